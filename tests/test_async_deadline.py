"""The deadline of an asynchronous unit of work."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic

import pytest
from sqlalchemy import make_url, select, text

from sessionscope import AsyncDatabase
from sessionscope.exc import CommitUnknown, DeadlineExceeded
from sessionscope.testing import Fault, FaultProxy
from tests.async_drivers import create_tables, names, on_postgres, on_uvloop_too
from tests.models import Item
from tests.test_deadline import SLEEP

pytestmark = pytest.mark.anyio


@pytest.fixture
async def behind(async_url: str) -> AsyncIterator[tuple[AsyncDatabase, FaultProxy]]:
    """The same database behind a proxy."""
    url = make_url(async_url)
    async with AsyncDatabase(async_url) as database:
        await create_tables(database)
    assert url.host is not None
    assert url.port is not None
    with FaultProxy(url.host, url.port) as proxy:
        async with AsyncDatabase(proxy.through(async_url)) as database:
            yield database, proxy


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_statement_that_takes_too_long_is_cancelled(
    async_database: AsyncDatabase, read_only: bool
) -> None:
    sleep = text(SLEEP[async_database.engine.dialect.name])
    with pytest.raises(DeadlineExceeded) as error:
        async with async_database.begin(timeout=0.3, read_only=read_only) as session:
            await session.execute(sleep)
    assert error.value.phase == "query"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await names(async_database) == []


@on_uvloop_too
@on_postgres
async def test_a_silent_server_does_not_hold_a_task(
    behind: tuple[AsyncDatabase, FaultProxy],
) -> None:
    database, proxy = behind
    await database.ping()
    started = monotonic()
    with pytest.raises(DeadlineExceeded) as error:
        async with database.begin(timeout=0.3) as session:
            await session.execute(select(1))
            proxy.go_silent()
            await session.execute(select(1))
    assert error.value.phase == "query"
    assert monotonic() - started < 5
    proxy.heal()
    proxy.cut()  # the cancellation has met the same silence, and would wait on
    await database.ping()


@on_postgres
async def test_a_silent_server_does_not_hold_who_connects(
    behind: tuple[AsyncDatabase, FaultProxy],
) -> None:
    database, proxy = behind
    proxy.go_silent()
    with pytest.raises(DeadlineExceeded) as error:
        async with database.begin(timeout=0.3) as session:
            await session.execute(select(1))
    assert error.value.phase == "connect"
    proxy.cut()


@on_uvloop_too
@on_postgres
async def test_a_commit_that_is_not_answered_is_unknown(
    behind: tuple[AsyncDatabase, FaultProxy],
) -> None:
    database, proxy = behind
    proxy.aim("hang", b"COMMIT")
    with pytest.raises(CommitUnknown):
        async with database.begin(timeout=0.3) as session:
            session.add(Item(name="pear"))
    proxy.heal()


async def test_a_unit_that_is_late_does_not_commit(async_database: AsyncDatabase) -> None:
    with pytest.raises(DeadlineExceeded) as error:
        async with async_database.begin(timeout=0.2) as session:
            session.add(Item(name="pear"))
            await session.flush()
            await asyncio.sleep(0.3)
    assert error.value.phase == "commit"
    assert await names(async_database) == []


@on_postgres
async def test_the_server_is_told(async_database: AsyncDatabase) -> None:
    setting = text("SELECT current_setting('statement_timeout')")
    async with async_database.begin(timeout=30) as session:
        assert await session.scalar(setting) not in ("0", None)
    async with async_database.begin() as session:
        assert await session.scalar(setting) == "0"


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
@on_postgres
async def test_a_lost_commit_is_resolved(
    behind: tuple[AsyncDatabase, FaultProxy], fault: Fault
) -> None:
    database, proxy = behind
    await database.ping()
    proxy.aim(fault, b"COMMIT")

    async def work(session: object) -> None:
        session.add(Item(name="pear"))  # type: ignore[attr-defined]

    await database.run(work)
    assert proxy.hits == 1
    assert await names(database) == ["pear"]
    assert database.stats().retried == (fault == "cut before")
