"""Hooks of asynchronous sessions: plain and async callables, once, in order, after the end."""

import asyncio
import logging
from collections.abc import Callable

import anyio
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase, Database, after_commit, after_rollback
from sessionscope.exc import ConfigurationError
from tests.async_drivers import names, on_one_of_each_kind, on_postgres, on_uvloop_too
from tests.models import Item, Note

pytestmark = pytest.mark.anyio


class Log:
    """What hooks were called with; the async one waits, as real ones do."""

    def __init__(self) -> None:
        self.lines: list[object] = []

    def plain(self, line: object) -> None:
        self.lines.append(line)

    async def waiting(self, line: object, *, times: int = 1) -> None:
        await asyncio.sleep(0)
        self.lines += [line] * times


@on_uvloop_too
async def test_both_kinds_of_hook_run_once_and_in_order(async_database: AsyncDatabase) -> None:
    log = Log()
    async with async_database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, log.waiting, 1, times=2)
        after_commit(session, log.plain, 2)
        after_commit(session, log.waiting, 3)
        after_rollback(session, log.waiting, "never")
        await session.flush()
        assert log.lines == []

    assert log.lines == [1, 1, 2, 3]


@on_one_of_each_kind
async def test_hooks_run_when_the_connection_is_back(async_database: AsyncDatabase) -> None:
    """So a hook may open a unit of its own, even where there is one connection only."""
    seen: list[object] = []

    async def look() -> None:
        seen.append(async_database.stats().in_use)
        seen.append(await names(async_database))

    async with async_database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, look)

    assert seen == [0, ["one"]]


@on_one_of_each_kind
async def test_a_hook_that_registers_a_hook_in_a_unit_of_its_own(
    async_database: AsyncDatabase,
) -> None:
    log = Log()

    async def hook() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="by a hook"))
            after_commit(session, log.waiting, "inner")

    async with async_database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, hook)

    assert log.lines == ["inner"]
    assert await names(async_database) == ["by a hook", "one"]


@on_one_of_each_kind
async def test_a_rolled_back_unit_runs_the_other_kind(async_database: AsyncDatabase) -> None:
    log = Log()
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin() as session:
            session.add(Item(name="one"))
            after_commit(session, log.waiting, "commit")
            after_rollback(session, log.waiting, "rollback")
            raise ValueError("stop")

    assert log.lines == ["rollback"]


@on_one_of_each_kind
async def test_a_failed_commit_counts_as_rolled_back(async_database: AsyncDatabase) -> None:
    log = Log()
    with pytest.raises(Exception, match="(?i)foreign key"):
        async with async_database.begin() as session:
            session.add(Note(item_id=404))
            after_commit(session, log.waiting, "commit")
            after_rollback(session, log.waiting, "rollback")

    assert log.lines == ["rollback"]


@on_postgres
async def test_savepoints_decide_for_their_hooks(async_database: AsyncDatabase) -> None:
    log = Log()
    async with async_database.begin() as session:
        after_commit(session, log.waiting, "outer")
        async with session.begin_nested():
            after_commit(session, log.waiting, "released")
        with pytest.raises(ValueError, match="stop"):
            async with session.begin_nested():
                after_commit(session, log.waiting, "never")
                after_rollback(session, log.waiting, "undone")
                raise ValueError("stop")
        assert log.lines == []

    assert log.lines == ["undone", "outer", "released"]


@on_postgres
async def test_hooks_of_a_commit_in_the_middle_run_even_if_the_rest_rolls_back(
    async_database: AsyncDatabase,
) -> None:
    log = Log()
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin() as session:
            session.add(Item(name="one"))
            after_commit(session, log.waiting, "first")
            await session.commit()
            after_commit(session, log.waiting, "second")
            session.add(Item(name="two"))
            raise ValueError("stop")

    assert log.lines == ["first"]
    assert await names(async_database) == ["one"]


@pytest.mark.parametrize("read_only", [False, True])
@on_postgres
async def test_hooks_of_a_unit_without_statements_run(
    async_database: AsyncDatabase, read_only: bool
) -> None:
    log = Log()
    async with async_database.begin(read_only=read_only) as session:
        after_commit(session, log.waiting, "commit")
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin(read_only=read_only) as session:
            after_rollback(session, log.plain, "rollback")
            raise ValueError("stop")

    assert log.lines == ["commit", "rollback"]


async def fail() -> None:
    raise ValueError("an async hook failed")


@pytest.mark.parametrize("failing", [fail, lambda: int("a hook failed")])
@on_postgres
async def test_a_failing_hook_hides_no_other_and_fails_no_commit(
    async_database: AsyncDatabase,
    failing: Callable[[], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = Log()
    with caplog.at_level(logging.ERROR, "sessionscope"):
        async with async_database.begin() as session:
            session.add(Item(name="one"))
            after_commit(session, failing)
            after_commit(session, log.waiting, "ran")

    assert log.lines == ["ran"]
    assert await names(async_database) == ["one"]
    assert "hook failed" in caplog.text


@on_postgres
async def test_a_plain_session_runs_its_hooks_when_its_transaction_has_ended(
    async_database: AsyncDatabase,
) -> None:
    log = Log()
    async with async_database.sessionmaker() as session:
        session.add(Item(name="one"))
        after_commit(session, log.waiting, "committed")
        await session.commit()
        assert log.lines == ["committed"]
        session.add(Item(name="two"))
        await session.flush()
        after_rollback(session, log.plain, "undone")

    assert log.lines == ["committed", "undone"]


@on_postgres
async def test_the_session_inside_takes_hooks_as_well(async_database: AsyncDatabase) -> None:
    """What a plain ``def`` that run() calls has at hand."""
    log = Log()

    async with async_database.begin() as session:
        await session.run_sync(lambda plain: after_commit(plain, log.waiting, "ran"))
        await session.run_sync(lambda plain: after_commit(plain, log.plain, "too"))

    assert log.lines == ["ran", "too"]


@on_postgres
async def test_a_hook_on_a_session_that_has_ended_is_refused(
    async_database: AsyncDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def late(session: AsyncSession) -> None:
        after_commit(session, print)

    async with async_database.begin() as session:
        after_commit(session, late, session)
    assert "SessionEnded" in caplog.text
    assert "async with database.begin()" in caplog.text


def test_a_synchronous_session_refuses_an_async_hook(database: Database) -> None:
    """No one would await it."""
    called: list[str] = []
    with (
        pytest.raises(ConfigurationError, match="write it with `def`"),
        database.begin() as session,
    ):
        after_rollback(session, called.append, "rolled back")
        after_commit(session, fail)

    assert called == ["rolled back"]


@on_one_of_each_kind
async def test_a_hook_that_is_cancelled_turns_no_commit_into_a_failure(
    async_database: AsyncDatabase,
) -> None:
    log = Log()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async with async_database.begin() as session:
        session.add(Item(name="stored"))
        after_commit(session, cancelled)
        after_commit(session, log.waiting, "next")
    assert log.lines == ["next"]
    assert await names(async_database) == ["stored"]


class Slow:
    """A hook that waits until it is cancelled, if that comes in time."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.began = asyncio.Event()

    async def __call__(self) -> None:
        self.began.set()
        try:
            await asyncio.sleep(10)
            self.log.plain("in vain")
        finally:
            self.log.plain("cut off")


@on_uvloop_too
@on_one_of_each_kind
async def test_a_cancellation_during_a_slow_hook_ends_the_hook_and_not_the_commit(
    async_database: AsyncDatabase,
) -> None:
    """The other hooks run, the unit ends normally, and the cancellation comes back after it."""
    log = Log()
    slow = Slow(log)

    async def unit() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="stored"))
            after_commit(session, slow)
            after_commit(session, log.waiting, "next")
        log.plain("ended")
        await asyncio.sleep(0)
        log.plain("never")

    task = asyncio.create_task(unit())
    await slow.began.wait()
    assert async_database.stats().in_use == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.lines == ["cut off", "next", "ended"]
    assert await names(async_database) == ["stored"]


@on_postgres
async def test_a_timeout_that_is_over_with_the_unit_is_not_delivered_later(
    async_database: AsyncDatabase,
) -> None:
    log = Log()
    slow = Slow(log)
    async with asyncio.timeout(None) as deadline, async_database.begin() as session:
        session.add(Item(name="stored"))
        after_commit(session, lambda: deadline.reschedule(0))
        after_commit(session, slow)
    await asyncio.sleep(0)
    assert log.lines == ["cut off"]
    assert await names(async_database) == ["stored"]


@on_postgres
async def test_a_cancelled_anyio_scope_ends_its_slow_hooks(async_database: AsyncDatabase) -> None:
    """It cancels at every await, so that the next one that waits is cut off as well."""
    log = Log()
    slow = Slow(log)
    with anyio.CancelScope() as scope:
        async with async_database.begin() as session:
            session.add(Item(name="stored"))
            after_commit(session, scope.cancel)
            after_commit(session, slow)
            after_commit(session, slow)
            after_commit(session, log.plain, "plain")
        log.plain("ended")
    await asyncio.sleep(0)
    assert log.lines == ["cut off", "cut off", "plain", "ended"]
    assert await names(async_database) == ["stored"]


@on_postgres
async def test_the_timeout_of_a_hook_is_its_own(
    async_database: AsyncDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    async def gives_up() -> None:
        async with asyncio.timeout(0):
            await anyio.sleep_forever()

    async with async_database.begin() as session:
        session.add(Item(name="stored"))
        after_commit(session, gives_up)
    await asyncio.sleep(0)
    assert "TimeoutError" in caplog.text
    assert await names(async_database) == ["stored"]


@on_postgres
async def test_a_cancelled_task_does_not_wait_for_rollback_hooks(
    async_database: AsyncDatabase,
) -> None:
    """They go on where the rollback does, which nothing can prevent."""
    log = Log()
    hooked, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hook() -> None:
        hooked.set()
        await go_on.wait()
        log.plain("undone")
        done.set()

    async def unit() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="undone"))
            await session.flush()
            after_rollback(session, hook)
            raise ValueError("stop")

    task = asyncio.create_task(unit())
    await hooked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log.lines == []
    go_on.set()
    await done.wait()
    assert await names(async_database) == []
