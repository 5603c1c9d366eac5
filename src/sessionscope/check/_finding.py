"""What the checker says: findings with their evidence, the report, and the rules behind it."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sessionscope.check._files import Problem

Confidence = Literal["high", "medium", "low"]
CONFIDENCES: tuple[Confidence, ...] = ("low", "medium", "high")

# How a rule takes part by default: "info" findings are shown but do not fail the run.
Default = Literal["on", "high", "info", "opt-in"]
Applicability = Literal["safe", "unsafe"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One step of the chain that led to a finding."""

    path: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect: where it is, what happens in production, and the mend."""

    path: str
    line: int
    column: int
    end_line: int
    code: str
    name: str
    message: str
    confidence: Confidence
    evidence: tuple[Evidence, ...] = ()
    fix: Applicability | None = None
    info: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the record of the JSON format."""
        return {
            "path": self.path,
            "line": self.line,
            "column": self.column,
            "end_line": self.end_line,
            "code": self.code,
            "name": self.name,
            "message": self.message,
            "confidence": self.confidence,
            "evidence": [
                {"path": step.path, "line": step.line, "text": step.text} for step in self.evidence
            ],
            "fix": self.fix and {"applicability": self.fix},
        }


@dataclass(slots=True)
class Report:
    """What a run found, what it could not check, and how much it saw."""

    findings: list[Finding] = field(default_factory=list[Finding])
    problems: list[Problem] = field(default_factory=list[Problem])
    files: int = 0
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of defect. Its page is the docstring of the module that defines it."""

    code: str
    name: str
    default: Default
    judge: Callable[..., Iterator[Finding]]
    fix: Applicability | None = None

    @property
    def page(self) -> str:
        """The rule's page: what it does, why it bites, what to use instead."""
        return inspect.cleandoc(inspect.getmodule(self.judge).__doc__ or "")

    @property
    def summary(self) -> str:
        """The first line of the page."""
        return self.page.partition("\n")[0]
