"""The pair of engines: a writing one, a read-only one, and one bound over both."""

import os
import select
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, pool
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util.queue import Empty, Queue

from sessionscope import _sqlite
from sessionscope._guards import UNIT
from sessionscope._options import Options, missing_driver
from sessionscope.exc import ConfigurationError, PoolBusy, ReadOnlyUnit

# A server, proxy or firewall may drop a connection without a word; one that was
# idle for longer than this many seconds is pinged before it is used again.
PING_AFTER_IDLE = 30.0

_READ_ONLY_SWITCH = {
    "postgresql": "SET default_transaction_read_only = on",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = 1",
}

_CLOSING_MILLISECONDS = 100

_PQTRANS_IDLE = 0

_RETURNED_AT = "sessionscope.returned_at"
_POLLER = "sessionscope.poller"
_STREAMING = "sessionscope.streaming"


class Engines:
    """The writing and the read-only engine of one database.

    Both are plain engines. Together they never hold more connections than
    ``options.limit``: at the bound, the one closes an idle connection before the
    other opens one. *demand* tells how many units run or wait.
    """

    def __init__(self, options: Options, demand: Callable[[], int]) -> None:
        self.options = options
        self._views: dict[tuple[bool, str], Engine] = {}
        self.write = _create(options, **_write_options(options))
        if options.is_memory:
            # One connection, for one user at a time: an AUTOCOMMIT view of it would
            # show readers what a writer has not committed.
            assert isinstance(self.write.pool, MemoryPool)
            self.write.pool.timeout = min(options.pool_timeout, threading.TIMEOUT_MAX)
            _sqlite.prepare_memory(self.write)
            self.read = _sqlite.memory_reader(self.write)
            event.listen(self.read, "before_cursor_execute", _refuse_to_write)
            return
        self.read = _create(options, **_read_options(options))
        for engine in (self.write, self.read):
            if options.is_sqlite:
                _sqlite.prepare_file(engine, writes=engine is self.write)
            else:
                _keep_alive(engine)
        _make_read_only(self.read)
        _share_bound(options, demand, self.write, self.read)

    def bind(self, *, read_only: bool, isolation_level: str | None) -> Engine:
        """Return the engine for a unit of work, as a view when it names an isolation level."""
        engine = self.read if read_only else self.write
        if isolation_level is None:
            return engine
        key = read_only, isolation_level
        if key not in self._views:
            if self.options.is_sqlite:
                view = _sqlite.at_isolation_level(engine, isolation_level, read_only=read_only)
            else:
                view = engine.execution_options(isolation_level=isolation_level)
            self._views.setdefault(key, view)
        return self._views[key]

    @property
    def idle(self) -> int:
        """How many open connections no one uses."""
        pools = {id(engine.pool): engine.pool for engine in (self.write, self.read)}
        return sum(p.checkedin() for p in pools.values() if isinstance(p, pool.QueuePool))

    def dispose(self) -> None:
        """Close the connections that are not in use; later ones are opened anew."""
        self.write.dispose()
        if not self.options.is_memory:
            self.read.dispose()


class _Queue(Queue[ConnectionPoolEntry]):
    """The idle connections of a pool; more than its size while units are about to ask for them."""

    bound: "_Bound | None" = None

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
    bound: "_Bound | None" = None

    def share(self, bound: "_Bound | None") -> None:
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


class _Bound:
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
    descriptor = _descriptor(record.driver_connection)
    if descriptor is None or not hasattr(select, "poll"):
        record.close()
        return
    kept = os.dup(descriptor)  # the driver's own is gone after close()
    try:
        record.close()
        poll = select.poll()
        poll.register(kept, select.POLLIN)
        poll.poll(_CLOSING_MILLISECONDS)
    finally:
        os.close(kept)


def interrupt(driver_connection: Any) -> None:
    """End the statement, if any, that another thread is running on the connection."""
    for name in ("cancel_safe", "cancel", "interrupt"):  # psycopg, psycopg2, sqlite3
        if hasattr(driver_connection, name):
            with suppress(Exception):
                getattr(driver_connection, name)()
            return


def _create(options: Options, **settings: Any) -> Engine:
    given = dict(options.engine_options)
    if options.is_memory or given.get("poolclass") is pool.QueuePool:
        given.pop("poolclass", None)  # ours is that, and more
    connect_args = {**given.pop("connect_args", {}), **settings.pop("connect_args", {})}
    try:
        return create_engine(options.url, connect_args=connect_args, **{**settings, **given})
    except ImportError as error:
        raise missing_driver(options.url, error) from error
    except ValueError:
        # The text is not repeated: it shows the value, which may be a secret.
        raise ConfigurationError(
            "create_engine() cannot convert a value in the query part of the URL, or an option"
        ) from None
    except (TypeError, sa_exc.ArgumentError) as error:
        # SQLAlchemy names the option and never its value.
        raise ConfigurationError(
            f"create_engine() refused the URL or an option: {error}"
        ) from error


def _write_options(options: Options) -> dict[str, Any]:
    settings = _common_options(options)
    if options.isolation_level is not None and not options.is_sqlite:
        settings["isolation_level"] = options.isolation_level
    return settings


def _read_options(options: Options) -> dict[str, Any]:
    settings = _common_options(options)
    # Each SELECT is its own transaction: no BEGIN, no COMMIT, no ROLLBACK to wait for.
    settings["isolation_level"] = "AUTOCOMMIT"
    settings["skip_autocommit_rollback"] = True
    return settings


def _common_options(options: Options) -> dict[str, Any]:
    settings: dict[str, Any] = {"hide_parameters": True}
    if options.is_sqlite:
        settings["connect_args"] = _sqlite.connect_args(options)
    if options.is_memory:
        settings["poolclass"] = MemoryPool
    elif not issubclass(options.engine_options.get("poolclass", pool.QueuePool), pool.NullPool):
        settings["pool_size"] = options.pool_size
        settings["max_overflow"] = options.max_overflow
        settings["pool_timeout"] = options.pool_timeout
        settings["poolclass"] = SharedQueuePool
    return settings


def _share_bound(options: Options, demand: Callable[[], int], *engines: Engine) -> None:
    if options.limit is None:
        return
    bound = _Bound(options.limit, engines, demand)
    for engine in engines:
        if isinstance(engine.pool, SharedQueuePool):
            engine.pool.share(bound)


def _keep_alive(engine: Engine) -> None:
    """Replace dead connections at checkout without a round trip.

    A closed connection makes its socket readable, which poll() sees at once. A
    readable socket may as well hold a notice or a TLS ticket, so only then, and
    after PING_AFTER_IDLE seconds, is the driver asked to ping.
    """

    def connected(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info[_POLLER] = _poller(record.driver_connection)

    def returned(dbapi_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED_AT] = monotonic()

    def checked_out(
        dbapi_connection: DBAPIConnection,
        record: ConnectionPoolEntry,
        proxy: PoolProxiedConnection,
    ) -> None:
        returned_at = record.info.get(_RETURNED_AT)
        if returned_at is None:  # it has just been opened
            return
        if _is_in_transaction(record.driver_connection):
            raise sa_exc.DisconnectionError("it was given back with a transaction open")
        if monotonic() - returned_at > PING_AFTER_IDLE or record.info[_POLLER]():
            _ping(engine, dbapi_connection)

    event.listen(engine, "connect", connected)
    event.listen(engine, "checkin", returned)
    event.listen(engine, "checkout", checked_out)


def _is_in_transaction(driver_connection: Any) -> bool:
    """Return whether psycopg knows of a transaction that a thread began after its unit's end."""
    libpq = getattr(driver_connection, "pgconn", None)
    return libpq is not None and libpq.transaction_status != _PQTRANS_IDLE


def _poller(driver_connection: Any) -> Callable[[], object]:
    """Return a function that tells whether the connection's socket is readable."""
    descriptor = _descriptor(driver_connection)
    if descriptor is None:  # the ping after a pause remains
        return bool
    if not hasattr(select, "poll"):
        return lambda: select.select([descriptor], [], [], 0)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: poll.poll(0)


def _descriptor(driver_connection: Any) -> int | None:
    """Return the descriptor of the connection's socket, if the driver shows it."""
    fileno = getattr(driver_connection, "fileno", None)
    return fileno() if fileno is not None else None


def _ping(engine: Engine, dbapi_connection: DBAPIConnection) -> None:
    dialect = engine.dialect
    try:
        dialect.do_ping(dbapi_connection)
    except dialect.loaded_dbapi.Error as error:
        # The pool then closes this connection and opens another in its place.
        raise sa_exc.DisconnectionError(f"the connection was lost while idle: {error}") from error


def _make_read_only(engine: Engine) -> None:
    """Refuse writes before they are sent, and have the server refuse the rest."""
    switch = _READ_ONLY_SWITCH.get(engine.dialect.name)

    def connected(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        if switch is not None:
            cursor = dbapi_connection.cursor()
            cursor.execute(switch)
            cursor.close()

    event.listen(engine, "connect", connected)
    # Events of the dialect: one on the Engine would cost each Connection much more.
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, _executing)
    if engine.dialect.name == "postgresql":
        event.listen(engine, "reset", _end_stream)


def _executing(cursor: Any, statement: str, *parameters_and_context: Any) -> None:
    context: DefaultExecutionContext = parameters_and_context[-1]
    _refuse_writes(statement, context)
    if context.dialect.name == "postgresql":
        _begin_for_stream(context)


def _refuse_to_write(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
    _refuse_writes(statement, rest[1])


def _refuse_writes(statement: str, context: DefaultExecutionContext) -> None:
    if context.isinsert or context.isupdate or context.isdelete or context.isddl:
        raise ReadOnlyUnit(
            f"A read-only unit of work cannot write ({statement.split(None, 1)[0]} was refused, "
            "nothing was sent): open the unit with begin() or session_per_request(database), "
            "without read_only=True"
        )


def _begin_for_stream(context: DefaultExecutionContext) -> None:
    """Give a server-side cursor the transaction that PostgreSQL wants for it."""
    options = context.execution_options
    if options.get("stream_results") or options.get("yield_per"):
        proxied = context.root_connection.connection
        driver_connection: Any = proxied.dbapi_connection
        if driver_connection.autocommit:
            # The driver sends BEGIN before the DECLARE; default_transaction_read_only holds.
            driver_connection.autocommit = False
            proxied.info[_STREAMING] = True
            if UNIT in proxied.info:
                proxied.info[UNIT].streams = True


def _end_stream(dbapi_connection: Any, record: ConnectionPoolEntry, state: object) -> None:
    if record.info.pop(_STREAMING, False):
        dbapi_connection.rollback()
        dbapi_connection.autocommit = True
