"""Outcome: what became of a transaction whose COMMIT was lost with its connection."""

from collections.abc import Callable
from time import monotonic

from sqlalchemy import Engine
from sqlalchemy import exc as sa_exc

from sessionscope._deadline import Deadline
from sessionscope._identity import WAIT_FOR_STANDBYS, Identity
from sessionscope._timer import limited
from sessionscope.exc import CommitUnknown, DeadlineExceeded

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
    comes from the same server and timeline: after a failover to another one, or a crash, the same
    id may be another transaction's. What standbys have to confirm has committed once they have.
    """
    if identity.xid is None:
        return None
    began = monotonic()
    until = began + (_PATIENCE if seconds is None else min(seconds, _PATIENCE))
    while (left := until - monotonic()) > 0:
        deadline = Deadline(left, None)
        status = _ask(identity, engine, deadline, end=monotonic() - began > _LET_IT_END)
        if status == "unknown":
            return None
        if status in ("committed", "aborted"):
            return status == "committed"
        sleep(_PAUSE)
    return None


def _ask(identity: Identity, engine: Engine, deadline: Deadline, *, end: bool) -> str | None:
    """Return the transaction's status; nothing while no one answers."""
    try:
        with (
            limited(deadline, is_async=engine.dialect.is_async) as timer,
            engine.connect() as connection,
        ):
            timer.use(connection)
            try:
                status: str | None = connection.exec_driver_sql(identity.ask_outcome).scalar()
                if status == "in progress" and end:
                    connection.exec_driver_sql(identity.end_backend)
                elif status == "committed":
                    connection.exec_driver_sql(WAIT_FOR_STANDBYS)
                    connection.commit()
                    if timer.cut:  # a wait that is cancelled ends as if they had answered
                        return None
                return status
            finally:
                if timer.cut:  # a cancellation that is late would hit its next user
                    connection.invalidate()
    except (sa_exc.DBAPIError, sa_exc.TimeoutError, DeadlineExceeded, CommitUnknown):
        return None
