"""AsyncDatabase: run, with_session, the queue, stats, drain, dispose, the class of its sessions."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sessionscope import AsyncDatabase
from sessionscope.exc import ConfigurationError, PoolBusy, ReadOnlyUnit
from tests.async_drivers import (
    create_tables,
    names,
    on_one_of_each_kind,
    on_postgres,
    on_servers,
    on_uvloop_too,
    server_connections,
)
from tests.models import Item

pytestmark = pytest.mark.anyio


async def add(session: AsyncSession, name: str, *, suffix: str = "") -> str:
    """Business logic: it receives a session."""
    session.add(Item(name=name + suffix))
    await session.flush()
    return name + suffix


def add_plainly(session: Session, name: str, *, suffix: str = "") -> str:
    """The same for both kinds of Database."""
    session.add(Item(name=name + suffix))
    session.flush()
    return name + suffix


@on_uvloop_too
async def test_run_calls_both_kinds_of_function_as_one_unit(async_database: AsyncDatabase) -> None:
    assert await async_database.run(add, "one", suffix="!") == "one!"
    assert await async_database.run(add_plainly, "two", suffix="?") == "two?"
    assert await async_database.run(partial(add, suffix=";"), "three") == "three;"
    assert await names(async_database) == ["one!", "three;", "two?"]


@on_postgres
async def test_run_rolls_back_what_fails(async_database: AsyncDatabase) -> None:
    async def fail(session: AsyncSession) -> None:
        await add(session, "gone")
        raise ValueError("stop")

    def fail_plainly(session: Session) -> None:
        add_plainly(session, "gone")
        raise ValueError("stop")

    for failing in (fail, fail_plainly):
        with pytest.raises(ValueError, match="stop"):
            await async_database.run(failing)
    assert await names(async_database) == []
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
async def test_with_session_makes_entry_points_of_both(async_database: AsyncDatabase) -> None:
    @async_database.with_session()
    async def entry(session: AsyncSession, name: str, *, suffix: str = "") -> str:
        return await add(session, name, suffix=suffix)

    plain = async_database.with_session()(add_plainly)

    assert await entry("one", suffix="!") == "one!"
    assert await plain("two", suffix="?") == "two?"
    assert inspect.iscoroutinefunction(entry)
    assert inspect.iscoroutinefunction(plain)
    assert await names(async_database) == ["one!", "two?"]


async def test_with_session_takes_the_session_out_of_the_signature() -> None:
    """Frameworks build requests, tasks and commands from it."""
    async with AsyncDatabase("sqlite+aiosqlite://") as database:

        @database.with_session(read_only=True)
        async def entry(
            session: AsyncSession, name: Annotated[str, "a name"], count: int = 1
        ) -> list[str]:
            """What it does."""
            return []

    assert str(inspect.signature(entry)).replace("typing.", "") == (
        "(name: Annotated[str, 'a name'], count: int = 1) -> list[str]"
    )
    assert not hasattr(entry, "__wrapped__")
    assert entry.__name__ == "entry"
    assert entry.__doc__ == "What it does."
    assert entry.__module__ == __name__


@on_postgres
async def test_with_session_works_on_methods(async_database: AsyncDatabase) -> None:
    class Shop:
        @async_database.with_session()
        async def stock(self, session: AsyncSession, name: str) -> str:
            return await add(session, f"{type(self).__name__} {name}")

        @async_database.with_session()
        def stock_plainly(self, session: Session, name: str) -> str:
            return add_plainly(session, f"plain {name}")

        @classmethod
        @async_database.with_session()
        async def of_class(cls, session: AsyncSession, name: str) -> str:
            return await add(session, f"class {cls.__name__} {name}")

    assert await Shop().stock("pear") == "Shop pear"
    assert await Shop().stock_plainly("pear") == "plain pear"
    assert await Shop.of_class("pear") == "class Shop pear"
    assert len(await names(async_database)) == 3


@on_postgres
async def test_with_session_options_are_those_of_begin(async_database: AsyncDatabase) -> None:
    @async_database.with_session(read_only=True)
    async def entry(session: AsyncSession) -> None:
        session.add(Item(name="refused"))

    with pytest.raises(ReadOnlyUnit):
        await entry()


async def a_generator(session: AsyncSession) -> AsyncIterator[int]:
    yield 1


def a_plain_generator(session: Session) -> Iterator[int]:
    yield 1


async def without_parameters() -> None: ...


@pytest.mark.parametrize(
    ("fn", "mend"),
    [
        (a_generator, "Return a list"),
        (a_plain_generator, "Return a list"),
        (without_parameters, r"write def without_parameters\(session, ...\)"),
        (classmethod(add), "below @classmethod"),  # type: ignore[arg-type]  # it is no method
        (42, "decorates functions"),
    ],
)
async def test_with_session_refuses_what_would_work_after_its_unit(fn: object, mend: str) -> None:
    async with AsyncDatabase("sqlite+aiosqlite://") as database:
        with pytest.raises(ConfigurationError, match=mend):
            database.with_session()(fn)  # type: ignore[call-overload]  # what users do by mistake


@on_postgres
async def test_run_refuses_a_def_that_returns_a_coroutine(async_database: AsyncDatabase) -> None:
    """It would be called with a plain session, and run after the unit, or never."""
    with pytest.raises(ConfigurationError, match="calls it with a plain Session"):
        await async_database.run(lambda session: add(session, "gone"))
    assert await names(async_database) == []


async def test_sessions_are_of_the_users_class(async_url: str) -> None:
    class Inside(Session):
        def here(self) -> str:
            return "here"

    class MySession(AsyncSession):
        sync_session_class = Inside

        def mine(self) -> str:
            return "mine"

    async with AsyncDatabase(async_url, session_class=MySession) as database:
        for read_only in (False, True):
            async with database.begin(read_only=read_only) as session:
                assert session.mine() == "mine"
                assert await session.run_sync(Inside.here) == "here"  # type: ignore[arg-type]  # it is one
        async with database.sessionmaker() as plain:
            assert plain.mine() == "mine"
    assert MySession.sync_session_class is Inside


@on_one_of_each_kind
async def test_sqlmodel_sessions_work_with_exec(async_url: str) -> None:
    async with AsyncDatabase(async_url, session_class=SQLModelSession) as database:
        await create_tables(database)
        async with database.begin() as session:
            session.add(Item(name="one"))
        async with database.begin(read_only=True) as session:
            result = await session.exec(select(Item.name))  # type: ignore[call-overload]  # no SQLModel
            assert result.all() == [("one",)]


@on_postgres
@on_uvloop_too
async def test_a_full_pool_refuses_after_pool_timeout(async_url: str) -> None:
    """One bound over both engines: a reader and a writer fill it together."""
    async with AsyncDatabase(async_url, pool_size=2, max_overflow=0, pool_timeout=0.1) as database:
        leave = asyncio.Event()
        holders = [
            asyncio.create_task(hold(database, leave, read_only)) for read_only in (False, True)
        ]
        while database.stats().in_use < 2:
            await asyncio.sleep(0)
        for read_only in (False, True):
            with pytest.raises(PoolBusy, match=r"none came free in 0\.1 s") as caught:
                async with database.begin(read_only=read_only):
                    pytest.fail("it was admitted")
            assert caught.value.retry_after > 0
        leave.set()
        await asyncio.gather(*holders)

        stats = database.stats()
        assert (stats.limit, stats.in_use, stats.waiting) == (2, 0, 0)
        assert (stats.begun, stats.committed, stats.refused) == (2, 2, 2)
        assert stats.longest_wait >= 0.1


async def hold(database: AsyncDatabase, leave: asyncio.Event, read_only: bool = False) -> None:
    async with database.begin(read_only=read_only) as session:
        await session.execute(text("SELECT 1"))
        await leave.wait()


@on_postgres
async def test_who_waits_gets_the_slot_in_order(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_size=1, max_overflow=0) as database:
        order: list[int] = []

        async def work(number: int) -> None:
            async with database.begin(read_only=number % 2 == 0) as session:
                order.append(number)
                await session.execute(text("SELECT 1"))

        leave = asyncio.Event()
        holder = asyncio.create_task(hold(database, leave))
        while not database.stats().in_use:
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(work(number)) for number in range(5)]
        while database.stats().waiting < 5:
            await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(holder, *waiting)

        assert order == [0, 1, 2, 3, 4]
        assert database.stats().idle == 1


@on_postgres
async def test_a_full_queue_refuses_at_once(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_size=1, max_overflow=0, max_waiting=1) as database:
        leave = asyncio.Event()
        tasks = [asyncio.create_task(hold(database, leave)) for _ in range(2)]
        while not (database.stats().in_use and database.stats().waiting):
            await asyncio.sleep(0)
        with pytest.raises(PoolBusy, match="max_waiting=1 others already wait"):
            await database.ping()
        assert database.stats().longest_wait == 0
        leave.set()
        await asyncio.gather(*tasks)


@on_postgres
async def test_both_engines_together_keep_the_bound(async_url: str) -> None:
    async with (
        AsyncDatabase(async_url) as observer,
        AsyncDatabase(async_url, pool_size=2, max_overflow=1) as database,
    ):
        inside = asyncio.Barrier(4)

        async def work(read_only: bool) -> None:
            async with database.begin(read_only=read_only) as session:
                await session.execute(text("SELECT 1"))
                await inside.wait()
                await inside.wait()

        for read_only in (True, False, True):
            tasks = [asyncio.create_task(work(read_only)) for _ in range(3)]
            await inside.wait()
            assert await server_connections(observer) == 3
            await inside.wait()
            await asyncio.gather(*tasks)


async def test_many_units_in_one_gather_all_end(async_database: AsyncDatabase) -> None:
    """One unit per task is the right code, and more tasks than connections is usual."""

    async def work(number: int) -> None:
        async with async_database.begin() as session:
            await add(session, f"item {number}")

    await asyncio.gather(*(work(number) for number in range(30)))
    assert len(await names(async_database)) == 30
    stats = async_database.stats()
    assert stats.begun == stats.committed == 31
    assert stats.limit is None or stats.idle <= stats.limit


@on_servers
async def test_drain_waits_for_the_units_at_work_and_refuses_new_ones(
    async_database: AsyncDatabase,
) -> None:
    leave = asyncio.Event()
    working = asyncio.create_task(hold(async_database, leave))
    while not async_database.stats().in_use:
        await asyncio.sleep(0)
    draining = asyncio.create_task(async_database.drain(10))
    await asyncio.sleep(0)  # it refuses from its first step on
    with pytest.raises(PoolBusy, match="shutting down"):
        await async_database.ping()
    leave.set()
    assert await draining is True
    await working
    assert async_database.stats().idle == 0
    assert await names(async_database) == []  # it works again


@pytest.mark.parametrize("async_url", ["aiosqlite-memory"], indirect=True)
async def test_a_drained_database_keeps_what_is_in_memory(async_database: AsyncDatabase) -> None:
    await async_database.run(add, "kept")
    assert await async_database.drain(1)
    assert await names(async_database) == ["kept"]


@on_servers
async def test_a_disposed_database_is_usable_again(async_database: AsyncDatabase) -> None:
    await async_database.run(add, "one")
    assert async_database.stats().idle > 0
    await async_database.dispose()
    assert async_database.stats().idle == 0
    assert await names(async_database) == ["one"]


@on_postgres
async def test_the_block_disposes_and_leaves_nothing_on_the_server(async_url: str) -> None:
    async with AsyncDatabase(async_url) as observer:
        async with AsyncDatabase(async_url) as database:
            await database.ping()
            assert await server_connections(observer) == 1
        assert database.stats().idle == 0
        assert await server_connections(observer) == 0


@on_postgres
async def test_the_url_comes_from_the_environment(
    async_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", async_url)
    async with AsyncDatabase.from_env(pool_size=1) as database:
        await database.ping()
        assert repr(database).startswith("AsyncDatabase('postgresql+")
