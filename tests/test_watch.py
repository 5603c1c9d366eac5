"""Sessions that are never closed, and transactions that are idle for too long."""

import asyncio
import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from typing import Any

import pytest
from sqlalchemy import insert, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from benchmarks._cancelled import hold_all
from benchmarks.cancellation import leak, with_driver
from sessionscope import AsyncDatabase, Database, _overlap, after_commit
from sessionscope.exc import IdleInTransactionWarning, SessionLeakWarning
from tests.models import Item, names

drivers = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
leaks = pytest.mark.filterwarnings("always::sessionscope.exc.SessionLeakWarning")


def use(session: Session) -> None:
    """Begin a transaction, and make sure that the collector alone finds the session."""
    session.add(Item(name="lost"))
    session.flush()
    session.info["cycle"] = session


async def use_async(session: AsyncSession) -> None:
    session.add(Item(name="lost"))
    await session.flush()
    session.info["cycle"] = session


def leak_a_session(database: Database) -> None:
    use(database.sessionmaker())


def leak_a_unit(database: Database) -> None:
    block = database.begin()
    session = block.__enter__()
    use(session)
    session.info["block"] = block


async def leak_an_async_session(database: AsyncDatabase) -> None:
    await use_async(database.sessionmaker())


async def leak_an_async_unit(database: AsyncDatabase) -> None:
    block = database.begin()
    session = await block.__aenter__()
    await use_async(session)
    session.info["block"] = block


def collect_in_a_thread() -> None:
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()


@contextmanager
def one_leak(function: Any) -> Iterator[None]:
    """Expect one warning, that names the line of *function* which opened the session."""
    code = function.__code__
    with pytest.warns(SessionLeakWarning) as warned:
        yield
    (warning,) = warned
    message = str(warning.message)
    opened_at = f"{code.co_filename}:{code.co_firstlineno + 1} ({code.co_qualname})"
    assert f"The session opened at {opened_at} was never closed" in message
    is_async = iscoroutinefunction(function)
    assert f"Write: {'async ' if is_async else ''}with database.begin() as session" in message
    assert (warning.filename, warning.lineno) == (__file__, code.co_firstlineno + 1)


@pytest.mark.parametrize("leaking", [leak_a_session, leak_a_unit])
def test_a_leaked_session_gives_its_connection_back(database: Database, leaking: Any) -> None:
    """The collector may find it in any thread; what it did is rolled back."""
    gc.collect()
    with one_leak(leaking):
        leaking(database)
        collect_in_a_thread()
    assert database.stats().in_use == 0
    assert names(database) == []
    with database.begin() as session:
        session.add(Item(name="next"))
    assert names(database) == ["next"]


@pytest.mark.parametrize("leaking", [leak_an_async_session, leak_an_async_unit])
@pytest.mark.anyio
async def test_a_leaked_async_session_gives_its_connection_back(
    async_database: AsyncDatabase, leaking: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is closed on its event loop, where that is safe."""
    gc.collect()
    with one_leak(leaking):
        await asyncio.ensure_future(leaking(async_database))
        await asyncio.to_thread(collect_in_a_thread)
    async with asyncio.timeout(5):
        async with async_database.begin() as session:
            session.add(Item(name="next"))
    async with async_database.begin(read_only=True) as session:
        assert list(await session.scalars(select(Item.name))) == ["next"]
    assert async_database.stats().in_use == 0
    assert caplog.messages == []


@drivers
def test_leaked_async_sessions_do_not_crash_uvloop(postgres_url: str, driver: str) -> None:
    """SQLAlchemy's own clean-up would use the transport from the collector's thread."""
    run = leak(with_driver(make_url(postgres_url), driver))
    assert run.returncode == 0, run.stderr
    assert run.stdout == "3 at once\n"
    assert run.stderr.count("SessionLeakWarning: The session opened at") == 3
    assert "(leak) was never closed" in run.stderr
    assert "garbage collector is trying" not in run.stderr
    assert "Traceback" not in run.stderr


@leaks
@drivers
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a loop that was closed too soon
def test_a_session_may_be_collected_when_its_loop_is_closed(
    postgres_url: str, driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = AsyncDatabase(with_driver(make_url(postgres_url), driver), pool_size=2)

    async def leak_one() -> None:
        session = database.sessionmaker()
        await session.execute(text("SELECT 1"))
        session.info["cycle"] = session

    gc.disable()
    try:
        asyncio.run(leak_one())
        with pytest.warns(SessionLeakWarning, match="leak_one"):
            collect_in_a_thread()
    finally:
        gc.enable()
    assert database.engine.pool.backends.count == 0  # type: ignore[attr-defined]  # ours
    assert caplog.messages == []

    async def again() -> None:
        await hold_all(database, 2)
        await database.dispose()

    asyncio.run(again())


def test_a_closed_session_is_no_leak(database: Database) -> None:
    """Not even one that is closed late, or was never used. Warnings are errors here."""
    database.sessionmaker()
    with database.sessionmaker() as session:
        use(session)
    del session
    with database.begin() as session:
        use(session)
    del session
    gc.collect()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any pause at all in a transaction is too long."""
    monkeypatch.setattr(_overlap, "IDLE_SECONDS", -1.0)


@pytest.mark.usefixtures("impatient")
def test_a_transaction_that_was_idle_is_told_with_the_last_statement(database: Database) -> None:
    statement = select(Item).where(Item.name == "a secret")
    with pytest.warns(IdleInTransactionWarning) as warned:
        with database.begin() as session:
            session.scalars(statement)
    message = str(warned[0].message)
    assert f"The session opened at {__file__}:" in message
    assert "test_a_transaction_that_was_idle" in message
    assert "after 'SELECT item.id, item.name FROM item WHERE item.name = :name_1'" in message
    assert "a secret" not in message
    assert warned[0].filename == __file__


@pytest.mark.usefixtures("impatient")
def test_a_transaction_on_no_connection_is_not_idle(database: Database) -> None:
    """A hook has begun it, after another one had ended; nothing was asked of the server."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with database.begin() as session:
            session.commit()
            after_commit(session, str)
            session.flush()


@pytest.mark.usefixtures("impatient")
def test_one_line_is_told_once_however_often_it_is_idle(sqlite: Database) -> None:
    """As long as Python's own filter is in place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            with sqlite.begin() as session:
                session.scalars(select(Item))
    assert [warning.category for warning in caught] == [IdleInTransactionWarning]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda session: session.execute(insert(Item).values(name="a secret")), "INSERT INTO item"),
        (lambda session: session.get(Item, 1), "get(Item)"),
        (lambda session: session.connection(), "connection()"),
    ],
)
def test_the_last_call_is_told_without_its_values(sqlite: Database, call: Any, told: str) -> None:
    with pytest.warns(IdleInTransactionWarning) as warned:
        with sqlite.begin() as session:
            call(session)
    assert told in str(warned[0].message)
    assert "a secret" not in str(warned[0].message)


@pytest.mark.usefixtures("impatient")
@pytest.mark.anyio
async def test_an_async_transaction_that_was_idle_is_told_as_well(
    async_database: AsyncDatabase,
) -> None:
    with pytest.warns(IdleInTransactionWarning, match="after 'SELECT item.id, item.name FROM"):
        async with async_database.begin() as session:
            await session.scalars(select(Item))


def read_and_commit(session: Session) -> None:
    session.scalars(select(Item))
    session.commit()


@pytest.mark.usefixtures("impatient")
def test_a_plain_session_that_was_idle_is_told_as_well(sqlite: Database) -> None:
    with pytest.warns(IdleInTransactionWarning, match="test_a_plain_session_that_was_idle"):
        read_and_commit(sqlite.sessionmaker())


@pytest.mark.usefixtures("impatient")
def test_without_a_transaction_there_is_no_idleness(psycopg: Database) -> None:
    """Read-only units hold no locks, nor does a session between two transactions."""
    with psycopg.begin(read_only=True) as session:
        session.scalars(select(Item))
        session.scalars(select(Item))
    session = psycopg.sessionmaker()
    for _ in range(2):
        with pytest.warns(IdleInTransactionWarning) as warned:
            read_and_commit(session)
        assert len(warned) == 1  # at the commit, not at the statement before
    session.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.anyio
async def test_without_a_transaction_there_is_no_idleness_in_a_task_either(
    postgres_url: str,
) -> None:
    url = with_driver(make_url(postgres_url), "asyncpg")
    async with AsyncDatabase(url) as database, database.begin(read_only=True) as session:
        for _ in range(2):
            await session.execute(text("SELECT 1"))


def test_a_busy_transaction_is_not_idle(database: Database) -> None:
    """Warnings are errors here."""
    with database.begin() as session:
        for _ in range(2):
            session.scalars(select(Item)).all()
