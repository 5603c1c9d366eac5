"""From a source file, whatever it holds, to its syntax tree."""

import ast
from pathlib import Path

from sessionscope.check._files import Problem, SourceFile


def read(file: SourceFile, problems: list[Problem]) -> bytes | None:
    """Return what the file holds, or report why it cannot be read."""
    try:
        return Path(file.full).read_bytes()
    except OSError as error:
        problems.append(Problem(file.path, 1, error.strerror or "cannot be read"))
    return None


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
