"""Database: one pair of engines, one sessionmaker, and the units of work made from them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from time import monotonic, sleep
from types import MappingProxyType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from sqlalchemy import URL, Engine, Pool, literal, select
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar as TypeVarWithDefault

from sessionscope._credentials import Credentials
from sessionscope._entry import entry_point, finished, refuse_bare
from sessionscope._options import (
    Options,
    check_isolation_level,
    check_timeout,
    read_url,
    url_from_env,
)
from sessionscope._places import caller, place_of
from sessionscope._retry import ATTEMPTS, check_attempts
from sessionscope._source import CUTTING_SECONDS, Source
from sessionscope._unit import Unit
from sessionscope.events import Observer, Stats

SessionT = TypeVarWithDefault("SessionT", bound=Session, default=Session)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Owner = TypeVar("_Owner")
_Session_co = TypeVar("_Session_co", bound=Session, covariant=True)

_NONE: Mapping[str, Any] = MappingProxyType({})


class _WithSession(Protocol[_Session_co]):
    """What ``with_session()`` returns: a decorator that takes the session parameter away."""

    @overload
    def __call__(self, fn: Callable[Concatenate[_Session_co, _P], _R], /) -> Callable[_P, _R]: ...

    @overload
    def __call__(
        self, fn: Callable[Concatenate[_Owner, _Session_co, _P], _R], /
    ) -> Callable[Concatenate[_Owner, _P], _R]: ...


class Database(Generic[SessionT]):
    """One database: its engines, its sessionmaker, and units of work on it.

    Make one per process, at import time; nothing is connected before the first
    use. ``postgresql://`` means psycopg 3.

    *pool_size* and *max_overflow* bound the open connections, over the writing
    and the read-only engine together, and with them the units of work that run
    at once. *pool_timeout* is how many seconds a unit waits for its turn before
    PoolBusy is raised, *max_waiting* how many units may wait (``None``: any
    number, for that time). ``pool_size=0`` or ``max_overflow=-1``: no bound.
    *timeout* is how many seconds a unit of work may take by default, from the queue to
    the commit (``None``: any number). *credentials* is called before each new connection
    and returns a password, or a user and a password. *pooler* names what stands before
    the server: ``"pgbouncer-transaction"``; read-only units then are transactions, too.
    *outcome_table* names a table of MySQL or MariaDB that you have made: each unit of ``run()``
    leaves a row there, for one round trip more, by which a lost COMMIT is looked up
    (the CREATE TABLE is in docs/how-to/lost-commits.md; PostgreSQL needs none).
    *isolation_level* is that of writing units, one of SQLAlchemy's names; SQLite's
    are all serializable. Sessions are of *session_class*. *engine_options* and
    *session_options* go to ``create_engine()``, which here hides SQL parameters, and
    to ``sessionmaker()``. Raises ConfigurationError.
    """

    def __init__(
        self,
        url: str | URL,
        *,
        pool_size: int = 5,
        max_overflow: int = 10,
        pool_timeout: float = 5.0,
        max_waiting: int | None = None,
        timeout: float | None = None,
        credentials: Credentials | None = None,
        pooler: str | None = None,
        outcome_table: str | None = None,
        isolation_level: str | None = None,
        session_class: type[SessionT] = Session,  # type: ignore[assignment]  # a TypeVar's default
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        options = Options(
            read_url(url, is_async=False),
            pool_size=pool_size,
            max_overflow=max_overflow,
            pool_timeout=pool_timeout,
            max_waiting=max_waiting,
            timeout=timeout,
            credentials=credentials,
            pooler=pooler,
            outcome_table=outcome_table,
            isolation_level=isolation_level,
            session_class=session_class,
            session_base=Session,
            is_async=False,
            engine_options=engine_options or _NONE,
            session_options=session_options or _NONE,
        )
        name = f"{type(self).__name__}({options.safe_url!r})"
        self._source: Source[SessionT] = Source(options, name, observers)

    @classmethod
    def from_env(
        cls, variable: str = "DATABASE_URL", *, default: str | URL | None = None, **options: Any
    ) -> Self:
        """Return a Database for the URL in an environment variable.

        *options* are those of ``Database()``. For another session class a type checker
        wants ``Database[MySession].from_env(session_class=MySession)``. Raises
        ConfigurationError if the variable is not set and there is no *default*.
        """
        return cls(url_from_env(variable, default), **options)

    def __repr__(self) -> str:
        return self._source.name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.dispose()

    @property
    def engine(self) -> Engine:
        """The plain Engine of writing units."""
        return self._source.engines.write

    @property
    def read_engine(self) -> Engine:
        """The plain Engine of read-only units, in autocommit mode.

        Connection-level listeners of your own must be put on both engines.
        """
        return self._source.engines.read

    @property
    def sessionmaker(self) -> sessionmaker[SessionT]:
        """The plain sessionmaker. Its sessions are yours to commit and close."""
        return self._source.sessionmaker

    def begin(
        self,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        independent: bool = False,
    ) -> AbstractContextManager[SessionT]:
        """Open a unit of work: commit at the end of the block, roll back on any exception.

        A writing unit waits for three round trips plus one per statement after the
        first; a *read_only* one for one per SELECT. *isolation_level* is for this
        unit; on a read-only one ``"REPEATABLE READ"`` gives a snapshot, which needs
        a real transaction. *timeout* is how many seconds the unit may take, queue, connecting and
        commit included. A statement that is running then is cancelled, COMMIT is not
        sent any more; one that was sent and is not answered by then is CommitUnknown.
        This covers the session's methods, ``session.connection()``, rows that are fetched one
        by one, and cursors of ``session.connection().connection``; not COPY, and not what is
        done with its ``driver_connection``. Python code is not interrupted. PostgreSQL
        (psycopg, asyncpg) is told the limit of each statement together with BEGIN, MariaDB
        and, for SELECT, MySQL with the statement; smaller limits of their own stay. For that
        asyncpg and MySQL are asked once per connection (a round trip). An *independent* unit
        may be opened inside of another one and commits on its own, over the one connection
        that is in reserve for such units; SQLite has none, so there it needs a read-only unit
        around it. Raises
        ConfigurationError at once; PoolBusy and NestedUnit
        when the block begins; DatabaseUnavailable at the first statement; DeadlineExceeded
        wherever it waits; and at the end
        what ``Unit.commit()`` raises: TransactionDoomed, CommitUnknown, SessionEnded,
        ReadOnlyUnit, and what flush() and COMMIT raise.
        """
        return Unit(
            self,
            read_only=read_only,
            isolation_level=isolation_level,
            timeout=timeout,
            independent=independent,
            opened_at=caller(1),
        )

    def run(
        self, fn: Callable[Concatenate[SessionT, _P], _R], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _R:
        """Return ``fn(session, *args, **kwargs)``, run as one unit of work, and again if need be.

        A unit that the database has rolled back for the sake of others (SQLSTATE 40001, 40P01;
        MySQL 1213, 1205, 1020; SQLITE_BUSY), or whose connection was lost before COMMIT, runs
        again with a fresh session: up to 30 times, after a random pause of at most
        twice what it took, which doubles up to a second. A database that cannot be reached is
        waited for, ``pool_timeout`` seconds at most, and tried every quarter of a second. So *fn*
        must do nothing outside of its session that may not be done twice: that is for
        ``after_commit()``, whose hooks are dropped with a failed attempt. A COMMIT whose answer
        was lost is looked up on PostgreSQL (``pg_xact_status()``), elsewhere by the
        ``outcome_table``: done, or run again. For that each writing unit takes a transaction id
        at its BEGIN on PostgreSQL, for no round trip more (psycopg2: one before COMMIT; each new
        connection: one); for what only reads, write ``with_session(read_only=True)``. With the id
        comes the snapshot of a REPEATABLE READ unit, before any LOCK TABLE, and ``SET TRANSACTION``
        comes too late: write ``with_session(isolation_level=...)``, or ``attempts=1``.
        Not run again: what has committed once, what got a mapped object or an iterator as
        an argument, and what fails with CommitUnknown or with another database's error.

        All arguments are those of *fn*: for a unit that only reads, or has a timeout of its own,
        write ``with_session(timeout=2.0)(fn)(...)``. Raises what *fn* raises, and what ``begin()``
        raises: the last error, as it is.
        """
        return self._run(fn, args, kwargs)

    def with_session(
        self,
        fn: None = None,  # what `@database.with_session` would pass
        /,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        attempts: int = ATTEMPTS,
        independent: bool = False,
    ) -> _WithSession[SessionT]:
        """Make ``fn(session, ...)`` an entry point ``fn(...)`` that is one unit of work.

        For what is called from outside: a view, a task, a command, a job. The session
        is the first parameter, or the one after ``self``, and is not part of the
        result's signature. Functions that are called by such ones receive their
        session and are not decorated. It runs as by ``run()``, at most *attempts* times,
        all of them within *timeout* seconds; for one call with these options write
        ``with_session(read_only=True)(fn)(...)``. Raises ConfigurationError for functions whose
        work would be done after they return (``async def``, generators).
        """

        def run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._run(
                fn,
                args,
                kwargs,
                read_only=read_only,
                isolation_level=isolation_level,
                timeout=timeout,
                attempts=attempts,
                independent=independent,
            )

        refuse_bare(fn)
        check_isolation_level(isolation_level)
        check_timeout(timeout)
        check_attempts(attempts)

        def decorate(fn: Callable[..., Any], /) -> Callable[..., Any]:
            return entry_point(fn, run)

        return decorate

    def ping(self) -> None:
        """Make one round trip to the database, as a unit of work.

        Raises DatabaseUnavailable, PoolBusy, NestedUnit.
        """
        with Unit(self, read_only=True) as session:
            session.execute(select(literal(1)))

    def stats(self) -> Stats:
        """Return what the Database is doing now and has done so far. Costs no I/O."""
        return self._source.stats()

    def limit_waiting_threads(self, threads: Callable[[], int | None]) -> None:
        """For integrations: keep a framework's bounded thread pool from filling with waiters.

        *threads* returns the size of the pool that the current thread belongs to, or
        ``None``. Those of its threads that the holders of connections may need do not
        wait in ``begin()``: they get PoolBusy at once. Databases that are given the
        same callable share the pool.
        """
        self._source.limit_waiting_threads(threads)

    def connections_from(
        self, pool: Pool, dialect: Dialect | None = None
    ) -> AbstractContextManager[None]:
        """For integrations: take all connections from *pool* meanwhile, on every engine.

        It may lead to another database, whose *dialect* is then needed. Connections that are in
        use stay what they are. Not for two threads at once.
        """
        return self._source.engines.connections_from(pool, dialect)

    def drain(self, timeout: float) -> bool:
        """Refuse new units, wait at most *timeout* seconds for those at work to end.

        Then those that are left are cut off (DatabaseUnavailable) and rolled back, but for a COMMIT
        that was sent already, and all connections are closed. Returns whether all have ended
        by themselves. Afterwards units are admitted again, as after ``Engine.dispose()``.
        """
        source = self._source
        with source.draining():
            ended = source.wait_until_empty(monotonic() + timeout)
            if not ended:
                source.cut_off(timeout)
                source.wait_until_empty(monotonic() + CUTTING_SECONDS)
            if not source.options.is_memory:  # which is the data
                self.dispose()
        return ended

    def dispose(self) -> None:
        """Close the connections that are not in use; later units open new ones.

        A database in memory is lost with its connection.
        """
        self._source.engines.dispose()

    def _run(
        self,
        fn: Callable[..., _R],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        attempts: int = ATTEMPTS,
        independent: bool = False,
    ) -> _R:
        source = self._source
        call = fn, args, kwargs
        trying = source.attempts(call, attempts, timeout)
        try:
            while True:
                unit = Unit(
                    self,
                    read_only=read_only,
                    isolation_level=isolation_level,
                    independent=independent,
                    opened_at=place_of(fn),
                    attempts=trying,
                )
                try:
                    with unit as session:
                        result = fn(session, *args, **kwargs)
                        result = finished(result, fn, "a Database is synchronous")
                except Exception as error:
                    if trying.pause is None:
                        raise
                    pause = source.again(trying, call, error)
                else:
                    trying.succeeded()
                    return result
                sleep(pause)
        except BaseException:
            # Of an attempt after which none began: the pause was cancelled, or no slot came free.
            if (undone := trying.give_up()) is not None:
                undone()
            raise
