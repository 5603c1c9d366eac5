"""No program makes the checker fail: neither grammar's, nor spoilt, nor our own."""

import os
from pathlib import Path

import hypothesmith
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sessionscope.check import Config, check_source
from sessionscope.check._registry import RULES

PROGRAMS = int(os.environ.get("FUZZ_PROGRAMS", "200"))
EVERYTHING = Config(select=("SES",), confidence="low")
FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.py"))
# Makes every file worth a walk.
HEAD = "from sqlalchemy.orm import Session as S, sessionmaker\nsession = sessionmaker()\n"

anything = settings(
    max_examples=PROGRAMS,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)


def check(source: str) -> None:
    for finding in check_source(source, "app.py", EVERYTHING):
        assert 1 <= finding.line <= finding.end_line
        assert finding.column >= 1
        assert finding.code in RULES or finding.code == "SES100"


@anything
@given(hypothesmith.from_grammar())
def test_no_program_of_the_grammar_breaks_the_walk(source: str) -> None:
    try:
        compile(source, "app.py", "exec")
    except (SyntaxError, ValueError):
        return
    check(HEAD + source if "from __future__" not in source else source)


LINES = [line for path in FIXTURES for line in path.read_text().splitlines()]


@anything
@given(st.data())
def test_no_mixture_of_session_code_breaks_the_rules(data: st.DataObject) -> None:
    """Whole functions of the fixtures, torn apart and put together again."""
    path = data.draw(st.sampled_from(FIXTURES))
    blocks = path.read_text().split("\n\n\n")
    chosen = data.draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=6))
    kept = data.draw(st.integers(0, 40))
    source = "\n\n\n".join([blocks[0], *chosen])
    lines = source.splitlines()
    del lines[len(lines) - 1 - kept % len(lines)]
    source = "\n".join(lines)
    try:
        compile(source, "app.py", "exec", dont_inherit=True)
    except SyntaxError:
        return
    check(source)
