"""FastAPI: a session per request, committed before the response is sent.

A dependency with ``scope="function"`` ends after the response was serialized and
before it is sent: an exception, even one that a handler answers, rolls back; a
commit that fails reaches the exception handlers instead of a 2xx; streams and
background tasks run when the connection is back in the pool.
"""

import asyncio
import inspect
import logging
import math
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.requests import HTTPConnection
from fastapi.responses import JSONResponse

from sessionscope import Stats, Unit, exc

__all__ = ["install", "session_per_request"]

_R = TypeVar("_R")
_Units = dict[Any, Unit[Any]]
_Overrides = Mapping[Callable[..., Any] | None, Callable[..., Any]]

_UNITS = "sessionscope.units"
_DRAIN_SECONDS = 10.0
# When a refusal of each kind was last logged.
_logged_at: dict[type[Exception], float] = {}
_log = logging.getLogger("sessionscope")


# Units end in threads of their own: in the framework's pool they would queue
# behind requests that wait for the very connections they hold. There are never
# more of them at work than units, so the gates are the bound.
_ending: ThreadPoolExecutor


def _new_executor() -> None:
    global _ending  # noqa: PLW0603  # a forked child has none of its parent's threads
    _ending = ThreadPoolExecutor(max_workers=1000, thread_name_prefix="sessionscope-end")


_new_executor()
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_new_executor)


class _Database(Protocol):
    """A Database or an AsyncDatabase, which only those import who have greenlet."""

    def stats(self) -> Stats: ...
    def limit_waiting_threads(self, threads: Callable[[], int | None], /) -> None: ...


def session_per_request(database: _Database, *, read_only: bool = False) -> Any:
    """Return the dependency that gives a request its session.

    To be used as ``Annotated[Session, session_per_request(database)]``, or with an
    AsyncDatabase as ``Annotated[AsyncSession, session_per_request(database)]``, on its own
    or through other dependencies. A request has one session per database, which
    writes if any of its dependencies asks for one that writes. A returned response
    commits, whatever its status; to undo, raise, or call ``session.rollback()``.

    Waits for a slot without a thread, up to the Database's ``pool_timeout``. With
    several databases, all are flushed before the first one commits; there is no
    atomicity across them.
    """
    _check_database(database, "session_per_request(database)")
    return Depends(_SessionPerRequest(database, read_only), scope="function")


def install(app: FastAPI, *databases: _Database) -> None:
    """Answer our errors, drain at shutdown, and keep threads free for those at work.

    PoolBusy and DatabaseUnavailable become 503 with Retry-After, unless the app has
    a handler of its own for them or for a SQLAlchemy error above them. At start-up
    a database that does not answer is a warning, not a failure; at shutdown the units
    at work, of all databases, have 10 seconds to end. A websocket is closed with 1013. A
    mounted app has exception handlers of its own: install() it, too.
    """
    if not databases:
        raise exc.ConfigurationError("install() needs a Database: write install(app, database)")
    for database in databases:
        _check_database(database, "install(app, database)")
    _add_lifespan(app, databases)
    for error in (exc.PoolBusy, exc.DatabaseUnavailable):
        if error not in app.exception_handlers:
            app.add_exception_handler(error, _answer_503)


@dataclass(frozen=True)
class _SessionPerRequest:
    """The dependency's callable; equal ones are one dependency to FastAPI."""

    database: Any
    read_only: bool

    async def __call__(self, connection: HTTPConnection) -> AsyncIterator[Any]:
        scope = connection.scope
        if scope["type"] != "http":
            raise exc.ConfigurationError(
                "A websocket lives too long for one unit of work: open one per message, "
                "with database.begin() as session: ... (of an AsyncDatabase, async with)"
            )
        units: _Units = scope.setdefault(_UNITS, {})
        if self.database in units:  # an outer dependency opened it and will end it
            yield units[self.database].session
            return
        opened = await _open(self, scope)
        units.update(opened)
        try:
            yield units[self.database].session
        except asyncio.CancelledError:
            # A `def` endpoint goes on in its thread, and cannot be waited for here.
            await _end(opened.values(), Unit.discard)
            raise
        except BaseException:
            await _end(opened.values(), Unit.rollback)
            raise
        else:
            await _end(opened.values(), Unit.commit)
        finally:
            for database in opened:  # a middleware may send the same scope through once more
                del units[database]


async def _open(dependency: _SessionPerRequest, scope: MutableMapping[str, Any]) -> _Units:
    """Admit the units that the route wants, in an order that is the same for all routes."""
    code = getattr(scope.get("endpoint"), "__code__", None)
    opened_at = (code, code.co_firstlineno) if code is not None else None
    opened: _Units = {}
    try:
        for database, read_only in _wanted(dependency, scope).items():
            if database not in scope[_UNITS]:
                unit = Unit(database, read_only=read_only, opened_at=opened_at)
                await unit.admit_async()
                opened[database] = unit
    except BaseException:
        for unit in opened.values():
            unit.close()
        raise
    return opened


def _wanted(dependency: _SessionPerRequest, scope: Mapping[str, Any]) -> dict[Any, bool]:
    """Return for each database of the request, in their fixed order, whether it is only read."""
    # The dependencies that include_router() adds are known to this context only.
    included = scope.get("fastapi", {}).get("effective_route_context")
    dependant = getattr(included, "dependant", None) or getattr(
        scope.get("route"), "dependant", None
    )
    overrides: _Overrides = getattr(scope.get("app"), "dependency_overrides", None) or {}
    wanted = {dependency.database: dependency.read_only}
    if dependant is not None:
        for other in _walk(dependant, overrides):
            wanted[other.database] = wanted.get(other.database, True) and other.read_only
    return dict(sorted(wanted.items(), key=_id_of_database)) if len(wanted) > 1 else wanted


def _id_of_database(item: tuple[Any, bool]) -> int:
    return id(item[0])


def _walk(dependant: Dependant, overrides: _Overrides) -> Iterator[_SessionPerRequest]:
    """Yield the session dependencies of a route, as the app has overridden them."""
    for inner in dependant.dependencies:
        call = inner.call
        if overrides and call in overrides:
            yield from _walk_call(overrides[call], inner.path or "", overrides)
        elif isinstance(call, _SessionPerRequest):
            yield call
        elif inner.dependencies:
            yield from _walk(inner, overrides)


def _walk_call(
    call: Callable[..., Any], path: str, overrides: _Overrides
) -> Iterator[_SessionPerRequest]:
    if isinstance(call, _SessionPerRequest):
        yield call
    else:
        yield from _walk(get_dependant(path=path, call=call), overrides)


async def _end(units: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]) -> None:
    """End the units: those of AsyncDatabases here, the others in a thread."""
    here = [unit for unit in units if unit.is_async]
    others = [unit for unit in units if not unit.is_async]
    if not here:
        await _end_in_thread(others, how)
    elif not others:
        await Unit.end_all_async(here, how)
    elif how is Unit.commit:
        await _commit_both(here, others)
    else:
        await _undo_both(here, others, how)


async def _commit_both(here: Collection[Unit[Any]], others: Collection[Unit[Any]]) -> None:
    """Flush all units, of both kinds, and then commit them."""
    if any(unit.has_changes for unit in others):
        await _flush_first(here, others)
    try:
        await Unit.end_all_async(here, Unit.commit)
    except BaseException:
        await _end_in_thread(others, Unit.rollback)
        raise
    await _end_in_thread(others, Unit.commit)


async def _flush_first(here: Collection[Unit[Any]], others: Collection[Unit[Any]]) -> None:
    """Flush the *others* in a thread; if that fails, undo all units."""
    flushing = _start(partial(Unit.flush_all, others))
    try:
        await asyncio.shield(flushing)
    except asyncio.CancelledError:
        # It goes on in its thread, is interrupted, and no one asks for its error any more.
        flushing.add_done_callback(lambda done: done.exception())
        await _undo_both(here, others, Unit.discard)
        raise
    except BaseException:
        await _undo_both(here, others, Unit.rollback)
        raise


async def _undo_both(
    here: Collection[Unit[Any]], others: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]
) -> None:
    # Under a cancelled anyio scope every await raises: what each starts before its first is done.
    try:
        await Unit.end_all_async(here, how)
    finally:
        await _end_in_thread(others, how)


async def _end_in_thread(units: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]) -> None:
    """End the units of Databases, in a thread if that may wait for one."""
    # discard() interrupts a statement and waits for another thread, whatever the unit did.
    if how is not Unit.discard and not any(unit.needs_io for unit in units):
        Unit.end_all(units, how)
        return
    # Started before the first await: a cancellation cannot prevent it.
    await asyncio.shield(_start(partial(Unit.end_all, units, how)))


def _start(work: Callable[[], _R]) -> "asyncio.Future[_R]":
    """Start *work* in a thread that sees the request's context."""
    context = copy_context()
    return asyncio.get_running_loop().run_in_executor(_ending, lambda: context.run(work))


def _check_database(database: object, usage: str) -> None:
    if not hasattr(database, "limit_waiting_threads"):
        raise exc.ConfigurationError(
            f"{type(database).__name__} is not a Database or an AsyncDatabase of sessionscope: "
            f"write {usage}"
        )


def _add_lifespan(app: FastAPI, databases: Sequence[Any]) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[Any]:
        limiter = current_default_thread_limiter()

        def pooled_threads() -> int | None:
            # AnyIO's own name for its threads, which have no other sign.
            if threading.current_thread().name != "AnyIO worker thread":
                return None
            return int(min(limiter.total_tokens, 1_000_000))  # it may be infinite

        for database in databases:
            database.limit_waiting_threads(pooled_threads)
            await _warn_if_unavailable(database)
        try:
            async with inner(app) as state:
                yield state
        finally:
            await asyncio.gather(*(_call(each.drain, _DRAIN_SECONDS) for each in databases))

    app.router.lifespan_context = lifespan


async def _call(method: Callable[..., Any], *args: Any) -> Any:
    """Call a method of an AsyncDatabase here, and one of a Database in a thread."""
    if inspect.iscoroutinefunction(method):
        return await method(*args)
    # asyncio's own threads are few: one would wait here until another's ten seconds are over.
    return await _start(partial(method, *args))


async def _warn_if_unavailable(database: Any) -> None:
    try:
        await _call(database.ping)
    except (exc.DatabaseUnavailable, exc.PoolBusy) as error:
        _log.warning("%r does not answer at start-up: %s", database, error)


async def _answer_503(request: Request | WebSocket, error: Exception) -> Any:
    handler = _handler_of_the_app(request, error)
    if handler is not None:
        if inspect.iscoroutinefunction(handler):
            return await handler(request, error)
        return await run_in_threadpool(handler, request, error)
    _log_refusal(request, error)
    if isinstance(request, WebSocket):
        return await request.close(1013)  # RFC 6455's registry: try again later
    busy = isinstance(error, exc.PoolBusy)
    return JSONResponse(
        {
            "detail": "The database is busy." if busy else "The database cannot be reached.",
            "code": getattr(error, "error_code", None),
        },
        status_code=503,
        headers={"Retry-After": str(math.ceil(getattr(error, "retry_after", 1.0)))},
    )


def _log_refusal(request: HTTPConnection, error: Exception) -> None:
    """Log at most one refusal per second and kind: under overload there are thousands."""
    now = monotonic()
    if now - _logged_at.get(type(error), -1.0) >= 1.0:
        _logged_at[type(error)] = now
        _log.warning("%s was refused with 503: %s", request.url.path, error)


def _handler_of_the_app(request: HTTPConnection, error: Exception) -> Any:
    """Return the app's handler for a class between the error's own and Exception."""
    for cls in type(error).__mro__:
        if cls is Exception:
            return None
        handler = request.app.exception_handlers.get(cls)
        if handler is not None and handler is not _answer_503:
            return handler
    return None
