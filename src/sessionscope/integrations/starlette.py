"""Starlette: what an app with ``with_session`` on its endpoints needs beside.

An endpoint that is decorated with ``with_session()`` is one unit of work, which
ends before its response is sent, before streams and background tasks run. What is
left for the app is the answer to overload, and its start and end.
"""

import inspect
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from sessionscope.integrations import _lifespan, _refusal

__all__ = ["install"]


def install(app: Starlette, *databases: _lifespan.Database) -> None:
    """Answer our errors, and drain at shutdown.

    PoolBusy and DatabaseUnavailable become 503 with Retry-After, DeadlineExceeded 504, unless
    the app has a handler of its own for them or for an error above them. At start-up
    a database that does not answer is a warning, not a failure; at shutdown the units
    at work have 10 seconds to end. A websocket is closed with 1013. A mounted app has
    exception handlers of its own: install() it, too.
    """
    _lifespan.check_databases(databases, "install(app, database)")
    _add_lifespan(app, databases)
    for error in _refusal.ERRORS:
        if error not in app.exception_handlers:
            app.add_exception_handler(error, _answer)


def _add_lifespan(app: Starlette, databases: Sequence[Any]) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[Any]:
        async with _lifespan.lifespan(databases), inner(app) as state:
            yield state

    app.router.lifespan_context = lifespan


async def _answer(request: Request | WebSocket, error: Exception) -> Any:
    handlers = request.app.exception_handlers
    handler = _refusal.handler_of_the_app(type(error), handlers, _answer)
    if handler is not None:
        if inspect.iscoroutinefunction(handler):
            return await handler(request, error)
        return await run_in_threadpool(handler, request, error)
    status, body, headers = _refusal.refuse(error, request.url.path)
    if isinstance(request, WebSocket):
        return await request.close(1013)  # RFC 6455's registry: try again later
    return JSONResponse(body, status, headers)
