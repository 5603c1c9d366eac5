"""The command ``init``: a new project, written from the files in ``_templates``."""

import argparse
import json
import os
import re
import shlex
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

WRITTEN, REFUSED, UNUSABLE = 0, 1, 2

# A new repository has these already: what is there stays.
_KEPT = {".gitignore", "README.md"}
_REQUIREMENT = re.compile(r'"(sessionscope\[[\w,]+\])"')


class _Refused(Exception):
    """Why nothing was written, and the exit code that says whose turn it is."""

    def __init__(self, reason: str, code: int = REFUSED) -> None:
        super().__init__(reason)
        self.code = code


def init(arguments: argparse.Namespace) -> int:
    """Write a project into a folder, all of it or nothing; return the exit code.

    0 written; 1 refused by what the folder holds or allows; 2 an option that cannot be.
    """
    folder = Path(arguments.folder)
    try:
        source = _given_source(arguments.source) if arguments.source else _own_source()
        project = _project(is_async=arguments.is_async, source=source)
        kept = _check(folder, project)
        _write(folder, {name: project[name] for name in project if name not in kept})
    except _Refused as refused:
        print(f"sessionscope: {refused}", file=sys.stderr)
        return refused.code
    print(*_report(arguments.folder, project, kept, source), sep="\n")
    return WRITTEN


def _given_source(given: str) -> str:
    """Return the URL of the wheel, sdist or checkout at the path *given*."""
    path = Path(given)
    if not (_is_checkout(path) if path.is_dir() else _is_archive(path)):
        what = "is not there" if not path.exists() else "is none"
        raise _Refused(
            f"--from {given} {what}: name a wheel (sessionscope-….whl), an sdist "
            "(sessionscope-….tar.gz) or a checkout of sessionscope",
            UNUSABLE,
        )
    return path.resolve().as_uri()


def _own_source() -> str | None:
    """Return where this sessionscope came from, ``None`` for a package index (PEP 610)."""
    try:
        told = distribution("sessionscope").read_text("direct_url.json")
    except PackageNotFoundError:  # not installed: it runs from its checkout
        root = Path(__file__).resolve().parents[2]
        return root.as_uri() if _is_checkout(root) else None
    if told is None:
        return None
    origin = json.loads(told)
    url: str = origin["url"]
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return url


def _is_checkout(path: Path) -> bool:
    try:
        with (path / "pyproject.toml").open("rb") as file:
            return bool(tomllib.load(file)["project"]["name"] == "sessionscope")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_archive(path: Path) -> bool:
    with suppress(OSError):
        if path.match("sessionscope-*.whl"):
            return zipfile.is_zipfile(path)
        if path.match("sessionscope-*.tar.gz"):
            return tarfile.is_tarfile(path)
    return False


def _project(*, is_async: bool, source: str | None) -> dict[str, bytes]:
    """Return the contents of the new files by their names."""
    templates = files("sessionscope") / "_templates"
    project = dict(_read(templates / "sync"))
    if is_async:
        project.update(_read(templates / "async"))
    if source is not None:
        text = project["pyproject.toml"].decode()
        text = _REQUIREMENT.sub(lambda found: f'"{found[1]} @ {source}"', text)
        project["pyproject.toml"] = text.encode()
    return project


def _read(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            # Installers compile what they find, and linters keep caches.
            if not entry.name.startswith((".", "__")):
                yield from _read(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_bytes()


def _check(folder: Path, project: dict[str, bytes]) -> set[str]:
    """Return the files that stay as they are; raise if another one is in the way."""
    if "%" in str(folder.resolve()):
        raise _Refused(
            f"{folder.resolve()} has a % in it, which Alembic's configuration takes for its own: "
            "name another folder"
        )
    there = sorted(name for name in project if os.path.lexists(folder / name))
    taken = [folder / name for name in there if name not in _KEPT]
    for parent in sorted({parent for name in project for parent in (folder / name).parents}):
        if os.path.lexists(parent) and not parent.is_dir():
            taken.insert(0, parent)
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise _Refused(
            f"{taken[0]}{more} is there already, and init overwrites nothing: name a new folder "
            "(sessionscope init DIR), or move away what is in this one"
        )
    return set(there)


def _write(folder: Path, project: dict[str, bytes]) -> None:
    """Write the files; whatever goes wrong, what was made until then is taken away."""
    made: list[Path] = []
    try:
        for name, content in project.items():
            path = folder / name
            for parent in reversed([each for each in path.parents if not each.exists()]):
                parent.mkdir()
                made.append(parent)
            # Exclusively: what somebody else writes at this moment is not overwritten either.
            with path.open("xb") as file:
                made.append(path)
                file.write(content)
    except BaseException as error:
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).lower()
            raise _Refused(
                f"{error.filename or folder} cannot be written ({reason}), and nothing was: "
                "name a folder where you may write (sessionscope init DIR)"
            ) from error
        raise


def _report(
    folder: str, project: dict[str, bytes], kept: set[str], source: str | None
) -> Iterator[str]:
    """Yield the lines that say what was done, and what to do next."""
    yield f"Wrote {len(project) - len(kept)} files to {folder}."
    if kept:
        yield f"Kept what was there: {', '.join(sorted(kept))}."
    if ".gitignore" in kept:
        yield "Add to it: /.venv/ and *.db"
    yield f"sessionscope will be installed from {source or 'the package index'}."
    yield "Next:"
    if folder != ".":
        yield f"  cd {'-- ' if folder.startswith('-') else ''}{shlex.quote(folder)}"
    yield "  make test"
    yield "  make run"
