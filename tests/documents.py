"""What the tests of the documentation share: its pages, and the blocks of code in them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# By what is compiled, loaded() knows what was loaded.
for _name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
    os.environ.pop(_name, None)

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^`\n]*)$")


class Block(NamedTuple):
    """A fenced block, what it is said to be, and its text without the indentation of a list."""

    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in their order."""
    lines = iter(page.read_text(encoding="utf-8").splitlines(keepends=True))
    for line in lines:
        opening = _FENCE.match(line.rstrip())
        if opening is None:
            continue
        inside: list[str] = []
        for inner in lines:
            if inner.strip() == opening["fence"]:
                break
            inside.append(inner)
        else:
            raise AssertionError(f"{page}: a block is not closed: {line}")
        yield Block(opening["language"].strip(), dedent("".join(inside)))


def name_of(page: Path) -> str:
    """Return the path of a page from the top of the project on."""
    return page.relative_to(ROOT).as_posix()


def loaded(folder: Path) -> set[str]:
    """Return the names of the modules below *folder* that some Python has loaded."""
    return {path.name.partition(".")[0] for path in folder.rglob("__pycache__/*.pyc")}
