"""Outcome: what became of a transaction whose COMMIT was lost with its connection."""

from collections.abc import Callable
from time import monotonic

from sqlalchemy import Engine
from sqlalchemy import exc as sa_exc

from sessionscope._deadline import Deadline
from sessionscope._identity import Identity
from sessionscope._timer import Timer, limited
from sessionscope.exc import DeadlineExceeded

# Seconds for which the database is asked, and between two questions.
_PATIENCE = 5.0
_PAUSE = 0.02
# Seconds after which the session that the COMMIT came from is ended, if it goes on.
_LET_IT_END = 0.2


def has_committed(
    identity: Identity, engine: Engine, sleep: Callable[[float], None], seconds: float | None
) -> bool | None:
    """Return whether a transaction of PostgreSQL has committed; ``None``: it cannot be known.

    Asks over a connection of *engine*, at most *seconds* long. The answer counts only if it
    comes from the same server and timeline: after a failover to another one the same
    id may be another transaction's.
    """
    if identity.xid is None:
        return None
    began = monotonic()
    until = began + (_PATIENCE if seconds is None else min(seconds, _PATIENCE))
    while (left := until - monotonic()) > 0:
        deadline = Deadline(left, None)
        status, server = _ask(identity, engine, deadline, end=monotonic() - began > _LET_IT_END)
        if server is not None and server != identity.server:
            return None
        if status in ("committed", "aborted"):
            return status == "committed"
        sleep(_PAUSE)
    return None


def _ask(
    identity: Identity, engine: Engine, deadline: Deadline, *, end: bool
) -> tuple[str | None, str | None]:
    """Return the transaction's status, and who says so; nothing while no one answers."""

    def ask(timer: Timer) -> tuple[str | None, str | None]:
        with engine.connect() as connection:
            timer.use(connection)
            try:
                row = connection.exec_driver_sql(identity.ask_outcome).first()
                if row is None or row[1] is None:  # a standby, so far
                    return None, None
                if row[0] == "in progress" and end:
                    connection.exec_driver_sql(identity.end_backend)
                return row[0], row[1]
            finally:
                if timer.cut:  # a cancellation that is late would hit its next user
                    connection.invalidate()

    try:
        return limited(deadline, ask, is_async=engine.dialect.is_async)
    except (sa_exc.DBAPIError, sa_exc.TimeoutError, DeadlineExceeded):
        return None, None
