"""Settings and URL in, engine and session options out."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from sqlalchemy import URL, make_url
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sessionscope._credentials import Credentials
from sessionscope.exc import ConfigurationError

# SQLAlchemy's names; each database takes those it knows.
ISOLATION_LEVELS = (
    "AUTOCOMMIT",
    "READ COMMITTED",
    "READ UNCOMMITTED",
    "REPEATABLE READ",
    "SERIALIZABLE",
)

# What may stand between here and the server, and give a connection's next transaction to another.
POOLERS = ("pgbouncer-transaction",)

_EXAMPLE = "postgresql+psycopg://user:password@host/dbname or sqlite:///file.db"

_INSTALL = {
    "psycopg": 'pip install "sessionscope[postgresql]"',
    "pymysql": 'pip install "sessionscope[mysql]"',
    "psycopg2": "pip install psycopg2-binary",
    "MySQLdb": 'pip install mysqlclient, or write "mysql+pymysql://"',
    "greenlet": 'pip install "sessionscope[asyncio]"',
}

_SYNC_DRIVERS = {"postgresql": "+psycopg", "mysql": "+pymysql", "mariadb": "+pymysql"}
_ASYNC_DRIVERS = {
    "postgresql": "+asyncpg",
    "mysql": "+asyncmy",
    "mariadb": "+asyncmy",
    "sqlite": "+aiosqlite",
}

# What Database takes by name, so that it is never given twice.
_OWN_ENGINE_OPTIONS = ("pool_size", "max_overflow", "pool_timeout", "isolation_level")
# What opens a connection in the place of the dialect.
_CREATORS = ("creator", "async_creator")
_TABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", re.ASCII)
_OWN_SESSION_OPTIONS = {
    "bind": "the Database binds its sessions itself",
    "class_": "write Database(..., session_class=...)",
    "close_resets_only": "a session that was closed stays closed here",
}


@dataclass(frozen=True)
class Options:
    """What a Database was asked for, checked."""

    url: URL
    pool_size: int
    max_overflow: int
    pool_timeout: float
    max_waiting: int | None
    timeout: float | None
    credentials: Credentials | None = field(repr=False)
    pooler: str | None
    outcome_table: str | None
    isolation_level: str | None
    session_class: type[Any]
    session_base: type[Any]
    is_async: bool
    engine_options: Mapping[str, Any] = field(repr=False)
    session_options: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        _check_number("pool_size", self.pool_size, at_least=0)
        _check_number("max_overflow", self.max_overflow, at_least=-1)
        _check_number("pool_timeout", self.pool_timeout, at_least=0, integer=False)
        if self.max_waiting is not None:
            _check_number("max_waiting", self.max_waiting, at_least=0)
        check_timeout(self.timeout)
        self._check_pooler()
        self._check_outcome_table()
        self._check_credentials()
        session_class, base = cast(object, self.session_class), self.session_base
        if not (isinstance(session_class, type) and issubclass(session_class, base)):
            raise ConfigurationError(
                f"session_class={session_class!r} is not a subclass of "
                f"{base.__module__.removesuffix('.session')}.{base.__name__}"
            )
        check_isolation_level(self.isolation_level)
        if self.isolation_level == "AUTOCOMMIT":
            raise ConfigurationError(
                'isolation_level="AUTOCOMMIT" leaves nothing to roll back: give it to the one '
                'unit that needs it, begin(isolation_level="AUTOCOMMIT")'
            )
        for name in _OWN_ENGINE_OPTIONS:
            if name in self.engine_options:
                raise ConfigurationError(
                    f"engine_options has {name!r}: write Database(..., {name}=...) instead"
                )
        pool_class = self.engine_options.get("poolclass", QueuePool)
        allowed = (QueuePool, StaticPool) if self.is_memory else (QueuePool,)
        if pool_class not in allowed and not issubclass(pool_class, NullPool):
            raise ConfigurationError(
                f"engine_options has poolclass={pool_class.__name__}: write NullPool for no pool, "
                "or leave it out"
            )
        for name, mend in _OWN_SESSION_OPTIONS.items():
            if name in self.session_options:
                raise ConfigurationError(f"session_options has {name!r}: {mend}")

    def _check_pooler(self) -> None:
        if self.pooler is None:
            return
        if self.pooler not in POOLERS:
            raise ConfigurationError(f"pooler={self.pooler!r} is unknown: write {POOLERS[0]!r}")
        if self.url.get_backend_name() != "postgresql":
            raise ConfigurationError(
                f"pooler={self.pooler!r} stands in front of PostgreSQL, and this database is "
                f"{self.url.get_backend_name()}: leave it out"
            )

    def _check_outcome_table(self) -> None:
        if self.outcome_table is None:
            return
        if self.url.get_backend_name() not in ("mysql", "mariadb"):
            raise ConfigurationError(
                f"outcome_table={self.outcome_table!r} is for MySQL and MariaDB, and this database "
                f"is {self.url.get_backend_name()}: leave it out"
            )
        if not _TABLE.fullmatch(self.outcome_table):
            raise ConfigurationError(
                f"outcome_table={self.outcome_table!r} is not a table's name: write "
                "'sessionscope_outcome', or 'schema.sessionscope_outcome'"
            )

    def _check_credentials(self) -> None:
        if self.credentials is None:
            return
        if not callable(self.credentials):
            raise ConfigurationError(
                "credentials must be a function that returns a password, or a user and a password: "
                "a password that never changes belongs into the URL"
            )
        if self.is_sqlite:
            raise ConfigurationError(
                "credentials are for servers, and SQLite knows no users: leave them out"
            )
        for name in _CREATORS:
            if name in self.engine_options:
                raise ConfigurationError(
                    f"engine_options has {name!r}, which logs in by itself, so that credentials "
                    "would never be asked for: call them there, or leave it out"
                )

    @property
    def safe_url(self) -> str:
        """The URL without its secrets, for messages."""
        query = {
            key: "***" if "password" in key.lower() or "passwd" in key.lower() else value
            for key, value in self.url.query.items()
        }
        return self.url.set(query=query).render_as_string(hide_password=True)

    @property
    def quoted_outcome_table(self) -> str | None:
        """The table for outcomes as MySQL wants to read it."""
        table = self.outcome_table
        return None if table is None else ".".join(f"`{part}`" for part in table.split("."))

    @cached_property
    def is_sqlite(self) -> bool:
        """Whether the database is SQLite, in a file or in memory."""
        return self.url.get_backend_name() == "sqlite"

    @cached_property
    def is_memory(self) -> bool:
        """Whether the database is an SQLite database that lives in one connection."""
        # The rule of SQLAlchemy's pysqlite dialect, which keeps it private.
        return self.is_sqlite and (
            not self.url.database
            or self.url.database in (":memory:", "file::memory:")
            or self.url.query.get("mode") == "memory"
        )

    @property
    def limit(self) -> int | None:
        """How many connections may be open at once, ``None`` for no limit."""
        if self.is_memory:
            return 1
        pool_class = self.engine_options.get("poolclass", QueuePool)
        unlimited = issubclass(pool_class, NullPool) or not self.pool_size or self.max_overflow < 0
        return None if unlimited else self.pool_size + self.max_overflow


def read_url(url: str | URL, *, is_async: bool) -> URL:
    """Return *url* as that of a driver of the asked kind, or raise ConfigurationError.

    ``postgresql://`` means psycopg 3, which has both, on every version of SQLAlchemy.
    """
    parsed = url if isinstance(url, URL) else _parse(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if _dialect(parsed, is_async=is_async).is_async is is_async:
        return parsed
    kind, right, wrong = (
        ("a synchronous", "Database", "AsyncDatabase")
        if is_async
        else ("an asynchronous", "AsyncDatabase", "Database")
    )
    raise ConfigurationError(
        f"{parsed.drivername!r} is {kind} driver, and this is {wrong}: use {right}, or write "
        f"{_other_name(parsed, is_async=is_async)!r} in its place"
    )


def url_from_env(variable: str, default: str | URL | None) -> str | URL:
    """Return the URL in the environment variable, else *default*."""
    value = os.environ.get(variable, "").strip() or default
    if value is None:
        raise ConfigurationError(
            f"The environment variable {variable} is not set: set it to a database URL such as "
            f"{_EXAMPLE}, or give a default: Database.from_env({variable!r}, default=...)"
        )
    return value


def check_isolation_level(level: str | None) -> None:
    """Raise ConfigurationError if *level* is not a name that SQLAlchemy uses."""
    if level is not None and level not in ISOLATION_LEVELS:
        raise ConfigurationError(
            f"isolation_level={level!r} is unknown: write one of {', '.join(ISOLATION_LEVELS)}"
        )


def check_timeout(timeout: float | None) -> None:
    """Raise ConfigurationError if *timeout* is not a number of seconds that can pass."""
    if timeout is not None:
        _check_number("timeout", timeout, at_least=0, integer=False)
        if not timeout:
            raise ConfigurationError("timeout=0 leaves no time: None is no limit")


def missing_driver(url: URL, error: ImportError) -> ConfigurationError:
    """Return the error that names what to install for *url*."""
    module = error.name or str(error)
    mend = _INSTALL.get(module, f"pip install {module}")
    return ConfigurationError(
        f"The driver of {url.drivername!r} is not installed (no module {module!r}): {mend}"
    )


def _parse(url: object) -> URL:
    if not isinstance(url, str):
        raise ConfigurationError(
            f"A database URL must be a string or a sqlalchemy.URL, not {type(url).__name__}: "
            f"write {_EXAMPLE}"
        )
    scheme = url.partition(":")[0]
    if scheme in ("postgres", "postgres+psycopg"):
        raise ConfigurationError(
            "The URL begins with 'postgres://', which SQLAlchemy does not know: "
            "write 'postgresql://' in its place"
        )
    try:
        return make_url(url)
    except (sa_exc.ArgumentError, ValueError):
        # The text is not repeated, nor its cause shown: it may hold a password.
        raise ConfigurationError(
            f"The database URL does not parse (it has {len(url)} characters): write {_EXAMPLE}. "
            "Special characters in a password must be escaped with urllib.parse.quote_plus(), "
            "and a port must be a number"
        ) from None


def _dialect(url: URL, *, is_async: bool) -> type[Dialect]:
    try:
        return url.get_dialect(_is_async=is_async)
    except sa_exc.NoSuchModuleError:
        raise ConfigurationError(
            f"The database or driver {url.drivername!r} is not known to SQLAlchemy: "
            f"write {_EXAMPLE}, or install the package that provides it"
        ) from None
    except ImportError as error:
        raise missing_driver(url, error) from error


def _other_name(url: URL, *, is_async: bool) -> str:
    backend = url.get_backend_name()
    drivers = _ASYNC_DRIVERS if is_async else _SYNC_DRIVERS
    return f"{backend}{drivers.get(backend, '')}://"


def _check_number(name: str, value: object, *, at_least: int, integer: bool = True) -> None:
    numbers = int if integer else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers)
        or not math.isfinite(value)
        or value < at_least
    ):
        kind = "a whole number" if integer else "a number of seconds"
        raise ConfigurationError(f"{name}={value!r} must be {kind}, {at_least} or more")
