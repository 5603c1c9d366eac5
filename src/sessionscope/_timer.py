"""Timer: ends what a unit of work waits for when its time is over.

A call that waits for a server which is silent, and keeps its connection alive, never
returns by itself: no ping, keep-alive or timeout of the kernel sees anything amiss. So the
statement is cancelled on the server, and if that brings no answer in a moment, the
connection is cut under the driver. What was cut is never used again, because a cancellation
that is late would hit the connection's next user.
"""

import asyncio
import functools
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sessionscope import _watchdog
from sessionscope._backends import keep_socket
from sessionscope._deadline import Deadline, current
from sessionscope._interrupt import interrupt
from sessionscope._overlap import METHODS
from sessionscope._retry import code_of, is_busy, sqlstate_of
from sessionscope._timed_cursor import watch_cursors
from sessionscope.exc import CommitUnknown, DeadlineExceeded, Phase, PoolBusy

# Seconds for which a cancelled statement may take to end before its connection is cut.
_GRACE = 0.05

# Session methods that end a unit, and are never refused.
_ENDINGS = ("close", "reset", "rollback")
# What a server says by itself when the limit that it was told is over: PostgreSQL's
# query_canceled, ER_QUERY_TIMEOUT of MySQL, ER_STATEMENT_TIMEOUT of MariaDB.
_TIMED_OUT = {"57014", 3024, 1969}

_R = TypeVar("_R")


class _Line:
    """A connection that a unit uses, as far as it takes to cut it."""

    __slots__ = ("connection", "driver_connection", "has_server", "info", "kept", "pool", "stop")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.info = connection.connection.info
        self.pool: Pool = connection.engine.pool
        self.driver_connection: Any = connection.connection.driver_connection
        # A handle of our own: the driver's may be closed at any time, and its number reused.
        self.kept: socket.socket | None = keep_socket(self.driver_connection)
        self.has_server = connection.dialect.name != "sqlite"
        # What interrupts SQLite does not wait.
        self.stop: Callable[[], None] | None = None
        if not (self.has_server or connection.dialect.is_async):
            driver: Any = self.driver_connection
            self.stop = driver.interrupt

    def cancel(self) -> None:
        """Cancel the statement on the server, in a thread: a silent one does not answer to this."""
        cancel = functools.partial(_cancel, self.pool, self.driver_connection)
        # If there is no thread to be had, the connection is cut a little later.
        with suppress(RuntimeError):
            threading.Thread(target=cancel, name="sessionscope-cancel", daemon=True).start()

    def cut(self) -> None:
        """Cut the connection under its driver. Does not wait."""
        if self.kept is not None:
            with suppress(OSError):
                self.kept.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the handle."""
        if self.kept is not None:
            self.kept.close()
            self.kept = None


class Timer:
    """The deadline of one unit of work, while the unit is at work."""

    __slots__ = (
        "_cancelling",
        "_ended",
        "_handle",
        "_has_cancelled",
        "_is_async",
        "_left",
        "_lines",
        "_lock",
        "_pending",
        "_phase",
        "_task",
        "committing",
        "confirmed",
        "cut",
        "deadline",
        "why",
    )

    def __init__(self, deadline: Deadline, *, is_async: bool) -> None:
        self.deadline = deadline
        self.committing = False  # COMMIT was sent, and its answer has not come
        self.confirmed = False  # its answer has come, and the call is about to end
        self.cut = False  # what the unit waited for was ended, and its connections with it
        self.why: DeadlineExceeded | None = None  # what was ended is told this
        self._phase: Phase | None = None  # inside of which kind of call the unit is
        self._ended = False
        # Re-entrant: the garbage collector may end this very unit, once it was abandoned.
        self._lock = threading.RLock()
        self._lines: list[_Line] = []
        self._left: threading.Event | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0  # how often the task had been cancelled before the call
        self._has_cancelled = False  # it was cancelled from here, and has not been told yet
        self._pending: asyncio.Handle | None = None  # of a cancellation that is about to be made
        self._handle: asyncio.TimerHandle | None = None
        self._is_async = is_async
        if is_async:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(deadline.remaining, self.expire)
        else:
            _watchdog.watch(self, deadline.remaining)

    @property
    def is_over(self) -> bool:
        """Whether the unit may do nothing more but end."""
        return self.why is not None or self.deadline.is_over

    @property
    def is_inside(self) -> bool:
        """Whether the unit is inside of a call that ends at the deadline."""
        return self._phase is not None

    @property
    def has_ended(self) -> bool:
        """Whether the unit has ended."""
        return self._ended

    def use(self, connection: Connection) -> None:
        """Note that the unit has begun to use *connection*, or has begun a savepoint of it."""
        info = connection.connection.info
        with self._lock:
            if any(line.info is info for line in self._lines):
                return
            self._lines.append(_Line(connection))
            cut = self.cut
        if cut:  # in the moment when it was there: what is sent now would not be ended any more
            raise self.error("connect")
        watch_cursors(connection, self)

    def start_commit(self) -> None:
        """Note that COMMIT is about to be sent. Raises DeadlineExceeded if it must not."""
        with self._lock:
            if not self.is_over:
                self.committing = True
                return
        raise self.error("commit")

    def confirm(self) -> None:
        """Note that COMMIT was answered: nothing is left to end."""
        with self._lock:
            self.committing, self.confirmed = False, True

    def release(self, info: dict[Any, Any]) -> bool:
        """Note that a connection goes back; return whether no one may use it any more."""
        with self._lock:
            for line in self._lines:
                if line.info is info:
                    self._lines.remove(line)
                    line.close()
                    break
        return self.cut

    def leave_to_parent(self) -> None:
        """Let the unit end in a forked child, whose parent's threads may have held the lock."""
        self._lock = threading.RLock()

    def end(self) -> None:
        """Note that the unit has ended."""
        with self._lock:
            self._ended = True
            lines, self._lines = self._lines, []
            for line in lines:
                line.close()
        if self._handle is not None:
            self._handle.cancel()
        else:
            _watchdog.forget_one()

    def expire(self) -> None:
        """End what the unit waits for, if it does, and refuse whatever it would still do."""
        with self._lock:
            if self._ended or self.cut or self.confirmed or self._phase is None:
                return
            self.why = self.deadline.exceeded(self._phase if self._lines else "connect")
            self.cut = True
            if self._task is not None and not self.committing:
                self._pending = self._task.get_loop().call_soon_threadsafe(self._cancel)
                return
            self._left = left = threading.Event()
        work = functools.partial(self._break, left)
        try:
            # Not here: it may take as long as the server likes.
            threading.Thread(target=work, name="sessionscope-cut", daemon=True).start()
        except RuntimeError:  # no thread is to be had
            self._cut(left)

    def error(self, phase: Phase) -> DeadlineExceeded:
        """Return what the unit is told whose time is over."""
        return self.why or self.deadline.exceeded(phase)

    def discard(self) -> bool:
        """Close the connections, without a word to a server that may not answer.

        Return whether there was one. A transaction of SQLite, which always answers, is left.
        """
        with self._lock:
            self.why = self.error(self._phase or "query")
            self.cut = True
            connections = [line.connection for line in self._lines if line.has_server]
        for connection in connections:
            if not connection.closed:
                connection.invalidate()
        return bool(connections)

    def run(self, work: Callable[..., _R], /, *args: Any, **kwargs: Any) -> _R:
        """Return ``work(*args, **kwargs)``, which waits for the database at most until the end."""
        return self.call("query", work, args, kwargs)

    def end_with(self, work: Callable[[], Any]) -> Any:
        """Call *work*, which ends something in the database, while there is time for it.

        Later its connection is closed before, and it waits for nothing.
        """
        if not self.is_inside and self.is_over and self.discard():
            with suppress(Exception):
                work()
            return None
        return self.call("query", work, (), {}, ends=True)

    def call(
        self,
        phase: Phase,
        work: Callable[..., _R],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        ends: bool = False,
    ) -> _R:
        """Return ``work(*args, **kwargs)``; raise DeadlineExceeded when the time is over.

        What *ends* the unit is called all the same, after its connections were closed.
        """
        if self._phase is not None or self._ended:
            return work(*args, **kwargs)
        token = current.set(self.deadline)
        self._enter(phase)
        was_over = False
        try:
            # Only now: a time that runs out from here on ends the call.
            if self.is_over:
                was_over = True
                self._refuse(phase, ends=ends)
            result = work(*args, **kwargs)
        except BaseException as error:
            told = self._translate(error, phase)
            if told is None:
                raise
            raise told from error
        finally:
            self._leave()
            current.reset(token)
        if self.cut and not was_over and phase != "commit":  # it was done in the very moment
            raise self.error(phase)
        return result

    def _enter(self, phase: Phase) -> None:
        if self._is_async:
            self._task = task = asyncio.current_task()
            self._cancelling = task.cancelling() if task is not None else 0
        self._phase = phase

    def _refuse(self, phase: Phase, *, ends: bool) -> None:
        """Raise DeadlineExceeded, or let a call that *ends* the unit find closed connections."""
        if not ends:
            raise self.error(phase)
        self.discard()

    def _leave(self) -> None:
        with self._lock:
            self._phase = None
            self.committing = self.confirmed = False
            if self._left is not None:
                self._left.set()
        if self._pending is not None:
            self._pending.cancel()
        self._take_back()
        self._task = None

    def _translate(self, error: BaseException, phase: Phase) -> BaseException | None:
        """Return what *error*, which has left a call, means to the unit."""
        if isinstance(error, CommitUnknown | DeadlineExceeded):
            return None
        if isinstance(error, asyncio.CancelledError):
            return self.why if self._take_back() else None
        if self.cut or (self.is_over and _says_timed_out(error)):
            return self.error(phase)
        if self.is_over and isinstance(error, PoolBusy):
            return self.error("connect")
        return None

    def _cancel(self) -> None:
        if self._task is not None:
            self._has_cancelled = True
            self._task.cancel()

    def _take_back(self) -> bool:
        """Take back the cancellation that was made here; return whether it was the only one.

        Also if a driver has swallowed it, or made another error of it: the task's own
        timeouts count on it.
        """
        if not self._has_cancelled or self._task is None:
            return False
        self._has_cancelled = False
        return self._task.uncancel() <= self._cancelling

    def _break(self, left: threading.Event) -> None:
        """Cancel the statement on the server; cut the connection if it goes on."""
        with self._lock:
            lines = [] if self.committing else [line for line in self._lines if line.stop is None]
        for line in lines:
            line.cancel()
        if lines and left.wait(_GRACE):
            return
        self._cut(left)
        while not left.wait(_GRACE):
            self._cut(left)  # another statement has followed the one that was interrupted

    def _cut(self, left: threading.Event) -> None:
        # Whoever leaves the call waits for this: the next user of the connection is not hit.
        with self._lock:
            if left.is_set():
                return
            for line in self._lines:
                line.cut()
                if line.stop is not None and not self.committing:
                    line.stop()


def _cancel(pool: Pool, driver_connection: Any) -> None:
    with suppress(Exception):
        interrupt(pool, driver_connection)


def _says_timed_out(error: BaseException) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    told = (sqlstate_of(error.orig), code_of(error.orig))
    return is_busy(error.orig) or not _TIMED_OUT.isdisjoint(told)


def limited(deadline: Deadline, work: Callable[[Timer], _R], *, is_async: bool) -> _R:
    """Return ``work(timer)``, which waits for the connections it tells of until the *deadline*."""
    timer = Timer(deadline, is_async=is_async)
    try:
        return timer.run(work, timer)
    finally:
        timer.end()


def timed(session_class: type[Any], key: str) -> type[Any]:
    """Return a class of sessions whose calls end with the deadline of their unit.

    *key* is that of the unit's scope in the session's ``info``.
    """
    names = {*METHODS, *_ENDINGS}
    methods = {name: _timed(getattr(session_class, name), key) for name in names}
    return type(session_class.__name__, (session_class,), methods)


def _timed(method: Callable[..., Any], key: str) -> Callable[..., Any]:
    name = method.__name__
    phase: Phase = "commit" if name == "commit" else "query"
    ends = name in _ENDINGS

    @functools.wraps(method)
    def call(self: Session, *args: Any, **kwargs: Any) -> Any:
        timer: Timer | None = self.info[key].timer
        if timer is None:  # the unit has ended
            return method(self, *args, **kwargs)
        return timer.call(phase, method, (self, *args), kwargs, ends=ends)

    return call
