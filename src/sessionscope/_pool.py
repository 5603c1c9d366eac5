"""The pools: at most so many connections over both engines, and one user in memory."""

import os
import select
import threading
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any, Literal

from sqlalchemy import Connection, Engine, pool
from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util.queue import Empty, Queue

from sessionscope.exc import PoolBusy

_CLOSING_MILLISECONDS = 100


class _Queue(Queue[ConnectionPoolEntry]):
    """The idle connections of a pool; more than its size while units are about to ask for them."""

    bound: "Bound | None" = None

    def _full(self) -> bool:
        # QueuePool closes what does not fit, and under load opens it anew at once.
        full = len(self.queue) >= self.maxsize > 0
        return full and (self.bound is None or not self.bound.is_in_demand())


class SharedQueuePool(pool.QueuePool):
    """A QueuePool that shares its bound with the pool of another engine."""

    # The pool's logger takes its name from here: with all others, under "sqlalchemy".
    __module__ = "sqlalchemy.pool"
    _queue_class = _Queue
    _in_use_at_disposal: int | None = None
    bound: "Bound | None" = None

    def share(self, bound: "Bound | None") -> None:
        """Count this pool's connections in *bound*."""
        self.bound = bound
        assert isinstance(self._pool, _Queue)
        self._pool.bound = bound

    def _do_get(self) -> ConnectionPoolEntry:
        bound = self.bound
        started = monotonic()
        while True:
            seen = bound.changes if bound is not None else 0
            try:
                return super()._do_get()
            except _NoRoom:
                left = started + self._timeout - monotonic()
                if bound is not None and bound.wait(left, seen):
                    continue
            except sa_exc.TimeoutError:
                pass
            limit = bound.limit if bound is not None else self.size() + self._max_overflow
            raise PoolBusy(
                f"All {limit} connections are in use, by units of work or by users of .engine and "
                f".sessionmaker; none came free in {self._timeout:g} s (pool_timeout)"
            )

    def _inc_overflow(self) -> bool:
        """Reserve the place of a connection that is about to be opened."""
        if self.bound is None:
            return super()._inc_overflow()
        with self.bound.lock:
            if not super()._inc_overflow():
                return False
            if self.bound.make_room():
                return True
            super()._dec_overflow()
        raise _NoRoom

    def _dec_overflow(self) -> Literal[True]:
        super()._dec_overflow()
        self._notify()
        return True

    def _notify(self) -> None:
        if self.bound is not None:
            self.bound.notify()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._in_use_at_disposal is not None:
            record.close()  # no one would take it from here
            self._in_use_at_disposal -= 1
            self._notify()
            return
        super()._do_return_conn(record)
        self._notify()

    def dispose(self) -> None:
        self._in_use_at_disposal = self.checkedout()
        if self.bound is not None:
            self.bound.retire(self)
        super().dispose()

    def count(self) -> int:
        """Return how many connections the pool has opened and not closed."""
        if self._in_use_at_disposal is not None:
            return self._in_use_at_disposal
        return self.size() + self.overflow()

    def recreate(self) -> "SharedQueuePool":
        recreated = super().recreate()
        assert isinstance(recreated, SharedQueuePool)
        recreated.share(self.bound)
        return recreated

    def close_one_idle(self) -> bool:
        """Close a connection that no one uses; return whether there was one."""
        try:
            record = self._pool.get(False)
        except Empty:
            return False
        _close_for_good(record)
        self._dec_overflow()
        return True


class MemoryPool(pool.StaticPool):
    """The one connection of a database in memory, for one user at a time.

    A second user would share the transaction of the first, and end it.
    """

    __module__ = "sqlalchemy.pool"
    timeout = 0.0

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._lock = threading.Lock()

    def _do_get(self) -> ConnectionPoolEntry:
        if not self._lock.acquire(timeout=self.timeout):
            raise PoolBusy(
                "The connection of the database in memory is in use, by a unit of work or by a "
                f"user of .engine or .sessionmaker; it did not come free in {self.timeout:g} s"
            )
        try:
            return super()._do_get()
        except BaseException:
            self._lock.release()
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        self._lock.release()

    def recreate(self) -> "MemoryPool":
        recreated = super().recreate()
        assert isinstance(recreated, MemoryPool)
        recreated.timeout = self.timeout
        return recreated


class _NoRoom(Exception):
    """The bound over both pools is reached and no connection is idle."""


class Bound:
    """At most *limit* connections over the pools of several engines."""

    def __init__(self, limit: int, engines: tuple[Engine, ...], demand: Callable[[], int]) -> None:
        self.limit = limit
        self._engines = engines
        self._demand = demand
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self.changes = 0
        self._retired: weakref.WeakSet[SharedQueuePool] = weakref.WeakSet()

    def _pools(self) -> list[SharedQueuePool]:
        # Asked anew each time: Engine.dispose() replaces the pool.
        return [e.pool for e in self._engines if isinstance(e.pool, SharedQueuePool)]

    def is_in_demand(self) -> bool:
        """Return whether as many units run or wait as there are connections."""
        return self._demand() >= self._count()

    def make_room(self) -> bool:
        """Close idle connections until the bound holds; return whether it does."""
        while self._count() > self.limit:
            if not any(p.close_one_idle() for p in self._pools()):
                return False
        return True

    def retire(self, disposed: SharedQueuePool) -> None:
        """Go on counting what is still in use of a pool that the engine has replaced."""
        self._retired.add(disposed)

    def _count(self) -> int:
        return sum(p.count() for p in (*self._pools(), *self._retired))

    def wait(self, timeout: float, seen: int) -> bool:
        """Wait for a change after the *seen* one; return False at the timeout."""
        with self._changed:
            return timeout > 0 and self._changed.wait_for(lambda: self.changes != seen, timeout)

    def notify(self) -> None:
        """Wake those who wait: a connection was given back or closed."""
        with self._changed:
            self.changes += 1
            self._changed.notify_all()


def _close_for_good(record: ConnectionPoolEntry) -> None:
    """Close a connection and wait a moment for the server to have closed it, too.

    Otherwise the server would count one connection too many while the next opens.
    """
    socket = descriptor(record.driver_connection)
    if socket is None or not hasattr(select, "poll"):
        record.close()
        return
    kept = os.dup(socket)  # the driver's own is gone after close()
    try:
        record.close()
        poll = select.poll()
        poll.register(kept, select.POLLIN)
        poll.poll(_CLOSING_MILLISECONDS)
    finally:
        os.close(kept)


def interrupt(connection: Connection) -> None:
    """End the statement, if any, that another thread is running on the connection."""
    driver_connection: Any = connection.connection.driver_connection
    for name in ("cancel_safe", "cancel", "interrupt"):  # psycopg, psycopg2, sqlite3
        if hasattr(driver_connection, name):
            getattr(driver_connection, name)()
            return
    if hasattr(driver_connection, "thread_id"):  # MySQL's drivers
        _kill(connection.engine, driver_connection.thread_id())


def _kill(engine: Engine, thread_id: int) -> None:
    """Have MySQL end a connection, over a new one: its protocol knows no other way."""
    beside = pool.NullPool(engine.pool._creator).connect()  # pyright: ignore[reportPrivateUsage]  # the pool's own has no place left
    try:
        beside.cursor().execute(f"KILL {thread_id}")
    finally:
        beside.close()


def descriptor(driver_connection: Any) -> int | None:
    """Return the descriptor of the connection's socket, if the driver shows it."""
    fileno = getattr(driver_connection, "fileno", None)
    if fileno is None:  # pymysql keeps it to itself
        fileno = getattr(getattr(driver_connection, "_sock", None), "fileno", None)
    return fileno() if fileno is not None else None
