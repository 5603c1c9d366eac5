"""A driver that fails at one call: sqlite3 and aiosqlite, with the faults that a Script places.

SQLAlchemy sees a module like any other driver's, and the database behind it is real. Two dialects
use it: SQLite's own, and "scripted", which is none that this library knows by name, as that of
a server would be.
"""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from sqlite3 import dbapi2
from types import ModuleType
from typing import Any, TypeVar

import aiosqlite
from aiosqlite.context import Result
from sqlalchemy import URL, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_dbapi, SQLiteDialect_aiosqlite
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

T = TypeVar("T")
ConnectionT = TypeVar("ConnectionT", bound=sqlite3.Connection)


class Stop(BaseException):
    """What no one may take for an error and go on."""


@dataclass(frozen=True)
class Fault:
    """What happens at a call.

    *make* returns what is raised; without it the task is cancelled. *loses* the connection, or
    keeps it. *late*: what was called has happened.
    """

    name: str
    make: Callable[[], BaseException] | None
    loses: bool = False
    late: bool = False

    def __str__(self) -> str:
        return f"{self.name} after" if self.late else self.name


ERROR = Fault("error", lambda: sqlite3.OperationalError("disk I/O error"))
DISCONNECT = Fault(
    "disconnect",
    # By this text SQLite's dialects know that a connection is gone.
    lambda: sqlite3.ProgrammingError("Cannot operate on a closed database."),
    loses=True,
)
INTERRUPT = Fault("interrupt", KeyboardInterrupt)
STOP = Fault("stop", Stop)
CANCEL = Fault("cancel", None)


class Script:
    """At which calls which faults strike, what was called, and which connections are open."""

    def __init__(self, *, like_a_server: bool = False) -> None:
        self.like_a_server = like_a_server
        self.calls: list[str] = []
        self.open: set[object] = set()
        self.task: asyncio.Task[Any] | None = None  # which a fault cancels
        self._faults: Mapping[int, Fault] = {}

    def start(self, faults: Mapping[int, Fault]) -> None:
        """Count the calls from one again, and let *faults* strike at them."""
        self.calls = []
        self._faults = faults

    def next(self, name: str) -> Fault | None:
        """Count a call; return the fault that strikes at it."""
        self.calls.append(name)
        return self._faults.get(len(self.calls))

    def perform(self, name: str, connection: "Connection | None", call: Callable[[], T]) -> T:
        """Make a driver's call, or let it fail."""
        fault = self.next(name)
        if fault is None:
            return call()
        assert fault.make is not None
        if fault.late:
            call()
        if fault.loses and connection is not None:
            connection.lose()
        raise fault.make()

    async def perform_async(
        self, name: str, connection: "AioConnection | None", call: Callable[[], Awaitable[T]]
    ) -> T:
        """Async version of :meth:`perform`."""
        fault = self.next(name)
        if fault is None:
            return await call()
        if fault.make is None:
            return await self._cancel(call, late=fault.late)
        if fault.late:
            await call()
        if fault.loses and connection is not None:
            await connection.lose()
        raise fault.make()

    async def _cancel(self, call: Callable[[], Awaitable[T]], *, late: bool) -> T:
        assert self.task is not None
        if late:
            result = await call()
            self.task.cancel()
            return result
        self.task.cancel()
        return await call()


class Connection(sqlite3.Connection):
    """A connection of sqlite3 that follows a script."""

    script: Script

    # sqlite3's execute() is made of these two.
    def cursor(self, factory: object = None) -> "Cursor":  # type: ignore[override]  # ours only
        return self.script.perform("cursor", self, lambda: sqlite3.Connection.cursor(self, Cursor))

    def commit(self) -> None:
        self.script.perform("commit", self, lambda: sqlite3.Connection.commit(self))

    def rollback(self) -> None:
        self.script.perform("rollback", self, lambda: sqlite3.Connection.rollback(self))

    def close(self) -> None:
        """Close, and fail afterwards: what has failed to close is closed all the same."""
        try:
            self.script.perform("close", None, lambda: None)
        finally:
            self.lose()

    def lose(self) -> None:
        """Close without counting it as a call."""
        self.script.open.discard(self)
        # SQLite would keep its locks as long as someone refers to a cursor; a server does not.
        with suppress(sqlite3.Error):
            sqlite3.Connection.rollback(self)
        sqlite3.Connection.close(self)


class Cursor(sqlite3.Cursor):
    """A cursor of sqlite3 that follows the script of its connection."""

    def execute(self, *args: Any) -> "Cursor":
        self._perform("execute", lambda: sqlite3.Cursor.execute(self, *args))
        return self

    def executemany(self, *args: Any) -> "Cursor":
        self._perform("execute", lambda: sqlite3.Cursor.executemany(self, *args))
        return self

    def fetchone(self) -> Any:
        return self._perform("fetch", lambda: sqlite3.Cursor.fetchone(self))

    def fetchmany(self, size: int | None = None) -> list[Any]:
        size = self.arraysize if size is None else size
        return self._perform("fetch", lambda: sqlite3.Cursor.fetchmany(self, size))

    def fetchall(self) -> list[Any]:
        return self._perform("fetch", lambda: sqlite3.Cursor.fetchall(self))

    def close(self) -> None:
        self._perform("cursor.close", lambda: sqlite3.Cursor.close(self))

    def _perform(self, name: str, call: Callable[[], T]) -> T:
        connection = self.connection
        assert isinstance(connection, Connection)
        return connection.script.perform(name, connection, call)


class AioConnection(aiosqlite.Connection):
    """A connection of aiosqlite that follows a script."""

    script: Script

    async def _connect(self) -> aiosqlite.Connection:
        try:
            connection = await self.script.perform_async("connect", None, super()._connect)
        except BaseException:
            if self._running and (stopped := self.stop()) is not None:
                await stopped  # its thread, which was started for it
            raise
        self.script.open.add(self)
        return connection

    def cursor(self) -> "Result[AioCursor]":  # type: ignore[override]  # ours only
        return Result(self.script.perform_async("cursor", self, self._cursor))

    async def _cursor(self) -> "AioCursor":
        cursor = await self._execute(self._conn.cursor)  # type: ignore[no-untyped-call]  # aiosqlite's
        return AioCursor(self, cursor)

    async def commit(self) -> None:
        await self.script.perform_async("commit", self, super().commit)

    async def rollback(self) -> None:
        await self.script.perform_async("rollback", self, super().rollback)

    async def close(self) -> None:
        """Close, and fail afterwards: what has failed to close is closed all the same."""
        if self._connection is None:
            return
        try:
            await self.script.perform_async("close", None, _nothing)
        finally:
            await self.lose()
            await super().close()

    async def lose(self) -> None:
        """Close without counting it as a call."""
        self.script.open.discard(self)
        with suppress(sqlite3.Error, ValueError):
            await super().rollback()
        if self.script.like_a_server:
            # SQLAlchemy's adapter takes a COMMIT on what aiosqlite has closed for done.
            await self._execute(self._conn.close)  # type: ignore[no-untyped-call]  # aiosqlite's
        else:
            await super().close()

    def stop(self) -> "asyncio.Future[Any] | None":
        self.script.open.discard(self)
        return super().stop()


class AioCursor(aiosqlite.Cursor):
    """A cursor of aiosqlite that follows the script of its connection."""

    async def execute(self, sql: str, parameters: Iterable[Any] | None = None) -> aiosqlite.Cursor:
        return await self._perform(
            "execute", lambda: super(AioCursor, self).execute(sql, parameters)
        )

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> aiosqlite.Cursor:
        call = super().executemany
        return await self._perform("execute", lambda: call(sql, parameters))

    async def fetchall(self) -> Iterable[sqlite3.Row]:
        return await self._perform("fetch", super().fetchall)

    async def close(self) -> None:
        await self._perform("cursor.close", super().close)

    async def _perform(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        connection = self._conn
        assert isinstance(connection, AioConnection)
        try:
            return await connection.script.perform_async(name, connection, call)
        except BaseException:
            if connection.script.like_a_server:  # which keeps no lock for what has failed
                with suppress(sqlite3.Error, ValueError):
                    await super().close()
            raise


class ServerDialect(SQLiteDialect_pysqlite):
    """A dialect whose database this library does not know by its name."""

    name = "scripted"
    driver = "fake"
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return QueuePool


class AioServerDialect(SQLiteDialect_aiosqlite):
    """Async version of :class:`ServerDialect`."""

    name = "scripted"
    driver = "aio"
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool


registry.register("scripted", __name__, "ServerDialect")
registry.register("scripted.aio", __name__, "AioServerDialect")


def driver(script: Script) -> ModuleType:
    """Return a DBAPI module whose connections follow *script*: ``create_engine(module=...)``."""
    return _like(dbapi2, partial(_connect, script))


def async_driver(script: Script) -> Any:
    """Async version of :func:`driver`."""
    module = _like(aiosqlite, partial(_aio_connect, script))
    return AsyncAdapt_aiosqlite_dbapi(module, sqlite3)


def _like(module: ModuleType, connect: Callable[..., object]) -> ModuleType:
    other = ModuleType("scripted")
    vars(other).update({**vars(module), "connect": connect})
    return other


def _connect(script: Script, *args: Any, **kwargs: Any) -> Connection:
    def connect() -> Connection:
        return _in_no_hurry(sqlite3.connect(*args, factory=Connection, **kwargs))

    connection = script.perform("connect", None, connect)
    connection.script = script
    script.open.add(connection)
    return connection


def _aio_connect(script: Script, database: str, **kwargs: Any) -> AioConnection:
    connection = AioConnection(lambda: _in_no_hurry(sqlite3.connect(database, **kwargs)), 64)
    connection.script = script
    return connection


def _in_no_hurry(connection: ConnectionT) -> ConnectionT:
    """Let a new connection not wait for the disk, which no test here pulls out."""
    sqlite3.Connection.cursor(connection, sqlite3.Cursor).execute("PRAGMA synchronous = OFF")
    return connection


async def _nothing() -> None:
    pass
