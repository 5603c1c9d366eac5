"""Verified commit on each asynchronous driver: commit() returning means that it is stored."""

from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase
from sessionscope.exc import CommitUnknown, TransactionDoomed
from tests.async_drivers import (
    a_rival_that_wins,
    backend_id,
    kill,
    lock,
    names,
    on_mysql,
    on_postgres,
    on_sqlite_files,
    on_uvloop_too,
)
from tests.models import Item

pytestmark = pytest.mark.anyio

FAILING = "SELECT * FROM no_such_table"


async def swallow(session: AsyncSession, statement: str = FAILING) -> None:
    with pytest.raises(sa_exc.DBAPIError):
        await session.execute(text(statement))


@on_postgres
@on_uvloop_too
async def test_a_swallowed_error_never_commits_silently(async_database: AsyncDatabase) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK after an error; we raise instead."""
    with pytest.raises(TransactionDoomed) as caught:
        async with async_database.begin() as session:
            session.add(Item(name="lost"))
            await session.flush()
            await swallow(session)

    message = str(caught.value)
    assert f"running {FAILING!r}" in message
    assert f"{__file__}:" in message
    assert isinstance(caught.value, sa_exc.PendingRollbackError)
    assert isinstance(caught.value.__cause__, sa_exc.ProgrammingError)
    assert await names(async_database) == []


@on_postgres
async def test_the_connection_of_a_doomed_transaction_is_clean(
    async_database: AsyncDatabase,
) -> None:
    backends = []
    with pytest.raises(TransactionDoomed):
        async with async_database.begin() as session:
            backends.append(await backend_id(session))
            await swallow(session)

    async with async_database.begin() as session:
        assert [await backend_id(session)] == backends
        session.add(Item(name="next"))
    assert await names(async_database) == ["next"]


@pytest.mark.parametrize("async_url", ["psycopg"], indirect=True)
async def test_an_error_of_a_raw_cursor_dooms_as_well(async_database: AsyncDatabase) -> None:
    """SQLAlchemy never sees it; the driver's own status tells. asyncpg shows none."""
    with pytest.raises(TransactionDoomed):
        async with async_database.begin() as session:
            raw = await (await session.connection()).get_raw_connection()
            assert raw.driver_connection is not None
            with pytest.raises(Exception, match="no_such_table"):
                await raw.driver_connection.execute(FAILING)


@on_postgres
async def test_a_commit_in_the_middle_is_verified_too(async_database: AsyncDatabase) -> None:
    async with async_database.begin() as session:
        session.add(Item(name="lost"))
        await session.flush()
        await swallow(session)
        with pytest.raises(TransactionDoomed):
            await session.commit()
        await session.rollback()
        session.add(Item(name="kept"))

    assert await names(async_database) == ["kept"]


@on_postgres
async def test_a_plain_session_of_the_sessionmaker_is_verified_too(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.sessionmaker() as session:
        session.add(Item(name="lost"))
        await session.flush()
        await swallow(session)
        with pytest.raises(TransactionDoomed):
            await session.commit()

    assert await names(async_database) == []


@on_postgres
async def test_the_next_statement_says_what_really_failed(async_database: AsyncDatabase) -> None:
    """The server's own words are that the transaction is aborted, and not why."""
    with pytest.raises(TransactionDoomed, match="no_such_table"):
        async with async_database.begin() as session:
            await swallow(session)
            await session.execute(text("SELECT 1"))


async def test_a_swallowed_flush_error_dooms(async_database: AsyncDatabase) -> None:
    async with async_database.begin() as session:
        session.add(Item(id=1, name="first"))

    with pytest.raises(TransactionDoomed, match="a flush failed earlier"):
        async with async_database.begin() as session:
            session.add(Item(id=1, name="again"))
            with pytest.raises(sa_exc.IntegrityError):
                await session.flush()

    assert await names(async_database) == ["first"]


async def in_a_savepoint(session: AsyncSession) -> None:
    with pytest.raises(sa_exc.DBAPIError):
        async with session.begin_nested():
            await session.execute(text(FAILING))


async def in_a_savepoint_of_text_sql(session: AsyncSession) -> None:
    await session.execute(text("SAVEPOINT mine"))
    await swallow(session)
    await session.execute(text("ROLLBACK TO SAVEPOINT mine"))


async def a_flush_in_a_savepoint(session: AsyncSession) -> None:
    session.add(Item(id=1001, name="one"))
    await session.flush()
    with pytest.raises(sa_exc.IntegrityError):
        async with session.begin_nested():
            session.add(Item(name="one"))


async def on_the_client_side(session: AsyncSession) -> None:
    """The driver cannot encode the value: nothing was sent."""
    with pytest.raises((sa_exc.DBAPIError, UnicodeError)):
        await session.execute(text("SELECT CAST(:value AS CHAR(9))"), {"value": "\ud800"})


async def then_rolled_back(session: AsyncSession) -> None:
    await swallow(session)
    await session.rollback()


@pytest.mark.parametrize(
    "legal",
    [
        in_a_savepoint,
        in_a_savepoint_of_text_sql,
        a_flush_in_a_savepoint,
        on_the_client_side,
        then_rolled_back,
    ],
)
async def test_a_legal_pattern_is_no_false_alarm(
    async_database: AsyncDatabase, legal: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async with async_database.begin() as session:
        await session.execute(text("SELECT 1"))
        await legal(session)
        session.add(Item(name="kept"))

    assert "kept" in await names(async_database)


async def only_swallowed(session: AsyncSession) -> None:
    await swallow(session, "INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")


async def then_written(session: AsyncSession) -> None:
    await only_swallowed(session)
    await session.execute(text("INSERT INTO item (id, name) VALUES (2, 'two')"))


@on_sqlite_files
@pytest.mark.parametrize("after_it", [only_swallowed, then_written])
async def test_on_conflict_rollback_dooms_statements_and_the_commit(
    async_database: AsyncDatabase, after_it: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """SQLite has ended the transaction: what follows would be written at once."""
    with pytest.raises(TransactionDoomed, match="IntegrityError"):
        async with async_database.begin() as session:
            await session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
            await after_it(session)

    assert await names(async_database) == []


@on_sqlite_files
async def test_a_caught_integrity_error_on_sqlite_commits(async_database: AsyncDatabase) -> None:
    async with async_database.begin() as session:
        await session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        await swallow(session, "INSERT INTO item (id, name) VALUES (1, 'again')")

    assert await names(async_database) == ["one"]


async def nothing(session: AsyncSession) -> None:
    """Go on to the commit."""


async def another_row(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO item VALUES (4, 'alone')"))


@on_mysql
@pytest.mark.parametrize("then", [nothing, another_row])
async def test_a_swallowed_deadlock_dooms_statements_and_the_commit(
    async_database: AsyncDatabase, then: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """The server has rolled back everything: what follows would be stored alone."""
    async with a_rival_that_wins(async_database) as collide:
        with pytest.raises(TransactionDoomed, match="OperationalError running 'SELECT id"):
            async with async_database.begin() as session:
                session.add(Item(id=3, name="lost"))
                await session.flush()
                await lock(session, 1)
                await collide(session)
                await then(session)
    assert await names(async_database) == ["one", "two"]
    async with async_database.begin() as session:
        session.add(Item(name="on a clean connection"))


@on_mysql
async def test_a_caught_integrity_error_on_mysql_commits(async_database: AsyncDatabase) -> None:
    async with async_database.begin() as session:
        session.add(Item(id=1, name="kept"))
        await session.flush()
        await swallow(session, "INSERT INTO item VALUES (1, 'again')")
    assert await names(async_database) == ["kept"]


DIE = """CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"""
DIE_AT_COMMIT = """CREATE CONSTRAINT TRIGGER die AFTER INSERT ON item
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()"""


@on_postgres
@on_uvloop_too
async def test_a_connection_lost_during_commit_is_an_unknown_outcome(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.engine.begin() as connection:
        await connection.execute(text(DIE))
        await connection.execute(text(DIE_AT_COMMIT))

    with pytest.raises(CommitUnknown, match="lost during COMMIT"):
        async with async_database.begin() as session:
            session.add(Item(name="who knows"))

    assert await names(async_database) == []  # this server died before it had committed
    assert async_database.stats().in_use == 0


@on_mysql
async def test_a_connection_lost_during_commit_is_unknown_on_mysql(
    async_database: AsyncDatabase, async_url: str
) -> None:
    with pytest.raises(CommitUnknown, match="lost during COMMIT"):
        async with async_database.begin() as session:
            session.add(Item(name="who knows"))
            await session.flush()
            await kill(async_url, await backend_id(session))
    assert await names(async_database) == []


@on_postgres
async def test_a_connection_lost_before_commit_is_a_plain_failure(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(sa_exc.DBAPIError) as caught:
        async with async_database.begin() as session:
            session.add(Item(name="lost"))
            await session.flush()
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert not isinstance(caught.value, CommitUnknown)
    assert await names(async_database) == []


@on_postgres
async def test_a_swallowed_loss_of_the_connection_is_called_that(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(TransactionDoomed, match="its connection was lost"):
        async with async_database.begin() as session:
            session.add(Item(name="lost"))
            await session.flush()
            await swallow(session, "SELECT pg_terminate_backend(pg_backend_pid())")

    assert await names(async_database) == []


@on_postgres
async def test_no_parameter_appears_in_an_error(async_database: AsyncDatabase) -> None:
    statement = text("SELECT * FROM no_such_table WHERE a = CAST(:secret AS TEXT)")
    with pytest.raises(TransactionDoomed) as caught:
        async with async_database.begin() as session:
            with pytest.raises(sa_exc.DBAPIError) as plain:
                await session.execute(statement, {"secret": "hunter2"})
            assert "hunter2" not in str(plain.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("async_url", ["psycopg"], indirect=True)
async def test_pending_changes_do_not_hide_what_really_failed(
    async_database: AsyncDatabase,
) -> None:
    """The last flush is refused for what was swallowed, not for a lost connection."""
    with pytest.raises(TransactionDoomed, match="no_such_table"):
        async with async_database.begin() as session:
            with pytest.raises(sa_exc.DBAPIError):
                await session.execute(text("SELECT * FROM no_such_table"))
            session.add(Item(name="lost"))
    assert await names(async_database) == []
