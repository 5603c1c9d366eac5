"""Connections of event loops: one that died, one whose socket is reused, one of another loop."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import SessionShared
from tests.async_drivers import backend_id, kill, names


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["aiosqlite-file", "aiosqlite-memory"], indirect=True)
async def test_the_server_refuses_what_gets_through_to_it(async_database: AsyncDatabase) -> None:
    with pytest.raises(sa_exc.DBAPIError, match=r"(?i)read.?only"):
        async with async_database.begin(read_only=True) as session:
            await session.execute(text("INSERT INTO item (name) VALUES ('text')"))
    assert await names(async_database) == []


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["asyncmy"], indirect=True)
async def test_a_killed_connection_is_replaced_without_an_error(
    async_database: AsyncDatabase, async_url: str
) -> None:
    killed = set()
    for read_only in (False, True):
        async with async_database.begin(read_only=read_only) as session:
            killed.add(await backend_id(session))
    await kill(async_url, *killed)
    for read_only in (False, True):
        async with async_database.begin(read_only=read_only) as session:
            assert await backend_id(session) not in killed


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["asyncpg", "asyncmy"], indirect=True)
async def test_the_number_of_a_closed_socket_may_be_anothers(
    async_database: AsyncDatabase, async_url: str
) -> None:
    """Seen through the number alone, a dead connection looks as alive as the new one."""
    async with async_database.begin() as session:
        killed = await backend_id(session)
    await kill(async_url, killed)
    other = AsyncDatabase(async_url)
    async with other, other.begin() as session:
        await backend_id(session)  # takes the number that has come free
        async with async_database.begin() as again:
            assert await backend_id(again) != killed


def test_the_place_of_the_first_thread_is_the_users_own(sqlite: Database) -> None:
    """Not the driver's, nor that of what the driver waits in."""
    inside, leave = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        inside.set()
        leave.wait(10)

    def the_first(session: Session) -> None:
        session.execute(text("SELECT 1"))

    with sqlite.begin() as session:
        event.listen(session.connection(), "before_cursor_execute", block)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(the_first, session)
            assert inside.wait(10)
            with pytest.raises(SessionShared) as caught:
                session.execute(text("SELECT 1"))
            leave.set()
            first.result(10)
    assert "the_first" in str(caught.value)
    assert "threading.py" not in str(caught.value)


@pytest.mark.parametrize(
    "async_url", ["psycopg", "asyncpg", "aiosqlite-file", "asyncmy"], indirect=True
)
def test_a_session_on_another_event_loop_is_refused(async_url: str) -> None:
    """asyncpg says something of futures; psycopg and aiosqlite go on, until they hang."""
    database = AsyncDatabase(async_url)

    async def open_and_use() -> AsyncSession:
        session = database.sessionmaker()
        await session.execute(text("SELECT 1"))
        return session

    async def use(session: AsyncSession) -> None:
        with pytest.raises(SessionShared, match="on another event loop") as caught:
            await session.execute(text("SELECT 1"))
        assert "open_and_use" in str(caught.value)
        assert "async with database.begin()" in str(caught.value)

    async def end(session: AsyncSession) -> None:
        assert await session.scalar(text("SELECT 1")) == 1
        await session.close()
        await database.dispose()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        session = first.run(open_and_use())
        second.run(use(session))
        first.run(end(session))


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["psycopg", "asyncpg", "asyncmy"], indirect=True)
async def test_the_engine_inside_is_refused_outside_of_a_greenlet(
    async_database: AsyncDatabase,
) -> None:
    """A common mistake, which must not cost the pool a place."""
    before = async_database.stats()
    for _ in range(20):
        with pytest.raises(sa_exc.MissingGreenlet, match="run_sync"):
            async_database.engine.sync_engine.pool.recreate().connect()
    async with async_database.begin() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    assert async_database.stats().limit == before.limit


@pytest.mark.parametrize("async_url", ["psycopg", "asyncpg", "asyncmy"], indirect=True)
def test_a_connection_of_a_loop_that_has_stopped_gives_its_place_back(async_url: str) -> None:
    database = AsyncDatabase(async_url, pool_size=1, max_overflow=0)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        for runner in (first, second, first):
            runner.run(database.ping())
        first.run(database.dispose())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("async_url", ["psycopg", "asyncpg", "aiosqlite-memory"], indirect=True)
def test_eager_tasks_do_not_run_inside_of_a_greenlet(async_url: str) -> None:
    database = AsyncDatabase(async_url)

    async def use() -> None:
        if sys.version_info >= (3, 12):  # for the type checkers, which believe no decorator
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        for _ in range(3):
            async with database.begin() as session:
                assert await session.scalar(text("SELECT 1")) == 1
        await database.dispose()

    with asyncio.Runner() as runner:
        runner.run(use())
