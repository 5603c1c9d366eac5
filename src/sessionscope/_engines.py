"""The pair of engines: a writing one, a read-only one, and one bound over both."""

import os
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import copy
from threading import TIMEOUT_MAX, Lock
from typing import Any

from sqlalchemy import Engine, pool
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from sessionscope import _sqlite
from sessionscope._async_backends import AsyncBackends
from sessionscope._backends import Backends, limit_connecting
from sessionscope._commit import note_commits
from sessionscope._credentials import ask_for_credentials
from sessionscope._identity import let_ride
from sessionscope._liveness import keep_alive
from sessionscope._marker import sweep_markers
from sessionscope._mysql import limit_statements
from sessionscope._options import Options, missing_driver
from sessionscope._pool import (
    AsyncSharedQueuePool,
    CountedNullPool,
    MemoryPool,
    SharedQueuePool,
)
from sessionscope._pooler import READ_ONLY, without_a_session
from sessionscope._read_only import make_read_only, make_view_read_only
from sessionscope._signal import AsyncSignal, Signal
from sessionscope.exc import ConfigurationError

# create_engine(), or what makes the engine of an AsyncEngine.
CreateEngine = Callable[..., Engine]


class Engines:
    """The writing and the read-only engine of one database.

    Both are plain engines. Together they never hold more connections than
    ``options.limit``: at the bound, the one closes an idle connection before the
    other opens one. *demand* tells how many units run or wait.
    """

    def __init__(self, options: Options, create: CreateEngine, demand: Callable[[], int]) -> None:
        self.options = options
        self._views: dict[tuple[bool, str | None, bool], Engine] = {}
        self._lock = Lock()
        signal = AsyncSignal() if options.is_async else Signal()
        backends = AsyncBackends if options.is_async else Backends
        self.backends = backends(options.limit, demand, self._pools, signal)
        self._reserve = backends(1, _none, self._pools_in_reserve, signal)
        self._reserved: tuple[Engine, ...] = ()
        self.write = _create(options, create, **_write_options(options))
        if options.is_memory:
            # One connection, for one user at a time: an AUTOCOMMIT view of it would
            # show readers what a writer has not committed.
            assert isinstance(self.write.pool, MemoryPool)
            self.write.pool.timeout = min(options.pool_timeout, TIMEOUT_MAX)
            self.write.pool.share(self.backends)
            _sqlite.prepare_memory(self.write)
            self.read = _sqlite.memory_reader(self.write)
            make_view_read_only(self.read)
            return
        self.read = _create(options, create, **_read_options(options))
        for engine in (self.write, self.read):
            if options.is_sqlite:
                _sqlite.prepare_file(engine, writes=engine is self.write)
            else:
                keep_alive(engine)
                limit_connecting(engine)
                let_ride(engine)
                note_commits(engine)
                limit_statements(engine)
            if options.credentials is not None:
                ask_for_credentials(engine, options.credentials)
            assert isinstance(engine.pool, (SharedQueuePool, CountedNullPool))
            engine.pool.share(self.backends)
        make_read_only(self.read, by_session=options.pooler is None)
        if options.quoted_outcome_table is not None:
            sweep_markers(self.write, options.quoted_outcome_table)
        _all.add(self)

    def leave_to_parent(self) -> None:
        """Open connections of one's own from now on: what a forked child must do."""
        for engine in (self.write, self.read, *self._reserved):
            # Collected as garbage, they would end what they lead to.
            _of_parents.append(engine.pool)
            engine.dispose(close=False)

    def _pools(self) -> list[SharedQueuePool]:
        return _pools_of(self.read, self.write)

    def _pools_in_reserve(self) -> list[SharedQueuePool]:
        return _pools_of(*self._reserved)

    def bind(
        self, *, read_only: bool, isolation_level: str | None, independent: bool = False
    ) -> Engine:
        """Return the engine for a unit of work, as a view when it names an isolation level.

        An *independent* one has the same settings and listeners, and one connection of its
        own in reserve. SQLite, which has one writer, has none.
        """
        engine = self.read if read_only else self.write
        independent = independent and not self.options.is_sqlite
        if isolation_level is None and not independent:
            return engine
        key = read_only, isolation_level, independent
        if key not in self._views:
            with self._lock:
                engine = self._in_reserve(read_only=read_only) if independent else engine
                self._views.setdefault(key, self._view(engine, isolation_level, read_only))
        return self._views[key]

    def _view(self, engine: Engine, isolation_level: str | None, read_only: bool) -> Engine:
        if isolation_level is None:
            return engine
        if self.options.is_sqlite:
            return _sqlite.at_isolation_level(engine, isolation_level, read_only=read_only)
        return engine.execution_options(isolation_level=isolation_level)

    def _in_reserve(self, *, read_only: bool) -> Engine:
        if not self._reserved:
            self._reserved = tuple(copy(engine) for engine in (self.write, self.read))
            for engine in self._reserved:
                engine.pool = engine.pool.recreate()
                assert isinstance(engine.pool, (SharedQueuePool, CountedNullPool))
                engine.pool.share(self._reserve)
        return self._reserved[read_only]

    @contextmanager
    def connections_from(self, other: pool.Pool, dialect: Dialect | None) -> Generator[None]:
        """Take all connections from another pool meanwhile, which may be another database's."""
        if not self.options.is_sqlite:
            self._in_reserve(read_only=False)  # made now, they are not made of what stands in
        engines = (self.write, self.read, *self._reserved)
        kept = [(engine, engine.pool, engine.dialect) for engine in engines]
        views, self._views = self._views, {}
        try:
            for engine in engines:
                engine.pool = other
                engine.dialect = dialect or engine.dialect
            yield
        finally:
            for engine, own_pool, own_dialect in kept:
                engine.pool, engine.dialect = own_pool, own_dialect
            self._views = views

    def renew(self, proxied: PoolProxiedConnection) -> None:
        """Replace, at their next checkout, all connections as old as *proxied*, or older."""
        for engine in (self.write, self.read, *self._reserved):
            # What SQLAlchemy does after a lost connection, for more than its own pool.
            engine.pool._invalidate(proxied, _checkin=False)  # pyright: ignore[reportPrivateUsage]

    @property
    def idle(self) -> int:
        """How many open connections no one uses."""
        pools = {
            id(engine.pool): engine.pool for engine in (self.write, self.read, *self._reserved)
        }
        return sum(p.checkedin() for p in pools.values() if isinstance(p, pool.QueuePool))

    async def settle(self) -> None:
        """Wait until the connections that tasks have closed are gone."""
        for backends in (self.backends, self._reserve):
            assert isinstance(backends, AsyncBackends)
            await backends.settle()

    def dispose(self) -> None:
        """Close the connections that are not in use; later ones are opened anew."""
        engines = (self.write, self.read, *self._reserved)
        for engine in {id(engine.pool): engine for engine in engines}.values():
            engine.dispose()


def _create(options: Options, create: CreateEngine, **settings: Any) -> Engine:
    given = dict(options.engine_options)
    given.pop("poolclass", None)  # ours is that, and more
    connect_args = {**given.pop("connect_args", {}), **settings.pop("connect_args", {})}
    if "execution_options" in settings:
        own = settings.pop("execution_options")
        given["execution_options"] = {**given.get("execution_options", {}), **own}
    try:
        engine = create(options.url, connect_args=connect_args, **{**settings, **given})
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
    if options.is_async:
        # SQLAlchemy then leaves connections that the garbage collector finds to their pool.
        engine.dialect.has_terminate = True
    return engine


def _write_options(options: Options) -> dict[str, Any]:
    settings = _common_options(options)
    if options.isolation_level is not None and not options.is_sqlite:
        settings["isolation_level"] = options.isolation_level
    return settings


def _read_options(options: Options) -> dict[str, Any]:
    settings = _common_options(options)
    if options.pooler is not None:
        settings["execution_options"] = READ_ONLY
        return settings
    # Each SELECT is its own transaction: no BEGIN, no COMMIT, no ROLLBACK to wait for.
    settings["isolation_level"] = "AUTOCOMMIT"
    settings["skip_autocommit_rollback"] = True
    return settings


def _common_options(options: Options) -> dict[str, Any]:
    settings: dict[str, Any] = {"hide_parameters": True}
    if options.is_sqlite:
        settings["connect_args"] = _sqlite.connect_args(options)
    if options.pooler is not None:
        settings["connect_args"] = without_a_session(options.url)
    if options.is_memory:
        settings["poolclass"] = MemoryPool
    elif issubclass(options.engine_options.get("poolclass", pool.QueuePool), pool.NullPool):
        settings["poolclass"] = CountedNullPool
    else:
        settings["pool_size"] = options.pool_size
        settings["max_overflow"] = options.max_overflow
        settings["pool_timeout"] = options.pool_timeout
        settings["poolclass"] = AsyncSharedQueuePool if options.is_async else SharedQueuePool
    return settings


def _pools_of(*engines: Engine) -> list[SharedQueuePool]:
    # Asked anew each time: Engine.dispose() replaces the pool.
    return [engine.pool for engine in engines if isinstance(engine.pool, SharedQueuePool)]


def _none() -> int:
    return 0


# Those that have pools; a database in memory is copied by a fork.
_all: weakref.WeakSet[Engines] = weakref.WeakSet()
# The pools of the processes that this one was forked from.
_of_parents: list[pool.Pool] = []


def _leave_all_to_parent() -> None:
    for engines in _all:
        engines.leave_to_parent()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_all_to_parent)
