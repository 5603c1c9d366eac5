"""One session, two users at once: the second is refused, the first goes on and commits."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import event, select, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import SessionShared
from tests.async_drivers import (
    names,
    on_one_of_each_kind,
    on_postgres,
    on_uvloop_too,
    server_connections,
)
from tests.models import Item
from tests.models import names as plain_names

ROUNDS = 20


async def in_a_gather(session: AsyncSession) -> list[BaseException]:
    queries = (session.execute(text("SELECT 1")) for _ in range(2))
    results = await asyncio.gather(*queries, return_exceptions=True)
    return [each for each in results if isinstance(each, BaseException)]


async def in_a_task_group(session: AsyncSession) -> list[BaseException]:
    errors: list[BaseException] = []

    async def query() -> None:
        try:
            await session.scalars(select(Item))
        except Exception as error:
            errors.append(error)

    async with asyncio.TaskGroup() as group:
        group.create_task(query())
        group.create_task(query())
    return errors


@pytest.mark.anyio
@on_one_of_each_kind
@on_uvloop_too
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("twice", [in_a_gather, in_a_task_group])
async def test_two_tasks_are_told_apart_every_time(
    async_database: AsyncDatabase,
    twice: Callable[[AsyncSession], Awaitable[list[BaseException]]],
    warm: bool,
) -> None:
    """On a warm pool nothing else would tell; on a cold one connections would leak."""
    is_memory = async_database.engine.url.database is None
    rounds = range(ROUNDS if warm else 5)
    for number in rounds:
        if not warm and not is_memory:
            await async_database.dispose()
        async with async_database.begin() as session:
            errors = await twice(session)
            session.add(Item(name=f"round {number}"))
        assert [type(error) for error in errors] == [SessionShared]
        assert "test_overlap.py" in str(errors[0])

    assert len(await names(async_database)) == len(rounds)
    assert async_database.stats().in_use == 0
    assert async_database.stats().rolled_back == 0


@pytest.mark.anyio
@on_postgres
async def test_nothing_is_leaked_on_the_server(async_url: str) -> None:
    async with AsyncDatabase(async_url) as observer:
        async with AsyncDatabase(async_url) as database:
            for _ in range(ROUNDS):
                async with database.begin() as session:
                    await in_a_gather(session)
            assert await server_connections(observer) == 1
            assert database.stats().idle == 1
        assert await server_connections(observer) == 0


@pytest.mark.anyio
@on_postgres
async def test_an_error_that_leaves_the_unit_rolls_it_back(async_database: AsyncDatabase) -> None:
    """gather() gives up at the first error, while the other query still runs."""
    for _ in range(5):
        with pytest.raises(SessionShared):
            async with async_database.begin() as session:
                session.add(Item(name="gone"))
                await session.flush()
                await asyncio.gather(
                    session.execute(text("SELECT pg_sleep(0.05)")),
                    session.execute(text("SELECT 1")),
                )
    assert await names(async_database) == []
    assert async_database.stats().in_use == 0


@pytest.mark.anyio
@on_postgres
async def test_both_places_are_named_where_the_users_code_is(
    async_database: AsyncDatabase,
) -> None:
    async def the_first(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))

    async def the_second(session: AsyncSession) -> None:
        await session.scalar(text("SELECT 2"))

    async with async_database.begin() as session:
        first = asyncio.create_task(the_first(session))
        await asyncio.sleep(0)
        with pytest.raises(SessionShared) as caught:
            await the_second(session)
        await first
    message = str(caught.value)
    assert "the_first" in message
    assert "the_second" in message
    assert "opened at" in message
    assert "async with database.begin() as session" in message
    assert isinstance(caught.value, sa_exc.InvalidRequestError)


@pytest.mark.anyio
@on_postgres
async def test_one_task_after_the_other_is_fine(async_database: AsyncDatabase) -> None:
    """It is overlap that counts, not ownership."""
    async with async_database.begin() as session:
        for number in range(3):
            await asyncio.create_task(add(session, f"task {number}"))
    assert len(await names(async_database)) == 3


async def add(session: AsyncSession, name: str) -> None:
    session.add(Item(name=name))
    await session.flush()


@contextmanager
def another_thread_inside(session: Session) -> Iterator[None]:
    """Have another thread inside of a call of the session's."""
    inside, leave = threading.Event(), threading.Event()
    connection = session.connection()

    def block(*_: object) -> None:
        inside.set()
        assert leave.wait(10)

    def the_first() -> object:
        return session.scalar(text("SELECT 1"))

    event.listen(connection, "before_cursor_execute", block)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(the_first)
        try:
            assert inside.wait(10)
            yield
        finally:
            leave.set()
        assert first.result(10) == 1
    event.remove(connection, "before_cursor_execute", block)


def test_the_second_of_two_threads_is_refused_and_the_first_goes_on(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="kept"))
        session.flush()
        with another_thread_inside(session), pytest.raises(SessionShared) as caught:
            session.scalars(select(Item))
        session.add(Item(name="kept too"))

    message = str(caught.value)
    assert "scalars() was called at" in message
    assert message.count("test_overlap.py") >= 2  # where it was called, and where it was opened
    assert sorted(plain_names(database)) == ["kept", "kept too"]
    assert database.stats().in_use == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.commit(),
        lambda session: session.rollback(),
        lambda session: session.flush(),
        lambda session: session.get(Item, 1),
        lambda session: session.merge(Item(id=1, name="merged")),
        lambda session: session.begin_nested(),
        lambda session: session.close(),
        lambda session: session.reset(),
        lambda session: session.invalidate(),
        lambda session: session.prepare(),
        lambda session: session.bulk_save_objects([Item(name="bulk")]),
        lambda session: session.bulk_insert_mappings(Item, [{"name": "bulk"}]),
        lambda session: session.bulk_update_mappings(Item, [{"id": 1, "name": "bulk"}]),
        lambda session: session.delete(Item(id=1, name="kept")),
    ],
)
def test_everything_that_reaches_the_connection_is_guarded(
    sqlite: Database, use: Callable[[Session], object]
) -> None:
    with sqlite.begin() as session:
        session.add(Item(name="kept"))
        session.flush()
        with another_thread_inside(session), pytest.raises(SessionShared):
            use(session)
    assert plain_names(sqlite) == ["kept"]


def test_a_session_of_the_sessionmaker_is_guarded_as_well(sqlite: Database) -> None:
    with sqlite.sessionmaker() as session:
        with another_thread_inside(session), pytest.raises(SessionShared):
            session.execute(text("SELECT 1"))


def test_one_thread_after_the_other_is_fine(database: Database) -> None:
    """Frameworks pass a session from thread to thread."""
    with database.begin() as session:
        for number in range(3):
            with ThreadPoolExecutor(1) as threads:
                threads.submit(session.add, Item(name=str(number))).result(10)
                threads.submit(session.flush).result(10)
    assert len(plain_names(database)) == 3


def test_a_call_within_a_call_is_the_same_user(database: Database) -> None:
    """A listener may use the session that it is called for."""
    with database.begin() as session:

        @event.listens_for(session, "before_flush")
        def look(session: Session, *_: object) -> None:
            with session.no_autoflush:
                assert session.scalar(text("SELECT 1")) == 1

        session.add(Item(name="kept"))
    assert plain_names(database) == ["kept"]


def test_a_session_does_not_keep_the_parameters_of_its_last_call(sqlite: Database) -> None:
    rows = [{"id": number, "name": str(number)} for number in range(3)]
    with sqlite.begin() as session:
        session.execute(text("INSERT INTO item VALUES (:id, :name)"), rows)
        kept = [each for value in vars(session).values() for each in _members(value)]
        assert not any(each is rows for each in kept)


def _members(value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple):
        return (value,)
    return tuple(inner for member in value for inner in _members(member))
