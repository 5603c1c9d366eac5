"""The deadline of an asynchronous unit of work."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from time import monotonic

import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from sessionscope import AsyncDatabase
from sessionscope._timer import Timer
from sessionscope._watch import UNIT
from sessionscope.exc import CommitUnknown, DeadlineExceeded, SessionEnded
from sessionscope.testing import Fault, FaultProxy
from tests.async_drivers import create_tables, names, on_postgres, on_uvloop_too
from tests.models import Item
from tests.test_deadline import OUTSIDE, SLEEP

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


@on_postgres
async def test_an_id_does_not_answer_for_the_transaction_after_it(
    behind: tuple[AsyncDatabase, FaultProxy],
) -> None:
    """What was ended by text has an outcome of its own."""
    database, proxy = behind
    calls: list[int] = []

    async def work(session: AsyncSession) -> None:
        calls.append(1)
        await session.execute(text("SELECT 1"))
        await session.execute(text("ROLLBACK"))
        session.add(Item(name="pear"))
        await session.flush()
        proxy.aim("cut after", b"COMMIT")

    with pytest.raises(CommitUnknown):
        await database.run(work)
    assert calls == [1]


@on_postgres
@pytest.mark.parametrize("ending", ["rollback", "close"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_silent_server_does_not_hold_who_gives_up(
    behind: tuple[AsyncDatabase, FaultProxy], ending: str, late: bool
) -> None:
    """It is not waited for, and what may still be answered is not given back."""
    database, proxy = behind
    started = monotonic()
    with suppress(DeadlineExceeded, SessionEnded):
        async with database.begin(timeout=0.3) as session:
            session.add(Item(name="pear"))
            await session.flush()
            proxy.go_silent()
            if late:
                await asyncio.sleep(0.4)
            await getattr(session, ending)()
            assert database.stats().idle == 0
    assert monotonic() - started < 1.5
    proxy.heal()
    proxy.cut()
    assert database.stats().in_use == 0
    assert await names(database) == []


@pytest.mark.parametrize("way", ["stream", "connection", "savepoint"])
async def test_what_is_waited_for_outside_of_the_sessions_methods_ends_as_well(
    async_database: AsyncDatabase, way: str
) -> None:
    sleep = OUTSIDE[async_database.engine.dialect.name]
    started = monotonic()
    with pytest.raises(DeadlineExceeded):
        async with async_database.begin(timeout=0.5) as session:
            if way == "stream":
                rows = text(f"SELECT 1 UNION ALL {sleep}").execution_options(yield_per=1)
                async for _ in await session.stream(rows):
                    pass
            elif way == "connection":
                await (await session.connection()).execute(text(sleep))
            else:
                async with session.begin_nested():
                    await (await session.connection()).execute(text(sleep))
    assert monotonic() - started < 5
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@on_postgres
async def test_a_smaller_limit_of_the_connections_own_stays(async_url: str) -> None:
    setting = text("SELECT current_setting('statement_timeout')")
    async with AsyncDatabase(async_url) as database:
        async with database.engine.connect() as connection:
            await connection.execute(text("SET statement_timeout = '2s'"))
            await connection.commit()
        for _ in range(2):
            async with database.begin(timeout=30) as session:
                assert await session.scalar(setting) == "2s"


@on_postgres
@pytest.mark.parametrize("comes", ["first", "last"])
async def test_a_cancellation_in_the_moment_of_the_deadline_is_not_lost(
    async_database: AsyncDatabase, comes: str
) -> None:
    """Somebody else's, in the same tick of the event loop."""
    started: asyncio.Future[Timer] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with async_database.begin(timeout=30) as session:
            await session.execute(select(1))
            started.set_result(session.info[UNIT].timer)
            await session.execute(text("SELECT pg_sleep(30)"))

    task = asyncio.ensure_future(work())
    timer = await started
    await asyncio.sleep(0.1)
    ends: list[Callable[[], object]] = [task.cancel, timer.expire]
    if comes == "last":
        ends.reverse()
    for end in ends:
        end()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@on_postgres
@pytest.mark.parametrize("swallow", ["swallows it", "makes another error of it"])
async def test_the_deadlines_own_cancellation_is_taken_back(
    async_database: AsyncDatabase, swallow: str
) -> None:
    """Also if a driver, or a listener, does not let it through."""
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(DeadlineExceeded):
        async with async_database.begin(timeout=0.3) as session:

            @event.listens_for(session.sync_session, "before_flush")
            def flushing(*_: object) -> None:
                try:
                    await_only(asyncio.sleep(30))
                except asyncio.CancelledError:
                    if swallow != "swallows it":
                        raise sa_exc.OperationalError("", None, OSError("lost")) from None

            await session.execute(select(1))
            session.add(Item(name="pear"))
            await session.flush()
    assert task.cancelling() == 0
    async with asyncio.timeout(0.1) as timeout:  # which counts on it
        await asyncio.sleep(0)
    assert not timeout.expired()
