"""The sandbox of an AsyncDatabase: one connection for the tasks of one event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase, Database, _overlap, after_commit
from sessionscope.exc import (
    ConfigurationError,
    IdleInTransactionWarning,
    ReadOnlyUnit,
    TransactionDoomed,
)
from sessionscope.integrations.fastapi import install, session_per_request
from sessionscope.testing import SandboxError, _turns, async_sandbox
from tests.async_drivers import (
    create_tables,
    names,
    on_one_of_each_kind,
    on_postgres,
    on_sqlite_files,
)
from tests.models import Item, Note

pytestmark = pytest.mark.anyio

on_asyncpg = pytest.mark.parametrize("async_url", ["asyncpg"], indirect=True)


@pytest.fixture
async def boxed(async_database: AsyncDatabase) -> AsyncIterator[AsyncDatabase]:
    """An AsyncDatabase in a sandbox, of which nothing must be left."""
    async with async_sandbox(async_database):
        yield async_database
    assert await names(async_database) == []


async def test_every_door_leads_into_the_sandbox(boxed: AsyncDatabase) -> None:
    async with boxed.begin() as session:
        session.add(Item(name="unit"))
    async with boxed.sessionmaker.begin() as session:
        session.add(Item(name="sessionmaker"))
    async with boxed.engine.begin() as connection:
        await connection.execute(insert(Item).values(name="Core"))
    async with boxed.begin(isolation_level="SERIALIZABLE") as session:
        session.add(Item(name="view"))
    await boxed.run(lambda session: session.add(Item(name="run")))
    assert len(await names(boxed)) == 5


async def test_errors_and_rollbacks_stay_where_they_are(boxed: AsyncDatabase) -> None:
    async with boxed.begin() as session:
        session.add(Item(name="pear"))
    with pytest.raises(IntegrityError):
        async with boxed.begin() as session:
            session.add(Item(name="pear"))
    with pytest.raises(ReadOnlyUnit):
        async with boxed.begin(read_only=True) as session:
            session.add(Item(name="plum"))
    assert await names(boxed) == ["pear"]


async def test_hooks_run(boxed: AsyncDatabase) -> None:
    ran: list[str] = []
    async with boxed.begin() as session:
        session.add(Item(name="pear"))
        after_commit(session, ran.append, "committed")
    assert ran == ["committed"]


@on_one_of_each_kind
async def test_a_rollback_dooms_another_one_that_has_written_since(boxed: AsyncDatabase) -> None:
    """It began before, and would have lost one of its two rows in silence."""
    async with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        await flush(own, "first")
        await flush(other, "other")
        await flush(own, "second")
        await other.rollback()
        with pytest.raises(TransactionDoomed, match=r"rows were undone .*session\.commit\(\)"):
            await own.commit()
    assert await names(boxed) == []


@on_one_of_each_kind
async def test_a_savepoint_that_is_rolled_back_dooms_another_one_that_has_written_since(
    boxed: AsyncDatabase,
) -> None:
    async with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        await flush(own, "own")
        await flush(other, "first")
        savepoint = await own.begin_nested()
        await flush(own, "in the savepoint")
        await flush(other, "second")
        await savepoint.rollback()
        with pytest.raises(TransactionDoomed, match=r"rows were undone .*session\.commit\(\)"):
            await other.commit()
    assert await names(boxed) == []


@on_one_of_each_kind
async def test_it_is_said_that_a_commit_was_undone_by_one_that_had_begun_later(
    boxed: AsyncDatabase,
) -> None:
    async with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        await flush(own, "first")
        await flush(other, "other")
        await flush(own, "second")
        await own.commit()
        await other.rollback()
        with pytest.warns(RuntimeWarning, match="has committed was undone"):
            assert await names(boxed) == ["first"]


async def flush(session: AsyncSession, name: str) -> None:
    session.add(Item(name=name))
    await session.flush()


@on_one_of_each_kind
async def test_tasks_take_turns_while_the_tests_own_session_is_open(boxed: AsyncDatabase) -> None:
    """16 tasks with units of which each second one rolls back, and none another one's work."""

    async def work(number: int) -> None:
        for unit in range(4):
            async with boxed.begin() as session:
                session.add(Item(name=f"{number}-{unit}"))
                await session.flush()
                await asyncio.sleep(0)
                if unit % 2:
                    await session.rollback()

    async with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        await own.flush()
        await asyncio.gather(*(work(number) for number in range(16)))
        await own.commit()
    expected = {f"{number}-{unit}" for number in range(16) for unit in (0, 2)}
    assert set(await names(boxed)) == expected | {"own"}


@on_postgres
async def test_a_cancelled_statement_ends_its_unit_alone(boxed: AsyncDatabase) -> None:
    async with boxed.begin() as session:
        session.add(Item(name="pear"))
    with anyio.move_on_after(0.1):
        async with boxed.begin() as session:
            session.add(Item(name="plum"))
            await session.execute(text("SELECT pg_sleep(30)"))
    assert await names(boxed) == ["pear"]


@on_postgres
async def test_a_task_that_is_cancelled_in_the_line_leaves_it(boxed: AsyncDatabase) -> None:
    async def write(name: str) -> None:
        async with boxed.sessionmaker.begin() as session:
            session.add(Item(name=name))
            await session.flush()

    waiting: asyncio.Task[None] | None = None

    async def hold() -> None:
        nonlocal waiting
        async with boxed.sessionmaker.begin() as session:
            session.add(Item(name="held"))
            await session.flush()
            waiting = asyncio.get_running_loop().create_task(write("never"), context=clean)
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.wait([waiting])

    clean = copy_context()  # as that of a worker that was started before
    await asyncio.create_task(hold())
    await write("after it")
    assert sorted(await names(boxed)) == ["after it", "held"]


@pytest.fixture
def in_line(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set as soon as a task waits for its turn."""
    event = asyncio.Event()
    wait = _turns._TaskWaiter.wait

    def tell_and_wait(waiter: Any) -> None:
        event.set()
        wait(waiter)

    monkeypatch.setattr(_turns._TaskWaiter, "wait", tell_and_wait)
    return event


@on_one_of_each_kind
async def test_who_waits_for_one_whose_connection_is_thrown_away_goes_on(
    boxed: AsyncDatabase, in_line: asyncio.Event
) -> None:
    """As at the end of a unit that was cancelled."""

    async def write() -> None:
        async with boxed.sessionmaker.begin() as session:
            await flush(session, "pear")

    async def hold() -> None:
        session = boxed.sessionmaker()
        await flush(session, "gone")
        waiting = asyncio.get_running_loop().create_task(write(), context=clean)
        await in_line.wait()
        await session.invalidate()
        await asyncio.wait_for(waiting, _turns.PATIENCE / 2)

    clean = copy_context()
    await asyncio.create_task(hold())
    assert await names(boxed) == ["pear"]


@on_one_of_each_kind
async def test_a_rollback_that_is_cancelled_in_the_line_is_made_up_for(
    boxed: AsyncDatabase, in_line: asyncio.Event
) -> None:
    has_written, may_end = asyncio.Event(), asyncio.Event()

    async def inner() -> None:
        async with boxed.sessionmaker() as session:
            await flush(session, "inner")
            has_written.set()
            await may_end.wait()

    async def outer() -> None:
        async with boxed.sessionmaker() as session:
            await flush(session, "outer")
            beside = asyncio.create_task(inner())
            await has_written.wait()
            rolling_back = asyncio.create_task(session.rollback())
            await in_line.wait()
            rolling_back.cancel()
            await asyncio.wait([rolling_back])
            may_end.set()
            await beside

    await asyncio.create_task(outer())
    assert await names(boxed) == []


async def test_a_statement_that_ends_the_transaction_fails_the_test(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(SandboxError, match=r"'COMMIT' at .*test_async_sandbox\.py"):
        async with async_sandbox(async_database), async_database.begin() as session:
            await session.scalar(select(1))
            await session.execute(text("COMMIT"))


@pytest.mark.parametrize("async_url", ["asyncpg", "aiosqlite-memory"], indirect=True)
async def test_a_deferred_constraint_fails_the_commit(boxed: AsyncDatabase) -> None:
    with pytest.raises(IntegrityError):
        async with boxed.begin() as session:
            session.add(Note(item_id=1))


async def test_one_in_memory_takes_the_place_of_one_that_cannot_be_reached() -> None:
    database = AsyncDatabase("postgresql://nobody@127.0.0.1:1/nothing")
    async with AsyncDatabase("sqlite+aiosqlite://") as memory:
        await create_tables(memory)
        async with async_sandbox(database, bind=memory.engine):
            async with database.begin() as session:
                session.add(Item(name="pear"))
            assert await names(database) == ["pear"]
        assert await names(memory) == []
        with pytest.raises(ConfigurationError, match="other colour"):
            async with async_sandbox(database, bind=Database("sqlite://").engine):
                pass


def application(database: AsyncDatabase) -> FastAPI:
    """An application that stores items and counts them."""
    app = FastAPI()
    install(app, database)
    per_request = session_per_request(database)

    @app.post("/items/{name}")
    async def add(name: str, session: AsyncSession = per_request) -> int:
        session.add(Item(name=name))
        await session.flush()
        return await session.scalar(select(func.count()).select_from(Item)) or 0

    return app


@on_one_of_each_kind
async def test_requests_on_the_same_event_loop_are_part_of_it(boxed: AsyncDatabase) -> None:
    transport = httpx2.ASGITransport(app=application(boxed))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        async with boxed.sessionmaker() as own:
            own.add(Item(name="own"))
            await own.flush()
            assert (await client.post("/items/pear")).json() == 2
            requests = [client.post(f"/items/{number}") for number in range(8)]
            answers = await asyncio.gather(*requests)
            assert [answer.status_code for answer in answers] == [200] * 8
            await own.commit()
    assert len(await names(boxed)) == 10


@on_asyncpg
async def test_another_event_loop_is_refused_with_the_mend(boxed: AsyncDatabase) -> None:
    """As that of a TestClient, whose thread waits for a connection of this one."""
    client = TestClient(application(boxed))
    with pytest.raises(SandboxError, match=r"another event loop.*httpx\.AsyncClient"):
        await asyncio.to_thread(partial(client.post, "/items/pear"))


@on_postgres
async def test_a_unit_runs_again_once_its_savepoint_is_rolled_back(boxed: AsyncDatabase) -> None:
    attempts: list[AsyncSession] = []

    async def add(session: AsyncSession) -> None:
        attempts.append(session)
        assert (await session.scalars(select(Item.name))).all() == []
        session.add(Item(name="pear"))
        await session.flush()
        if len(attempts) < 3:
            await session.execute(text("DO $$ BEGIN RAISE serialization_failure; END $$"))

    await boxed.run(add)
    assert len(set(attempts)) == 3
    assert await names(boxed) == ["pear"]


@on_postgres
async def test_a_unit_that_runs_again_leaves_the_tests_own_rows_alone(
    boxed: AsyncDatabase,
) -> None:
    """They were flushed and not committed, by the session around it."""
    attempts: list[None] = []

    @boxed.with_session(attempts=2)
    async def add(session: AsyncSession) -> None:
        attempts.append(None)
        await flush(session, "pear")
        await session.execute(text("DO $$ BEGIN RAISE serialization_failure; END $$"))

    async with boxed.sessionmaker() as own:
        await flush(own, "own")
        with pytest.raises(DBAPIError):
            await add()
        assert (await own.scalars(select(Item.name))).all() == ["own"]
        await own.commit()
    assert len(attempts) == 2
    assert await names(boxed) == ["own"]


async def test_the_tests_own_session_may_wait_for_what_it_has_started(
    boxed: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_overlap, "IDLE_SECONDS", -1.0)

    @boxed.with_session()
    async def work(session: AsyncSession) -> None:
        await flush(session, "unit")
        await flush(session, "another")

    async with boxed.sessionmaker() as own:
        await flush(own, "own")
        with pytest.warns(IdleInTransactionWarning):
            await work()
        await own.commit()


async def test_one_that_is_left_by_a_cancellation_leaves_nothing(
    async_database: AsyncDatabase,
) -> None:
    """In a cancelled scope every await is cancelled, those of the clean-up as well."""
    for _ in range(2):
        with anyio.CancelScope() as scope:
            async with async_sandbox(async_database), async_database.begin() as session:
                await flush(session, "pear")
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert await names(async_database) == []


async def test_a_synchronous_database_needs_the_other_one() -> None:
    with pytest.raises(ConfigurationError, match=r"`with sandbox\(database\)`"):
        async with async_sandbox(Database("sqlite://")):
            pass


@on_sqlite_files
async def test_a_file_that_another_process_writes_to_is_named(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_timeout=0.1) as database:
        await create_tables(database)
        with Database(async_url.replace("+aiosqlite", "")) as other, other.begin() as session:
            session.add(Item(name="pear"))
            session.flush()
            with pytest.raises(SandboxError, match=r"is locked.*worker_id"):
                async with async_sandbox(database):
                    pass
