"""FastAPI applications with `def` endpoints, each set up as its library's documentation has it.

A library is imported in its own function: it may be missing, and what one import installs must
not run in the processes of the others.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from benchmarks._bodies import DONE, Body
from benchmarks._model import FIRST, Item, slow_first
from benchmarks._postgres import conninfo
from benchmarks._settings import ItemOut, Settings
from benchmarks._subject import Site, def_routes, depending, health_app, opening


def sessionscope(settings: Settings) -> Site:
    """Serve our session."""
    return _sessionscope(settings, read_only=False)


def sessionscope_read_only(settings: Settings) -> Site:
    """Serve our read-only session; the routes that write do not work with it."""
    return _sessionscope(settings, read_only=True)


def _sessionscope(settings: Settings, *, read_only: bool) -> Site:
    from sessionscope import Database
    from sessionscope.integrations.fastapi import install, session_per_request

    app = health_app()
    database = Database(settings.url, pool_timeout=settings.pool_timeout, **settings.pool)
    install(app, database)
    return def_routes(
        app, settings, depending(app, session_per_request(database, read_only=read_only))
    )


def sqlalchemy_get_db(settings: Settings) -> Site:
    """Serve FastAPI's tutorial: a session in a `yield` dependency, committed by the endpoint."""
    app = health_app()
    dependency = Depends(_get_db(_factory(settings)))
    return def_routes(app, settings, depending(app, dependency, commit=True))


def sqlalchemy_bounded(settings: Settings) -> Site:
    """Serve plain SQLAlchemy with all that FastAPI has against the deadlock of the tutorial."""
    app = health_app()
    begin = _factory(settings).begin
    dependency = Depends(_get_db(begin), scope="function", max_concurrency=settings.limit)
    return def_routes(app, settings, depending(app, dependency))


def _factory(settings: Settings) -> sessionmaker[Session]:
    return sessionmaker(create_engine(settings.url, **settings.pool))


def _get_db(
    opened: Callable[[], AbstractContextManager[Session]],
) -> Callable[[], Iterator[Session]]:
    def get_db() -> Iterator[Session]:
        with opened() as session:
            yield session

    return get_db


def advanced_alchemy(settings: Settings) -> Site:
    """Serve advanced-alchemy's extension for FastAPI in its mode `autocommit`."""
    from advanced_alchemy.extensions.fastapi import (
        AdvancedAlchemy,
        EngineConfig,
        SQLAlchemySyncConfig,
    )

    app = health_app()
    config = SQLAlchemySyncConfig(
        connection_string=settings.url,
        engine_config=EngineConfig(**settings.pool),
        commit_mode="autocommit",
    )
    alchemy = AdvancedAlchemy(config=config, app=app)
    return def_routes(app, settings, depending(app, Depends(alchemy.provide_session())))


def fastapi_sqla(settings: Settings) -> Site:
    """Serve fastapi-sqla, configured by environment variables as it asks for."""
    configure_fastapi_sqla(settings.url, settings)
    from fastapi_sqla import SessionDependency

    app = fastapi_sqla_app()
    return def_routes(app, settings, depending(app, Depends(SessionDependency())))


def configure_fastapi_sqla(url: str, settings: Settings) -> None:
    """Set what fastapi-sqla reads."""
    os.environ["sqlalchemy_url"] = url  # noqa: SIM112  # the name is theirs
    for name, value in settings.pool.items():
        os.environ[f"sqlalchemy_{name}"] = str(value)


def fastapi_sqla_app() -> FastAPI:
    """Return an application with fastapi-sqla's middleware and start-up."""
    import fastapi_sqla

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await fastapi_sqla.startup()
        yield

    app = health_app()
    app.router.lifespan_context = lifespan
    fastapi_sqla.setup_middlewares(app)
    return app


def oslo_db(settings: Settings) -> Site:
    """Serve oslo.db's enginefacade: a reader or a writer, opened in the endpoint.

    Its transaction belongs to a thread, so that a `yield` dependency cannot hold it: FastAPI
    enters and leaves one in different threads.
    """
    from oslo_db.sqlalchemy import enginefacade

    manager = enginefacade.transaction_context()
    manager.configure(
        connection=settings.url,
        max_pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
    )

    @enginefacade.transaction_context_provider
    class Context:
        """What oslo.db hangs the transaction on."""

    def scope(body: Body) -> AbstractContextManager[Session]:
        kind = manager.writer if body.writes else manager.reader
        using: AbstractContextManager[Session] = kind.using(Context())
        return using

    app = health_app()
    return def_routes(app, settings, opening(app, scope))


def psycopg_pool(settings: Settings) -> Site:
    """Serve the driver and its own pool: no session, no object is made."""
    from psycopg_pool import ConnectionPool

    url = make_url(settings.url)
    # One statement is a transaction of its own, so nothing more needs to be sent.
    pool: Any = ConnectionPool(
        conninfo(url),
        kwargs={"autocommit": True},
        min_size=settings.pool_size,
        max_size=settings.limit,
        open=True,
    )
    app = health_app()
    slow, read, write = raw_statements(settings.query_seconds)

    def serve(path: str, statement: str) -> None:
        def endpoint() -> Any:
            with pool.connection() as connection:
                found = connection.execute(statement).fetchone()
            return ItemOut(id=found[0], name=found[1])

        app.get(path, response_model=ItemOut)(endpoint)

    for path, statement in (("/slow", slow), ("/read", read), ("/write", write)):
        serve(path, statement)
    app.get("/unused")(lambda: DONE)
    return Site(app)


def raw_statements(seconds: float) -> tuple[str, str, str]:
    """Return what the routes send, as text: slow, read and write."""
    dialect: Any = make_url("postgresql+psycopg://").get_dialect()()

    def literal(statement: Any) -> str:
        options = {"literal_binds": True}
        return str(statement.compile(dialect=dialect, compile_kwargs=options))

    insert = f"INSERT INTO {Item.__tablename__} (name) VALUES ('written') RETURNING id, name"
    return literal(slow_first(seconds)), literal(FIRST), insert
