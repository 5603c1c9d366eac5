"""Litestar: a session per request, committed before the response is sent.

Litestar ends generator dependencies after the response was serialized and before it
is sent, which is where the unit of work commits. It begins before the first
dependency runs, so that all of them, and the handler, are one flow of control, and
one that fails leaves nothing open.
"""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import CodeType
from typing import Any, cast

from litestar import Litestar, MediaType, Request, Response
from litestar.config.app import AppConfig
from litestar.di import Provide
from litestar.enums import ScopeType
from litestar.handlers import BaseRouteHandler
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from sessionscope import Unit, exc
from sessionscope.integrations import _lifespan, _refusal, _request_units

__all__ = ["install", "session_per_request"]

_UNITS = "sessionscope.units"
_INSTALL = "Litestar(..., on_app_init=[install(database)])"
# The threads of asyncio's default executor, which runs `def` handlers: documented.
_THREADS = min(32, (os.cpu_count() or 1) + 4)


def session_per_request(database: _lifespan.Database, *, read_only: bool = False) -> Provide:
    """Return the dependency that gives a request its session.

    To be used as ``dependencies={"session": session_per_request(database)}``, with
    ``install(database)`` at the app. A request has one session per database, which
    writes if any of the dependencies that its handler uses asks for one that writes. A
    returned response commits, whatever its status; to undo, raise, or call
    ``session.rollback()``.

    Waits for a slot without a thread, up to the Database's ``pool_timeout``. With
    several databases, all are flushed before the first one commits; there is no
    atomicity across them.
    """
    _lifespan.check_database(database, "session_per_request(database)")
    return _SessionPerRequest(database, read_only)


def install(*databases: _lifespan.Database) -> Callable[[AppConfig], AppConfig]:
    """Return what ``on_app_init`` takes: it opens the units of work that handlers ask for.

    PoolBusy and DatabaseUnavailable become 503 with Retry-After, DeadlineExceeded 504, unless
    the app has a handler of its own for them or for an error above them. At start-up
    a database that does not answer is a warning, not a failure; at shutdown the units
    at work have 10 seconds to end.
    """
    _lifespan.check_databases(databases, _INSTALL)

    def on_app_init(config: AppConfig) -> AppConfig:
        of_the_app: Any = config  # Litestar leaves the parameters of its types open
        of_the_app.middleware.append(_around)
        of_the_app.lifespan.insert(0, partial(_lifespan_of, databases))  # around all others
        for error in _refusal.ERRORS:
            if _refusal.handler_of_the_app(error, of_the_app.exception_handlers) is None:
                of_the_app.exception_handlers[error] = _answer
        return config

    return on_app_init


class _SessionPerRequest(Provide):
    """The dependency, from which is read what a handler wants before it is called."""

    __slots__ = ("database", "read_only")

    def __init__(self, database: Any, read_only: bool) -> None:
        async def session(scope: Scope) -> AsyncGenerator[Any]:
            units = _units_of(cast("dict[str, Any]", scope))
            session = units[database].session
            try:
                yield session
            except asyncio.CancelledError:
                # A `def` handler goes on in its thread, and cannot be waited for here.
                await _end(units, Unit.discard)
                raise
            except BaseException:
                await _end(units, Unit.rollback)
                raise
            else:
                await _end(units, Unit.commit)

        super().__init__(session)
        self.database = database
        self.read_only = read_only


def _units_of(scope: dict[str, Any]) -> _request_units.Units:
    units: _request_units.Units | None = scope.get(_UNITS)
    if units is None:
        raise exc.ConfigurationError(
            f"A handler wants a session, and no one opens its unit of work: write {_INSTALL}"
        )
    return units


async def _end(units: _request_units.Units, how: Callable[[Unit[Any]], None]) -> None:
    """End what is still open: with several sessions, the first to end ends all."""
    still_open = list(units.values())
    units.clear()
    await _request_units.end_units(still_open, how)


def _around(app: ASGIApp) -> ASGIApp:
    """Open the units that the handler wants; roll back those that no one has ended."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        own = cast("dict[str, Any]", scope)
        handler: BaseRouteHandler | None = own.get("route_handler")
        wanted = _wanted(handler) if handler is not None else {}
        if not wanted:
            await app(scope, receive, send)
            return
        if scope["type"] != ScopeType.HTTP:
            raise exc.ConfigurationError(
                "A websocket lives too long for one unit of work: open one per message, "
                "with database.begin() as session: ... (of an AsyncDatabase, async with)"
            )
        units = own[_UNITS] = await _request_units.open_units(wanted, _code_of(handler))

        async def send_when_ended(message: Message) -> None:
            if units:  # a dependency failed, and Litestar did not end those before it
                await _end(units, Unit.rollback)
            await send(message)

        try:
            await app(scope, receive, send_when_ended)
        finally:
            if units:  # cancelled
                await _end(units, Unit.discard)

    return middleware


def _wanted(handler: BaseRouteHandler) -> dict[Any, bool]:
    """Return for each database of the handler, in their fixed order, whether it is only read."""
    wanted: dict[Any, bool] = {}
    for provide in _used(handler.parsed_fn_signature.parameters, handler.resolve_dependencies()):
        if isinstance(provide, _SessionPerRequest):
            wanted[provide.database] = wanted.get(provide.database, True) and provide.read_only
    return _request_units.in_order(wanted)


def _used(names: Any, dependencies: dict[str, Provide]) -> Iterator[Provide]:
    """Yield the dependencies that are reached from parameters of these *names*."""
    for name in names:
        provide = dependencies.get(name)
        if provide is not None:
            yield provide
            yield from _used(provide.parsed_fn_signature.parameters, dependencies)


def _code_of(handler: BaseRouteHandler | None) -> CodeType | None:
    fn: Any = handler.fn if handler is not None else None
    fn = getattr(fn, "func", fn)  # a `def` handler, wrapped to be called in a thread
    code: CodeType | None = getattr(fn, "__code__", None)
    return code


@asynccontextmanager
async def _lifespan_of(databases: Sequence[Any], app: Litestar) -> AsyncGenerator[None]:
    for database in databases:
        database.limit_waiting_threads(_pooled_threads)
    async with _lifespan.lifespan(databases):
        yield


def _pooled_threads() -> int | None:
    # asyncio's own name for the threads of its default executor.
    return _THREADS if threading.current_thread().name.startswith("asyncio_") else None


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    status, body, headers = _refusal.refuse(error, request.url.path)
    return Response(body, status_code=status, headers=headers, media_type=MediaType.JSON)
