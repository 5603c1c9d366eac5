"""Deadline: when a unit of work must have ended, from its queue to its commit."""

from contextvars import ContextVar
from time import monotonic

from sessionscope._places import Place, describe
from sessionscope.exc import DeadlineExceeded, Phase

# Seconds by which the server ends a statement later than we do.
_LATER = 0.05

_WHERE: dict[Phase, str] = {
    "queue": "while it waited for a slot. Shorten the units of work, or allow more at once "
    "(pool_size, max_overflow)",
    "connect": "while a connection was being opened. Check that the server is reachable",
    "query": "at a statement, which was cancelled, or not sent any more. Look for what takes so "
    "long (locks, a full scan, or work beside the database)",
    "commit": "before COMMIT was sent. Do less in the unit",
}


class Deadline:
    """The end of the *seconds* that a unit of work has, which begin now."""

    __slots__ = ("_at", "_opened_at", "seconds")

    def __init__(self, seconds: float, opened_at: Place | None) -> None:
        self.seconds = seconds
        self._at = monotonic() + seconds
        self._opened_at = opened_at

    @property
    def remaining(self) -> float:
        """Seconds that are left, never less than none."""
        return max(0.0, self._at - monotonic())

    @property
    def for_server(self) -> float:
        """Seconds to tell the server: a little more, as it is the second to say so."""
        return self.remaining + _LATER

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return monotonic() >= self._at

    def exceeded(self, phase: Phase) -> DeadlineExceeded:
        """Return the error that says where the time ran out."""
        error = DeadlineExceeded(
            f"The unit of work opened at {describe(self._opened_at)} was not done after "
            f"{self.seconds:g} s (timeout): the time ran out {_WHERE[phase]}, or raise timeout. "
            "What it had not committed was rolled back"
        )
        error.phase = phase
        return error


def within(seconds: float) -> float:
    """Return how long one may wait who would wait for so many *seconds*."""
    deadline = current.get()
    return seconds if deadline is None else min(seconds, deadline.remaining)


# Of the unit that is inside of a call of its session, in this thread or task.
current: ContextVar[Deadline | None] = ContextVar("sessionscope_deadline", default=None)
