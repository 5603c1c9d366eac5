"""From paths to the source files at and below them."""

import os
import stat
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
    paths: Iterable[str | os.PathLike[str]],
    exclude: Iterable[str],
    problems: list[Problem],
    folder: Path | None = None,
) -> list[SourceFile]:
    """Return the Python files at and below *paths*, each once, in order.

    The patterns of *exclude* are relative to *folder*, else to the working directory.
    """
    found: dict[str, SourceFile] = {}
    patterns = tuple(exclude)
    for given in paths:
        root = Path(given)
        try:
            mode = root.stat().st_mode
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            text = "no such file or folder" if missing else error.strerror or "cannot be read"
            problems.append(Problem(str(given), 1, text))
            continue
        if stat.S_ISDIR(mode):
            base, files = root, _below(str(root), problems)
        elif stat.S_ISREG(mode):
            base, files = root.parent, iter([(str(root), True)])
        else:  # whoever reads a pipe or a terminal may wait for ever
            problems.append(Problem(str(given), 1, "is neither a file nor a folder"))
            continue
        # Plain strings from here on: what follows is done for each of thousands of files.
        shown, real = _folder(shown_from(base)), _folder(os.path.realpath(base))
        inside = _folder(shown_from(base, folder))
        start = len(_folder(str(base)))
        for full, is_link in files:
            local = full[start:].replace(os.sep, "/")
            if not any(matches(inside + local, pattern) for pattern in patterns):
                target = os.path.realpath(full) if is_link else real + full[start:]
                if target not in found or not is_link:  # the file itself rather than a link
                    found[target] = SourceFile(shown + local, local, full)
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
            problems.append(Problem(shown_from(Path(folder)), 1, error.strerror or "unreadable"))
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
                if entry.is_file(follow_symlinks=False) or (is_link and not _leads_astray(entry)):
                    yield entry.path.removeprefix("./"), is_link
        waiting += reversed(inner)


def _leads_astray(link: os.DirEntry[str]) -> bool:
    """Return whether *link* leads to a folder, a pipe or a device; one that is broken is told."""
    try:
        return not stat.S_ISREG(link.stat().st_mode)
    except OSError:
        return False


def stamp(path: str | os.PathLike[str]) -> bytes:
    """Return what changes with the file at *path*, without a look into it."""
    try:
        found = os.stat(path)  # noqa: PTH116 - thousands of times
    except OSError:
        return b"?"
    # st_ctime_ns: whether a file may be read changes no other time.
    return f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_size} {found.st_ino};".encode()


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED or name.startswith(".") or name.endswith(".egg-info")


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the full path, with links as they are: resolve() raises on a circle of them."""
    return Path(os.path.normpath(Path.cwd() / path))


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder that *path* is, or lies in."""
    full = absolute(path)
    return full if os.path.isdir(full) else full.parent  # noqa: PTH112 - it never raises


def shown_from(path: Path, folder: Path | None = None) -> str:
    """Return *path* relative to *folder*, else to the working directory; in full if outside."""
    full = absolute(path)
    try:
        return full.relative_to(folder or Path.cwd()).as_posix()
    except ValueError:
        return full.as_posix()


def matches(path: str, pattern: str) -> bool:
    """Return whether *pattern* means *path*: a file, a folder with all below it, or a glob."""
    plain = pattern.rstrip("/")
    if not plain:
        return False
    if path == plain or path.startswith(plain + "/") or f"/{plain}/" in f"/{path}":
        return True
    return Path(path).match(pattern)
