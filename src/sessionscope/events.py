"""Frozen records of what a Database did."""

from dataclasses import dataclass

__all__ = ["Stats"]


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
    longest_wait: float
    longest_use: float
