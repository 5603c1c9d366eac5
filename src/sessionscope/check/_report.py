"""The report in its formats: text, JSON and GitHub annotations."""

import json
from collections import Counter
from collections.abc import Iterator

from sessionscope.check._finding import Finding, Report


def text(report: Report) -> Iterator[str]:
    """Yield the findings with their evidence, then what could not be checked, then a summary."""
    for finding in report.findings:
        mark = " (info)" if finding.info else ""
        place = f"{finding.path}:{finding.line}:{finding.column}"
        yield f"{place}: {finding.code}{mark} {finding.message}"
        for step in finding.evidence:
            yield f"    {step.path}:{step.line}: {step.text}"
    yield from summary(report)


def summary(report: Report) -> Iterator[str]:
    """Yield the problems and the last line of the text format."""
    for problem in report.problems:
        yield f"{problem.path}:{problem.line}: {problem.text}"
    if not report.files:
        yield nothing(report)
        return
    found = _counted(len(report.findings), "finding") if report.findings else "No findings"
    yield f"{found} in {_counted(report.files, 'file')}."


def nothing(report: Report) -> str:
    """Return the line for a run that has checked no file; its problems tell why, if it has any."""
    why = "no file could be read" if report.problems else "no Python file was found"
    return f"Nothing was checked: {why}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def as_json(report: Report) -> str:
    """Return the findings as a JSON list."""
    return json.dumps([finding.as_dict() for finding in report.findings], indent=2)


def github(report: Report) -> Iterator[str]:
    """Yield a GitHub Actions annotation per finding and problem."""
    for finding in report.findings:
        yield (
            f"::{_level(finding)} file={_property(finding.path)},line={finding.line},"
            f"endLine={finding.end_line},col={finding.column},"
            f"title={finding.code} {finding.name}::{_data(finding.message)}"
        )
    for problem in report.problems:
        yield f"::error file={_property(problem.path)},line={problem.line}::{_data(problem.text)}"


def _level(finding: Finding) -> str:
    return "notice" if finding.info else "error"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def statistics(report: Report) -> Iterator[str]:
    """Yield the number of findings per rule."""
    names = {finding.code: finding.name for finding in report.findings}
    for code, number in sorted(Counter(f.code for f in report.findings).items()):
        yield f"{number:6}  {code}  {names[code]}"
    yield from summary(report)
