"""Draining: none begins, those at work may end, the rest is cut off, and then all works again."""

import asyncio
import threading

import pytest
from sqlalchemy import text

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import DatabaseUnavailable, PoolBusy
from tests.async_drivers import names as async_names
from tests.async_drivers import on_servers
from tests.models import Item, names
from tests.test_deadline import SLEEP


def test_a_unit_that_does_not_end_is_cut_off(database: Database) -> None:
    sleep, errors = text(SLEEP[database.engine.dialect.name]), []
    began = threading.Event()

    def work() -> None:
        try:
            with database.begin() as session:
                session.add(Item(name="pear"))
                session.flush()
                began.set()
                session.execute(sleep)
        except Exception as error:
            errors.append(error)

    if database.engine.url.database is None:
        pytest.skip("A database in memory cannot be cut off: it is its connection")
    thread = threading.Thread(target=work)
    thread.start()
    began.wait(10)
    assert database.drain(0.1) is False
    thread.join(10)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [DatabaseUnavailable]
    assert "was cut off by drain(0.1)" in str(errors[0])
    assert names(database) == []
    assert database.stats().in_use == 0


def test_who_computes_is_refused_when_it_asks_again(database: Database) -> None:
    began, drained = threading.Event(), threading.Event()
    errors = []

    def work() -> None:
        try:
            with database.begin() as session:
                session.add(Item(name="pear"))
                session.flush()
                began.set()
                drained.wait(10)
        except Exception as error:
            errors.append(error)

    if database.engine.url.database is None:
        pytest.skip("A database in memory cannot be cut off: it is its connection")
    thread = threading.Thread(target=work)
    thread.start()
    began.wait(10)
    assert database.drain(0.1) is False
    drained.set()
    thread.join(10)
    assert [type(error) for error in errors] == [DatabaseUnavailable]
    assert "was cut off by drain(0.1)" in str(errors[0])
    assert names(database) == []


def test_nothing_begins_meanwhile_and_everything_afterwards(postgres: Database) -> None:
    inside, refused = threading.Event(), threading.Event()

    def hold() -> None:
        with postgres.begin() as session:
            session.add(Item(name="pear"))
            inside.set()
            refused.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(10)
    drained: list[bool] = []
    drain = threading.Thread(target=lambda: drained.append(postgres.drain(10)))
    drain.start()
    while True:
        try:
            postgres.ping()
        except PoolBusy:
            break
    refused.set()
    for thread in (holder, drain):
        thread.join(10)
    assert drained == [True]
    assert names(postgres) == ["pear"]


@on_servers
@pytest.mark.anyio
async def test_a_task_that_does_not_end_is_cancelled(async_database: AsyncDatabase) -> None:
    sleep = text(SLEEP[async_database.engine.dialect.name])
    began = asyncio.Event()

    async def work() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="pear"))
            await session.flush()
            began.set()
            await session.execute(sleep)

    task = asyncio.create_task(work())
    await began.wait()
    assert await async_database.drain(0.1) is False
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await async_names(async_database) == []
    assert async_database.stats().in_use == 0
