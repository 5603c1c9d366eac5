"""install() with AsyncDatabases: event loops that come and go, start-up and shutdown."""

import asyncio
import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import (
    FastAPI,
    WebSocket,
)
from fastapi.testclient import TestClient
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase, Database, Unit
from sessionscope.exc import ConfigurationError, PoolBusy
from sessionscope.integrations.fastapi import install, session_per_request
from tests.async_drivers import (
    names,
)
from tests.fastapi_clients import (
    app_of,
    until,
)
from tests.models import Base, Item
from tests.models import names as names_sync

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["psycopg", "asyncpg", "aiosqlite"])
def tables_url(request: pytest.FixtureRequest) -> str:
    """The tests' tables behind each driver, for tests whose event loops come and go."""
    is_sqlite = request.param == "aiosqlite"
    url = make_url(request.getfixturevalue("sqlite_url" if is_sqlite else "postgres_url"))
    with Database(url) as database:
        Base.metadata.create_all(database.engine)
    return url.set(drivername=f"{url.get_backend_name()}+{request.param}").render_as_string(False)


def sync_names(url: str) -> list[str]:
    backend = make_url(url).get_backend_name()
    with Database(make_url(url).set(drivername=backend)) as database:
        return sorted(names_sync(database))


def app_that_creates(database: AsyncDatabase) -> FastAPI:
    app = FastAPI()

    @app.post("/{name}")
    async def create(
        name: str, session: Annotated[AsyncSession, session_per_request(database)]
    ) -> None:
        session.add(Item(name=name))

    return app


def test_two_test_clients_in_a_row_work(tables_url: str) -> None:
    """Each has an event loop of its own; the first one's shutdown drains the Database."""
    database = AsyncDatabase(tables_url)
    app = app_that_creates(database)
    install(app, database)
    for name in ("one", "two"):
        with TestClient(app) as client:
            assert client.post(f"/{name}").status_code == 200
            assert client.post(f"/{name}-more").status_code == 200
        assert database.stats().idle == 0
    assert sync_names(tables_url) == ["one", "one-more", "two", "two-more"]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_test_client_without_a_lifespan_works(tables_url: str) -> None:
    """Each request then has an event loop of its own, which is closed when it is answered.

    asyncpg's connections cannot be closed in order after that.
    """
    database = AsyncDatabase(tables_url)
    client = TestClient(app_that_creates(database))
    for name in ("one", "two", "three"):
        assert client.post(f"/{name}").status_code == 200
    assert sync_names(tables_url) == ["one", "three", "two"]
    asyncio.run(database.dispose())
    gc.collect()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_database_that_is_down_is_503_and_a_warning_at_start_up(
    caplog: pytest.LogCaptureFixture, driver: str
) -> None:
    database = AsyncDatabase(f"postgresql+{driver}://user:s3cr3t@127.0.0.1:1/db")
    app = app_that_creates(database)
    install(app, database)
    with caplog.at_level(logging.WARNING, "sessionscope"), TestClient(app) as client:
        response = client.post("/pear")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert "Retry-After" in response.headers
    assert "does not answer at start-up" in caplog.text
    assert "s3cr3t" not in caplog.text


async def test_shutdown_waits_for_the_units_at_work(async_database: AsyncDatabase) -> None:
    """And refuses new ones meanwhile; afterwards the Database works again."""
    inside, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="pear"))
            inside.set()
            await leave.wait()

    app = app_of(async_database)
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    working = asyncio.create_task(work())
    await inside.wait()
    stopping = asyncio.create_task(lifespan.__aexit__(None, None, None))
    while not async_database.stats().refused:
        await asyncio.sleep(0)
        refusal = asyncio.create_task(async_database.ping())
        await asyncio.wait([refusal], timeout=1)
        refusal.exception()
    assert not stopping.done()
    leave.set()
    await asyncio.gather(working, stopping)
    assert await names(async_database) == ["pear"]


def test_a_websocket_is_refused_with_the_mend(tables_url: str) -> None:
    database = AsyncDatabase(tables_url)
    app = FastAPI()
    install(app, database)

    @app.websocket("/ws")
    async def chat(
        websocket: WebSocket, session: Annotated[AsyncSession, session_per_request(database)]
    ) -> None:
        pytest.fail("the endpoint ran")

    with TestClient(app) as client, pytest.raises(ConfigurationError, match="async with"):
        with client.websocket_connect("/ws"):
            pytest.fail("it was accepted")
    assert database.stats().in_use == 0


@pytest.mark.parametrize("kind", [Database, AsyncDatabase])
async def test_all_databases_drain_at_the_same_time(
    tmp_path: Path, kind: type[Database] | type[AsyncDatabase]
) -> None:
    """Each refuses new units while all of them still have one at work.

    There are more of them than threads that asyncio.to_thread() has here.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    driver = "sqlite" if kind is Database else "sqlite+aiosqlite"
    databases = [kind(f"{driver}:///{tmp_path / name}") for name in ("a", "b", "c")]
    app = app_of(*databases)
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    units = [Unit[Any](database) for database in databases]
    for unit in units:  # each in a flow of its own, as requests are
        await asyncio.create_task(unit.admit_async())
    stopping = asyncio.create_task(lifespan.__aexit__(None, None, None))
    await until(lambda: all(is_draining(database) for database in databases))
    assert [database.stats().in_use for database in databases] == [1] * 3
    for unit in units:
        unit.close()
    await stopping
    assert not any(is_draining(database) for database in databases)


def is_draining(database: Database | AsyncDatabase) -> bool:
    """Whether a new unit is refused; there is a connection for one that reads."""
    unit = Unit[Any](database, read_only=True)
    try:
        unit.admit()
    except PoolBusy as error:
        return "drain()" in str(error)
    unit.close()
    return False


def test_wrong_arguments_name_the_line_to_write() -> None:
    database = AsyncDatabase("sqlite+aiosqlite://")
    for wrong, line in (
        (lambda: install(FastAPI(), database.engine), r"AsyncEngine .* write install\(app, "),  # type: ignore[arg-type]
        (lambda: session_per_request(database.engine), r"write session_per_request\("),  # type: ignore[arg-type]
        (lambda: session_per_request(database.sessionmaker), r"write session_per_request"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match=line):
            wrong()
