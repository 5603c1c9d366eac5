"""What is refused: a session after its end, a write in a read-only unit, a second unit."""

import asyncio
import sys
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from types import CodeType
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from sessionscope.exc import NestedUnit, ReadOnlyUnit, SessionEnded

# The key in Session.info, and in Connection.info while the session uses the
# connection, of the Scope of their unit of work.
UNIT = "sessionscope.unit"

# A line of code, kept as it comes and put into words only for an error.
Place = tuple[CodeType, int]


def caller(depth: int) -> Place:
    """Return the place that many calls above the function that asks."""
    # A whole stack costs a hundred times more.
    frame = sys._getframe(depth + 1)  # pyright: ignore[reportPrivateUsage]  # documented
    return frame.f_code, frame.f_lineno


def describe(place: Place) -> str:
    """Return the place as ``file:line (function)``."""
    code, line = place
    return f"{code.co_filename}:{line} ({code.co_qualname})"


class Scope:
    """What the guards know of one unit of work."""

    __slots__ = (
        "autocommit",
        "connection",
        "ended",
        "opened_at",
        "owner",
        "read_only",
        "streams",
        "task",
        "thread",
        "used",
    )

    def __init__(
        self, owner: object, opened_at: Place, *, read_only: bool, autocommit: bool
    ) -> None:
        self.owner = owner
        self.opened_at = opened_at
        self.read_only = read_only
        self.autocommit = autocommit  # nothing to commit or roll back at its end
        self.connection: Connection | None = None  # the last one that the session used
        self.task: asyncio.Task[Any] | None = None
        self.thread = 0
        self.used = False  # a transaction was begun
        self.streams = False  # a read-only unit had to begin a real one, for a server-side cursor
        self.ended = False


# The scopes that the current flow of control holds. A worker thread to which a
# task's context was copied sees them too: the task awaits it.
_held: ContextVar[tuple[Scope, ...]] = ContextVar("sessionscope_held", default=())


def refuse_nested(owner: object, database: str) -> None:
    """Raise NestedUnit if this flow of control holds a unit of *owner*.

    A new task or thread is a flow of its own. Without this rule, units that hold
    one connection and wait for another can all wait for each other.
    """
    for scope in _held.get():
        if scope.owner is owner and not scope.ended and _is_same_flow(scope):
            raise NestedUnit(
                f"A unit of work of {database} is open already, opened at "
                f"{describe(scope.opened_at)}; a second one here would hold one connection and "
                "wait for another. Pass the session on, fn(session, ...), to functions that are "
                "not decorated with with_session()"
            )


def enter(scope: Scope) -> None:
    """Make *scope* the current flow's."""
    scope.task = _current_task()
    scope.thread = threading.get_ident()
    held = _held.get()
    _held.set((*(other for other in held if not other.ended), scope) if held else (scope,))


def leave(scope: Scope) -> None:
    """End *scope*, from whichever thread."""
    scope.ended = True
    scope.task = scope.connection = None
    held = _held.get()
    if held == (scope,):
        _held.set(())
    elif scope in held:
        _held.set(tuple(other for other in held if other is not scope))


def _is_same_flow(scope: Scope) -> bool:
    if scope.task is None:  # a loop that runs in the unit's own thread blocks the unit
        return scope.thread == threading.get_ident()
    # No task here, and the scope is visible: a thread that the unit's task awaits.
    return _current_task() in (None, scope.task)


def _current_task() -> "asyncio.Task[Any] | None":
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


def watch(factory: sessionmaker[Any]) -> None:
    """Put the guards on all sessions that *factory* makes."""
    event.listen(factory, "after_transaction_create", _refuse_after_end)
    event.listen(factory, "after_begin", _tell_connection)
    event.listen(factory, "before_flush", _refuse_flush)


def _refuse_after_end(session: Session, transaction: SessionTransaction) -> None:
    scope: Scope | None = session.info.get(UNIT)
    if scope is None:
        return
    if scope.ended:
        transaction.close()
        refuse_ended(session)
    scope.used = True


def refuse_ended(session: Session) -> None:
    """Raise SessionEnded if *session* is that of a unit of work that has ended."""
    scope: Scope | None = session.info.get(UNIT)
    if scope is not None and scope.ended:
        raise SessionEnded(
            f"This session has ended with its unit of work, opened at {describe(scope.opened_at)}. "
            "Code that runs later (a stream, a background task, another thread) opens its own: "
            "with database.begin() as session: ..."
        )


def _tell_connection(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    scope: Scope | None = session.info.get(UNIT)
    if scope is not None:
        scope.connection = connection
        connection.info[UNIT] = scope


def _refuse_flush(session: Session, context: object, instances: Sequence[object] | None) -> None:
    scope: Scope | None = session.info.get(UNIT)
    if scope is not None and scope.read_only:
        changed = [*session.new, *session.dirty, *session.deleted]
        names = sorted({type(instance).__name__ for instance in changed})
        raise ReadOnlyUnit(
            f"A read-only unit of work, opened at {describe(scope.opened_at)}, cannot write its "
            f"changes of {', '.join(names)}; nothing was sent. Open it with begin() or "
            "session_per_request(database), without read_only=True"
        )
