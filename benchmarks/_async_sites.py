"""FastAPI applications with `async def` endpoints on asyncpg, each as its library documents it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from benchmarks._bodies import DONE
from benchmarks._def_sites import configure_fastapi_sqla, fastapi_sqla_app, raw_statements
from benchmarks._postgres import text
from benchmarks._settings import ItemOut, Settings, for_asyncpg
from benchmarks._subject import Site, async_depending, async_routes, finding, health_app


def sessionscope(settings: Settings) -> Site:
    """Serve our asynchronous session."""
    import sessionscope as ours
    from sessionscope.integrations.fastapi import install, session_per_request

    # Found by name: this repository can be older than the class.
    make: Any = ours.AsyncDatabase  # type: ignore[attr-defined, unused-ignore]
    url, connect_args = for_asyncpg(settings.url)
    database = make(
        url,
        pool_timeout=settings.pool_timeout,
        engine_options={"connect_args": connect_args},
        **settings.pool,
    )
    app = health_app()
    install(app, database)
    return async_routes(app, settings, async_depending(app, session_per_request(database)))


def sqlalchemy(settings: Settings) -> Site:
    """Serve plain SQLAlchemy: a unit per request that commits before the answer is sent."""
    factory = async_sessionmaker(_engine(settings), expire_on_commit=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with factory.begin() as session:
            yield session

    app = health_app()
    dependency = Depends(get_db, scope="function")
    return async_routes(app, settings, async_depending(app, dependency))


def sqlalchemy_get_db(settings: Settings) -> Site:
    """Serve the tutorials' asynchronous `get_db`, committed by the endpoint."""
    factory = async_sessionmaker(_engine(settings), expire_on_commit=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with factory() as session:
            yield session

    app = health_app()
    return async_routes(app, settings, async_depending(app, Depends(get_db), commit=True))


def _engine(settings: Settings) -> AsyncEngine:
    url, connect_args = for_asyncpg(settings.url)
    return create_async_engine(url, connect_args=connect_args, **settings.pool)


def advanced_alchemy(settings: Settings) -> Site:
    """Serve advanced-alchemy's extension for FastAPI in its mode `autocommit`."""
    from advanced_alchemy.extensions.fastapi import (
        AdvancedAlchemy,
        AsyncSessionConfig,
        EngineConfig,
        SQLAlchemyAsyncConfig,
    )

    app = health_app()
    url, connect_args = for_asyncpg(settings.url)
    config = SQLAlchemyAsyncConfig(
        connection_string=text(url),
        engine_config=EngineConfig(connect_args=connect_args, **settings.pool),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    alchemy = AdvancedAlchemy(config=config, app=app)
    return async_routes(app, settings, async_depending(app, Depends(alchemy.provide_session())))


def fastapi_sqla(settings: Settings) -> Site:
    """Serve fastapi-sqla with asyncpg, configured by environment variables as it asks for."""
    url, connect_args = for_asyncpg(settings.url)
    configure_fastapi_sqla(text(url), settings)
    # Variables cannot hold these arguments, without which its connections are not counted.
    event.listen(Engine, "do_connect", lambda dialect, record, a, k: k.update(connect_args))
    from fastapi_sqla import AsyncSessionDependency

    app = fastapi_sqla_app()
    return async_routes(app, settings, async_depending(app, Depends(AsyncSessionDependency())))


def fastapi_async_sqlalchemy(settings: Settings) -> Site:
    """Serve fastapi-async-sqlalchemy's middleware with `commit_on_exit`."""
    from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

    app = health_app()
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=_engine(settings), commit_on_exit=True)

    async def find() -> AsyncSession:
        session: AsyncSession = db.session
        return session

    return async_routes(app, settings, finding(app, find))


def context_async_sqlalchemy(settings: Settings) -> Site:
    """Serve context-async-sqlalchemy's middleware for FastAPI."""
    from context_async_sqlalchemy import DBConnect, db_session
    from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

    connection = DBConnect(
        host=settings.url,
        engine_creator=lambda host: _engine(settings),
        session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
    )
    app = health_app()
    add_fastapi_http_db_session_middleware(app)
    return async_routes(app, settings, finding(app, lambda: db_session(connection)))


def asyncpg_pool(settings: Settings) -> Site:
    """Serve the driver and its own pool: no session, no object is made."""
    import asyncpg  # type: ignore[import-untyped]  # it ships no types

    url, connect_args = for_asyncpg(settings.url)
    dsn = text(url.set(drivername="postgresql"))
    sizes = {"min_size": settings.pool_size, "max_size": settings.limit}
    opened: dict[str, Any] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(dsn, **sizes, **connect_args) as opened["pool"]:
            yield

    app = health_app()
    app.router.lifespan_context = lifespan

    def serve(path: str, statement: str) -> None:
        async def endpoint() -> Any:
            # One statement is a transaction of its own, so nothing more needs to be sent.
            async with opened["pool"].acquire() as connection:
                found = await connection.fetchrow(statement)
            return ItemOut(id=found[0], name=found[1])

        app.get(path, response_model=ItemOut)(endpoint)

    paths = ("/slow", "/read", "/write")
    for path, statement in zip(paths, raw_statements(settings.query_seconds), strict=True):
        serve(path, statement)

    @app.get("/unused")
    async def unused() -> dict[str, str]:
        return DONE

    return Site(app)
