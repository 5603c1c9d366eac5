"""What is refused: a session after its end, a write in a read-only unit, a second unit."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker
from sqlalchemy.orm.session import _sessions  # pyright: ignore[reportPrivateUsage]  # all there are

from sessionscope import _overlap, _watch
from sessionscope._options import Options
from sessionscope._places import Place, begin, describe
from sessionscope._watch import UNIT, OnLeak
from sessionscope.exc import NestedUnit, ReadOnlyUnit, SessionEnded, SessionScopeError


class Scope:
    """What the guards know of one unit of work."""

    __slots__ = (
        "autocommit",
        "connection",
        "ended",
        "forked",
        "has_committed",
        "identity",
        "independent",
        "is_async",
        "is_split",
        "left",
        "may_run_again",
        "on_begin",
        "opened_at",
        "owner",
        "read_only",
        "streams",
        "task",
        "thread",
        "timer",
        "used",
        "why",
    )

    def __init__(
        self,
        owner: object,
        opened_at: Place,
        *,
        is_async: bool,
        read_only: bool,
        autocommit: bool,
        independent: bool,
    ) -> None:
        self.owner = owner
        self.opened_at = opened_at
        self.is_async = is_async
        self.independent = independent
        self.read_only = read_only
        self.autocommit = autocommit  # nothing to commit or roll back at its end
        self.connection: Connection | None = None  # the last one that the session used
        self.task: asyncio.Task[Any] | None = None
        self.thread = 0
        self.used = False  # a transaction was begun
        self.streams = False  # a read-only unit had to begin a real one, for a server-side cursor
        self.left = False  # its flow of control has gone on, its clean-up may go on in a task
        self.ended = False
        self.forked = False  # it belongs to the process that this one was forked from
        self.has_committed = False  # something of it is there to stay
        self.may_run_again = False
        self.is_split = False  # its transactions are those of several engines
        self.identity: Any = None  # what the server calls the transaction that is committed last
        self.timer: Any = None  # of its deadline
        self.why: SessionScopeError | None = None  # who was cut off is told this
        self.on_begin: Callable[[Scope, Connection], None] | None = None


# The scopes that the current flow of control holds. A worker thread to which a
# task's context was copied sees them too: the task awaits it.
_held: ContextVar[tuple[Scope, ...]] = ContextVar("sessionscope_held", default=())


def refuse_nested(scope: Scope, database: str, options: Options) -> None:
    """Raise NestedUnit if this flow of control holds a unit of the same Database.

    A new task or thread is a flow of its own. Without this rule, units that hold
    one connection and wait for another can all wait for each other. An independent
    unit has a connection in reserve, and is refused inside of another one only. SQLite
    has one writer, so there the outer unit must be a read-only one.
    """
    for outer in _held.get():
        if outer.owner is not scope.owner or outer.left or not _is_same_flow(outer):
            continue
        opened = f"of {database} is open already, opened at {describe(outer.opened_at)}"
        if not scope.independent:
            raise NestedUnit(
                f"A unit of work {opened}; a second one here would hold one connection and "
                "wait for another. Pass the session on, fn(session, ...), to functions that are "
                "not decorated with with_session(), or write begin(independent=True) for work "
                "that commits on its own"
            )
        if options.is_memory or (options.is_sqlite and not outer.read_only):
            raise NestedUnit(
                f"A unit of work {opened}, and SQLite has one writer at a time, in memory one "
                "connection, also for independent=True. Pass the session on, fn(session, ...)"
            )
        if outer.independent:
            raise NestedUnit(
                f"An independent unit of work {opened}, and there is one connection in reserve "
                "only. Pass its session on, fn(session, ...)"
            )


def enter(scope: Scope) -> None:
    """Make *scope* the current flow's."""
    scope.task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    scope.thread = threading.get_ident()
    if not (held := _held.get()) or (len(held) == 1 and held[0].left):
        _held.set((scope,))
    else:
        _held.set((*(other for other in held if not other.left), scope))


def leave(scope: Scope) -> None:
    """Let the flow of control that held *scope* go on, from whichever thread."""
    # The next enter() takes it out of the context: to do it here, too, would cost each unit
    # ten times as much. What is left in there meanwhile holds nothing but its place.
    scope.left = True
    scope.task = None
    scope.owner = None


def _live_sessions() -> list[Session]:
    # values() runs Python code in between, and other threads make sessions.
    return [session for each in _sessions.valuerefs() if (session := each()) is not None]


def open_scopes(owner: object) -> list[Scope]:
    """Return the units of *owner* that have begun and not ended."""
    scopes = [session.info.get(UNIT) for session in _live_sessions()]
    return [
        scope for scope in scopes if scope is not None and scope.owner is owner and not scope.ended
    ]


def is_held(scope: Scope) -> bool:
    """Return whether the current flow of control holds *scope*, or one that started it did."""
    return scope in _held.get()


def _is_same_flow(scope: Scope) -> bool:
    if scope.task is None:  # a loop that runs in the unit's own thread blocks the unit
        return scope.thread == threading.get_ident()
    # No task here, and the scope is visible: a thread that the unit's task awaits.
    return _current_task() in (None, scope.task)


def _current_task() -> "asyncio.Task[Any] | None":
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


def guard(factory: sessionmaker[Any], on_leak: OnLeak, *, is_async: bool) -> type[Any]:
    """Put the guards on all sessions that *factory* makes; return the class for those of units."""

    def begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        scope: Scope | None = session.info.get(UNIT)
        if scope is not None:
            if scope.connection is not None:
                _note_engines(scope, connection)
            scope.connection = connection
            connection.info[UNIT] = scope
            if scope.on_begin is not None:
                scope.on_begin(scope, connection)
        if scope is None or is_async:  # Unit.__del__ finds the others
            _watch.watch(session, connection, on_leak)

    _overlap.refuse_overlap(factory, is_async=is_async)
    event.listen(factory, "after_transaction_create", _refuse_after_end)
    event.listen(factory, "after_begin", begun)
    event.listen(factory, "before_flush", _refuse_flush)
    return _watch.note_opening(factory)


def _note_engines(scope: Scope, connection: Connection) -> None:
    assert scope.connection is not None
    if scope.connection.engine.pool is not connection.engine.pool:  # "binds" leads to several
        scope.is_split = True


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
            "This session has ended with its unit of work, the block, function or endpoint at "
            f"{describe(scope.opened_at)}. Code that runs later (a stream, a background task, "
            f"another thread) opens its own: {begin(is_async=scope.is_async)} as session: ..."
        )


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


def _leave_all_to_parent() -> None:
    """In a forked child, refuse the sessions that use connections of the parent."""
    for session in _live_sessions():
        scope: Scope | None = session.info.get(UNIT)
        if scope is not None and not scope.ended:
            scope.left = scope.ended = scope.forked = True
            if scope.timer is not None:
                scope.timer.leave_to_parent()
            _overlap.leave_to_parent(session)
        elif scope is None and session.in_transaction():
            _overlap.leave_to_parent(session)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_all_to_parent)
