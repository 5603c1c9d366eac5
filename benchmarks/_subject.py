"""The shape of an application that is compared, and how FastAPI serves its routes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from benchmarks._bodies import (
    DONE,
    Body,
    Kept,
    async_bodies,
    async_read,
    async_stream,
    bodies,
    read,
    run,
    run_async,
)
from benchmarks._settings import Settings

Add = Callable[[Body], None]
# What an endpoint writes that finds its session by itself.
Scope = Callable[[Body], AbstractContextManager[Session]]
AsyncScope = Callable[[], AbstractAsyncContextManager[AsyncSession]]


@dataclass(frozen=True)
class Site:
    """An application, ready to be served."""

    app: Any
    interface: Literal["asgi", "wsgi"] = "asgi"


@dataclass(frozen=True)
class Subject:
    """One way to give sessions to requests, and who offers it."""

    name: str
    style: str
    home: str
    """The module and the function that make its Site."""
    packages: tuple[str, ...] = ()
    environment: str = "bench"
    asks: bool = True
    """Whether it has sessions, so that the five questions can be asked."""
    note: str = ""
    rival: bool = field(default=True)
    """Whether it is compared with ours; a limit is only shown beside it."""


def health_app() -> FastAPI:
    """Return an application with nothing but `/health`."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return DONE

    return app


def def_routes(app: FastAPI, settings: Settings, add: Add) -> Site:
    """Add every `def` route of the comparison to *app*."""
    kept = Kept()
    _add_all(bodies(settings.query_seconds, kept), add)

    @app.get("/reads-kept")
    def reads_kept() -> Any:
        return read(kept.session)

    return Site(app)


def async_routes(app: FastAPI, settings: Settings, add: Add) -> Site:
    """Add every `async def` route of the comparison to *app*."""
    kept = Kept()
    _add_all(async_bodies(settings.query_seconds, kept), add)

    @app.get("/reads-kept")
    async def reads_kept() -> Any:
        return await async_read(kept.session)

    return Site(app)


def _add_all(all_bodies: Sequence[Body], add: Add) -> None:
    for body in all_bodies:
        add(body)


def depending(app: FastAPI, dependency: Any, *, commit: bool = False) -> Add:
    """Return how a `def` route is added that declares *dependency*."""

    def add(body: Body) -> None:
        def endpoint(session: Annotated[Session, dependency]) -> Any:
            return _answer(body, run(body, session, commit=commit))

        app.get(body.path, response_model=body.model)(endpoint)

    return add


def opening(app: FastAPI, scope: Scope) -> Add:
    """Return how a `def` route is added that opens its session itself."""

    def add(body: Body) -> None:
        def endpoint() -> Any:
            with scope(body) as session:
                result = run(body, session, commit=False)
            return _answer(body, result)

        app.get(body.path, response_model=body.model)(endpoint)

    return add


def async_depending(app: FastAPI, dependency: Any, *, commit: bool = False) -> Add:
    """Return how an `async def` route is added that declares *dependency*."""

    def add(body: Body) -> None:
        async def endpoint(session: Annotated[AsyncSession, dependency]) -> Any:
            return _answer(body, await run_async(body, session, commit=commit))

        app.get(body.path, response_model=body.model)(endpoint)

    return add


def finding(app: FastAPI, find: Callable[[], Any]) -> Add:
    """Return how an `async def` route is added that awaits *find* for its session."""

    def add(body: Body) -> None:
        async def endpoint() -> Any:
            return _answer(body, await run_async(body, await find(), commit=False))

        app.get(body.path, response_model=body.model)(endpoint)

    return add


def _answer(body: Body, result: Any) -> Any:
    return StreamingResponse(async_stream()) if body.streams else result
