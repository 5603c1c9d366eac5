"""The cache: the report of the last run over the very same files."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sessionscope.check._config import Config
from sessionscope.check._files import Problem, SourceFile, stamp
from sessionscope.check._finding import Evidence, Finding, Report
from sessionscope.check._versions import Version

_FOLDER = ".sessionscope_cache"
_KEPT = 8


class Cache:
    """Reports by what they depend on: the checker, the options, each file's time and size.

    A finding may rest on any file of the project, so that one changed file means a new run.
    """

    def __init__(
        self, files: Sequence[SourceFile], config: Config, version: Version | None
    ) -> None:
        self._folder = Path(_FOLDER)
        self._file = self._folder / f"{_key(files, config, version)}.json"

    def load(self) -> Report | None:
        """Return the report, if nothing has changed since."""
        try:
            data = json.loads(self._file.read_bytes())
            self._file.touch()
            return _report(data)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def store(self, report: Report) -> None:
        """Keep *report*; where that is not possible, do without."""
        data = json.dumps(asdict(report))
        temporary = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(exist_ok=True)
            (self._folder / ".gitignore").write_text("*\n")
            temporary.write_text(data)
            temporary.replace(self._file)
            self._forget()
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _forget(self) -> None:
        entries = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[:-_KEPT]:
            path.unlink(missing_ok=True)


def _key(files: Iterable[SourceFile], config: Config, version: Version | None) -> str:
    digest = hashlib.sha256(repr((config, version)).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(stamp(path))
    for file in files:
        digest.update(repr((file.path, file.local)).encode())
        digest.update(stamp(file.full))
    return digest.hexdigest()


def _report(data: dict[str, Any]) -> Report:
    findings = [_finding(item) for item in data["findings"]]
    problems = [Problem(*item) for item in data["problems"]]
    return Report(findings, problems, data["files"], data["lines"])


def _finding(item: dict[str, Any]) -> Finding:
    steps = tuple(Evidence(**step) for step in item.pop("evidence"))
    return Finding(**item, evidence=steps)
