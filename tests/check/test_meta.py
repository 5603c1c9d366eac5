"""One rule, one file, one page, one fixture: nothing is missing and nothing is left over."""

import ast
from pathlib import Path

import pytest

from sessionscope.check import _rules
from sessionscope.check._finding import Rule
from sessionscope.check._pages import index, page
from sessionscope.check._registry import RULES

FIXTURES = Path(__file__).parent / "fixtures"
PAGES = Path(__file__).parents[2] / "docs" / "rules"
SOURCES = Path(_rules.__file__).parent
HEADINGS = [
    "## What it does",
    "## Why it bites in production",
    "## Example",
    "## Use instead",
    "## When to ignore",
]


def test_code_fixtures_and_pages_are_the_same_rules() -> None:
    codes = set(RULES)
    assert {path.stem.upper() for path in SOURCES.glob("ses*.py")} == codes
    assert {path.stem for path in FIXTURES.glob("*.py")} == codes
    assert {path.stem for path in PAGES.glob("SES*.md")} == codes


def test_there_are_twenty_one_rules_with_names_of_their_own() -> None:
    assert len(RULES) == 21
    assert len({rule.name for rule in RULES.values()}) == 21


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
def test_a_page_says_what_why_and_what_instead(rule: Rule) -> None:
    lines = rule.page.splitlines()
    assert [line for line in lines if line.startswith("## ")] == HEADINGS
    assert rule.summary.endswith(".")
    assert lines.count("```python") >= 2


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
def test_the_examples_of_a_page_are_python(rule: Rule) -> None:
    for block in rule.page.split("```python\n")[1:]:
        example = block.partition("```")[0]
        if not example.lstrip().startswith("except"):  # a part of a statement
            ast.parse(example)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.code)
def test_the_pages_are_those_of_the_code(rule: Rule) -> None:
    """``python -m sessionscope.check._pages docs/rules`` writes them anew."""
    assert (PAGES / f"{rule.code}.md").read_text() == page(rule)


def test_the_list_of_the_pages_is_that_of_the_code() -> None:
    assert (PAGES / "README.md").read_text() == index()
