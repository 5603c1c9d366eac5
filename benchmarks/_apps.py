"""One small FastAPI application, served by each variant with the same routes.

A variant is an adapter of a few lines in `VARIANTS`. Run as a program, this module serves one
of them on a socket that its parent has opened.
"""

import argparse
import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, params
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from benchmarks._claim_routes import add_claim_routes
from benchmarks._model import FIRST, Item, slow_first
from benchmarks._peers import Unit, pinging_begin, seed, sessionmaker_begin
from benchmarks._settings import ItemOut, Settings, for_asyncpg


@dataclass(frozen=True)
class Adapter:
    """What the `def` routes need from a variant."""

    session: Any
    """The dependency that a route declares."""
    begin: Callable[[], AbstractContextManager[Session]]
    """What an endpoint writes that opens a unit by itself."""
    commits: bool = True
    """Whether the dependency commits; else the endpoint does."""


def seed_variant(app: FastAPI, settings: Settings) -> None:
    """Serve the tutorials' `get_db`, with `pool_pre_ping`."""
    _serve_seed(app, settings, scope=None)


def scope_function(app: FastAPI, settings: Settings) -> None:
    """Serve the tutorials' `get_db` with `scope="function"`."""
    _serve_seed(app, settings, scope="function")


def _serve_seed(app: FastAPI, settings: Settings, scope: Literal["function"] | None) -> None:
    unit = seed(settings.url, **settings.pool).unit
    dependency = Depends(_get_db(unit), scope=scope)
    add_claim_routes(app, dependency, Depends(dependency.dependency, scope=scope, use_cache=False))
    add_routes(app, Adapter(dependency, unit, commits=False), settings)


def max_concurrency(app: FastAPI, settings: Settings) -> None:
    """Serve FastAPI's own cure for the deadlock over an engine with `pool_pre_ping`."""
    _limited(app, settings, pinging_begin(settings.url, **settings.pool).unit)


def max_concurrency_no_ping(app: FastAPI, settings: Settings) -> None:
    """Serve FastAPI's own cure over an engine that checks no connection."""
    _limited(app, settings, sessionmaker_begin(settings.url, **settings.pool).unit)


def _limited(app: FastAPI, settings: Settings, begin: Unit) -> None:
    dependency = Depends(_get_db(begin), scope="function", max_concurrency=settings.limit)
    add_routes(app, Adapter(dependency, begin), settings)


def late_commit(app: FastAPI, settings: Settings) -> None:
    """Serve a `get_db` that commits after its `yield`, as much code has it."""
    begin = pinging_begin(settings.url, **settings.pool).unit
    get_db = _get_db(begin)
    add_routes(app, Adapter(Depends(get_db), begin), settings)
    add_claim_routes(app, Depends(get_db), Depends(get_db, use_cache=False))


def ours(app: FastAPI, settings: Settings) -> None:
    """Serve our writing session."""
    _serve_ours(app, settings, read_only=False)


def ours_read_only(app: FastAPI, settings: Settings) -> None:
    """Serve our read-only session on every route, so `/write` does not work."""
    _serve_ours(app, settings, read_only=True)


def _serve_ours(app: FastAPI, settings: Settings, *, read_only: bool) -> None:
    from sessionscope import Database
    from sessionscope.integrations.fastapi import install, session_per_request

    database = Database(settings.url, pool_timeout=settings.pool_timeout, **settings.pool)
    install(app, database)
    session = session_per_request(database, read_only=read_only)
    add_routes(app, Adapter(session, database.begin), settings)
    add_claim_routes(app, session, session)


def all_async(app: FastAPI, settings: Settings) -> None:
    """Serve `async def` endpoints on asyncpg."""
    _serve_async(app, settings, ping=False)


def all_async_ping(app: FastAPI, settings: Settings) -> None:
    """Serve `async def` endpoints on asyncpg, with `pool_pre_ping`."""
    _serve_async(app, settings, ping=True)


def _serve_async(app: FastAPI, settings: Settings, *, ping: bool) -> None:
    url, connect_args = for_asyncpg(settings.url)
    engine = create_async_engine(
        url, pool_pre_ping=ping, connect_args=connect_args, **settings.pool
    )
    factory = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with factory() as db:
            yield db

    add_async_routes(app, Depends(get_db), settings.query_seconds)


def _get_db(unit: Unit) -> Callable[[], Iterator[Session]]:
    def get_db() -> Iterator[Session]:
        with unit() as db:
            yield db

    return get_db


def add_routes(app: FastAPI, adapter: Adapter, settings: Settings) -> None:
    """Add the `def` routes with the session of *adapter*."""
    statement = slow_first(settings.query_seconds)
    dependency = adapter.session

    def authenticate(db: Annotated[Session, dependency]) -> int:
        return db.scalars(FIRST).one().id

    @app.get("/slow", response_model=ItemOut)
    def slow(db: Annotated[Session, dependency]) -> Any:
        return db.scalars(statement).one()

    @app.get("/slow-auth", response_model=ItemOut)
    def slow_auth(
        user: Annotated[int, Depends(authenticate)], db: Annotated[Session, dependency]
    ) -> Any:
        return db.scalars(statement).one()

    @app.get("/slow-begin", response_model=ItemOut)
    def slow_begin() -> ItemOut:
        with adapter.begin() as db:
            return ItemOut.model_validate(db.scalars(statement).one())

    @app.get("/read", response_model=ItemOut)
    def read(db: Annotated[Session, dependency]) -> Item:
        return db.scalars(FIRST).one()

    @app.get("/write", response_model=ItemOut)
    def write(db: Annotated[Session, dependency]) -> ItemOut:
        item = Item(name="written")
        db.add(item)
        db.flush()
        stored = ItemOut.model_validate(item)
        if not adapter.commits:
            db.commit()
        return stored


def add_async_routes(app: FastAPI, dependency: params.Depends, seconds: float) -> None:
    """Add the same routes as `async def` endpoints."""
    statement = slow_first(seconds)

    async def authenticate(db: Annotated[AsyncSession, dependency]) -> int:
        return (await db.scalars(FIRST)).one().id

    @app.get("/slow", response_model=ItemOut)
    async def slow(db: Annotated[AsyncSession, dependency]) -> Any:
        return (await db.scalars(statement)).one()

    @app.get("/slow-auth", response_model=ItemOut)
    async def slow_auth(
        user: Annotated[int, Depends(authenticate)], db: Annotated[AsyncSession, dependency]
    ) -> Any:
        return (await db.scalars(statement)).one()

    @app.get("/read", response_model=ItemOut)
    async def read(db: Annotated[AsyncSession, dependency]) -> Item:
        return (await db.scalars(FIRST)).one()

    @app.get("/write", response_model=ItemOut)
    async def write(db: Annotated[AsyncSession, dependency]) -> Item:
        item = Item(name="written")
        db.add(item)
        await db.commit()
        return item


VARIANTS: dict[str, Callable[[FastAPI, Settings], None]] = {
    "seed": seed_variant,
    "scope-function": scope_function,
    "max-concurrency": max_concurrency,
    "max-concurrency-no-ping": max_concurrency_no_ping,
    "all-async": all_async,
    "all-async-ping": all_async_ping,
    "late-commit": late_commit,
    "sessionscope": ours,
    "sessionscope-read-only": ours_read_only,
}


def create(variant: str, settings: Settings) -> FastAPI:
    """Return the application of *variant*."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    VARIANTS[variant](app, settings)
    return app


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("settings", type=Settings.loads)
    parser.add_argument("descriptor", type=int, help="the listening socket")
    arguments = parser.parse_args()
    app = create(arguments.variant, arguments.settings)
    # A full collection of all that was imported stops a server for 0.1 s, now and then.
    gc.collect()
    gc.freeze()
    server = uvicorn.Server(
        uvicorn.Config(app, loop="asyncio", log_level="error", access_log=False)
    )
    server.run(sockets=[socket.socket(fileno=arguments.descriptor)])


if __name__ == "__main__":
    _main()
