"""The types of what tests and integrations use; read by mypy and pyright, never run."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Annotated, assert_type

import sqlmodel
from fastapi import FastAPI
from flask import Flask
from litestar import Litestar
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette

from sessionscope import AsyncDatabase, Database, Unit
from sessionscope.integrations import fastapi, flask, litestar, starlette
from sessionscope.testing import (
    Fault,
    FaultProxy,
    PostgresServer,
    SandboxError,
    Statement,
    TooManyStatements,
    async_sandbox,
    capture_hooks,
    count_statements,
    sandbox,
    shared_postgres,
)

plain = Database("sqlite://")
models = Database("sqlite://", session_class=sqlmodel.Session)
tasks = AsyncDatabase("sqlite+aiosqlite://")


def test_of_a_database() -> None:
    with sandbox(plain) as boxed:
        assert_type(boxed, Database[Session])
    with sandbox(models, bind=plain.engine) as of_models:
        assert_type(of_models, Database[sqlmodel.Session])
    sandbox(plain.engine)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    sandbox(plain, bind=plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_of_an_async_database() -> None:
    async with async_sandbox(tasks) as boxed:
        assert_type(boxed, AsyncDatabase[AsyncSession])
    async with async_sandbox(tasks, bind=tasks.engine):
        assert_type(tasks.engine, AsyncEngine)


def test_of_statements_and_hooks() -> None:
    with count_statements(plain, limit=3) as sent:
        assert_type(sent, list[Statement])
    with count_statements(tasks) as sent:
        assert_type(sent[0].text, str)
        assert_type(sent[0].place, str)
    with capture_hooks() as hooks:
        assert_type(hooks, list[partial[object]])
    with Unit.hand_hooks_to(print):
        pass
    errors: tuple[type[Exception], ...] = (SandboxError, TooManyStatements)
    assert errors


def test_of_servers() -> None:
    with PostgresServer(max_connections=20) as server:
        assert_type(server, PostgresServer)
        assert_type(server.create_database(), str)
    with FaultProxy("127.0.0.1", 5432) as proxy:
        assert_type(proxy, FaultProxy)
        assert_type(proxy.through("postgresql://127.0.0.1/test"), str)
        fault: Fault = "cut before"
        proxy.aim(fault, b"COMMIT", times=2)
        proxy.aim("cut", b"COMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_of_a_shared_server(folder: Path) -> Generator[str]:
    with shared_postgres(folder, print) as url:
        assert_type(url, str)
        yield url


ReadSession = Annotated[Session, fastapi.session_per_request(plain, read_only=True)]


def of_fastapi() -> None:
    app = FastAPI()
    assert_type(fastapi.install(app, plain, tasks), None)

    @app.get("/")
    def read(session: ReadSession) -> int:
        assert_type(session, Session)
        return 1

    assert [read]


def of_starlette() -> None:
    assert_type(starlette.install(Starlette(), plain, tasks), None)


def of_flask() -> None:
    assert_type(flask.install(Flask(__name__)), None)


def of_litestar() -> None:
    app = Litestar(
        dependencies={"session": litestar.session_per_request(plain)},
        on_app_init=[litestar.install(plain, tasks)],
    )
    assert_type(app, Litestar)


def of_fixtures(database: Database[Session], session: Session) -> Engine:
    """What conftest.py of a user declares."""
    assert_type(database.engine, Engine)
    return database.engine
