"""One user at a time: a session is never used by two threads or two tasks at once.

A Session is not safe for concurrent use, and says so only if its connection is
being opened: on a warm pool two tasks share a transaction in silence. Here the
second one is refused and the first one goes on unharmed. It is overlap that counts,
not ownership: frameworks pass a session from thread to thread.
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy.orm import Session, sessionmaker

from sessionscope._places import Place, describe, here, there
from sessionscope._watch import IDLE_SECONDS, opened_at, warn_of_idleness
from sessionscope.exc import SessionShared

# Everything through which a session reaches its connection.
_METHODS = (
    "begin_nested",
    "close",
    "commit",
    "connection",
    "execute",
    "flush",
    "get",
    "get_one",
    "merge",
    "refresh",
    "rollback",
    "scalar",
    "scalars",
)

_USE = "_sessionscope_use"
_User = int | asyncio.Task[Any]


class _Use:
    """Who is inside a session, and what was last done with it."""

    __slots__ = ("last", "left_at", "lock", "user")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.user: _User | None = None
        self.left_at = 0.0
        self.last: tuple[str, object] = ("", None)


def refuse_overlap(factory: sessionmaker[Any]) -> None:
    """Put the guard on all sessions that *factory* makes."""
    for name in _METHODS:
        setattr(factory.class_, name, _guarded(getattr(factory.class_, name)))


def is_in_use(session: Session) -> bool:
    """Return whether another thread or task is inside a call of *session*."""
    use: _Use | None = session.__dict__.get(_USE)
    return use is not None and use.user not in (None, _current_user())


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Session, *args: Any, **kwargs: Any) -> Any:
        use: _Use = self.__dict__.get(_USE) or self.__dict__.setdefault(_USE, _Use())
        user = _current_user()
        if use.user == user:
            return method(self, *args, **kwargs)
        if not use.lock.acquire(blocking=False):
            raise _shared(self, method.__name__, use.user)
        use.user = user
        if use.left_at and monotonic() - use.left_at > IDLE_SECONDS:
            warn_of_idleness(self, monotonic() - use.left_at, *use.last)
        try:
            return method(self, *args, **kwargs)
        finally:
            use.last = method.__name__, args[0] if args else None
            use.left_at = monotonic()
            use.user = None
            use.lock.release()

    return call


def _current_user() -> _User:
    if asyncio._get_running_loop() is not None:
        return asyncio.current_task() or threading.get_ident()
    return threading.get_ident()


def _shared(session: Session, method: str, user: _User | None) -> SessionShared:
    first = there(user) if user is not None else None
    second = here()
    return SessionShared(
        f"{method}() was called{_at(second)} while another thread or task{_at(first)} is using "
        f"the session opened at {describe(opened_at(session))}. The second use was refused, the "
        "first goes on. A session serves one thread or task at a time: give each a unit of work "
        "of its own, with database.begin() as session: ..."
    )


def _at(place: Place | None) -> str:
    # asyncio.gather() runs session.execute() as a task, from no line of the user's.
    return f" at {describe(place)}" if place is not None else " in a task of its own"
