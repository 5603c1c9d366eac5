"""Timer: ends what a unit of work waits for when its time is over.

A call that waits for a server which is silent, and keeps its connection alive, never
returns by itself: no ping, keep-alive or timeout of the kernel sees anything amiss. So the
statement is cancelled on the server, and if that brings no answer in a moment, the
connection is cut under the driver. What was cut is never used again, because a cancellation
that is late would hit the connection's next user.
"""

import asyncio
import functools
import heapq
import logging
import os
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sessionscope._backends import keep_socket
from sessionscope._deadline import Deadline, current
from sessionscope._interrupt import interrupt
from sessionscope._overlap import METHODS
from sessionscope._retry import code_of, is_busy, sqlstate_of
from sessionscope.exc import CommitUnknown, DeadlineExceeded, Phase, PoolBusy

# Seconds for which a cancelled statement may take to end before its connection is cut.
_GRACE = 0.05

_log = logging.getLogger("sessionscope")
# Units that have ended, after which their entries are dropped.
_MANY = 1000

# Session methods that end a unit, and are never refused.
_ENDINGS = ("close", "invalidate", "reset", "rollback")
# What a server says by itself when the limit that it was told is over: PostgreSQL's
# query_canceled, ER_QUERY_TIMEOUT of MySQL, ER_STATEMENT_TIMEOUT of MariaDB.
_TIMED_OUT = {"57014", 3024, 1969}


class _Line:
    """The connection that a unit uses, as far as it takes to cut it."""

    __slots__ = ("driver_connection", "kept", "pool")

    def __init__(self, connection: Connection) -> None:
        self.pool: Pool = connection.engine.pool
        self.driver_connection: Any = connection.connection.driver_connection
        # A handle of our own: the driver's may be closed at any time, and its number reused.
        self.kept: socket.socket | None = keep_socket(self.driver_connection)


class Timer:
    """The deadline of one unit of work, while the unit is at work."""

    __slots__ = (
        "_cancelling",
        "_ended",
        "_handle",
        "_is_async",
        "_left",
        "_line",
        "_lock",
        "_task",
        "committing",
        "confirmed",
        "cut",
        "deadline",
        "phase",
        "why",
    )

    def __init__(self, deadline: Deadline, *, is_async: bool) -> None:
        self.deadline = deadline
        self.phase: Phase | None = None  # inside of which kind of call the unit is
        self.committing = False  # COMMIT was sent, and its answer has not come
        self.confirmed = False  # its answer has come, and the call is about to end
        self.cut = False  # what the unit waited for was ended, and its connection with it
        self.why: DeadlineExceeded | None = None  # what was ended is told this
        self._ended = False
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._left: threading.Event | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._handle: asyncio.TimerHandle | None = None
        self._is_async = is_async
        if is_async:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(deadline.remaining, self.expire)
        else:
            _watchdog.watch(self)

    @property
    def is_over(self) -> bool:
        """Whether the unit may do nothing more but end."""
        return self.why is not None or self.deadline.is_over

    @property
    def has_ended(self) -> bool:
        """Whether the unit has ended."""
        return self._ended

    def use(self, connection: Connection) -> None:
        """Note that the unit has begun to use *connection*."""
        self._drop_line()
        with self._lock:
            self._line = _Line(connection)

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

    def release(self) -> bool:
        """Note that the connection goes back; return whether no one may use it any more."""
        self._drop_line()
        return self.cut

    def end(self) -> None:
        """Note that the unit has ended."""
        with self._lock:
            self._ended = True
        if self._handle is not None:
            self._handle.cancel()
        else:
            _watchdog.forget_one()
        self._drop_line()

    def expire(self) -> None:
        """End what the unit waits for, if it does, and refuse whatever it would still do."""
        with self._lock:
            if self._ended or self.cut or self.confirmed or self.phase is None:
                return
            self.why = self.deadline.exceeded("connect" if self._line is None else self.phase)
            self.cut = True
            self._left = threading.Event()
            if self._task is not None and not self.committing:
                self._cancelling = self._task.cancelling()
                self._task.get_loop().call_soon_threadsafe(self._cancel)
                return
        # Not here: it may take as long as the server likes.
        threading.Thread(target=self._break, name="sessionscope-cut", daemon=True).start()

    def error(self, phase: Phase) -> DeadlineExceeded:
        """Return what the unit is told whose time is over."""
        return self.why or self.deadline.exceeded(phase)

    def enter(self, phase: Phase) -> None:
        """Note that the unit is inside of a call."""
        self._task = asyncio.current_task() if self._is_async else None
        self.phase = phase

    def check(self) -> None:
        """Raise DeadlineExceeded if the time was over before the call began."""
        if self.is_over and not self.cut:
            raise self.error(self.phase or "query")

    def leave(self) -> None:
        """Note that the call has ended."""
        with self._lock:
            self.phase = None
            self.committing = self.confirmed = False
            self._task = None
            left = self._left
        if left is not None:
            left.set()

    def translate(self, error: BaseException) -> BaseException | None:
        """Return what *error*, which has left a call, means to the unit."""
        if isinstance(error, CommitUnknown | DeadlineExceeded):
            return None
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            # Somebody else may have cancelled it as well.
            if not self.cut or task is None or task.uncancel() > self._cancelling:
                return None
            return self.why
        if self.cut or (self.is_over and _says_timed_out(error)):
            return self.error(self.phase or "query")
        if self.is_over and isinstance(error, PoolBusy):
            return self.error("connect")
        return None

    def _cancel(self) -> None:
        if self._task is not None and self.phase is not None:
            self._task.cancel()

    def _break(self) -> None:
        """Cancel the statement on the server; cut the connection if it goes on."""
        line, left = self._line, self._left
        assert left is not None
        if line is None:  # it is being opened
            return
        if not self.committing:
            cancel = functools.partial(_cancel, line)
            # In a thread of its own: a silent server does not answer to this either.
            threading.Thread(target=cancel, name="sessionscope-cancel", daemon=True).start()
            if left.wait(_GRACE):
                return
        with self._lock:
            if line.kept is not None:
                with suppress(OSError):
                    line.kept.shutdown(socket.SHUT_RDWR)

    def _drop_line(self) -> None:
        with self._lock:
            line, self._line = self._line, None
            if line is not None and line.kept is not None:
                line.kept.close()
                line.kept = None


def _cancel(line: _Line) -> None:
    with suppress(Exception):
        interrupt(line.pool, line.driver_connection)


def _says_timed_out(error: BaseException) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    told = (sqlstate_of(error.orig), code_of(error.orig))
    return is_busy(error.orig) or not _TIMED_OUT.isdisjoint(told)


class _Watchdog:
    """One thread for all units of this process that threads wait for."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        # Re-entrant: the garbage collector may end an abandoned unit while this thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self._count = 0
        self._ended = 0  # of those in the heap, about
        self._thread: threading.Thread | None = None

    def forget_one(self) -> None:
        """Count one that need not be watched any more, and drop such ones when they are many."""
        self._ended += 1
        if self._ended < _MANY:
            return
        with self._changed:
            if 2 * self._ended > len(self._heap):
                self._heap = [entry for entry in self._heap if not entry[2].has_ended]
                heapq.heapify(self._heap)
                self._ended = 0

    def watch(self, timer: Timer) -> None:
        """Call the timer's expire() when its time is over."""
        with self._changed:
            self._count += 1
            entry = (monotonic() + timer.deadline.remaining, self._count, timer)
            heapq.heappush(self._heap, entry)
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name="sessionscope-deadlines", daemon=True
                )
                thread.start()
                self._thread = thread  # not before: if it cannot start, the next unit tries again
            elif self._heap[0] is entry:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            timer = self._next()
            try:
                timer.expire()
            except Exception:  # no thread could be started, for one: the others must not suffer
                _log.exception("A unit of work could not be ended at its deadline")

    def _next(self) -> Timer:
        """Wait for the next deadline, and return whose it is."""
        with self._changed:
            while True:
                wait = self._heap[0][0] - monotonic() if self._heap else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(wait)


_watchdog = _Watchdog()


def _forget() -> None:
    global _watchdog  # noqa: PLW0603  # a forked child has none of its parent's threads
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def limited(deadline: Deadline, *, is_async: bool) -> Generator[Timer]:
    """End what the block waits for, on the connection that it uses, at the *deadline*."""
    timer = Timer(deadline, is_async=is_async)
    token = current.set(deadline)
    timer.enter("query")
    try:
        yield timer
    except BaseException as error:
        told = timer.translate(error)
        if told is None:
            raise
        raise told from error
    finally:
        timer.leave()
        current.reset(token)
        timer.end()


def timed(session_class: type[Any], key: str) -> type[Any]:
    """Return a class of sessions whose calls end with the deadline of their unit.

    *key* is that of the unit's scope in the session's ``info``.
    """
    methods = {name: _timed(getattr(session_class, name), key) for name in METHODS}
    return type(session_class.__name__, (session_class,), methods)


def _timed(method: Callable[..., Any], key: str) -> Callable[..., Any]:
    name = method.__name__
    phase: Phase = "commit" if name == "commit" else "query"

    @functools.wraps(method)
    def call(self: Session, *args: Any, **kwargs: Any) -> Any:
        timer: Timer | None = self.info[key].timer
        if timer is None or timer.phase is not None:  # ended, or inside of a call of its own
            return method(self, *args, **kwargs)
        token = current.set(timer.deadline)
        timer.enter(phase)
        try:
            # Only now: a time that runs out from here on ends the call.
            if name not in _ENDINGS:
                timer.check()
            result = method(self, *args, **kwargs)
        except BaseException as error:
            told = timer.translate(error)
            if told is None:
                raise
            raise told from error
        finally:
            timer.leave()
            current.reset(token)
        if timer.cut and name != "commit":  # it was done in the very moment
            raise timer.error(phase)
        return result

    return call
