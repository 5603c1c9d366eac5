"""Figures with their targets, tables, and how both are printed."""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("SQLAlchemy", "psycopg", "asyncpg", "fastapi", "starlette", "anyio", "uvicorn")


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of *values*."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Figure:
    """One number that a promise is made about."""

    name: str
    value: float
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @classmethod
    def spread(
        cls,
        name: str,
        spread: Spread,
        unit: str = "x",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> "Figure":
        """Make a figure of the median of *spread*, with its low and high."""
        return cls(name, spread.median, unit, at_most, at_least, spread.low, spread.high, note)

    @property
    def verdict(self) -> str:
        """Return `ok` or `MISS`, or nothing where there is no target."""
        if self.at_most is None and self.at_least is None:
            return ""
        low_enough = self.at_most is None or self.value <= self.at_most
        high_enough = self.at_least is None or self.value >= self.at_least
        return "ok" if low_enough and high_enough else "MISS"

    def cells(self) -> list[str]:
        """Return the figure as one row of a table."""
        between = "" if self.low is None else f"{number(self.low)}-{number(self.high or 0)}"
        value = f"{number(self.value)} {self.unit}"
        return [self.name, value, between, self._target(), self.verdict, self.note]

    def _target(self) -> str:
        bounds = [("<= ", self.at_most), (">= ", self.at_least)]
        if self.at_most == self.at_least:
            bounds = [("", self.at_most)]
        return " ".join(sign + number(bound) for sign, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Table:
    """Details behind the figures."""

    title: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """Lines to draw: for each name, points of x and the spread of y there."""

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, Spread]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What one benchmark found."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def number(value: float) -> str:
    """Write *value* with as many digits as are worth reading."""
    if math.isinf(value):
        return "never"
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def show(report: Report) -> None:
    """Print *report*: its figures first, then its tables."""
    print(f"\n== {report.name} ==")
    header = ["figure", "measured", "min-max", "target", "", ""]
    _show_table(Table("", header, [figure.cells() for figure in report.figures]))
    for table in report.tables:
        _show_table(table)


def _show_table(table: Table) -> None:
    if not table.rows:
        return
    print(f"\n{table.title}" if table.title else "")
    lines = [list(table.header), *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    for line in lines:
        print("  ".join(_aligned(line, widths)).rstrip())


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    first, *others = line
    return [first.ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)
    ]


def machine() -> dict[str, str]:
    """Describe where and when the figures were taken."""
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "sessionscope": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _commit() -> str:
    """Return the commit that is measured, for src has no other version."""
    command = ["git", "describe", "--always", "--dirty"]
    with suppress(FileNotFoundError):
        told = subprocess.run(command, check=False, capture_output=True, text=True)
        if told.returncode == 0:
            return told.stdout.strip()
    return "of no commit"


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def dump(path: Path, environment: dict[str, str], reports: list[Report]) -> None:
    """Write everything that was printed to *path* as JSON."""
    content = {"machine": environment, "reports": [asdict(report) for report in reports]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def ratios(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[Spread, Spread, Spread]:
    """Measure both in alternating rounds; return ours / theirs, ours, theirs.

    The order within a pair alternates too, so that a drift of the machine hits both alike.
    """
    pairs = [_pair(ours, theirs, swapped=bool(turn % 2)) for turn in range(rounds)]
    quotients = [our / their if their else float("inf") for our, their in pairs]
    return (
        Spread.of(quotients),
        Spread.of(our for our, _ in pairs),
        Spread.of(their for _, their in pairs),
    )


def _pair(
    ours: Callable[[], float], theirs: Callable[[], float], *, swapped: bool
) -> tuple[float, float]:
    if swapped:
        their = theirs()
        return ours(), their
    return ours(), theirs()
