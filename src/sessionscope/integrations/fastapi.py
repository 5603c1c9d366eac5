"""FastAPI: a session per request, committed before the response is sent.

A dependency with ``scope="function"`` ends after the response was serialized and
before it is sent: an exception, even one that a handler answers, rolls back; a
commit that fails reaches the exception handlers instead of a 2xx; streams and
background tasks run when the connection is back in the pool.
"""

import asyncio
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_dependant
from fastapi.requests import HTTPConnection

from sessionscope import Unit, exc
from sessionscope.integrations import _lifespan, starlette
from sessionscope.integrations._request_units import Units, end_units, in_order, open_units

__all__ = ["install", "session_per_request"]

_Overrides = Mapping[Callable[..., Any] | None, Callable[..., Any]]

_UNITS = "sessionscope.units"


def session_per_request(database: _lifespan.Database, *, read_only: bool = False) -> Any:
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
    _lifespan.check_database(database, "session_per_request(database)")
    return Depends(_SessionPerRequest(database, read_only), scope="function")


def install(app: FastAPI, *databases: _lifespan.Database) -> None:
    """Answer our errors, drain at shutdown, and keep threads free for those at work.

    PoolBusy and DatabaseUnavailable become 503 with Retry-After, DeadlineExceeded 504, unless
    the app has a handler of its own for them or for an error above them. At start-up
    a database that does not answer is a warning, not a failure; at shutdown the units
    at work, of all databases, have 10 seconds to end. A websocket is closed with 1013. A
    mounted app has exception handlers of its own: install() it, too.
    """
    starlette.install(app, *databases)
    _limit_waiting_threads(app, databases)


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
        units: Units = scope.setdefault(_UNITS, {})
        if self.database in units:  # an outer dependency opened it and will end it
            yield units[self.database].session
            return
        opened = await _open(self, scope)
        units.update(opened)
        try:
            yield units[self.database].session
        except asyncio.CancelledError:
            # A `def` endpoint goes on in its thread, and cannot be waited for here.
            await end_units(opened.values(), Unit.discard)
            raise
        except BaseException:
            await end_units(opened.values(), Unit.rollback)
            raise
        else:
            await end_units(opened.values(), Unit.commit)
        finally:
            for database in opened:  # a middleware may send the same scope through once more
                del units[database]


async def _open(dependency: _SessionPerRequest, scope: MutableMapping[str, Any]) -> Units:
    """Admit the units that the route wants, in an order that is the same for all routes."""
    wanted = _wanted(dependency, scope)
    missing = {each: wanted[each] for each in wanted if each not in scope[_UNITS]}
    return await open_units(missing, getattr(scope.get("endpoint"), "__code__", None))


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
    return in_order(wanted)


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


def _limit_waiting_threads(app: FastAPI, databases: Sequence[_lifespan.Database]) -> None:
    """Keep threads free for the requests that hold a connection, while the app runs."""
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
        async with inner(app) as state:
            yield state

    app.router.lifespan_context = lifespan
