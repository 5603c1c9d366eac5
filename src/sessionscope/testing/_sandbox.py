"""sandbox and async_sandbox: what a test writes is rolled back at its end."""

from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar, cast

from sqlalchemy import Connection, Engine, Pool, event
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from sessionscope import exc
from sessionscope.testing._stack import Stack
from sessionscope.testing._stand_in import SandboxPool, StandIn, executing_through_stand_ins


class _Database(Protocol):
    """A Database or an AsyncDatabase, which only those import who have greenlet."""

    @property
    def engine(self) -> Any: ...
    @property
    def read_engine(self) -> Any: ...
    def connections_from(
        self, pool: Pool, dialect: Dialect | None = None
    ) -> AbstractContextManager[None]: ...


DatabaseT = TypeVar("DatabaseT", bound=_Database)


@contextmanager
def sandbox(database: DatabaseT, *, bind: Engine | None = None) -> Generator[DatabaseT]:
    """Roll back at the end of the block whatever is written through *database*.

    All that the Database hands out, to any thread, task or request, shares one connection and
    one transaction: units of work, sessions of its ``sessionmaker``, connections of its engines.
    Each of their transactions is a savepoint in it, so ``commit()`` is real to the code that
    calls it and hooks run, and all see what was written before. Those of other threads take
    turns: see ``sessionscope.testing._stack``. Isolation levels other than that of the
    Database, and what must commit on its own, are not to be had on one connection: an
    ``independent`` unit is undone with the one around it.

    With *bind*, an Engine of another database, say ``Database("sqlite://").engine``, that
    database stands in for the real one, which is never connected to. Costs five round trips.
    Raises SandboxError if the transaction was ended behind the sandbox's back, or cannot begin
    because another process writes to the SQLite file, IntegrityError if a deferred constraint does
    not hold, and ConfigurationError.
    """
    _check_database(database, is_async=False)
    box = _Sandbox(database, bind)
    box.open()
    try:
        yield database
    except BaseException as error:
        box.close_after(error)
        raise
    else:
        box.close(check=True)


@asynccontextmanager
async def async_sandbox(database: DatabaseT, *, bind: Any = None) -> AsyncGenerator[DatabaseT]:
    """Async version of :func:`sandbox`, on one event loop; *bind* is an AsyncEngine."""
    _check_database(database, is_async=True)
    box = _Sandbox(database, bind)
    await greenlet_spawn(box.open)
    try:
        yield database
    except BaseException as error:
        await greenlet_spawn(box.close_after, error)
        raise
    else:
        await greenlet_spawn(box.close, check=True)


class _Sandbox:
    """One Database, its connection for the length of a test, and what stands in for its pools."""

    def __init__(self, database: _Database, bind: Any) -> None:
        self._database = database
        self._engine = _sync(database.engine)
        self._reader = _sync(database.read_engine)
        self._bind = _sync(bind) if bind is not None else None
        self._open = ExitStack()
        _check(self._engine, self._bind)

    def open(self) -> None:
        """Connect, begin, and put the sandbox in the place of the pools."""
        source = self._bind or self._engine
        with ExitStack() as opening:
            if self._bind is None and _is_new(self._reader):
                self._reader.connect().close()  # the dialect learns from its first connection
            proxied = source.raw_connection()
            opening.callback(proxied.close)
            opening.enter_context(_for_many_transactions(proxied, source.dialect.name))
            connect: Any = source.pool._creator  # pyright: ignore[reportPrivateUsage]  # as the pool
            self._stack = Stack(proxied, source.dialect, connect)
            dialects = {source.dialect, self._engine.dialect, self._reader.dialect}
            opening.enter_context(executing_through_stand_ins(*dialects))
            pool = SandboxPool(self._stack, source.dialect)
            dialect = source.dialect if self._bind is not None else None
            opening.enter_context(self._database.connections_from(pool, dialect))
            event.listen(self._reader, "engine_connect", _read_only)
            opening.callback(event.remove, self._reader, "engine_connect", _read_only)
            self._open = opening.pop_all()

    def close(self, *, check: bool) -> None:
        """Roll back, put everything back in its place, and raise what is to be said."""
        with self._open:
            self._stack.finish(check=check)

    def close_after(self, error: BaseException) -> None:
        """Close after *error*, which is what is to be said, with the rest as a note."""
        try:
            self.close(check=False)
        except Exception as other:
            error.add_note(f"{type(other).__name__}: {other}")


def _sync(engine: Any) -> Engine:
    found: Engine = getattr(engine, "sync_engine", engine)
    return found


def _check_database(database: object, *, is_async: bool) -> None:
    if not hasattr(database, "connections_from"):
        raise exc.ConfigurationError(
            "A sandbox needs a Database, under pytest that which the fixture sessionscope_database "
            f"or sessionscope_async_database returns, and not {_kind(database)}. Give it the "
            "application's own; an engine of another database goes into sandbox(database, "
            "bind=engine)"
        )
    if cast("_Database", database).engine.dialect.is_async is not is_async:
        raise exc.ConfigurationError(
            "A Database needs `with sandbox(database)`"
            if is_async
            else "An AsyncDatabase needs `async with async_sandbox(database)`, on the event loop "
            "on which it is used"
        )


def _kind(found: object) -> str:
    return "None" if found is None else f"an object of the class {type(found).__name__}"


def _check(engine: Engine, bind: object) -> None:
    if any(isinstance(getattr(each, "pool", None), SandboxPool) for each in (engine, bind)):
        raise exc.ConfigurationError(
            "This Database is in a sandbox already: one test has one. Put rows for many tests "
            "into the database before (fixture postgres_template)"
        )
    if bind is not None and not isinstance(bind, Engine):
        raise exc.ConfigurationError(
            f"bind must be an Engine, and is {_kind(bind)}: write bind=other_database.engine"
        )
    if bind is not None and bind.dialect.is_async is not engine.dialect.is_async:
        raise exc.ConfigurationError(
            "bind is an engine of the other colour: a Database needs an Engine, an AsyncDatabase "
            "an AsyncEngine"
        )


def _is_new(engine: Engine) -> bool:
    return getattr(engine.dialect, "server_version_info", None) is None


def _read_only(connection: Connection) -> None:
    stand_in = connection.connection.dbapi_connection
    if isinstance(stand_in, StandIn):
        stand_in.be_read_only()


@contextmanager
def _for_many_transactions(proxied: PoolProxiedConnection, dialect: str) -> Generator[None]:
    """Set a driver's connection up for more than one transaction, and as it was afterwards."""
    real: Any = proxied.dbapi_connection
    own: dict[str, Any] = getattr(proxied.driver_connection, "__dict__", {})
    # psycopg ends by itself a statement that is cancelled. A Database closes such a connection
    # instead, and keeps it from that; here there is no other connection.
    wait = own.pop("wait", None)
    # sqlite3 begins and commits by itself, in the mode that is its default.
    level = real.isolation_level if dialect == "sqlite" else None
    if level is not None:
        real.isolation_level = None
    try:
        yield
    finally:
        if wait is not None:
            own["wait"] = wait
        if level is not None:
            real.isolation_level = level
