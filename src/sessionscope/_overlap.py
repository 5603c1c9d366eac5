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

from sessionscope._places import Place, begin, describe, here, there
from sessionscope._watch import IDLE_SECONDS, opened_at, warn_of_idleness
from sessionscope.exc import SessionEnded, SessionShared

# Everything through which a session reaches its connection.
METHODS = (
    "begin_nested",
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "close",
    "commit",
    "connection",
    "delete",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "prepare",
    "refresh",
    "reset",
    "rollback",
    "scalar",
    "scalars",
)

# Keys in a session's __dict__: who is inside a call of it, and what was last done with it, when.
USER = "_sessionscope_user"
_LAST = "_sessionscope_last"
# And the event loop on which an asynchronous one was used first.
_LOOP = "_sessionscope_loop"

# Who uses a session that was in use when this process was forked: no thread of it.
_PARENT = 0

_User = int | asyncio.Task[Any]


def refuse_overlap(factory: sessionmaker[Any], *, is_async: bool) -> None:
    """Put the guard on all sessions that *factory* makes."""
    current_user = _current_task_or_thread if is_async else threading.get_ident
    for name in METHODS:
        method = getattr(factory.class_, name)
        on_loop = _on_one_loop(method) if is_async else method
        guarded: Any = _guarded(on_loop, current_user)
        guarded.unguarded = method
        setattr(factory.class_, name, guarded)


def reset(session: Session) -> None:
    """Reset *session* of a unit that ends, whoever is inside of a call of it."""
    method: Any = type(session).reset
    method.unguarded(session)


def invalidate(session: Session) -> None:
    """Invalidate *session* of a unit that ends, whoever is inside of a call of it."""
    method: Any = type(session).invalidate
    method.unguarded(session)


def leave_to_parent(session: Session) -> None:
    """Refuse *session* in this process, which was forked from the one that uses it."""
    session.__dict__[USER] = _PARENT


def is_in_use(session: Session) -> bool:
    """Return whether another thread or task is inside a call of *session*."""
    user: _User | None = session.__dict__.get(USER)
    return user is not None and user not in (threading.get_ident(), _current_task_or_thread())


def _guarded(method: Callable[..., Any], current_user: Callable[[], _User]) -> Callable[..., Any]:
    name = method.__name__

    @functools.wraps(method)
    def call(self: Session, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__
        me = current_user()
        if state.get(USER) == me:  # from inside of a call of its own
            # Without the dictionary, where it is empty: this runs before every statement.
            return method(self, *args, **kwargs) if kwargs else method(self, *args)
        user = state.setdefault(USER, me)  # one step: no other thread comes in between
        if user != me:
            raise _refusal(self, name, user)
        try:
            last = state.get(_LAST)
            if last is not None and monotonic() - last[0] > IDLE_SECONDS:
                warn_of_idleness(self, *last[1:])
            return method(self, *args, **kwargs) if kwargs else method(self, *args)
        finally:
            state[_LAST] = monotonic(), name, args[:1]  # not what was sent with it
            del state[USER]

    return call


def _on_one_loop(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a session on another event loop than its first: its connection waits on that one."""

    @functools.wraps(method)
    def call(self: Session, *args: Any, **kwargs: Any) -> Any:
        loop = asyncio._get_running_loop()
        if self.__dict__.setdefault(_LOOP, loop) is not loop:
            raise SessionShared(
                f"{method.__name__}() was called{_at(here())} on another event loop than the one "
                f"on which the session opened at {describe(opened_at(self))} was used first. Open "
                f"a unit of work where it is used: {begin(is_async=True)} as session: ..."
            )
        return method(self, *args, **kwargs)

    return call


def _current_task_or_thread() -> _User:
    if asyncio._get_running_loop() is not None:
        return asyncio.current_task() or threading.get_ident()
    return threading.get_ident()


def _refusal(session: Session, method: str, user: _User) -> SessionEnded | SessionShared:
    if user != _PARENT:
        return _shared(session, method, user)
    return SessionEnded(
        f"{method}() was called{_at(here())} in a forked process, and the session opened at "
        f"{describe(opened_at(session))} belongs to the process before the fork. Open a unit of "
        f"work after the fork: {begin(is_async=_LOOP in session.__dict__)} as session: ..."
    )


def _shared(session: Session, method: str, user: _User) -> SessionShared:
    first, second = there(user), here()
    is_async = isinstance(user, asyncio.Task) or _LOOP in session.__dict__
    return SessionShared(
        f"{method}() was called{_at(second)} while another thread or task{_at(first)} is using "
        f"the session opened at {describe(opened_at(session))}. The second use was refused, the "
        "first goes on. A session serves one thread or task at a time: give each a unit of work "
        f"of its own, {begin(is_async=is_async)} as session: ..."
    )


def _at(place: Place | None) -> str:
    # asyncio.gather() runs session.execute() as a task, from no line of the user's.
    return f" at {describe(place)}" if place is not None else " in a task of its own"
