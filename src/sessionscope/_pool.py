"""The pools: they share their bound with the pool of another engine; one user in memory."""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import exc as sa_exc
from sqlalchemy import pool
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _ConnectionRecord  # pyright: ignore[reportPrivateUsage]  # its own
from sqlalchemy.util import memoized_property
from sqlalchemy.util.concurrency import in_greenlet
from sqlalchemy.util.queue import Empty, Full, QueueCommon

from sessionscope._backends import Backends
from sessionscope._deadline import within
from sessionscope._interrupt import interrupt
from sessionscope._mysql import forget_unread
from sessionscope.exc import DeadlineExceeded, PoolBusy


class _Queue(QueueCommon[ConnectionPoolEntry]):
    """The idle connections of a pool; more than its size while units are about to ask for them.

    Without a lock: nobody waits here, the pool does that by itself, in a thread or in a task.
    """

    backends: Backends

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        self.maxsize = maxsize
        self.use_lifo = use_lifo
        self._idle: deque[ConnectionPoolEntry] = deque()

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        try:
            return self._idle.pop() if self.use_lifo else self._idle.popleft()
        except IndexError:
            raise Empty from None

    def put(
        self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None
    ) -> None:
        if self.full():
            raise Full
        self._idle.append(item)

    def qsize(self) -> int:
        return len(self._idle)

    def empty(self) -> bool:
        return not self._idle

    def full(self) -> bool:
        # QueuePool closes what does not fit, and under load opens it anew at once.
        return len(self._idle) >= self.maxsize > 0 and not self.backends.is_in_demand()


class _Record(_ConnectionRecord):
    """A pool's entry that knows asyncpg's errors while a connection is set up.

    Its place comes back though its reset was interrupted, as in the newest SQLAlchemy
    (https://github.com/sqlalchemy/sqlalchemy/issues/13699).
    """

    def __init__(self, pool: pool.Pool, connect: bool = True) -> None:
        self._dialect: Any = pool._dialect  # pyright: ignore[reportPrivateUsage]  # of its kind
        super().__init__(pool, connect)

    def get_connection(self) -> Any:
        # A server may also be gone while its connection is set up.
        try:
            return super().get_connection()
        except Exception as error:
            if (known := _of_asyncpg(error, self._dialect)) is None:
                raise
            raise known from error

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        super().invalidate(e, soft)
        if soft or e is None or isinstance(e, Exception) or self.fairy_ref is None:
            return
        user: Any = self.fairy_ref()
        if user is not None:  # who may be closed once more, and must not reach the next one
            user.dbapi_connection = user._connection_record = None
        self.checkin()

    def _checkin_failed(self, err: BaseException, _fairy_was_created: bool = True) -> None:
        try:
            super().invalidate(err)
        finally:
            self.checkin(_fairy_was_created=_fairy_was_created)


class _CountedPool(pool.Pool):
    """A pool whose connections are opened and closed by *backends*, which counts them."""

    backends: Backends
    _patience = 0.0

    def share(self, backends: Backends) -> None:
        """Count this pool's connections in *backends*."""
        self.backends = backends

    if not TYPE_CHECKING:

        @property
        def _invoke_creator(self) -> Callable[..., Any]:
            return self._open

        @_invoke_creator.setter
        def _invoke_creator(self, connect: Callable[..., Any]) -> None:
            self._connect = connect

    _connect: Callable[[ConnectionPoolEntry], DBAPIConnection]

    def _open(self, record: ConnectionPoolEntry) -> DBAPIConnection:
        discard = partial(self._close_connection, terminate=True)
        try:
            return self.backends.open(partial(self._connect, record), discard, self._patience)
        except DeadlineExceeded:  # which is an OSError as well
            raise
        except OSError as error:  # which asyncpg leaves as it is
            dialect: Any = self._dialect
            raise dialect.loaded_dbapi.OperationalError(str(error)) from error

    def _create_connection(self) -> ConnectionPoolEntry:
        # It connects at its checkout. If that fails half-way, in a "connect" event or in a
        # cancelled task, the pool closes what was opened: older SQLAlchemys forget it.
        return _Record(self, connect=False)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        driver_connection = self._dialect.get_driver_connection(connection)
        close = partial(super()._close_connection, connection, terminate=terminate)
        cancel = None
        if terminate:
            forget_unread(driver_connection)
            cancel = partial(interrupt, self, driver_connection)
        self.backends.close(connection, driver_connection, close, cancel)

    def recreate(self) -> Any:
        recreated = super().recreate()
        assert isinstance(recreated, _CountedPool)
        recreated.share(self.backends)
        return recreated


def _of_asyncpg(error: Exception, dialect: Any) -> Exception | None:
    """Return an *error* of asyncpg's, in opening a connection, as one that SQLAlchemy knows."""
    dbapi = dialect.loaded_dbapi
    if not hasattr(dbapi, "_asyncpg_error_translate"):
        return None
    # SQLAlchemy 2.1 does this by itself where it connects, and not where it sets codecs.
    classes = {dbapi.asyncpg.InternalClientError: dbapi.InternalError}
    classes |= dbapi._asyncpg_error_translate
    known: Any = next((classes[each] for each in type(error).__mro__ if each in classes), None)
    if known is not None:
        known = known(str(error))
        known.pgcode = known.sqlstate = getattr(error, "sqlstate", None)
    return known  # type: ignore[no-any-return]


class CountedNullPool(_CountedPool, pool.NullPool):
    """A NullPool whose connections end as safely as those of a pool."""

    __module__ = "sqlalchemy.pool"


class SharedQueuePool(_CountedPool, pool.QueuePool):
    """A QueuePool that shares its bound with the pool of another engine."""

    # The pool's logger takes its name from here: with all others, under "sqlalchemy".
    __module__ = "sqlalchemy.pool"
    _queue_class = _Queue
    _is_disposed = False

    def share(self, backends: Backends) -> None:
        super().share(backends)
        self._patience = self._timeout
        assert isinstance(self._pool, _Queue)
        self._pool.backends = backends

    def _do_get(self) -> ConnectionPoolEntry:
        deadline = monotonic() + within(self._timeout)
        while True:
            seen = self.backends.signal.changes
            try:
                return super()._do_get()
            except PoolBusy:
                raise
            except sa_exc.TimeoutError:
                if not self.backends.signal.wait(seen, deadline - monotonic()):
                    raise self.backends.busy(self._timeout) from None

    def _dec_overflow(self) -> Literal[True]:
        super()._dec_overflow()
        self.backends.signal.notify()
        return True

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if self._is_disposed:
            record.close()  # no one would take it from here
        elif record.dbapi_connection is None:  # invalidated, or never connected
            self._dec_overflow()
        else:
            super()._do_return_conn(record)
            self.backends.signal.notify()

    def dispose(self) -> None:
        self._is_disposed = True
        super().dispose()

    def close_one_idle(self) -> bool:
        """Close a connection that no one uses; return whether there was one."""
        try:
            record = self._pool.get(False)
        except Empty:
            return False
        try:
            record.close()
        finally:
            self._dec_overflow()
        return True


class AsyncSharedQueuePool(SharedQueuePool):
    """A SharedQueuePool for the asynchronous drivers."""

    __module__ = "sqlalchemy.pool"
    _is_asyncio = True
    _dialect = pool.AsyncAdaptedQueuePool._dialect


class MemoryPool(_CountedPool, pool.StaticPool):
    """The one connection of a database in memory, for one user at a time.

    A second user would share the transaction of the first, and end it.
    """

    __module__ = "sqlalchemy.pool"
    timeout = 0.0
    _kept: DBAPIConnection | None = None

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._lock = threading.Lock()

    @memoized_property
    def connection(self) -> _ConnectionRecord:
        return _Record(self)

    def _do_get(self) -> ConnectionPoolEntry:
        if not self._lock.acquire(blocking=False):
            self._take()
        try:
            if self._kept is not None:
                self._take_back(self._kept)
            return super()._do_get()
        except BaseException:
            self._release()
            raise

    def _take(self) -> None:
        deadline = monotonic() + within(self.timeout)
        while True:
            seen = self.backends.signal.changes
            if self._lock.acquire(blocking=False):
                return
            if not self.backends.signal.wait(seen, deadline - monotonic()):
                raise PoolBusy(
                    "The connection of the database in memory is in use, by a unit of work or by "
                    "a user of .engine or .sessionmaker; it did not come free in "
                    f"{self.timeout:g} s"
                )

    def _release(self) -> None:
        self._lock.release()
        self.backends.signal.notify()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._release()  # it stays where it is

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        if terminate and "connection" in self.__dict__:
            self._kept = connection  # after an interrupt or a cancellation: it is the data
        else:
            super()._close_connection(connection)

    def _take_back(self, kept: DBAPIConnection) -> None:
        """Go on with the connection that was kept, as if it had come back in order."""
        if self._dialect.is_async:
            interrupt(self, self._dialect.get_driver_connection(kept))
        kept.rollback()
        cursor = kept.cursor()
        cursor.execute("PRAGMA query_only = 0")  # a reader may have been cut off
        cursor.close()
        self.connection.info.clear()
        self.connection.dbapi_connection = kept
        self.connection.starttime = time()
        self._kept = None  # not before: a cancellation meanwhile would take the data with it

    def dispose(self) -> None:
        super().dispose()
        kept, self._kept = self._kept, None
        if kept is not None:
            if self._dialect.is_async and in_greenlet():  # to be closed, it must be at rest
                interrupt(self, self._dialect.get_driver_connection(kept))
            self._close_connection(kept)

    def recreate(self) -> "MemoryPool":
        recreated = super().recreate()
        assert isinstance(recreated, MemoryPool)
        recreated.timeout = self.timeout
        return recreated
