"""The tables of the survival benchmark, and what its writers were told."""

from collections import Counter
from dataclasses import dataclass, field

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tables of the survival benchmark."""


class Entry(Base):
    """One acknowledged unit; its name is not unique, so that a second time can be seen."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))


class Number(Base):
    """A number that everybody increments."""

    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int]


@dataclass
class Told:
    """What the writers were told of each name, and what they raised."""

    stored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def judge(self, found: Counter[str]) -> dict[str, int]:
        """Compare with what is *found* in the table."""
        return {
            "acknowledged": len(self.stored),
            "failed": len(self.failed),
            "unknown": len(self.unknown),
            "lost": sum(name not in found for name in self.stored),
            "twice": sum(times > 1 for times in found.values()),
            "failed but stored": sum(name in found for name in self.failed),
        }
