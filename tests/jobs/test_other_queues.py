"""taskiq, dramatiq, APScheduler and threads: a function with with_session is one unit of work."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import dramatiq
import pytest
from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.schedulers.background import BackgroundScheduler
from dramatiq.brokers.stub import StubBroker
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from taskiq import InMemoryBroker

from sessionscope import AsyncDatabase, Database, after_commit
from tests.models import Item, Note, names


def fail_at_commit(session: Session) -> None:
    session.add(Note(item_id=404))
    session.flush()


def test_taskiq_stores_the_result_of_what_was_committed(psycopg: Database) -> None:
    """And the commit that fails is the task's error."""

    async def main() -> None:
        broker = InMemoryBroker()
        async with AsyncDatabase(psycopg.engine.url) as database:

            @broker.task
            @database.with_session()
            async def add(session: AsyncSession, name: str) -> list[str]:
                session.add(Item(name=name))
                after_commit(session, sent.append, await note.kiq())
                return [name]

            @broker.task
            @database.with_session()
            async def note(session: AsyncSession) -> None:
                await session.run_sync(fail_at_commit)

            sent: list[Any] = []
            await broker.startup()
            result = await (await add.kiq("pear")).wait_result(timeout=20)
            assert (result.is_err, result.return_value) == (False, ["pear"])
            assert names(psycopg) == ["pear"]
            failed = await sent[0].wait_result(timeout=20)
            assert isinstance(failed.error, IntegrityError)
            await broker.shutdown()

    asyncio.run(main())


def test_a_task_of_taskiq_is_sent_once_its_sender_has_committed(psycopg: Database) -> None:
    async def main() -> None:
        broker = InMemoryBroker(await_inplace=True)
        async with AsyncDatabase(psycopg.engine.url) as database:
            seen: list[list[str]] = []

            @broker.task
            @psycopg.with_session(read_only=True)
            def look(session: Session, name: str) -> None:
                seen.append([name, *session.scalars(select(Item.name))])

            await broker.startup()
            async with database.begin() as session:
                session.add(Item(name="pear"))
                after_commit(session, look.kiq, "pear")
                await session.flush()
                assert seen == []
            assert seen == [["pear", "pear"]]
            await broker.shutdown()

    asyncio.run(main())


def test_a_def_task_of_taskiq_runs_in_a_thread(psycopg: Database) -> None:
    async def main() -> None:
        broker = InMemoryBroker()

        @broker.task
        @psycopg.with_session()
        def add(session: Session, count: int) -> int:
            session.add(Item(name=f"pear {count}"))
            return count + 1

        await broker.startup()
        # It casts arguments to what the signature says.
        result = await (await add.kiq("7")).wait_result(timeout=20)  # type: ignore[arg-type]  # on purpose
        assert result.return_value == 8
        await broker.shutdown()

    asyncio.run(main())
    assert names(psycopg) == ["pear 7"]


@pytest.fixture
def dramatiq_broker() -> Iterator[StubBroker]:
    broker = StubBroker()
    dramatiq.set_broker(broker)
    yield broker
    broker.close()


def test_dramatiq_acknowledges_after_the_commit_and_tries_again_in_a_new_unit(
    psycopg: Database, dramatiq_broker: StubBroker
) -> None:
    attempts: list[Session] = []

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    @psycopg.with_session()
    def add(session: Session, name: str) -> None:
        attempts.append(session)
        session.add(Item(name=name))
        session.flush()
        if len(attempts) == 1:
            session.add(Note(item_id=404))  # fails at COMMIT

    worker = dramatiq.Worker(dramatiq_broker, worker_threads=4)
    worker.start()
    try:
        with psycopg.begin() as session:
            after_commit(session, add.send, "pear")
            assert attempts == []
        dramatiq_broker.join(add.queue_name, fail_fast=False)
    finally:
        worker.stop()
    assert len(set(map(id, attempts))) == 2
    assert names(psycopg) == ["pear"]


def test_apscheduler_hears_of_the_commit_that_failed(psycopg: Database) -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    scheduler = BackgroundScheduler()
    scheduler.add_listener(events.put, EVENT_JOB_EXECUTED | EVENT_JOB_ERROR)
    add = psycopg.with_session()(lambda session, name: session.add(Item(name=name)))
    scheduler.start()
    try:
        scheduler.add_job(add, args=["pear"], id="add")
        done = events.get(timeout=20)
        assert (done.job_id, done.exception, names(psycopg)) == ("add", None, ["pear"])
        scheduler.add_job(psycopg.with_session()(fail_at_commit), id="note")
        assert isinstance(events.get(timeout=20).exception, IntegrityError)
    finally:
        scheduler.shutdown()


def test_a_pool_of_threads_that_is_larger_than_that_of_connections_waits(
    psycopg: Database,
) -> None:
    @psycopg.with_session()
    def add(session: Session, number: int) -> int:
        session.add(Item(name=f"item {number}"))
        if number % 10 == 0:
            raise ValueError(number)
        return number

    stored = []
    with ThreadPoolExecutor(40) as threads:
        for future in [threads.submit(add, number) for number in range(100)]:
            with suppress(ValueError):
                stored.append(future.result(30))
    assert len(stored) == len(names(psycopg)) == 90
    assert psycopg.stats().in_use == 0
