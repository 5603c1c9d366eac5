"""From paths to source files, whatever they hold, and to their syntax trees."""

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sessionscope.check._facts import words

_SKIPPED = words(
    "__pycache__ node_modules site-packages venv env build dist buck-out __pypackages__"
)


class SourceFile(NamedTuple):
    """One file to check."""

    path: str  # as it is reported: relative to the working directory where it can be
    local: str  # relative to the folder that was named, to tell tests from the rest
    full: Path


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
            files: Iterable[Path] = _below(root, problems)
        elif root.exists():
            files = [root]
        else:
            problems.append(Problem(str(given), 1, "no such file or folder"))
            continue
        base = root if root.is_dir() else root.parent
        for file in files:
            shown = _shown(file)
            if not any(_matches(shown, pattern) for pattern in patterns):
                local = file.relative_to(base).as_posix()
                found.setdefault(os.path.realpath(file), SourceFile(shown, local, file))
    return sorted(found.values())


def _below(root: Path, problems: list[Problem]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        problems.append(Problem(_shown(Path(error.filename)), 1, error.strerror or "unreadable"))

    # Links to folders are not followed: they lead in circles.
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not _is_skipped(folder, f))
        for file in sorted(files):
            if file.endswith(".py"):
                yield Path(folder, file)


def _is_skipped(folder: str, name: str) -> bool:
    if name in _SKIPPED or name.startswith(".") or name.endswith(".egg-info"):
        return True
    return os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))  # noqa: PTH110, PTH118 - per folder


def _shown(path: Path) -> str:
    full = os.path.normpath(Path.cwd() / path)
    try:
        return Path(full).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return Path(full).as_posix()


def _matches(path: str, pattern: str) -> bool:
    """A pattern names a file, a folder with all below it, or is a glob over the path."""
    plain = pattern.rstrip("/")
    if path == plain or path.startswith(plain + "/") or f"/{plain}/" in f"/{path}":
        return True
    return Path(path).match(pattern)


def matches(path: str, pattern: str) -> bool:
    """Return whether *path* is meant by *pattern*."""
    return _matches(path, pattern)


def parse(source: bytes, path: str, problems: list[Problem]) -> ast.Module | None:
    """Return the syntax tree, or report in one line why there is none."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        problems.append(Problem(path, error.lineno or 1, f"cannot be parsed: {error.msg}"))
    except (ValueError, RecursionError, MemoryError, LookupError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        problems.append(Problem(path, 1, f"cannot be parsed: {text}"))
    return None


def read(file: SourceFile, problems: list[Problem]) -> bytes | None:
    """Return what the file holds, or report why it cannot be read."""
    try:
        return file.full.read_bytes()
    except OSError as error:
        problems.append(Problem(file.path, 1, error.strerror or "cannot be read"))
    return None
