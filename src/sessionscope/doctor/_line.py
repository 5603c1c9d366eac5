"""Line: one thing that was looked at, what was seen, and what mends it."""

from dataclasses import asdict, dataclass
from typing import Literal

# "bad" makes the command fail; "note" is worth knowing.
Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    level: Level
    seen: str
    mend: str = ""

    def __str__(self) -> str:
        told = f"{self.seen}. {self.mend}" if self.mend else self.seen
        return f"{self.level:<5} {self.name:<12} {told}"

    def as_dict(self) -> dict[str, str]:
        """Return the line for JSON."""
        return asdict(self)


def line(name: str, seen: str, *, bad: bool = False, note: bool = False, mend: str = "") -> Line:
    """Return a line, whose *mend* is told only where there is something to mend."""
    level: Level = "bad" if bad else "note" if note else "ok"
    return Line(name, level, seen, "" if level == "ok" else mend)
