"""AsyncDatabase: the twin of Database for `async def`, over the same units of work."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from importlib.util import find_spec
from time import monotonic
from types import MappingProxyType, TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from sqlalchemy import URL, Pool, literal, select
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from sessionscope import _async_unit
from sessionscope._async_source import AsyncSessionT, AsyncSource, create_engine
from sessionscope._credentials import Credentials
from sessionscope._entry import async_entry_point, finished, is_async, refuse_bare
from sessionscope._options import (
    Options,
    check_isolation_level,
    check_timeout,
    read_url,
    url_from_env,
)
from sessionscope._places import caller, place_of
from sessionscope._retry import ATTEMPTS, check_attempts
from sessionscope._source import CUTTING_SECONDS
from sessionscope._unit import Unit
from sessionscope.events import Observer, Stats

if find_spec("greenlet") is None:  # SQLAlchemy 2.0 would say so at the first statement only
    raise ImportError("AsyncDatabase needs greenlet: pip install sqlalchemy[asyncio]")

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Owner = TypeVar("_Owner")
_Session_co = TypeVar("_Session_co", bound=AsyncSession, covariant=True)

_NONE: Mapping[str, Any] = MappingProxyType({})


class _WithSession(Protocol[_Session_co]):
    """What ``with_session()`` returns: a decorator that takes the session parameter away."""

    @overload
    def __call__(
        self, fn: Callable[Concatenate[_Session_co, _P], Coroutine[Any, Any, _R]], /
    ) -> Callable[_P, Coroutine[Any, Any, _R]]: ...

    @overload
    def __call__(
        self, fn: Callable[Concatenate[Session, _P], _R], /
    ) -> Callable[_P, Coroutine[Any, Any, _R]]: ...

    @overload
    def __call__(
        self, fn: Callable[Concatenate[_Owner, _Session_co, _P], Coroutine[Any, Any, _R]], /
    ) -> Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _R]]: ...

    @overload
    def __call__(
        self, fn: Callable[Concatenate[_Owner, Session, _P], _R], /
    ) -> Callable[Concatenate[_Owner, _P], Coroutine[Any, Any, _R]]: ...


class _Block(AbstractAsyncContextManager[AsyncSessionT]):
    """One unit of work as the block of an ``async with``."""

    __slots__ = ("_unit",)

    def __init__(self, unit: Unit[AsyncSessionT]) -> None:
        self._unit = unit

    async def __aenter__(self) -> AsyncSessionT:
        await self._unit.admit_async()
        return self._unit.session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._unit.failed(exc)
        how = Unit.commit if exc_type is None else Unit.rollback
        await Unit.end_all_async((self._unit,), how)


class AsyncDatabase(Generic[AsyncSessionT]):
    """Async version of :class:`Database`: sessions are ``AsyncSession`` objects.

    For asyncpg, psycopg, aiosqlite, asyncmy and aiomysql, on asyncio and uvloop.
    Functions that take a plain ``Session`` serve both: ``run()`` and
    ``with_session()`` run them as ``AsyncSession.run_sync()`` does. Objects are not expired by a
    commit, as SQLAlchemy advises for asyncio. A unit that is cancelled is rolled back, its
    statement is cancelled on the server, and its connection counts until the server
    has closed it; once COMMIT was sent, its outcome is waited for, and the cancellation
    is delivered at the next ``await``.
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
        session_class: type[AsyncSessionT] = AsyncSession,  # type: ignore[assignment]  # a TypeVar's default
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        options = Options(
            read_url(url, is_async=True),
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
            session_base=AsyncSession,
            is_async=True,
            engine_options=engine_options or _NONE,
            session_options=session_options or _NONE,
        )
        name = f"{type(self).__name__}({options.safe_url!r})"
        self._source: AsyncSource[AsyncSessionT] = AsyncSource(
            options, name, observers, create_engine
        )

    @classmethod
    def from_env(
        cls, variable: str = "DATABASE_URL", *, default: str | URL | None = None, **options: Any
    ) -> Self:
        """Async version of :meth:`Database.from_env`."""
        return cls(url_from_env(variable, default), **options)

    def __repr__(self) -> str:
        return self._source.name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.dispose()

    @property
    def engine(self) -> AsyncEngine:
        """The plain AsyncEngine of writing units."""
        return self._source.async_engine(self._source.engines.write)

    @property
    def read_engine(self) -> AsyncEngine:
        """The plain AsyncEngine of read-only units, in autocommit mode."""
        return self._source.async_engine(self._source.engines.read)

    @property
    def sessionmaker(self) -> async_sessionmaker[AsyncSessionT]:
        """The plain async_sessionmaker. Its sessions are yours to commit and close."""
        return self._source.async_sessionmaker

    def begin(
        self,
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        independent: bool = False,
    ) -> AbstractAsyncContextManager[AsyncSessionT]:
        """Async version of :meth:`Database.begin`, for ``async with``.

        A writing unit waits on asyncpg for as many round trips as on psycopg, and for one
        more at the commit if a statement has failed in it.
        """
        return _Block(
            Unit(
                self,
                read_only=read_only,
                isolation_level=isolation_level,
                timeout=timeout,
                independent=independent,
                opened_at=caller(1),
            )
        )

    @overload
    async def run(
        self,
        fn: Callable[Concatenate[AsyncSessionT, _P], Coroutine[Any, Any, _R]],
        /,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _R: ...

    @overload
    async def run(
        self, fn: Callable[Concatenate[Session, _P], _R], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _R: ...

    async def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Async version of :meth:`Database.run`.

        *fn* is an ``async def`` that takes an AsyncSession, or a ``def`` that takes a
        plain Session.
        """
        return await self._run(fn, args, kwargs)

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
    ) -> _WithSession[AsyncSessionT]:
        """Async version of :meth:`Database.with_session`: the entry points are ``async def``.

        They wrap an ``async def`` that takes an AsyncSession, or a ``def`` that takes
        a plain Session.
        """

        def run(fn: Callable[..., Any], args: Any, kwargs: Any) -> Awaitable[Any]:
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
            return async_entry_point(fn, run)

        return decorate

    async def ping(self) -> None:
        """Async version of :meth:`Database.ping`."""
        async with self.begin(read_only=True) as session:
            await session.execute(select(literal(1)))

    def stats(self) -> Stats:
        """Return what the Database is doing now and has done so far. Costs no I/O."""
        return self._source.stats()

    def limit_waiting_threads(self, threads: Callable[[], int | None]) -> None:
        """Async version of :meth:`Database.limit_waiting_threads`: its units wait in none."""

    def connections_from(
        self, pool: Pool, dialect: Dialect | None = None
    ) -> AbstractContextManager[None]:
        """Async version of :meth:`Database.connections_from`, which does no I/O either."""
        return self._source.engines.connections_from(pool, dialect)

    async def drain(self, timeout: float) -> bool:
        """Async version of :meth:`Database.drain`: the tasks that are left are cancelled."""
        source = self._source
        with source.draining():
            ended = await asyncio.to_thread(source.wait_until_empty, monotonic() + timeout)
            if not ended:
                source.cut_off(timeout)
                until = monotonic() + CUTTING_SECONDS
                await asyncio.to_thread(source.wait_until_empty, until)
            if not source.options.is_memory:  # which is the data
                await self.dispose()
        return ended

    async def dispose(self) -> None:
        """Async version of :meth:`Database.dispose`."""
        await greenlet_spawn(self._source.engines.dispose)
        await self._source.engines.settle()

    async def _run(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        attempts: int = ATTEMPTS,
        independent: bool = False,
    ) -> Any:
        source = self._source
        call = fn, args, kwargs
        trying = source.attempts(call, attempts, timeout)
        is_plain = not is_async(fn)
        try:
            while True:
                unit: Unit[Any] = Unit(
                    self,
                    read_only=read_only,
                    isolation_level=isolation_level,
                    independent=independent,
                    opened_at=place_of(fn),
                    plain=is_plain,
                    attempts=trying,
                )
                try:
                    async with _Block(unit) as session:
                        if is_plain:
                            result = await greenlet_spawn(_call, fn, session, args, kwargs)
                        else:
                            result = await fn(session, *args, **kwargs)
                except Exception as error:
                    if trying.pause is None:
                        raise
                    pause = source.again(trying, call, error)
                else:
                    trying.succeeded()
                    return result
                await asyncio.sleep(pause)
        except BaseException:
            if (undone := trying.give_up()) is not None:
                await _async_unit.end(undone)
            raise


def _call(fn: Callable[..., Any], session: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Call a plain function, and send its changes in the same greenlet."""
    result = finished(
        fn(session, *args, **kwargs), fn, "an AsyncDatabase calls it with a plain Session"
    )
    session.flush()
    return result
