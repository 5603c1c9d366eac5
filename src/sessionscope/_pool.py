"""The pair of engines: a writing one, a read-only one, and one bound over both."""

import select
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, pool
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util.queue import Empty, Queue

from sessionscope import _sqlite
from sessionscope._guards import UNIT
from sessionscope._options import Options, missing_driver
from sessionscope.exc import ConfigurationError, ReadOnlyUnit

# A server, proxy or firewall may drop a connection without a word; one that was
# idle for longer than this many seconds is pinged before it is used again.
PING_AFTER_IDLE = 30.0

_READ_ONLY_SWITCH = {
    "postgresql": "SET default_transaction_read_only = on",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = 1",
}

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
            # One connection is all there is: an AUTOCOMMIT view of it would show
            # readers what a writer has not committed.
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

    _queue_class = _Queue
    bound: "_Bound | None" = None

    def share(self, bound: "_Bound | None") -> None:
        """Count this pool's connections in *bound*."""
        self.bound = bound
        assert isinstance(self._pool, _Queue)
        self._pool.bound = bound

    def _do_get(self) -> ConnectionPoolEntry:
        deadline = monotonic() + self._timeout
        while True:
            try:
                return super()._do_get()
            except _NoRoom:
                assert self.bound is not None
                if not self.bound.wait(deadline - monotonic()):
                    raise sa_exc.TimeoutError(
                        f"All {self.bound.limit} connections of both engines are in use; none "
                        f"came free in {self._timeout:g} s (pool_timeout)"
                    ) from None

    def _inc_overflow(self) -> bool:
        """Reserve the place of a connection that is about to be opened."""
        if not super()._inc_overflow():
            return False
        if self.bound is not None and not self.bound.make_room():
            super()._dec_overflow()
            raise _NoRoom
        return True

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        if self.bound is not None:
            self.bound.notify()

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
        record.close()
        self._dec_overflow()
        return True


class _NoRoom(Exception):
    """The bound over both pools is reached and no connection is idle."""


class _Bound:
    """At most *limit* connections over the pools of several engines."""

    def __init__(self, limit: int, engines: tuple[Engine, ...], demand: Callable[[], int]) -> None:
        self.limit = limit
        self._engines = engines
        self._demand = demand
        self._changed = threading.Condition()
        self._waiting = 0

    def _pools(self) -> list[SharedQueuePool]:
        # Asked anew each time: Engine.dispose() replaces the pool.
        return [e.pool for e in self._engines if isinstance(e.pool, SharedQueuePool)]

    def is_in_demand(self) -> bool:
        """Return whether as many units run or wait as there are connections."""
        return self._demand() >= _count(self._pools())

    def make_room(self) -> bool:
        """Close idle connections until the bound holds; return whether it does."""
        with self._changed:
            pools = self._pools()
            while _count(pools) > self.limit:
                if not any(p.close_one_idle() for p in pools):
                    return False
        return True

    def wait(self, timeout: float) -> bool:
        """Wait until a connection was given back; return False at the timeout."""
        with self._changed:
            self._waiting += 1
            try:
                return timeout > 0 and self._changed.wait(timeout)
            finally:
                self._waiting -= 1

    def notify(self) -> None:
        if self._waiting:
            with self._changed:
                self._changed.notify_all()


def _count(pools: list[SharedQueuePool]) -> int:
    return sum(p.size() + p.overflow() for p in pools)


def _create(options: Options, **settings: Any) -> Engine:
    given = dict(options.engine_options)
    connect_args = {**given.pop("connect_args", {}), **settings.pop("connect_args", {})}
    try:
        return create_engine(options.url, connect_args=connect_args, **{**settings, **given})
    except ImportError as error:
        raise missing_driver(options.url, error) from error
    except (TypeError, sa_exc.ArgumentError) as error:
        # SQLAlchemy names the option and never its value.
        raise ConfigurationError(f"create_engine() refused an option: {error}") from error


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
        settings["poolclass"] = pool.StaticPool
    elif issubclass(options.engine_options.get("poolclass", pool.QueuePool), pool.QueuePool):
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
        if monotonic() - returned_at > PING_AFTER_IDLE or record.info[_POLLER]():
            _ping(engine, dbapi_connection)

    event.listen(engine, "connect", connected)
    event.listen(engine, "checkin", returned)
    event.listen(engine, "checkout", checked_out)


def _poller(driver_connection: Any) -> Callable[[], object]:
    """Return a function that tells whether the connection's socket is readable."""
    try:
        descriptor = driver_connection.fileno()
    except AttributeError:  # no socket to be had: the ping after a pause remains
        return bool
    if not hasattr(select, "poll"):
        return lambda: select.select([descriptor], [], [], 0)[0]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: poll.poll(0)


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
