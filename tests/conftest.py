"""Fixtures of all tests: real databases, fresh for each test."""

import os
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from sessionscope import AsyncDatabase, Database
from sessionscope.testing import FaultProxy, PostgresServer
from tests import async_drivers
from tests.models import create_tables


def missing(service: str) -> NoReturn:
    """Skip the test that needs *service*; in CI, where all must be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(service)
    pytest.skip(service)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at the end what a test has counted, on whichever process it ran."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "tell":
                terminalreporter.write_line(str(value))


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


@pytest.fixture(scope="session")
def mysql_server() -> URL:
    """The MariaDB or MySQL that listens on localhost."""
    url = make_url("mysql+pymysql://root@127.0.0.1:3306")
    engine = create_engine(url)
    try:
        engine.connect().close()
    except OperationalError as error:
        missing(f"No MariaDB at {url}: {error.orig}")
    finally:
        engine.dispose()
    return url


@pytest.fixture
def mysql_url(mysql_server: URL) -> Iterator[str]:
    """An empty MariaDB database, this run's and this worker's own."""
    url = mysql_server.set(database=f"sessionscope_test_{os.getpid()}")
    engine = create_engine(mysql_server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {url.database}"))
        yield url.render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {url.database}"))
    engine.dispose()


KINDS = ("sqlite-file", "sqlite-memory", "postgres", "psycopg2", "mysql")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind in turn."""
    if request.param == "sqlite-memory":
        return "sqlite://"
    if request.param == "psycopg2":
        return with_psycopg2(request.getfixturevalue("postgres_url"))
    fixture = request.param.removesuffix("-file") + "_url"
    return str(request.getfixturevalue(fixture))


def with_psycopg2(url: str) -> str:
    """The same PostgreSQL database through the older driver."""
    return url.replace("+psycopg:", "+psycopg2:")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A Database of each kind in turn, with the default options and the tests' tables."""
    with Database(url) as database:
        yield create_tables(database)


@pytest.fixture(params=["psycopg", "psycopg2"])
def postgres(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL Database with the tests' tables, through each of its drivers."""
    url = with_psycopg2(postgres_url) if request.param == "psycopg2" else postgres_url
    with Database(url) as database:
        yield create_tables(database)


@pytest.fixture
def psycopg(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL Database with the tests' tables, through psycopg 3 alone."""
    with Database(postgres_url) as database:
        yield create_tables(database)


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[FaultProxy]:
    url = make_url(postgres_url)
    assert url.host is not None
    assert url.port is not None
    with FaultProxy(url.host, url.port) as proxy:
        yield proxy


@pytest.fixture
def behind(postgres_url: str, proxy: FaultProxy) -> Iterator[Database]:
    """The same database behind the proxy."""
    with Database(postgres_url) as database:
        create_tables(database)
    with Database(proxy.through(postgres_url)) as database:
        yield database


@pytest.fixture
def mysql(mysql_url: str) -> Iterator[Database]:
    """A MariaDB Database with the tests' tables."""
    with Database(mysql_url) as database:
        yield create_tables(database)


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    """An SQLite Database in a file, with the tests' tables."""
    with Database(sqlite_url) as database:
        yield create_tables(database)


@pytest.fixture(scope="session")
def reused_postgres(postgres_server: PostgresServer) -> Iterator[Engine]:
    """One PostgreSQL database for many tests: to make one takes longer than most of them."""
    engine = create_engine(postgres_server.create_database(), isolation_level="AUTOCOMMIT")
    yield engine
    engine.dispose()


@pytest.fixture
def emptied_postgres_url(reused_postgres: Engine) -> str:
    """A PostgreSQL database that is as good as new; what was left connected is cut."""
    with reused_postgres.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    # No connection of its own is in the way of tests that count.
    reused_postgres.dispose()
    return reused_postgres.url.render_as_string(hide_password=False)


@pytest.fixture(params=async_drivers.ASYNC_DRIVERS)
def async_url(request: pytest.FixtureRequest) -> str:
    """An empty database through each asynchronous driver in turn."""
    driver = request.param.partition("-")[0]
    if find_spec(driver) is None:
        missing(f"The driver {driver} is not installed")
    if request.param == "aiosqlite-memory":
        return "sqlite+aiosqlite://"
    emptied = "emptied_postgres_url"
    fixture = {"psycopg": emptied, "asyncpg": emptied, "aiosqlite": "sqlite_url"}
    url = make_url(request.getfixturevalue(fixture.get(driver, "mysql_url")))
    other = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    return other.render_as_string(hide_password=False)


@pytest.fixture
async def async_database(async_url: str) -> AsyncIterator[AsyncDatabase]:
    """An AsyncDatabase through each driver in turn, with the tests' tables."""
    async with AsyncDatabase(async_url) as database:
        await async_drivers.create_tables(database)
        yield database
