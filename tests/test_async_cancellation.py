"""Cancelled units of work: the bound holds, the outcome is told as it is, nothing is left."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic, thread_time
from typing import Any

import pytest
from sqlalchemy import event, func, make_url, select, text
from sqlalchemy.pool import NullPool

import sessionscope
from benchmarks._aimed import AIMS, aim_at_commit, make_commit_slow
from benchmarks._cancelled import WAYS, hold_all
from benchmarks._fuzz import UNITS, cut_everywhere
from benchmarks.cancellation import LOOPS, POOL, keep_bound, run_on, with_driver
from sessionscope import AsyncDatabase, Database, _async_unit, _loops, after_commit
from sessionscope.exc import CommitUnknown
from sessionscope.testing import PostgresServer
from tests.async_drivers import (
    names,
    on_mysql,
    on_postgres,
    on_servers,
    on_sqlite_files,
)
from tests.models import Item

SOURCE = Path(sessionscope.__file__).parents[1]

on_memory = pytest.mark.parametrize("async_url", ["aiosqlite-memory"], indirect=True)
drivers = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
loops = pytest.mark.parametrize("loop", LOOPS)


async def cancel(work: Callable[[], Awaitable[object]], began: asyncio.Event) -> None:
    """Cancel *work* when it has begun, and wait for its end."""
    task = asyncio.ensure_future(work())
    await began.wait()
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()


async def add(database: AsyncDatabase, name: str) -> None:
    async with database.begin() as session:
        session.add(Item(name=name))
        await session.flush()


@drivers
@pytest.mark.parametrize("way", WAYS)
def test_cancelled_units_keep_the_bound(postgres_url: str, driver: str, way: str) -> None:
    """A cancelled statement counts until the server has ended it, however it was cancelled."""
    url = with_driver(make_url(postgres_url), driver)
    seen = run_on(LOOPS["asyncio"], keep_bound(url, WAYS[way], units=10))
    assert seen.most <= POOL
    assert seen.samples > 10
    assert seen.is_quiet, seen


@drivers
@pytest.mark.parametrize("way", ["task.cancel() twice", "anyio, shielded clean-up"])
def test_cancelled_units_keep_the_bound_on_uvloop(postgres_url: str, driver: str, way: str) -> None:
    url = with_driver(make_url(postgres_url), driver)
    seen = run_on(LOOPS["uvloop"], keep_bound(url, WAYS[way], units=10))
    assert seen.most <= POOL
    assert seen.is_quiet, seen


@drivers
@loops
@pytest.mark.parametrize("way", AIMS)
def test_a_unit_that_is_cancelled_near_its_commit_tells_the_truth(
    postgres_url: str, driver: str, loop: str, way: str
) -> None:
    """A normal end: stored. Cancelled: not stored. And no cancellation is lost, or comes late."""
    url = make_url(postgres_url)
    make_commit_slow(url)

    async def main() -> Any:
        async with AsyncDatabase(with_driver(url, driver), pool_size=5) as database:
            return await aim_at_commit(database, AIMS[way], times=40, seed=2)

    seen = run_on(LOOPS[loop], main())
    assert (seen.wrong, seen.stray, seen.lost) == (0, 0, 0)
    assert seen.ends["stored"] > 0
    assert set(seen.ends) <= {"stored", "cancelled"}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_a_unit_may_be_cancelled_at_any_await(async_url: str, unit: str, cold: bool) -> None:
    """Not one row too few or too many, no slot, task or connection is left, nobody complains."""
    if async_url == "sqlite+aiosqlite://" and (cold or unit == "read-only"):
        pytest.skip("Without its one connection a database in memory is another database")
    seen = run_on(LOOPS["asyncio"], cut_everywhere(async_url, UNITS[unit], cold=cold, soon=cold))
    assert seen.faults == []
    assert seen.ends.count("cancelled") >= 2
    assert seen.ends[-1] == "normal"


@pytest.mark.anyio
async def test_a_cancellation_that_came_during_commit_is_delivered_at_the_next_await(
    async_database: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    cancel_while_committing(monkeypatch, at_its_end=False)

    async def unit() -> None:
        await add(async_database, "stored")
        reached.append("after the unit")
        await asyncio.sleep(0)
        reached.append("after an await")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(unit())
    assert reached == ["after the unit"]
    assert await names(async_database) == ["stored"]


@on_postgres
@pytest.mark.anyio
async def test_a_cancellation_in_the_very_moment_of_the_confirmation_is_not_mistaken(
    async_database: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel_while_committing(monkeypatch, at_its_end=True)
    ended_normally = []

    async def unit() -> None:
        await add(async_database, "stored")
        ended_normally.append(True)
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(unit())
    assert ended_normally == [True]
    assert await names(async_database) == ["stored"]


@on_postgres
@pytest.mark.anyio
async def test_a_cancellation_that_came_during_commit_is_delivered_to_a_slow_hook(
    async_database: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be delayed if it had to wait for that; and it comes back after the unit."""
    cancel_while_committing(monkeypatch, at_its_end=False)
    reached = []

    async def hook() -> None:
        try:
            await asyncio.sleep(10)
            reached.append("in vain")
        finally:
            reached.append("hook")

    async def unit() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="stored"))
            after_commit(session, hook)
        reached.append("after the unit")
        await asyncio.sleep(0)
        reached.append("after an await")

    with pytest.raises(asyncio.CancelledError):
        await asyncio.ensure_future(unit())
    assert reached == ["hook", "after the unit"]
    assert await names(async_database) == ["stored"]


def cancel_while_committing(monkeypatch: pytest.MonkeyPatch, *, at_its_end: bool) -> None:
    """Cancel the first task that commits, when COMMIT is under way or just confirmed."""
    start = _loops.start
    cancelled: list[object] = []

    def start_and_cancel(work: Any, alive: Any) -> "asyncio.Task[Any]":
        user, committing = asyncio.current_task(), start(work, alive)
        assert user is not None
        if cancelled:
            return committing
        cancelled.append(user)
        if at_its_end:
            committing.add_done_callback(lambda _: user.cancel())
        else:
            asyncio.get_running_loop().call_soon(user.cancel)
        return committing

    monkeypatch.setattr(_async_unit, "start", start_and_cancel)


@on_postgres
@pytest.mark.anyio
async def test_a_commit_that_was_cut_off_by_the_end_of_the_loop_is_unknown(
    async_database: AsyncDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.run() cancels all tasks at its end, ours as well."""
    start = _loops.start

    def start_and_cancel(work: Any, alive: Any) -> "asyncio.Task[Any]":
        committing = start(work, alive)
        asyncio.get_running_loop().call_soon(committing.cancel)
        return committing

    monkeypatch.setattr(_async_unit, "start", start_and_cancel)
    with pytest.raises(CommitUnknown, match="event loop was shut down during COMMIT"):
        await add(async_database, "perhaps")


@on_servers
@pytest.mark.anyio
async def test_a_failing_connect_event_takes_no_place(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_size=1, max_overflow=0) as database:
        event.listen(database.engine.sync_engine, "connect", refuse_first := Refusal(2))
        for _ in range(2):
            with pytest.raises(ValueError, match="not this one"):
                async with database.begin() as session:
                    await session.connection()
        await hold_all(database, 1)
        assert refuse_first.left == 0
        assert database.stats().idle == 1


def test_a_failing_connect_event_takes_no_place_from_threads_either(postgres_url: str) -> None:
    with Database(postgres_url, pool_size=1, max_overflow=0, pool_timeout=0.5) as database:
        event.listen(database.engine, "connect", Refusal(2))
        for _ in range(2):
            with pytest.raises(ValueError, match="not this one"), database.engine.connect():
                pass
        with database.engine.connect():
            pass
        assert database.stats().idle == 1


class Refusal:
    """A listener that refuses the first few connections."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise ValueError("not this one")


@on_servers
@pytest.mark.anyio
async def test_what_was_cancelled_is_not_counted_as_idle(async_url: str) -> None:
    async with AsyncDatabase(async_url) as database:
        await cancel_a_slow_statement(database)
        assert database.stats().idle == 0


@on_postgres
@pytest.mark.anyio
async def test_waiting_for_the_server_costs_no_processor_time(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        await session.connection()
        before = thread_time()
        await session.execute(text("SELECT pg_sleep(0.5)"))
        assert thread_time() - before < 0.1


async def cancel_a_slow_statement(database: AsyncDatabase, *, read_only: bool = False) -> None:
    """Cancel a unit of work while the database works."""
    began = asyncio.Event()

    async def unit() -> None:
        async with database.begin(read_only=read_only) as session:
            await session.connection()
            asyncio.get_running_loop().call_later(0.1, began.set)
            await session.execute(SLOW[session.get_bind().dialect.name])

    await cancel(unit, began)


SLOW = {
    "postgresql": text("SELECT pg_sleep(30)"),
    "mysql": text("SELECT sleep(30)"),
    "sqlite": text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) "
        "SELECT count(*) FROM n"
    ),
}


@on_mysql
@pytest.mark.anyio
async def test_mysql_ends_the_statements_of_cancelled_units(
    async_url: str, mysql: Database
) -> None:
    """Its protocol knows no cancelling: one connection more has to say KILL, and to wait."""
    async with AsyncDatabase(async_url) as database:
        await asyncio.gather(*(cancel_a_slow_statement(database) for _ in range(5)))
        await database.dispose()
        with mysql.begin(read_only=True) as session:
            others = "FROM information_schema.processlist WHERE db = DATABASE()"
            left = session.scalars(text(f"SELECT info {others} AND id <> CONNECTION_ID()"))
            assert [statement for statement in left if statement] == []


@on_memory
@pytest.mark.anyio
@pytest.mark.parametrize("read_only", [True, False])
async def test_a_database_in_memory_survives_a_cancellation(
    async_database: AsyncDatabase, read_only: bool
) -> None:
    """Its connection is its data, and is cleaned up instead of being closed."""
    await add(async_database, "before")
    await cancel_a_slow_statement(async_database, read_only=read_only)
    async with asyncio.timeout(3):
        await add(async_database, "after")
    assert await names(async_database) == ["after", "before"]


@on_sqlite_files
@pytest.mark.anyio
async def test_a_stream_that_was_cut_off_keeps_no_lock_of_a_file(
    async_database: AsyncDatabase,
) -> None:
    """Also while the exception, and with it the stream, is still referred to."""
    for name in ("first", "second"):
        await add(async_database, name)
    streams = []
    began = asyncio.Event()

    async def unit() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="rolled back"))
            stream = await session.stream_scalars(select(Item).execution_options(yield_per=1))
            streams.append(stream)
            await anext(stream)
            began.set()
            await session.execute(select(Item))

    await cancel(unit, began)
    async with asyncio.timeout(3):
        await add(async_database, "next")
    assert await names(async_database) == ["first", "next", "second"]


@drivers
@pytest.mark.anyio
async def test_a_silent_server_does_not_keep_a_cancelled_task(
    postgres_server: PostgresServer, postgres_url: str, driver: str
) -> None:
    """The task waits a second for its statement to end, and the connection keeps its place."""
    url = with_driver(make_url(postgres_url), driver)
    began = asyncio.Event()
    pids: list[int] = []
    async with AsyncDatabase(url) as database:

        async def unit() -> None:
            async with database.begin() as session:
                pids.append(await session.scalar(text("SELECT pg_backend_pid()")) or 0)
                asyncio.get_running_loop().call_later(0.1, silence)
                await session.execute(select(func.pg_sleep(30)))

        def silence() -> None:
            os.kill(pids[0], signal.SIGSTOP)
            began.set()

        start = monotonic()
        try:
            await cancel(unit, began)
            assert monotonic() - start < 2.5
            assert database.engine.pool.backends.count == 1  # type: ignore[attr-defined]  # ours
        finally:
            os.kill(pids[0], signal.SIGCONT)
        await hold_all(database, 5)


@on_postgres
@pytest.mark.anyio
async def test_a_silent_server_does_not_keep_what_closes_a_connection(async_url: str) -> None:
    async with AsyncDatabase(async_url, engine_options={"poolclass": NullPool}) as database:
        async with database.begin(read_only=True) as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            start = monotonic()
        ended = monotonic()
        os.kill(pid, signal.SIGCONT)
        assert ended - start < 1


@on_postgres
@pytest.mark.anyio
async def test_a_connection_that_is_closed_twice_gives_one_place_back(async_url: str) -> None:
    async with AsyncDatabase(async_url) as database:
        await database.ping()
        async with database.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            pool: Any = database.engine.pool
            count = pool.backends.count
            for _ in range(2):
                await connection.run_sync(lambda _: pool._close_connection(raw.dbapi_connection))
            assert pool.backends.count == count - 1
            await connection.invalidate()


END_OF_LOOP = """
import asyncio, sys
from sqlalchemy import text
from sessionscope import AsyncDatabase

database = AsyncDatabase(sys.argv[1], pool_size=3, max_overflow=0)

async def unit():
    async with database.begin() as session:
        await session.execute(text("SELECT pg_sleep(30)"))

async def main():
    units = [asyncio.create_task(unit()) for _ in range(3)]
    await asyncio.sleep(0.3)

asyncio.run(main())
print("ended with", database.engine.pool.backends.count)
asyncio.run(database.ping())
asyncio.run(database.dispose())
"""


@drivers
def test_the_end_of_the_event_loop_leaves_no_statement_behind(
    psycopg: Database, driver: str
) -> None:
    """asyncio.run() cancels the units that are open, which wait until the server is quiet."""
    url = with_driver(psycopg.engine.url, driver)
    command = [sys.executable, "-c", END_OF_LOOP, url]
    run = subprocess.run(
        command, cwd=SOURCE, check=False, capture_output=True, text=True, timeout=20
    )
    assert run.stderr == ""
    assert run.stdout == "ended with 0\n"
    with psycopg.begin(read_only=True) as session:
        active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
        assert session.scalar(text(active)) == 0
