"""Each rule against its fixture: every marked line is found, every other line is left alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sessionscope.check import Config, Finding, check_source
from sessionscope.check._registry import RULES

FIXTURES = Path(__file__).parent / "fixtures"
BAD = re.compile(
    r"# BAD (?P<column>\d+)(?:\+(?P<lines>\d+))?(?: (?P<confidence>\w+))?: (?P<message>.*)$"
)


class Expected(NamedTuple):
    """What a marked line says: ``# BAD column+lines confidence: part of the message``."""

    column: int
    lines: int
    confidence: str | None
    message: str


def sections(code: str) -> Iterator[str]:
    """Yield the modules of a fixture; its head belongs to each, and lines keep their numbers."""
    head, *rest = re.split(r"(?m)^# ---\n", (FIXTURES / f"{code}.py").read_text())
    line = head.count("\n")
    for section in rest or [""]:
        line += bool(rest)
        yield head + "\n" * (line - head.count("\n")) + section
        line += section.count("\n")


def found(code: str) -> dict[int, Finding]:
    config = Config(select=(code,))
    return {
        finding.line: finding
        for source in sections(code)
        for finding in check_source(source, "app.py", config)
    }


def expected(code: str) -> dict[int, Expected]:
    marked: dict[int, Expected] = {}
    for number, line in enumerate((FIXTURES / f"{code}.py").read_text().splitlines(), 1):
        mark = BAD.search(line)
        if mark is not None:
            column, lines = int(mark["column"]), int(mark["lines"] or 0)
            marked[number] = Expected(column, lines, mark["confidence"], mark["message"])
    return marked


@pytest.mark.parametrize("code", RULES)
def test_a_rule_finds_the_marked_lines_and_no_others(code: str) -> None:
    """The place, the span, the message, and the confidence where one is told, are the mark's."""
    findings, marks = found(code), expected(code)
    assert sorted(findings) == sorted(marks)
    for line, mark in marks.items():
        finding = findings[line]
        assert (finding.column, finding.end_line - line) == (mark.column, mark.lines)
        assert mark.message in finding.message
        assert mark.confidence in {None, finding.confidence}
        assert (finding.code, finding.name) == (code, RULES[code].name)


@pytest.mark.parametrize("code", ["SES106", "SES206"])
def test_a_rule_that_is_not_always_sure_tells_how_sure_it_is(code: str) -> None:
    """Each mark of its fixture names a confidence, and there are different ones."""
    confidences = {mark.confidence for mark in expected(code).values()}
    assert confidences == {"high", "medium"}


@pytest.mark.parametrize("code", RULES)
def test_a_fixture_has_eight_defects_and_eight_near_misses(code: str) -> None:
    text = (FIXTURES / f"{code}.py").read_text()
    assert len(expected(code)) >= 8
    assert text.count("# GOOD") >= 8


@pytest.mark.parametrize("code", RULES)
def test_a_comment_suppresses_a_finding_and_only_this_rule(code: str) -> None:
    """``# noqa: CODE`` on the line; another rule's code changes nothing."""
    config = Config(select=(code,))
    for source in sections(code):
        lines = source.splitlines()
        findings = check_source(source, "app.py", config)
        other = list(lines)
        for finding in findings:
            lines[finding.line - 1] += f"  # noqa: {code}"
            other[finding.line - 1] += "  # noqa: SES999"
        assert check_source("\n".join(lines), "app.py", config) == []
        assert check_source("\n".join(other), "app.py", config) == findings


@pytest.mark.parametrize("code", RULES)
def test_each_finding_speaks_of_production_and_shows_its_evidence(code: str) -> None:
    for finding in found(code).values():
        assert len(finding.message) > 60
        assert finding.evidence
        assert finding.info is (RULES[code].default == "info")
