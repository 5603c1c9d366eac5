"""Outcome: what became of a transaction whose COMMIT was lost with its connection."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from sqlalchemy import Connection, Engine

from sessionscope._deadline import Deadline
from sessionscope._identity import Verdict
from sessionscope._timer import Timer, limited

# Seconds for which the database is asked, and between two questions.
_PATIENCE = 5.0
_PAUSE = 0.02
# Seconds after which the session that the COMMIT came from is ended, if it goes on.
_LET_IT_END = 0.2


class _Known(Protocol):
    """What a transaction is known by: its id, or the row that it has left."""

    @property
    def is_known(self) -> bool: ...

    def find_out(self, connection: Connection, *, end: bool) -> Verdict | None: ...


def has_committed(
    identity: _Known, engine: Engine, sleep: Callable[[float], None], seconds: float | None
) -> bool | None:
    """Return whether a transaction has committed; ``None``: it cannot be known.

    Asks over a connection of *engine*, at most *seconds* long.
    """
    if not identity.is_known:
        return None
    began = monotonic()
    until = began + (_PATIENCE if seconds is None else min(seconds, _PATIENCE))
    while (left := until - monotonic()) > 0:
        deadline = Deadline(left, None)
        verdict = _ask(identity, engine, deadline, end=monotonic() - began > _LET_IT_END)
        if verdict is not None:
            return None if verdict == "unknowable" else verdict == "committed"
        sleep(_PAUSE)
    return None


def _ask(identity: _Known, engine: Engine, deadline: Deadline, *, end: bool) -> Verdict | None:
    """Return what has become of the transaction; ``None`` while no one can say."""

    def ask(timer: Timer) -> Verdict | None:
        with engine.connect() as connection:
            timer.use(connection)
            try:
                verdict = identity.find_out(connection, end=end)
                # A wait for standbys that is cancelled ends as if they had answered.
                return None if timer.cut else verdict
            finally:
                if timer.cut:  # a cancellation that is late would hit its next user
                    connection.invalidate()

    try:
        return limited(deadline, ask, is_async=engine.dialect.is_async)
    except Exception:  # nor is there a thread to be had, perhaps: none of it is the unit's error
        return None
