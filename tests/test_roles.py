"""Writers find the server that takes writes, and lose nothing on their way to it."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError, InternalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.events import Event, UnitRetried
from sessionscope.exc import CommitUnknown, DatabaseUnavailable
from sessionscope.testing import PostgresServer
from tests.conftest import missing, with_psycopg2
from tests.models import Item, create_tables, names
from tests.replication import (
    Standby,
    ask,
    demote,
    of_both,
    primary_and_standby,
    switch_over,
)

Pair = tuple[PostgresServer, Standby]
PORT = text("SELECT inet_server_port()")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        try:
            servers = stack.enter_context(primary_and_standby())
        except ModuleNotFoundError as error:
            missing(str(error))
        yield servers


def prepare(pair: Pair) -> str:
    """A database with the tests' tables on both servers; its URL on the primary."""
    primary, standby = pair
    url = primary.create_database("shop")
    with Database(url) as database:
        create_tables(database)
    standby.catch_up()
    return url


def store(session: Session, name: str) -> None:
    session.add(Item(name=name))


def fill_the_pool(database: Database, size: int) -> None:
    """Open so many connections at once, which are idle then."""
    barrier = threading.Barrier(size)

    def hold() -> None:
        with database.begin() as session:
            session.execute(select(1))
            barrier.wait(10)

    threads = [threading.Thread(target=hold) for _ in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(("driver", "commas"), [("psycopg", False), ("psycopg2", True)])
def test_one_attempt_fails_on_a_demoted_primary(pair: Pair, driver: str, commas: bool) -> None:
    """Then no connection leads there any more, of writers and of readers."""
    primary, standby = pair
    url = of_both(prepare(pair), primary, standby, commas=commas)
    url = with_psycopg2(url) if driver == "psycopg2" else url
    attempts: Counter[str] = Counter()

    def work(session: Session, name: str) -> None:
        attempts[name] += 1
        store(session, name)

    with Database(url, pool_size=4) as database:
        fill_the_pool(database, 4)
        with database.begin(read_only=True) as session:
            assert session.scalar(PORT) == primary.port
        switch_over(primary, standby)
        for number in range(8):
            database.run(work, str(number))
        assert sum(attempts.values()) == 9
        assert database.stats().retried == 1
        with database.begin(read_only=True) as session:
            assert session.scalar(PORT) == standby.port
        assert sorted(names(database)) == [str(number) for number in range(8)]
    assert ask(primary, "SELECT count(*) FROM item", "shop") == 0


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.anyio
async def test_one_attempt_of_a_task_fails_on_a_demoted_primary(pair: Pair, driver: str) -> None:
    primary, standby = pair
    url = make_url(of_both(prepare(pair), primary, standby))
    attempts: Counter[str] = Counter()

    async def work(session: AsyncSession, name: str) -> None:
        attempts[name] += 1
        session.add(Item(name=name))

    async with AsyncDatabase(url.set(drivername=f"postgresql+{driver}")) as database:
        barrier = asyncio.Barrier(4)

        async def hold() -> None:
            async with database.begin() as session:
                await session.execute(select(1))
                await barrier.wait()

        await asyncio.gather(*(hold() for _ in range(4)))
        await asyncio.to_thread(switch_over, primary, standby)
        for number in range(8):
            await database.run(work, str(number))
        async with database.begin(read_only=True) as session:
            assert await session.scalar(PORT) == standby.port
    assert sum(attempts.values()) == 9
    assert ask(standby, "SELECT count(*) FROM item", "shop") == 8
    assert ask(primary, "SELECT count(*) FROM item", "shop") == 0


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.anyio
async def test_tasks_wait_until_one_server_takes_writes(pair: Pair, driver: str) -> None:
    """Between demotion and promotion no host matches target_session_attrs=read-write."""
    primary, standby = pair
    url = make_url(of_both(prepare(pair), primary, standby))
    async with AsyncDatabase(url.set(drivername=f"postgresql+{driver}")) as database:
        await asyncio.to_thread(demote, primary)
        standby.catch_up()
        with pytest.raises(DatabaseUnavailable):
            async with database.begin() as session:
                session.add(Item(name="pear"))
        running = asyncio.create_task(database.run(store, "pear"))
        await asyncio.to_thread(standby.promote)
        await running
    assert ask(standby, "SELECT name FROM item", "shop") == "pear"


def test_writers_lose_nothing_while_the_primary_changes(pair: Pair) -> None:
    """0 failed, 0 lost, 0 stored twice; the old primary stays, for reads alone."""
    primary, standby = pair
    url = of_both(prepare(pair), primary, standby)
    stored: list[str] = []
    errors: list[Exception] = []
    enough, stop = threading.Event(), threading.Event()
    with Database(url) as database:

        def write(writer: int) -> None:
            number = 0
            while not stop.is_set():
                name = f"{writer} {number}"
                number += 1
                try:
                    database.run(store, name)
                except Exception as error:
                    errors.append(error)
                    return
                stored.append(name)
                if number == 20:
                    enough.set()

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        assert enough.wait(30)
        switch_over(primary, standby)
        before = len(stored)
        while len(stored) < before + 80 and not errors:
            stop.wait(0.01)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert errors == []
        # Names are unique: what was stored twice would be an error.
        assert sorted(names(database)) == sorted(stored)


def test_a_client_of_a_standby_writes_once_that_is_promoted(pair: Pair) -> None:
    """Its first attempt fails, and its connections are replaced."""
    _, standby = pair
    prepare(pair)
    calls = 0

    def promote(event: Event) -> None:
        if isinstance(event, UnitRetried):
            standby.promote()

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        store(session, "pear")

    with Database(standby.url("shop"), observers=[promote]) as database:
        with pytest.raises(DBAPIError, match="read-only"), database.begin() as session:
            store(session, "plum")
        database.run(work)
        assert calls == 2
        assert names(database) == ["pear"]


def backend(session: Session) -> int:
    return int(session.scalars(text("SELECT pg_backend_pid()")).one())


def by_an_option(session: Session) -> None:
    session.connection(execution_options={"postgresql_readonly": True})


def by_a_statement(session: Session) -> None:
    session.execute(text("SET TRANSACTION READ ONLY"))


def by_a_setting(session: Session) -> None:
    session.execute(text("SET default_transaction_read_only = on"))
    session.commit()


@pytest.mark.parametrize("ask_for_it", [by_an_option, by_a_statement, by_a_setting])
def test_who_asks_for_a_read_only_transaction_is_told_once(
    postgres: Database, ask_for_it: Callable[[Session], None]
) -> None:
    """The server is a primary: its connections stay, and no second attempt would differ."""
    with postgres.begin() as session:
        before = backend(session)
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        ask_for_it(session)
        store(session, "pear")

    with pytest.raises(InternalError, match="read-only"):
        postgres.run(work)
    assert calls == 1
    with postgres.begin() as session:
        assert backend(session) == before


SAYS = (
    "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1290, MESSAGE_TEXT = 'The MariaDB server is running "
    "with the --{} option so it cannot execute this statement'"
)


@pytest.mark.parametrize(
    ("option", "attempts"), [("read-only", 2), ("super-read-only", 2), ("secure-file-priv", 1)]
)
def test_mysql_names_the_option_that_is_in_the_way(
    mysql: Database, option: str, attempts: int
) -> None:
    """It has one number for all of them; only a server that reads alone is the wrong one."""
    with mysql.begin() as session:
        before = session.scalar(text("SELECT CONNECTION_ID()"))
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        store(session, str(calls))
        session.flush()
        if calls == 1:
            session.execute(text(SAYS.format(option)))

    if attempts == 1:
        with pytest.raises(DBAPIError, match="1290"):
            mysql.run(work)
    else:
        mysql.run(work)
    assert calls == attempts
    with mysql.begin() as session:
        after = session.scalar(text("SELECT CONNECTION_ID()"))
    assert (after == before) is (attempts == 1)


def test_a_promoted_standby_does_not_answer_for_a_lost_commit(pair: Pair) -> None:
    """It has given the transaction's id to another one, which it says is committed."""
    primary, standby = pair
    url = of_both(prepare(pair), primary, standby)
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        store(session, "pear")
        session.flush()
        xid = session.scalars(text("SELECT pg_current_xact_id()::text::bigint")).one()
        primary.stop("immediate")
        standby.promote()
        while ask(standby, "SELECT pg_current_xact_id()::text::bigint") <= xid:
            pass
        assert ask(standby, f"SELECT pg_xact_status('{xid}'::xid8)") == "committed"

    standby.stop_following()
    with Database(url) as database:
        with pytest.raises(CommitUnknown):
            database.run(work)
        assert calls == 1
        assert names(database) == []
