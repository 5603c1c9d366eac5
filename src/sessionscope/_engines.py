"""The pair of engines: a writing one, a read-only one, and one bound over both."""

import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, create_engine, pool
from sqlalchemy import exc as sa_exc

from sessionscope import _sqlite
from sessionscope._liveness import keep_alive
from sessionscope._options import Options, missing_driver
from sessionscope._pool import Bound, MemoryPool, SharedQueuePool
from sessionscope._read_only import make_read_only, make_view_read_only
from sessionscope.exc import ConfigurationError


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
            make_view_read_only(self.read)
            return
        self.read = _create(options, **_read_options(options))
        for engine in (self.write, self.read):
            if options.is_sqlite:
                _sqlite.prepare_file(engine, writes=engine is self.write)
            else:
                keep_alive(engine)
        make_read_only(self.read)
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
    bound = Bound(options.limit, engines, demand)
    for engine in engines:
        if isinstance(engine.pool, SharedQueuePool):
            engine.pool.share(bound)
