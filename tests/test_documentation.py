"""Every block of Python in the documentation is run by a test, or named here with the reason."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sessionscope.check import _registry
from tests import test_how_to, test_more_how_to
from tests.documents import PAGES, ROOT, blocks_of, name_of

HOW_TO = "docs/how-to/{}.md"
# Which module runs the blocks of a page; each of them asserts that it has run them all.
RUN_BY = {
    "README.md": "test_readme",
    "docs/tutorial.md": "test_tutorial",
    HOW_TO.format("test-with-sandbox"): "test_sandbox_guide",
    **{HOW_TO.format(page): "test_how_to" for page in test_how_to.USES},
    **{HOW_TO.format(page): "test_more_how_to" for page in test_more_how_to.PAGES_OF_CODE},
}
FRAGMENTS = (
    "parts of programs, wrong on purpose, and their mends: tests/check/test_meta.py compiles them, "
    "and tests/check/fixtures has each rule's whole programs"
)
NOT_RUN = {f"docs/rules/{code}.md": FRAGMENTS for code in _registry.RULES}
# What else a block may be. A block of Python under another name would be run by nobody.
OTHERS = {"console", "diff", "sql", "text", "toml", "yaml"}


def python_blocks() -> dict[str, int]:
    """Return how many blocks of Python each page has, where it has any."""
    counts = {
        name_of(page): sum(block.language == "python" for block in blocks_of(page))
        for page in PAGES
    }
    return {page: count for page, count in counts.items() if count}


def test_every_page_with_code_is_run_or_says_why_not(
    record_property: Callable[[str, object], None],
) -> None:
    counts = python_blocks()
    assert RUN_BY.keys() & NOT_RUN.keys() == set()
    assert RUN_BY.keys() | NOT_RUN.keys() == counts.keys()
    run = sum(counts[page] for page in RUN_BY)
    fragments = sum(counts[page] for page in NOT_RUN)
    record_property(
        "tell",
        f"documentation: {run} blocks of Python on {len(RUN_BY)} pages are run, {fragments} "
        f"fragments on {len(NOT_RUN)} pages of rules are compiled, 0 are skipped",
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_says_what_it_is(page: Path) -> None:
    languages = {block.language for block in blocks_of(page)}
    assert languages <= OTHERS | {"python"}


@pytest.mark.parametrize("page", RUN_BY)
def test_a_block_that_is_run_names_its_file(page: str) -> None:
    for block in blocks_of(ROOT / page):
        if block.language == "python":
            assert re.match(r"# (\w+/)*\w+\.py\b", block.text), block.text


def test_the_index_leads_to_every_page() -> None:
    """Directly, or by the list of the rules and the reference."""
    folder = ROOT / "docs"
    lists = [
        folder / "index.md",
        folder / "rules" / "README.md",
        folder / "reference" / "README.md",
    ]
    linked = {
        (page.parent / target).resolve()
        for page in lists
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8"))
    }
    assert set(folder.rglob("*.md")) - linked == {lists[0]}
