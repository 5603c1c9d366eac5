"""Watching: sessions that are never closed, and transactions that are open for too long.

A session that leaks is found when it is collected as garbage, by whichever thread. Its
connection is kept alive here until then, and given back where that is safe: an
asynchronous driver's on its event loop, never in the middle of the collector.
"""

import asyncio
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Executable
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from sessionscope._loops import call_soon, start
from sessionscope._places import Place, begin, describe, here
from sessionscope.exc import IdleInTransactionWarning, SessionLeakWarning

# Seconds for which a transaction may be open without a statement.
IDLE_SECONDS = 10.0

# The key in Session.info, and in Connection.info while the session uses the
# connection, of the Scope of their unit of work.
UNIT = "sessionscope.unit"

# And of the place where a session without one was opened.
_OPENED_AT = "sessionscope.opened_at"
_WATCH = "sessionscope.watch"

# The key in Connection.info of one on which sessions without a unit may be idle.
MAY_IDLE = "sessionscope.may_idle"

# Called with the place where a session was opened that has leaked.
OnLeak = Callable[[str], None]


class _Watch(weakref.ref[Session]):
    """A session in use, and the connection that it would take with it."""

    __slots__ = ("connection", "loop", "on_leak", "opened_at")

    connection: Connection
    loop: asyncio.AbstractEventLoop | None
    on_leak: OnLeak
    opened_at: Place | None


_watches: set[_Watch] = set()
_warned: dict[Any, int] = {}
_closing: set[asyncio.Task[Any]] = set()


def note_opening(factory: sessionmaker[Any]) -> type[Any]:
    """Make the sessions of *factory* know where they were opened.

    Returns a class with the same listeners for the sessions of units, which know it already.
    """
    session_class: Any = factory.class_  # the factory's own, whoever wrote the one it is made of
    make = session_class.__init__

    def init(self: Session, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.info[_OPENED_AT] = here()

    session_class.__init__ = init
    return type(session_class.__name__, (session_class,), {"__init__": make})


def watch(session: Session, connection: Connection, on_leak: OnLeak) -> None:
    """Watch *session*, which has begun to use *connection*."""
    watching: _Watch | None = session.info.get(_WATCH)
    if watching is None:
        watching = session.info[_WATCH] = _Watch(session, _collected)
        watching.opened_at = opened_at(session)
        watching.loop = asyncio._get_running_loop()
        watching.on_leak = on_leak
        _watches.add(watching)
    watching.connection = connection


def opened_at(session: Session) -> Place | None:
    """Return where *session* was opened, if that is known."""
    scope = session.info.get(UNIT)
    place: Place | None = session.info.get(_OPENED_AT) if scope is None else scope.opened_at
    return place


def leave(session: Session) -> None:
    """Stop watching *session*, which has been closed."""
    watching: _Watch | None = session.info.pop(_WATCH, None)
    if watching is not None:
        _watches.discard(watching)


def report(session: Session, on_leak: OnLeak) -> None:
    """Treat *session*, which has a connection and whose unit was abandoned, as a leak."""
    watching: _Watch | None = session.info.get(_WATCH)
    if watching is not None:
        _collected(watching)
    else:  # only asynchronous units are watched
        _warn_of_leak(opened_at(session), on_leak, is_async=False)


def warn_of_idleness(session: Session, method: str, arguments: tuple[object, ...]) -> None:
    """Warn that *session* kept its transaction open since its last call, for too long."""
    scope = session.info.get(UNIT)
    is_autocommit = scope is not None and scope.autocommit and not scope.streams
    if is_autocommit or not session.in_transaction() or (scope is None and _may_idle(session)):
        return
    if scope is not None and (scope.connection is None or scope.connection.closed):
        return  # begun by add() or a hook, and on no connection yet
    _warn(
        # Without the seconds, so that Python's filter shows it once for each line.
        f"The session opened at {describe(opened_at(session))} was idle in its transaction for "
        f"more than {IDLE_SECONDS:g} s after {_last_call(method, *arguments[:1])}: it kept its "
        "connection and its locks meanwhile. End the unit of work before what takes long (a call "
        "over the network, a file, a sleep), and begin another one after it",
        IdleInTransactionWarning,
        here() or opened_at(session),
    )


def _may_idle(session: Session) -> bool:
    watching: _Watch | None = session.info.get(_WATCH)
    if watching is None or watching.connection.closed or watching.connection.invalidated:
        return False
    return MAY_IDLE in watching.connection.info


def _last_call(method: str, argument: object = None) -> str:
    if isinstance(argument, Executable):
        return repr(" ".join(str(argument).split())[:80])
    name = getattr(argument, "__name__", "") if isinstance(argument, type) else ""
    return f"{method}({name})"


def _collected(watching: weakref.ref[Session]) -> None:
    """Warn of a session that was collected, and give its connection back."""
    assert isinstance(watching, _Watch)
    if watching not in _watches:  # its unit may be collected with it, and say so twice
        return
    _watches.discard(watching)
    connection = watching.connection
    if connection.closed:
        return
    try:
        is_async = connection.dialect.is_async
        _warn_of_leak(watching.opened_at, watching.on_leak, is_async=is_async)
    finally:
        if connection.dialect.is_async:
            _close_on_loop(connection, watching.loop)
        else:
            connection.close()


def _warn_of_leak(place: Place | None, on_leak: OnLeak, *, is_async: bool) -> None:
    on_leak(describe(place))
    _warn(
        f"The session opened at {describe(place)} was never closed; its connection was rolled "
        "back and given back when the garbage collector found it. Write: "
        f"{begin(is_async=is_async)} as session: ...",
        SessionLeakWarning,
        place,
    )


def _warn(message: str, category: type[Warning], place: Place | None) -> None:
    """Warn of a line of the user's: the stack here may be a greenlet's, or the collector's."""
    if place is None:
        warnings.warn(message, category, stacklevel=3)
        return
    code, line = place
    warnings.warn_explicit(message, category, code.co_filename, line, registry=_warned)


def _close_on_loop(connection: Connection, loop: asyncio.AbstractEventLoop | None) -> None:
    def close() -> None:
        start(greenlet_spawn(connection.close), _closing)

    if loop is None or not call_soon(loop, close):
        connection.invalidate()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    # What a forked child collects as garbage belongs to its parent.
    os.register_at_fork(after_in_child=_watches.clear)
