"""Backends: the server's connections, counted until the server itself has closed them.

A pool's own count is too early: it forgets a connection when it closes its end, while
the server may still run what a cancelled unit of work has asked of it.
"""

import os
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from contextvars import copy_context
from inspect import iscoroutinefunction
from math import ceil
from time import monotonic
from typing import Any, Protocol

from sqlalchemy import Engine
from sqlalchemy.engine.interfaces import DBAPIConnection

from sessionscope._deadline import Deadline, current, within
from sessionscope._signal import Signal
from sessionscope.exc import PoolBusy

# Seconds for which a closed connection may keep its place while the server is silent.
CLOSING_SECONDS = 0.1
# Seconds for which another thread may go on inside of psycopg before its connection is cut, and
# for which that may take.
_GRACE, _CUTTING = 0.05, 5.0
# Seconds that libpq takes at least to give up connecting.
_LIBPQ_SECONDS = 2


class _Pool(Protocol):
    def close_one_idle(self) -> bool: ...


class Backends:
    """At most *limit* server connections over the pools of several engines; ``None``: any number.

    *demand* tells how many units of work run or wait, *pools* yields the pools.
    """

    def __init__(
        self,
        limit: int | None,
        demand: Callable[[], int],
        pools: Callable[[], Sequence[_Pool]],
        signal: Signal,
    ) -> None:
        self.limit = limit
        self.signal = signal
        self._demand = demand
        self._pools = pools
        self.forget()
        _all.add(self)

    def leave_to_parent(self) -> None:
        """Start anew in a forked child, so that nothing that it does reaches the parent's lines.

        Closing a connection would send a farewell over it, and a driver may use it at any time.
        """
        for socket_of_parent in self._sockets.values():
            if socket_of_parent is not None:
                _lead_nowhere(*socket_of_parent)
        self.forget()

    def forget(self) -> None:
        """Start with no connection."""
        # Of each connection that was opened here: its descriptor, and which socket that was.
        self._sockets: dict[int, tuple[int, int] | None] = {}
        self._lock = threading.Lock()
        self.count = 0
        self._freed = 0
        self.signal.forget()

    def is_in_demand(self) -> bool:
        """Return whether as many units run or wait as there are connections."""
        return self._demand() >= self.count

    def open(
        self,
        connect: Callable[[], DBAPIConnection],
        discard: Callable[[DBAPIConnection], None],
        timeout: float,
    ) -> DBAPIConnection:
        """Return a new connection, at the bound in the place of an idle one.

        Waits at most *timeout* seconds for a place; raises PoolBusy. *discard* closes a
        connection that no one waits for any more.
        """
        self.take(within(timeout))
        deadline = current.get()
        if deadline is not None:
            return self._open_in_time(connect, discard, deadline)
        try:
            return self.note(connect())
        except BaseException:
            self.give_back()
            raise

    def note(self, connection: DBAPIConnection) -> DBAPIConnection:
        """Return *connection*, of which it is known now that it was opened here."""
        self._sockets[id(connection)] = _socket_id(
            getattr(connection, "driver_connection", connection)
        )
        return connection

    def forgets(self, connection: DBAPIConnection) -> bool:
        """Return whether *connection* was opened here, which is forgotten."""
        return self._sockets.pop(id(connection), self) is not self

    def _open_in_time(
        self,
        connect: Callable[[], DBAPIConnection],
        discard: Callable[[DBAPIConnection], None],
        deadline: Deadline,
    ) -> DBAPIConnection:
        """Connect in a thread of its own, which is left behind when the time is over."""
        opening: Future[DBAPIConnection] = Future()

        def work() -> None:
            try:
                opening.set_result(self.note(connect()))
            except BaseException as error:
                opening.set_exception(error)

        # In this context, where the deadline is known: limit_connecting().
        run = copy_context().run
        done: Collection[object] = ()
        try:
            threading.Thread(
                target=run, args=(work,), name="sessionscope-connect", daemon=True
            ).start()
            done, _ = wait([opening], deadline.remaining)
        except RuntimeError as error:  # no thread is to be had
            opening.set_exception(error)
            raise
        finally:  # also after an interrupt, which may come while the thread starts
            if not done:
                opening.add_done_callback(lambda late: self._give_up(late, discard))
        if not done:
            raise deadline.exceeded("connect")
        if opening.exception() is not None:
            self.give_back()
        return opening.result()

    def _give_up(
        self, late: "Future[DBAPIConnection]", discard: Callable[[DBAPIConnection], None]
    ) -> None:
        if late.exception() is not None:
            self.give_back()
        else:
            discard(late.result())

    def close(
        self,
        connection: DBAPIConnection,
        driver_connection: Any,
        close: Callable[[], None],
        cancel: Callable[[], None] | None,
    ) -> None:
        """Close a connection and wait a moment for the server to have closed it, too.

        *cancel* ends what it may still be running; only tasks leave such connections behind.
        """
        if not self.forgets(connection):  # the parent process has opened it
            close()
            return
        kept = keep_socket(driver_connection) if self.limit is not None else None
        try:
            with _alone(driver_connection) as alone:
                if alone:
                    close()
            if kept is not None:
                wait_until_closed(kept, CLOSING_SECONDS)
        finally:
            self.give_back()
            if kept is not None:
                kept.close()

    def take(self, timeout: float) -> None:
        """Take the place of a connection that is about to be opened."""
        deadline = monotonic() + timeout
        closing_since = None
        while True:
            seen = self.signal.changes
            if self._take_at_once():
                return
            # One is enough, however long its server takes, until somebody else has its place.
            freed = self._freed
            if freed != closing_since and any(pool.close_one_idle() for pool in self._pools()):
                closing_since = freed
                continue
            if not self.signal.wait(seen, deadline - monotonic()):
                raise self.busy(timeout)

    def busy(self, timeout: float) -> PoolBusy:
        """Return the error for whom no connection came free within *timeout* seconds."""
        return PoolBusy(
            f"All {self.limit} connections are in use, by units of work or by users of .engine and "
            f".sessionmaker; none came free in {timeout:g} s (pool_timeout)"
        )

    def give_back(self) -> None:
        """Free the place of a connection that is gone."""
        with self._lock:
            self.count -= 1
            self._freed += 1
        self.signal.notify()

    def _take_at_once(self) -> bool:
        with self._lock:
            if self.limit is not None and self.count >= self.limit:
                return False
            self.count += 1
            return True


def limit_connecting(engine: Engine) -> None:
    """Let libpq give up connecting soon after the unit's deadline, when no one waits any more.

    Else a server that takes connections and never answers would keep all places for minutes.
    """
    if engine.dialect.driver not in ("psycopg", "psycopg2") or engine.dialect.is_async:
        return
    connect = engine.dialect.connect

    def connect_in_time(*args: Any, **kwargs: Any) -> Any:
        deadline = current.get()
        if deadline is not None:
            seconds = max(_LIBPQ_SECONDS, ceil(deadline.remaining))
            given = int(kwargs.get("connect_timeout") or 0)
            kwargs["connect_timeout"] = min(given or seconds, seconds)
        return connect(*args, **kwargs)

    # Not by a do_connect listener: SQLAlchemy 2.0 gives all threads the same arguments to change.
    engine.dialect.connect = connect_in_time  # type: ignore[method-assign]  # as a subclass would


_all: weakref.WeakSet[Backends] = weakref.WeakSet()


def _forget_all() -> None:
    for backends in _all:
        backends.leave_to_parent()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_all)


def keep_socket(driver_connection: Any) -> socket.socket | None:
    """Return a second handle on the connection's socket, which the driver's close() leaves open."""
    number = descriptor(driver_connection)
    if number is None or number < 0:
        return None
    with suppress(OSError):
        # Not os.dup(): on Windows sockets are handles, which that does not know.
        return socket.fromfd(number, -1, -1)
    return None


def shut_down(driver_connection: Any) -> None:
    """Cut the connection under its driver, whose call fails then, in whichever thread."""
    kept = keep_socket(driver_connection)
    if kept is None:
        return
    with kept, suppress(OSError):
        # Else it was closed in this moment, and its number may be another connection's.
        if descriptor(driver_connection) is not None:
            kept.shutdown(socket.SHUT_RDWR)


@contextmanager
def _alone(driver_connection: Any) -> Generator[bool]:
    """Keep other threads out of psycopg's calls, if they leave: libpq frees what they are using."""
    lock = getattr(driver_connection, "lock", None)
    if lock is None or iscoroutinefunction(lock.acquire):
        yield True  # the other drivers see to that by themselves, and tasks share a thread
        return
    is_alone = lock.acquire(timeout=_GRACE)
    if not is_alone:
        shut_down(driver_connection)  # what is inside goes on, or has begun since: it fails now
        is_alone = lock.acquire(timeout=_CUTTING)
    try:
        yield is_alone
    finally:
        if is_alone:
            lock.release()


def wait_until_closed(kept: socket.socket, timeout: float) -> None:
    """Wait until the server has closed its end of a connection that we have closed."""
    with suppress(OSError):
        kept.settimeout(timeout)
        # The driver may have sent no farewell, and our second handle keeps the line open.
        kept.shutdown(socket.SHUT_WR)
        while kept.recv(65536):
            pass


def descriptor(driver_connection: Any) -> int | None:
    """Return the descriptor of the connection's socket, if the driver shows it."""
    fileno = getattr(driver_connection, "fileno", None)
    if fileno is None:
        fileno = getattr(_socket_of(driver_connection), "fileno", None)
    with suppress(Exception):  # a closed connection has none
        return fileno() if fileno is not None else None
    return None


def _socket_id(driver_connection: Any) -> tuple[int, int] | None:
    number = descriptor(driver_connection)
    if number is None or number < 0:
        return None
    with suppress(OSError):
        return number, os.fstat(number).st_ino
    return None


def _lead_nowhere(number: int, inode: int) -> None:
    """Let the descriptor lead nowhere, if it still is that socket's."""
    with suppress(OSError):
        if os.fstat(number).st_ino == inode:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number, inheritable=False)
            os.close(nowhere)


def _socket_of(driver_connection: Any) -> Any:
    """Return the socket that pymysql, asyncpg, aiomysql and asyncmy keep to themselves."""
    if getattr(driver_connection, "_sock", None) is not None:  # asyncmy has it, and leaves it empty
        return driver_connection._sock
    transport = transport_of(driver_connection)
    return transport.get_extra_info("socket") if transport is not None else None


def transport_of(driver_connection: Any) -> Any:
    """Return the event loop's transport that asyncpg, aiomysql and asyncmy keep to themselves."""
    writer = getattr(driver_connection, "_writer", None)
    return getattr(driver_connection, "_transport", None) or getattr(writer, "transport", None)
