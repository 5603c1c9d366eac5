"""From paths to the source files at and below them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_SKIPPED = frozenset(
    [
        "__pycache__",
        "node_modules",
        "site-packages",
        "venv",
        "env",
        "build",
        "dist",
        "buck-out",
        "__pypackages__",
    ]
)


class SourceFile(NamedTuple):
    """One file to check."""

    path: str  # as it is reported: relative to the working directory where it can be
    local: str  # relative to the folder that was named, to tell tests from the rest
    full: str


class Problem(NamedTuple):
    """A path that could not be checked, and why, in one line."""

    path: str
    line: int
    text: str


def discover(
    paths: Iterable[str | os.PathLike[str]], exclude: Iterable[str], problems: list[Problem]
) -> list[SourceFile]:
    """Return the Python files at and below *paths*, each once, in order."""
    found: dict[str, SourceFile] = {}
    patterns = tuple(exclude)
    for given in paths:
        root = Path(given)
        if root.is_dir():
            base, files = root, _below(str(root), problems)
        elif root.exists():
            base, files = root.parent, iter([(str(root), True)])
        else:
            problems.append(Problem(str(given), 1, "no such file or folder"))
            continue
        # Plain strings from here on: what follows is done for each of thousands of files.
        shown, real = _folder(_shown(base)), _folder(os.path.realpath(base))
        start = len(_folder(str(base)))
        for full, is_link in files:
            local = full[start:].replace(os.sep, "/")
            path = shown + local
            if not any(matches(path, pattern) for pattern in patterns):
                target = os.path.realpath(full) if is_link else real + full[start:]
                if target not in found or not is_link:  # the file itself rather than a link
                    found[target] = SourceFile(path, local, full)
    return sorted(found.values())


def _folder(path: str) -> str:
    """Return what the paths below the folder *path* begin with; those of "." with nothing."""
    return "" if path == "." else path.removesuffix("/") + "/"


def _below(root: str, problems: list[Problem]) -> Iterator[tuple[str, bool]]:
    """Yield the Python files below *root*, and whether each is a link."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            problems.append(Problem(_shown(Path(folder)), 1, error.strerror or "unreadable"))
            continue
        if folder != root and any(entry.name == "pyvenv.cfg" for entry in entries):
            continue  # a virtual environment
        inner: list[str] = []
        for entry in entries:
            # Links to folders are not followed: they lead in circles.
            if entry.is_dir(follow_symlinks=False):
                if not _is_skipped(entry.name):
                    inner.append(entry.path)
            elif entry.name.endswith(".py"):
                is_link = entry.is_symlink()
                if entry.is_file(follow_symlinks=False) or (
                    is_link and not _leads_to_folder(entry)
                ):
                    yield entry.path.removeprefix("./"), is_link
        waiting += reversed(inner)


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a circle of links
        return False


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED or name.startswith(".") or name.endswith(".egg-info")


def _shown(path: Path) -> str:
    full = os.path.normpath(Path.cwd() / path)
    try:
        return Path(full).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return Path(full).as_posix()


def matches(path: str, pattern: str) -> bool:
    """Return whether *pattern* means *path*: a file, a folder with all below it, or a glob."""
    plain = pattern.rstrip("/")
    if not plain:
        return False
    if path == plain or path.startswith(plain + "/") or f"/{plain}/" in f"/{path}":
        return True
    return Path(path).match(pattern)
