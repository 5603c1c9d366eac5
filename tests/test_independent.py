"""Independent units: inside of another one, with the one connection that is in reserve."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import NestedUnit, PoolBusy, ReadOnlyUnit
from tests.async_drivers import (
    create_tables,
    names,
    on_postgres,
    on_servers,
    on_uvloop_too,
    server_connections,
)
from tests.models import Item
from tests.models import create_tables as create_plainly
from tests.models import names as plain_names

on_sync_servers = pytest.mark.parametrize("url", ["postgres", "psycopg2", "mysql"], indirect=True)


@on_sync_servers
def test_it_commits_on_its_own_inside_of_another_unit(url: str) -> None:
    """Even where all connections are in use, by the outer one."""
    with Database(url, pool_size=1, max_overflow=0) as database:
        create_plainly(database)
        with pytest.raises(ValueError, match="stop"), database.begin() as outer:
            outer.add(Item(name="rolled back"))
            outer.flush()
            with database.begin(independent=True) as session:
                session.add(Item(name="kept"))
            raise ValueError("stop")
        assert plain_names(database) == ["kept"]
        assert database.stats().in_use == 0


@on_sync_servers
def test_it_may_be_rolled_back_alone(database: Database) -> None:
    with database.begin() as outer:
        outer.add(Item(name="kept"))
        with pytest.raises(ValueError, match="stop"), database.begin(independent=True) as session:
            session.add(Item(name="rolled back"))
            session.flush()
            raise ValueError("stop")
    assert plain_names(database) == ["kept"]


@on_sync_servers
def test_it_may_stand_alone_and_read_only(url: str) -> None:
    """Over the connection in reserve, where users of .engine have all others."""
    with Database(url, pool_size=1, max_overflow=0, pool_timeout=0) as database:
        create_plainly(database)
        with database.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            with database.begin(independent=True) as session:
                session.add(Item(name="kept"))
            with (
                pytest.raises(ReadOnlyUnit),
                database.begin(independent=True, read_only=True) as session,
            ):
                session.add(Item(name="refused"))
        assert plain_names(database) == ["kept"]


@on_sync_servers
def test_the_connection_in_reserve_is_counted_while_it_is_idle(database: Database) -> None:
    database.dispose()
    with database.begin(independent=True) as session:
        session.execute(text("SELECT 1"))
        assert database.stats().idle == 0
    assert database.stats().idle == 1


@on_sync_servers
def test_the_way_through_with_session(database: Database) -> None:
    @database.with_session(independent=True)
    def audit(session: Session, line: str) -> None:
        session.add(Item(name=line))

    with pytest.raises(ValueError, match="stop"), database.begin() as outer:
        outer.add(Item(name="rolled back"))
        audit("tried")
        raise ValueError("stop")
    assert plain_names(database) == ["tried"]


def test_there_is_one_connection_in_reserve_and_no_second_level(psycopg: Database) -> None:
    with psycopg.begin(), psycopg.begin(independent=True):
        with pytest.raises(NestedUnit, match="one connection in reserve only"):
            psycopg.begin(independent=True).__enter__()
        with pytest.raises(NestedUnit, match="Pass the session on"):
            psycopg.begin().__enter__()


def test_two_flows_take_turns_at_the_reserve(postgres_url: str) -> None:
    with Database(postgres_url, pool_timeout=0.1) as database:
        with database.begin(independent=True), ThreadPoolExecutor(1) as threads:
            with pytest.raises(PoolBusy):
                threads.submit(database.begin(independent=True).__enter__).result(10)
        with database.begin(independent=True) as session:
            assert session.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("url", ["sqlite-file"], indirect=True)
def test_sqlite_has_it_inside_of_a_read_only_unit(database: Database) -> None:
    with database.begin(read_only=True), database.begin(independent=True) as session:
        session.add(Item(name="kept"))
    assert plain_names(database) == ["kept"]
    with database.begin():
        with pytest.raises(NestedUnit, match="SQLite has one writer at a time"):
            database.begin(independent=True).__enter__()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_database_in_memory_has_no_second_connection(read_only: bool) -> None:
    with Database("sqlite://") as database, database.begin(read_only=read_only):
        with pytest.raises(NestedUnit, match="in memory one connection"):
            database.begin(independent=True).__enter__()


@pytest.mark.anyio
@on_servers
@on_uvloop_too
async def test_it_commits_on_its_own_on_an_event_loop(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_size=1, max_overflow=0) as database:
        await create_tables(database)
        with pytest.raises(ValueError, match="stop"):
            async with database.begin() as outer:
                outer.add(Item(name="rolled back"))
                await outer.flush()
                async with database.begin(independent=True) as session:
                    session.add(Item(name="kept"))
                    with pytest.raises(NestedUnit, match="one connection in reserve only"):
                        await database.begin(independent=True).__aenter__()
                raise ValueError("stop")
        assert await names(database) == ["kept"]
        assert database.stats().in_use == 0


@pytest.mark.anyio
@on_postgres
async def test_the_server_never_sees_more_than_one_connection_above_the_bound(
    async_url: str,
) -> None:
    async with (
        AsyncDatabase(async_url) as observer,
        AsyncDatabase(async_url, pool_size=3, max_overflow=0) as database,
    ):
        seen: list[int] = []

        async def work(read_only: bool) -> None:
            async with database.begin(read_only=read_only) as session:
                await session.execute(text("SELECT 1"))
                async with database.begin(independent=True, read_only=read_only) as inner:
                    await inner.execute(text("SELECT 1"))
                    await asyncio.create_task(look())

        async def look() -> None:
            seen.append(await server_connections(observer))

        await asyncio.gather(*(work(number % 2 == 0) for number in range(9)))
        assert max(seen) == 4
        assert len(seen) == 9


@pytest.mark.anyio
@pytest.mark.parametrize("async_url", ["aiosqlite-file"], indirect=True)
async def test_aiosqlite_has_it_inside_of_a_read_only_unit(async_database: AsyncDatabase) -> None:
    async with async_database.begin(read_only=True):
        async with async_database.begin(independent=True) as session:
            session.add(Item(name="kept"))
    assert await names(async_database) == ["kept"]
    async with async_database.begin():
        with pytest.raises(NestedUnit, match="SQLite has one writer at a time"):
            await async_database.begin(independent=True).__aenter__()
