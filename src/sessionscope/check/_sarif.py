"""The report as SARIF 2.1.0, for code scanning."""

import json
from typing import Any
from urllib.parse import quote

from sessionscope.check._config import UNUSED_NOQA
from sessionscope.check._finding import Finding, Report
from sessionscope.check._registry import RULES

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report, version: str) -> str:
    """Return the report as one SARIF run."""
    codes = sorted({finding.code for finding in report.findings})
    run = {
        "tool": {
            "driver": {
                "name": "sessionscope",
                "version": version,
                "rules": [_rule(code) for code in codes],
            }
        },
        "results": [_result(finding, codes) for finding in report.findings],
        "invocations": [
            {
                "executionSuccessful": not report.problems,
                "toolExecutionNotifications": [
                    {
                        "level": "error",
                        "message": {"text": problem.text},
                        "locations": [_location(problem.path, problem.line)],
                    }
                    for problem in report.problems
                ],
            }
        ],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(code: str) -> dict[str, Any]:
    if code == UNUSED_NOQA:
        return {"id": code, "name": "unused-noqa"}
    rule = RULES[code]
    return {
        "id": code,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "help": {"text": rule.page, "markdown": rule.page},
        "defaultConfiguration": {"level": "note" if rule.default == "info" else "error"},
    }


def _result(finding: Finding, codes: list[str]) -> dict[str, Any]:
    steps = [
        {"location": _location(step.path, step.line, text=step.text)} for step in finding.evidence
    ]
    found: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": "note" if finding.info else "error",
        "message": {"text": finding.message},
        "locations": [_location(finding.path, finding.line, finding.column, finding.end_line)],
        "properties": {"confidence": finding.confidence},
    }
    if steps:
        found["codeFlows"] = [{"threadFlows": [{"locations": steps}]}]
    return found


def _location(
    path: str, line: int, column: int = 1, end_line: int | None = None, text: str = ""
) -> dict[str, Any]:
    region = {"startLine": line, "startColumn": column, "endLine": end_line or line}
    found: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(path, errors="surrogateescape")},
            "region": region,
        }
    }
    if text:
        found["message"] = {"text": text}
    return found
