"""Frozen records of what a Database did, and what observers are called with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Event",
    "Observer",
    "Outcome",
    "SessionLeaked",
    "Stats",
    "UnitBegan",
    "UnitEnded",
    "UnitRefused",
    "UnitRetried",
    "UnitWaited",
]


@dataclass(frozen=True, slots=True)
class Stats:
    """What a Database is doing now, and has done since it was made.

    ``limit`` is how many units of work may run at once, ``None`` when the pool
    is unlimited. ``in_use`` and ``waiting`` count units, ``idle`` counts open
    connections that no one uses. The other counts only grow. ``longest_wait``
    and ``longest_use`` are seconds.
    """

    limit: int | None
    in_use: int
    idle: int
    waiting: int
    begun: int
    committed: int
    rolled_back: int
    refused: int
    retried: int
    longest_wait: float
    longest_use: float


Outcome = Literal["committed", "rolled back"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a unit of work, opened at ``opened_at`` (file:line)."""

    opened_at: str


@dataclass(frozen=True, slots=True)
class UnitWaited(Event):
    """A unit waited ``seconds`` for its slot, and got it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class UnitRefused(Event):
    """A unit got no slot within ``seconds``: PoolBusy was raised."""

    seconds: float


@dataclass(frozen=True, slots=True)
class UnitBegan(Event):
    """A unit was admitted and its session made, for its first ``attempt`` or a later one."""

    read_only: bool
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class UnitEnded(Event):
    """A unit ended, ``seconds`` after it had begun, and its connection is back."""

    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True)
class UnitRetried(Event):
    """Attempt number ``attempt`` has failed with an ``error`` of this class.

    The next one begins after a pause of ``seconds``.
    """

    attempt: int
    error: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SessionLeaked(Event):
    """A session was collected as garbage with its transaction open."""


# Called with each event, in the thread or task where it happens.
Observer = Callable[[Event], object]
