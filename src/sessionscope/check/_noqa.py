"""Suppressions: ``# noqa: SES105`` on the first or the last line of a finding."""

import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sessionscope.check._config import UNUSED_NOQA
from sessionscope.check._finding import Finding

_COMMENT = re.compile(
    r"#\s*noqa(?P<codes>:\s*[A-Z]+\d+(?:[\s,]+[A-Z]+\d+)*)?(?=$|[^\w:])", re.IGNORECASE
)
_CODE = re.compile(r"[A-Z]+\d+", re.IGNORECASE)


@dataclass(slots=True)
class Suppression:
    """One comment: the codes it names (none: all), and those that suppressed something."""

    line: int
    column: int
    codes: frozenset[str]
    used: set[str] = field(default_factory=set[str])


_ANY = re.compile(rb"#\s*noqa", re.IGNORECASE)
_OURS = re.compile(rb"#\s*noqa:.*SES", re.IGNORECASE)
_OTHERS = re.compile(rb"#\s*noqa:(?!.*SES)", re.IGNORECASE)


def _candidates(source: bytes) -> Iterator[str]:
    """Yield the lines that may speak to us; what names other tools' codes alone does not."""
    for line in source.splitlines():
        if _ANY.search(line) and not _OTHERS.search(line):
            yield line.decode("utf-8", "replace")


def _may_speak_to_us(source: bytes) -> bool:
    return _ANY.search(source) is not None and any(
        _COMMENT.search(line) for line in _candidates(source)
    )


class Comments:
    """The suppressions of a run; a file is tokenized, which is slow, where it can matter alone."""

    def __init__(self) -> None:
        self._sources: dict[str, bytes] = {}
        self._read: dict[str, list[Suppression]] = {}

    def add(self, path: str, source: bytes) -> None:
        """Keep *source*, if it may hold a suppression."""
        if _may_speak_to_us(source):
            self._sources[path] = source

    def keep(self, findings: Iterable[Finding]) -> list[Finding]:
        """Return the findings that no comment suppresses."""
        kept: list[Finding] = []
        for finding in findings:
            suppressed = False
            for comment in self._of(finding.path):
                if comment.line not in {finding.line, finding.end_line}:
                    continue
                if not comment.codes or finding.code in comment.codes:
                    comment.used.add(finding.code)
                    suppressed = True
            if not suppressed:
                kept.append(finding)
        return kept

    def unused(self, codes: Iterable[str]) -> list[Finding]:
        """Return a finding for each suppression of one of *codes* that suppressed nothing."""
        applied = set(codes)
        return [
            Finding(
                path=path,
                line=comment.line,
                column=comment.column,
                end_line=comment.line,
                code=UNUSED_NOQA,
                name="unused-noqa",
                message=f"`# noqa: {code}` suppresses nothing here: the next real {code} in this "
                "line would go unseen. Delete it",
                confidence="high",
            )
            for path, source in self._sources.items()
            if _OURS.search(source)
            for comment in self._of(path)
            for code in sorted((comment.codes & applied) - comment.used)
        ]

    def _of(self, path: str) -> list[Suppression]:
        if path not in self._read:
            self._read[path] = _suppressions(self._sources.get(path, b""))
        return self._read[path]


def _suppressions(source: bytes) -> list[Suppression]:
    found: list[Suppression] = []
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type == tokenize.COMMENT and (match := _COMMENT.search(token.string)):
                codes = frozenset(c.upper() for c in _CODE.findall(match["codes"] or ""))
                line, column = token.start
                found.append(Suppression(line, column + match.start() + 1, codes))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError, LookupError):
        return found
    return found
