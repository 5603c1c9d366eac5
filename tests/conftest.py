"""Fixtures of all tests: real databases, fresh for each test."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import make_url

from sessionscope import Database
from sessionscope.testing import PostgresServer
from tests.models import create_tables


def missing(service: str) -> NoReturn:
    """Skip the test that needs *service*; in CI, where all must be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(service)
    pytest.skip(service)


@pytest.fixture
def anyio_backend() -> str:
    """The tests that are coroutines run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the whole run, started by the first test that asks for it."""
    try:
        server = PostgresServer()
    except ModuleNotFoundError as error:
        missing(str(error))
    with server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """An empty PostgreSQL database; what the test leaves connected is cut."""
    url = postgres_server.create_database()
    yield url
    name = make_url(url).database
    assert name is not None
    postgres_server.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    if request.param == "sqlite-memory":
        return "sqlite://"
    fixture = {"sqlite-file": "sqlite_url", "postgres": "postgres_url"}[request.param]
    return str(request.getfixturevalue(fixture))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A Database of each kind in turn, with the default options and the tests' tables."""
    with Database(url) as database:
        yield create_tables(database)


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL Database with the tests' tables."""
    with Database(postgres_url) as database:
        yield create_tables(database)


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    """An SQLite Database in a file, with the tests' tables."""
    with Database(sqlite_url) as database:
        yield create_tables(database)
