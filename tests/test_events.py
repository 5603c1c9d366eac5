"""Observers: told what happened to each unit of work, in order, and harmless whatever they do."""

import asyncio
import dataclasses
import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
from sqlalchemy import text

from sessionscope import AsyncDatabase, Database, events
from sessionscope.events import (
    Event,
    SessionLeaked,
    UnitBegan,
    UnitEnded,
    UnitRefused,
    UnitRetried,
    UnitWaited,
)
from sessionscope.exc import ConfigurationError, PoolBusy, SessionLeakWarning
from tests.async_drivers import on_postgres, on_uvloop_too


class Observed(list[Event]):
    """An observer that keeps what it is told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self]


def test_a_unit_begins_and_ends(url: str) -> None:
    observed = Observed()
    with Database(url, observers=[observed]) as database:
        with database.begin(read_only=True) as session:
            session.execute(text("SELECT 1"))
            assert observed.kinds == [UnitBegan]
        with pytest.raises(ValueError, match="stop"), database.begin():
            raise ValueError("stop")

    began, ended, began_again, rolled_back = observed
    assert isinstance(began, UnitBegan)
    assert isinstance(began_again, UnitBegan)
    assert (began.read_only, began_again.read_only) == (True, False)
    assert isinstance(ended, UnitEnded)
    assert isinstance(rolled_back, UnitEnded)
    assert (ended.outcome, rolled_back.outcome) == ("committed", "rolled back")
    assert 0 < ended.seconds < 60
    for event in observed:
        assert event.opened_at.startswith(f"{__file__}:")
        assert "test_a_unit_begins_and_ends" in event.opened_at
    assert began.opened_at == ended.opened_at != began_again.opened_at


def test_the_connection_is_back_when_the_end_is_told(postgres_url: str) -> None:
    in_use: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, UnitEnded):
            in_use.append(database.stats().in_use)
            in_use.append(database.stats().idle)

    with Database(postgres_url, observers=[look]) as database:
        database.ping()
    assert in_use == [0, 1]


# Seconds; who waits for less than a millisecond is not said to have waited.
WORTH_TELLING = 0.003


def test_waiting_and_being_refused_are_told(sqlite_url: str) -> None:
    observed = Observed()
    with (
        Database(
            sqlite_url, pool_size=1, max_overflow=0, max_waiting=1, observers=[observed]
        ) as database,
        ThreadPoolExecutor(2) as threads,
    ):
        with database.begin():
            waiting = threads.submit(database.ping)
            while not database.stats().waiting:
                pass
            refused = threads.submit(database.ping)
            assert isinstance(refused.exception(10), PoolBusy)
            sleep(WORTH_TELLING)
        waiting.result(10)

    began, was_refused, ended, waited, *rest = observed
    assert [type(each) for each in (began, was_refused)] == [UnitBegan, UnitRefused]
    assert {type(ended), type(waited)} == {UnitEnded, UnitWaited}  # in two threads
    assert [type(each) for each in rest] == [UnitBegan, UnitEnded]
    (waited,) = (each for each in observed if isinstance(each, UnitWaited))
    assert WORTH_TELLING <= waited.seconds < 5
    assert waited.opened_at == rest[0].opened_at == rest[1].opened_at


def test_a_refusal_tells_how_long_the_unit_has_waited(sqlite_url: str) -> None:
    observed = Observed()
    with Database(
        sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0.05, observers=[observed]
    ) as database:
        with database.begin(), ThreadPoolExecutor(1) as threads:
            assert isinstance(threads.submit(database.ping).exception(10), PoolBusy)
    refused = observed[1]
    assert isinstance(refused, UnitRefused)
    assert 0.05 <= refused.seconds < 5


def test_a_leaked_session_is_told_with_its_place(sqlite_url: str) -> None:
    observed = Observed()
    with Database(sqlite_url, observers=[observed]) as database:
        with pytest.warns(SessionLeakWarning):
            leak_a_session(database)
    (leaked,) = observed
    assert isinstance(leaked, SessionLeaked)
    assert "leak_a_session" in leaked.opened_at


def leak_a_session(database: Database) -> None:
    session = database.sessionmaker()
    session.execute(text("SELECT 1"))
    del session
    gc.collect()


def test_an_observer_that_raises_is_logged_once_and_hurts_no_unit(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    observed = Observed()

    def broken(event: Event) -> None:
        raise ValueError("broken observer")

    with caplog.at_level(logging.ERROR, "sessionscope"):
        with Database(sqlite_url, observers=[broken, observed]) as database:
            for _ in range(3):
                database.ping()
            stats = database.stats()

    assert observed.kinds == [UnitBegan, UnitEnded] * 3
    assert caplog.text.count("this is logged once") == 1
    assert caplog.text.count("ValueError: broken observer") == 1
    assert (stats.committed, stats.in_use) == (3, 0)


def test_what_cannot_be_called_is_no_observer() -> None:
    for make in (Database, AsyncDatabase):
        url = "sqlite://" if make is Database else "sqlite+aiosqlite://"
        with pytest.raises(ConfigurationError, match="observers has 'log', which is not callable"):
            make(url, observers=["log"])  # type: ignore[list-item]  # the mistake


KINDS = [
    SessionLeaked("a.py:1"),
    UnitBegan("a.py:1", read_only=True),
    UnitEnded("a.py:1", "committed", 0.1),
    UnitRefused("a.py:1", 0.1),
    UnitRetried("a.py:1", 1, "OperationalError", 0.01),
    UnitWaited("a.py:1", 0.1),
]


@pytest.mark.parametrize("event", KINDS, ids=lambda event: type(event).__name__)
def test_an_event_is_a_frozen_record(event: Event) -> None:
    """Two with the same fields are equal, and can be kept in a set."""
    assert dataclasses.replace(event) == event
    assert len({event, dataclasses.replace(event)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.opened_at = "b.py:2"  # type: ignore[misc]  # what it refuses
    assert not hasattr(event, "__dict__")


def test_every_kind_of_event_is_tested_and_public() -> None:
    kinds = {type(event).__name__ for event in KINDS}
    assert {kind.__name__ for kind in Event.__subclasses__()} == kinds
    assert kinds < set(events.__all__)


@pytest.mark.anyio
@on_postgres
@on_uvloop_too
async def test_events_of_an_event_loop_come_in_order(async_url: str) -> None:
    observed = Observed()
    async with AsyncDatabase(
        async_url, pool_size=1, max_overflow=0, max_waiting=1, observers=[observed]
    ) as database:
        async with database.begin() as session:
            await session.execute(text("SELECT 1"))
            waiting = asyncio.create_task(database.ping())
            while not database.stats().waiting:
                await asyncio.sleep(0)
            with pytest.raises(PoolBusy):
                await asyncio.create_task(database.ping())
            await asyncio.sleep(WORTH_TELLING)
        await waiting

    assert observed.kinds == [
        UnitBegan,
        UnitRefused,
        UnitEnded,
        UnitWaited,
        UnitBegan,
        UnitEnded,
    ]
    outcomes = [event.outcome for event in observed if isinstance(event, UnitEnded)]
    assert outcomes == ["committed", "committed"]
    assert observed[0].opened_at == observed[2].opened_at
    assert "test_events_of_an_event_loop" in observed[0].opened_at


@pytest.mark.anyio
@on_postgres
async def test_a_broken_observer_hurts_no_unit_of_an_event_loop(
    async_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise ValueError("broken observer")

    with caplog.at_level(logging.ERROR, "sessionscope"):
        async with AsyncDatabase(async_url, observers=[broken]) as database:
            await database.ping()
            await database.ping()
            assert database.stats().committed == 2
    assert caplog.text.count("ValueError: broken observer") == 1
