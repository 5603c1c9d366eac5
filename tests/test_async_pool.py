"""Connections of event loops: dead ones are replaced, round trips counted, loops kept apart."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession

import sessionscope
from benchmarks.proxy import Proxy
from sessionscope import AsyncDatabase
from sessionscope.testing import PostgresServer
from tests.async_drivers import (
    backend_id,
    create_tables,
    kill,
    on_postgres,
    on_uvloop_too,
    through,
)
from tests.forks import answer_of_a_child
from tests.models import Item


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["psycopg", "asyncpg", "aiomysql"], indirect=True)
async def test_a_killed_connection_is_replaced_without_an_error(
    async_database: AsyncDatabase, async_url: str
) -> None:
    """The end of the connection is readable on its socket: no ping is needed to see it."""
    killed = set()
    for read_only in (False, True):
        async with async_database.begin(read_only=read_only) as session:
            killed.add(await backend_id(session))
    await kill(async_url, *killed)

    for read_only in (False, True):
        async with async_database.begin(read_only=read_only) as session:
            assert await backend_id(session) not in killed


@pytest.mark.anyio
@on_postgres
async def test_a_connection_that_ends_while_it_is_set_up_is_opened_again(async_url: str) -> None:
    """asyncpg tells that by an error of its own, which SQLAlchemy does not know there."""
    ended: list[object] = []

    def end(dbapi_connection: Any, record: object) -> None:
        if not ended:
            connection = dbapi_connection.driver_connection
            ended.append(connection)
            if hasattr(connection, "terminate"):
                connection.terminate()
            else:
                connection.pgconn.finish()

    async def work(session: AsyncSession) -> int:
        return int((await session.scalars(text("SELECT 1"))).one())

    async with AsyncDatabase(async_url) as database:
        for engine in (database.engine, database.read_engine):
            event.listen(engine.sync_engine.pool, "connect", end, insert=True)
        assert await database.run(work) == 1
        assert len(ended) == 1
        assert database.stats().retried == 1


@pytest.mark.anyio
@on_uvloop_too
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_a_server_that_was_restarted_is_reconnected_to(
    own_server: PostgresServer, driver: str
) -> None:
    url = make_url(own_server.create_database()).set(drivername=f"postgresql+{driver}")
    async with AsyncDatabase(url) as database:
        for read_only in (False, True):
            async with database.begin(read_only=read_only) as session:
                before = await backend_id(session)
        await asyncio.to_thread(own_server.restart)
        for read_only in (False, True):
            async with database.begin(read_only=read_only) as session:
                assert await backend_id(session) != before


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_forked_child_does_not_count_what_it_inherited(postgres_url: str, driver: str) -> None:
    """Once its pool is emptied, as SQLAlchemy has it, all connections are its own."""
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}")
    database = AsyncDatabase(url, pool_size=1, max_overflow=0, pool_timeout=0.1)

    async def select_one() -> object:
        async with database.begin() as session:
            return await session.scalar(text("SELECT 'served'"))

    def in_child() -> object:
        database.engine.sync_engine.dispose(close=False)
        return asyncio.run(select_one())

    with asyncio.Runner() as runner:
        session = database.sessionmaker()
        runner.run(session.execute(text("SELECT 1")))
        assert answer_of_a_child(in_child) == "served"
        runner.run(session.close())
        runner.run(database.dispose())


@pytest.fixture(scope="module")
def own_server() -> Any:
    """A server that a test may restart."""
    with PostgresServer() as server:
        yield server


SOURCE = Path(sessionscope.__file__).parent.parent

Work = Callable[[AsyncSession], Coroutine[Any, Any, object]]


async def one_select(session: AsyncSession) -> None:
    await session.scalars(select(Item))


async def three_selects(session: AsyncSession) -> None:
    for _ in range(3):
        await one_select(session)


async def an_insert(session: AsyncSession) -> None:
    session.add(Item(name=f"item {uuid4()}"))


@pytest.mark.anyio
@on_postgres
@on_uvloop_too
@pytest.mark.parametrize(
    ("read_only", "work", "trips"),
    [
        pytest.param(True, one_select, 1, id="a-read"),
        pytest.param(True, three_selects, 3, id="three-reads"),
        pytest.param(False, an_insert, 3, id="a-write"),
    ],
)
async def test_waited_round_trips(async_url: str, read_only: bool, work: Work, trips: int) -> None:
    """One for a SELECT; BEGIN, INSERT and COMMIT for a write, on both drivers alike."""
    port = make_url(async_url).port or 5432
    with Proxy("127.0.0.1", port) as proxy:
        async with AsyncDatabase(through(async_url, proxy.port)) as database:
            await create_tables(database)
            for _ in range(7):  # psycopg prepares a statement at its fifth use
                async with database.begin(read_only=read_only) as session:
                    await work(session)
            before = proxy.waited()
            async with database.begin(read_only=read_only) as session:
                await work(session)
            assert proxy.waited() - before == trips


TWO_LOOPS = """
import asyncio, sys
from sqlalchemy import text
from sessionscope import AsyncDatabase
url, loop = sys.argv[1:]
if loop == "uvloop":
    from uvloop import new_event_loop
else:
    from asyncio import new_event_loop
database = AsyncDatabase(url, pool_size=1, max_overflow=1)

async def use(number):
    for read_only in (False, True):
        async with database.begin(read_only=read_only) as session:
            await session.execute(text(f"SELECT {number}"))
    stats = database.stats()
    assert (stats.in_use, stats.idle) == (0, 2), stats

for number in range(3):
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(use(number))
print(database.stats().committed)
"""


@pytest.mark.parametrize(
    ("async_url", "loop"),
    [
        ("psycopg", "asyncio"),
        ("psycopg", "uvloop"),
        ("asyncpg", "asyncio"),
        ("asyncpg", "uvloop"),
        ("asyncmy", "asyncio"),
    ],
    indirect=["async_url"],
)
def test_event_loops_one_after_the_other_use_one_database(async_url: str, loop: str) -> None:
    """A connection belongs to the loop that opened it: the next one gets its own, in its place.

    In a process of its own, because the connections of a closed loop warn as they go.
    """
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", TWO_LOOPS, async_url, loop]
    run = subprocess.run(command, cwd=SOURCE, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "6\n"), run.stderr
