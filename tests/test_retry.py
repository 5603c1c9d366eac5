"""Whole units run again: for which errors, how often, and never twice."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database, after_commit, after_rollback
from sessionscope._places import place_of
from sessionscope._retry import Attempts, Budget, is_transient, mark
from sessionscope.events import Event, UnitBegan, UnitRetried
from sessionscope.exc import (
    ConfigurationError,
    DatabaseUnavailable,
    DeadlineExceeded,
    PoolBusy,
    TransactionDoomed,
)
from tests.models import Item, names


class Failing:
    """Work that adds an item and whose unit the database then fails some times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.sessions: list[Session] = []
        self.hooks: list[str] = []

    def __call__(self, session: Session, name: str = "pear") -> str:
        self.sessions.append(session)
        after_commit(session, self.hooks.append, f"committed {len(self.sessions)}")
        after_rollback(session, self.hooks.append, f"rolled back {len(self.sessions)}")
        session.add(Item(name=name))
        session.flush()
        if len(self.sessions) <= self.times:
            fail(session)
        return name


def fail(session: Session) -> None:
    """Have the database say that it has rolled back for the sake of others."""
    session.execute(text("DO $$BEGIN RAISE SQLSTATE '40001'; END$$"))


def test_two_hundred_increments_of_ten_threads_are_all_there(postgres: Database) -> None:
    """A12: READ COMMITTED loses most of them and says ok, SERIALIZABLE alone fails most."""
    with postgres.begin() as session:
        session.add(Item(id=1, name="0"))

    @postgres.with_session(isolation_level="SERIALIZABLE")
    def increment(session: Session) -> None:
        item = session.get_one(Item, 1)
        item.name = str(int(item.name) + 1)

    errors = in_threads(10, lambda: [increment() for _ in range(20)])
    assert errors == []
    assert postgres.run(lambda session: session.get_one(Item, 1).name) == "200"


def test_deadlocks_on_mysql_run_again(mysql: Database) -> None:
    """Two rows, locked in opposite orders by eight threads."""
    with mysql.begin() as session:
        session.add_all([Item(id=1, name="a 0"), Item(id=2, name="b 0")])

    def increment(session: Session, first: int) -> None:
        for number in (first, 3 - first):
            query = select(Item).where(Item.id == number).with_for_update()
            item = session.scalars(query).one()
            letter, value = item.name.split()
            item.name = f"{letter} {int(value) + 1}"
            session.flush()

    turns = iter(range(8))

    def work() -> None:
        first = next(turns) % 2 + 1
        for _ in range(10):
            mysql.run(increment, first)

    assert in_threads(8, work) == []
    assert sorted(names(mysql)) == ["a 80", "b 80"]


def test_a_failed_unit_runs_again_whole(psycopg: Database) -> None:
    """With a fresh session each time; hooks of failed attempts never run."""
    work = Failing(times=2)
    assert psycopg.run(work, name="pear") == "pear"
    assert len(set(map(id, work.sessions))) == 3
    assert work.hooks == ["committed 3"]
    assert names(psycopg) == ["pear"]
    assert psycopg.stats().retried == 2


@pytest.mark.anyio
async def test_an_asynchronous_unit_runs_again_whole(postgres_url: str) -> None:
    work = Failing(times=2)
    async with AsyncDatabase(postgres_url) as database:
        with Database(postgres_url) as beside:
            Item.metadata.create_all(beside.engine)
            assert await database.run(work) == "pear"
            assert work.hooks == ["committed 3"]
            assert names(beside) == ["pear"]


def test_the_last_error_is_raised_as_it_is(psycopg: Database) -> None:
    work = Failing(times=9)
    run = psycopg.with_session(attempts=3)(work)
    with pytest.raises(OperationalError) as error:
        run()
    assert any("This was attempt 3" in note for note in error.value.__notes__)
    assert len(work.sessions) == 3
    assert work.hooks == ["rolled back 3"]
    assert names(psycopg) == []


def test_observers_see_the_attempts(postgres_url: str) -> None:
    seen: list[Event] = []
    with Database(postgres_url, observers=[seen.append]) as database:
        Item.metadata.create_all(database.engine)
        database.run(Failing(times=1))
    assert [event.attempt for event in seen if isinstance(event, UnitBegan)] == [1, 2]
    (retried,) = (event for event in seen if isinstance(event, UnitRetried))
    assert (retried.attempt, retried.error) == (1, "OperationalError")


def test_what_has_committed_once_never_runs_again(psycopg: Database) -> None:
    work = Failing(times=9)

    def commits(session: Session) -> None:
        session.add(Item(name="stored"))
        session.commit()
        work(session)

    with pytest.raises(OperationalError):
        psycopg.run(commits)
    assert len(work.sessions) == 1
    assert names(psycopg) == ["stored"]


def test_what_has_committed_by_text_never_runs_again(postgres: Database) -> None:
    calls: list[int] = []

    def work(session: Session) -> None:
        calls.append(1)
        session.execute(text("INSERT INTO item (name) VALUES ('pear')"))
        session.execute(text("COMMIT"))
        session.execute(text("DO $$BEGIN RAISE serialization_failure; END$$"))

    with pytest.raises(OperationalError):
        postgres.run(work)
    assert calls == [1]
    assert names(postgres) == ["pear"]


def test_what_commits_each_statement_never_runs_again(psycopg: Database) -> None:
    work = Failing(times=9)
    with pytest.raises(OperationalError):
        psycopg.with_session(isolation_level="AUTOCOMMIT")(work)()
    assert len(work.sessions) == 1
    assert names(psycopg) == ["pear"]


def test_a_swallowed_failure_runs_again(psycopg: Database) -> None:
    """The unit cannot commit, for a reason that may be gone the next time."""
    work = Failing(times=1)

    def swallow(session: Session) -> None:
        with pytest.raises(OperationalError) if not work.sessions else session.begin_nested():
            work(session)

    psycopg.run(swallow)
    assert names(psycopg) == ["pear"]


@pytest.mark.parametrize(
    "make", [lambda item: item, lambda item: [item], lambda item: {"a": (item,)}]
)
def test_a_mapped_argument_forbids_a_second_attempt(
    psycopg: Database, make: Callable[[Item], Any]
) -> None:
    calls = 0

    def change(session: Session, argument: object) -> None:
        nonlocal calls
        calls += 1
        fail(session)

    with pytest.raises(OperationalError) as error:
        psycopg.run(change, make(Item(name="pear")))
    assert calls == 1
    assert "a mapped Item" in error.value.__notes__[0]
    assert "pass its primary key" in error.value.__notes__[0]


def test_an_iterator_forbids_a_second_attempt(psycopg: Database) -> None:
    """The first attempt has consumed it: the second would store nothing, and say so of all."""

    def store(session: Session, items: Any) -> None:
        session.add_all([Item(name=name) for name in items])
        session.flush()
        fail(session)

    with pytest.raises(OperationalError) as error:
        psycopg.run(store, (name for name in ("pear", "plum")))
    assert "an iterator" in error.value.__notes__[0]
    assert psycopg.stats().retried == 0


def test_two_phases_forbid_a_second_attempt(postgres_url: str) -> None:
    work = Failing(times=9)
    with Database(postgres_url, session_options={"twophase": True}) as database:
        Item.metadata.create_all(database.engine)
        with pytest.raises(OperationalError):
            database.run(work)
    assert len(work.sessions) == 1


def test_a_mapped_object_behind_the_function_forbids_it_too(psycopg: Database) -> None:
    def change(session: Session, item: Item) -> None:
        fail(session)

    def bound(item: Item, session: Session) -> None:
        fail(session)

    item = Item(name="pear")
    for work in (partial(change, item=item), bound.__get__(item)):
        with pytest.raises(OperationalError) as error:
            psycopg.run(work)
        assert "a mapped Item" in error.value.__notes__[0]


def test_other_errors_do_not_run_again(database: Database) -> None:
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.execute(text("SELECT nonsense FROM nowhere"))

    with pytest.raises(DBAPIError):
        database.run(work)
    assert calls == 1


def test_hooks_run_if_no_other_attempt_begins_after_all(postgres_url: str) -> None:
    """Somebody else has taken the slot meanwhile: the call has failed, with its last attempt."""
    work, taken, done = Failing(times=9), threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def hold() -> None:
        with database.begin():
            taken.set()
            done.wait(10)

    def take(event: Event) -> None:
        if isinstance(event, UnitRetried):
            threads.append(threading.Thread(target=hold))
            threads[-1].start()
            taken.wait(10)

    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    with Database(postgres_url, observers=[take], **options) as database:
        Item.metadata.create_all(database.engine)
        with pytest.raises(PoolBusy):
            database.run(work)
        done.set()
        threads[0].join(10)
    assert len(work.sessions) == 1
    assert work.hooks == ["rolled back 1"]


@pytest.mark.anyio
async def test_hooks_run_if_the_pause_is_cancelled(postgres_url: str) -> None:
    work = Failing(times=9)

    def cancel(event: Event) -> None:
        if isinstance(event, UnitRetried):
            running.cancel()

    async with AsyncDatabase(postgres_url, observers=[cancel]) as database:
        with Database(postgres_url) as beside:
            Item.metadata.create_all(beside.engine)
        running = asyncio.create_task(database.run(work))
        with pytest.raises(asyncio.CancelledError):
            await running
    assert len(work.sessions) == 1
    assert work.hooks == ["rolled back 1"]


@pytest.mark.anyio
async def test_two_hundred_increments_of_ten_tasks_are_all_there(postgres_url: str) -> None:
    """A12 on asyncpg."""
    with Database(postgres_url) as beside:
        Item.metadata.create_all(beside.engine)
        with beside.begin() as session:
            session.add(Item(id=1, name="0"))
    url = make_url(postgres_url).set(drivername="postgresql+asyncpg")
    async with AsyncDatabase(url) as database:

        @database.with_session(isolation_level="SERIALIZABLE")
        async def increment(session: AsyncSession) -> None:
            item = await session.get_one(Item, 1)
            item.name = str(int(item.name) + 1)

        async def work() -> None:
            for _ in range(20):
                await increment()

        await asyncio.gather(*(work() for _ in range(10)))
        async with database.begin(read_only=True) as reader:
            assert (await reader.get_one(Item, 1)).name == "200"


def test_the_error_of_another_database_does_not_run_again(psycopg: Database) -> None:
    """What the function did there may have been committed."""
    work = Failing(times=9)
    with Database(psycopg.engine.url) as other:

        def both(session: Session) -> None:
            with other.begin() as inner:
                work(inner)

        with pytest.raises(OperationalError):
            psycopg.run(both)
    assert len(work.sessions) == 1


def test_a_killed_connection_runs_again(psycopg: Database) -> None:
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.add(Item(name="pear"))
        session.flush()
        if calls == 1:
            backend = session.scalar(text("SELECT pg_backend_pid()"))
            with Database(psycopg.engine.url) as beside:
                beside.run(Session.execute, text(f"SELECT pg_terminate_backend({backend}, 5000)"))
            session.execute(select(1))

    psycopg.run(work)
    assert calls == 2
    assert names(psycopg) == ["pear"]


def test_a_server_that_is_gone_is_waited_for(postgres_url: str) -> None:
    """As long as for a slot; and only where attempts are left."""
    url = make_url(postgres_url).set(port=1)
    with Database(url, pool_timeout=0.3) as database:
        with pytest.raises(DatabaseUnavailable) as error:
            database.run(lambda session: session.execute(select(1)))
        assert any("This was attempt" in note for note in error.value.__notes__)
        once = database.with_session(attempts=1)(lambda session: session.execute(select(1)))
        with pytest.raises(DatabaseUnavailable) as error:
            once()
        assert not getattr(error.value, "__notes__", [])


def test_a_wrong_name_is_not_waited_for(postgres_url: str) -> None:
    url = make_url(postgres_url).set(database="nowhere")
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.execute(select(1))

    with Database(url) as database, pytest.raises(DatabaseUnavailable):
        database.run(work)
    assert calls == 1


def test_a_full_pool_does_not_run_again(postgres_url: str) -> None:
    """It has waited for its turn already."""
    with (
        Database(postgres_url, pool_size=1, max_overflow=0, pool_timeout=0.1) as database,
        database.begin(),
    ):
        errors = in_threads(1, lambda: database.run(lambda session: session.execute(select(1))))
    assert [type(error) for error in errors] == [PoolBusy]


def test_the_deadline_ends_the_attempts(psycopg: Database) -> None:
    work = Failing(times=1000)
    began = monotonic()
    # The last attempt's own error, or in its middle that of the time.
    with pytest.raises((OperationalError, DeadlineExceeded)) as error:
        psycopg.with_session(timeout=1.0, attempts=1000)(work)()
    (note,) = error.value.__notes__
    assert f"This was attempt {len(work.sessions)}, after " in note
    assert isinstance(error.value, OperationalError) or monotonic() - began >= 1.0
    assert 1 < len(work.sessions) < 1000
    assert names(psycopg) == []


def test_two_writers_of_one_sqlite_file_run_again(sqlite: Database) -> None:
    """Another process is inside: SQLite can only say that it is busy."""
    path = sqlite.engine.url.database
    assert path is not None
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = 0

        def work(session: Session) -> None:
            nonlocal calls
            calls += 1
            session.add(Item(name="pear"))

        with Database(sqlite.engine.url, pool_timeout=0.05) as database:
            with pytest.raises(OperationalError, match="locked") as error:
                database.with_session(attempts=2)(work)()
            assert any("This was attempt 2" in note for note in error.value.__notes__)
            other.rollback()
            database.run(work)
    assert names(sqlite) == ["pear"]


@pytest.mark.parametrize("attempts", [0, -1, 1.5, True, "3"])
def test_a_number_of_attempts_that_is_none_is_refused(attempts: int) -> None:
    with pytest.raises(ConfigurationError, match="attempts="):
        Database("sqlite://").with_session(attempts=attempts)


class Refused(Exception):
    """A driver's error, as far as it is looked at."""

    def __init__(self, *args: object, sqlstate: str | None = None) -> None:
        super().__init__(*args)
        if sqlstate is not None:
            self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("orig", "again"),
    [
        (Refused(sqlstate="40001"), True),
        (Refused(sqlstate="40P01"), True),
        (Refused(sqlstate="57P01"), True),
        (Refused(sqlstate="08006"), True),
        (Refused(sqlstate="08007"), False),
        # CockroachDB, as its documentation has them; not tried against a server.
        (Refused("restart transaction: TransactionRetryError", sqlstate="40001"), True),
        (Refused("result is ambiguous", sqlstate="40003"), False),
        (Refused(sqlstate="23505"), False),
        (Refused(sqlstate="57014"), False),
        (Refused(1213, "Deadlock found"), True),
        (Refused(1205, "Lock wait timeout exceeded"), True),
        (Refused(1020, "Record has changed since last read"), True),
        (Refused(1047, "WSREP has not yet prepared node"), True),
        (Refused(1062, "Duplicate entry"), False),
        (Refused("no code"), False),
        (Refused(), False),
    ],
    ids=str,
)
def test_which_errors_run_again(orig: Refused, again: bool) -> None:
    name = "Database('sqlite://')"
    error = OperationalError("SELECT 1", {}, orig)
    mark(error, name)
    assert is_transient(error, name) is again
    assert not is_transient(error, "Database('sqlite://other')")
    doomed = TransactionDoomed("cannot commit")
    doomed.__cause__ = error
    assert is_transient(doomed, name) is again


def test_a_storm_of_failures_ends_the_attempts() -> None:
    """In the long run there are no more retries than successes."""
    budget, name = Budget(), "Database('sqlite://')"
    error = OperationalError("SELECT 1", {}, Refused(sqlstate="40001"))
    mark(error, name)

    def judge() -> bool:
        attempts = Attempts(
            (print, (), {}), name, limit=2, patience=1, budget=budget, deadline=None
        )
        return attempts.judge(error)

    granted = 0
    while judge():
        granted += 1
    assert granted == 1000
    assert any("too many units of work fail" in note for note in error.__notes__)
    budget.deposit()
    assert judge()
    assert not judge()


def test_a_session_whose_connection_was_lost_is_transient() -> None:
    for code, again in (("8s2b", True), ("7s2a", False)):
        doomed = TransactionDoomed("cannot commit")
        doomed.__cause__ = PendingRollbackError("rolled back", code=code)
        assert not is_transient(doomed, "ours")
        mark(doomed, "ours")
        assert is_transient(doomed, "ours") is again
        assert not is_transient(doomed, "another")


def in_threads(count: int, work: Callable[[], object]) -> list[BaseException]:
    """Call *work* in so many threads at once; return what they raised."""
    start, errors = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_what_is_wrong_is_said_where_it_is_written() -> None:
    """At the decorator, not at the first call."""
    with pytest.raises(ConfigurationError, match="isolation_level="):
        Database("sqlite://").with_session(isolation_level="SNAPSHOT")


def test_a_database_that_is_away_is_tried_often_and_for_nothing() -> None:
    """Units that wait go on soon after its return, and conflicts may be tried again as ever."""
    budget = Budget()
    away = DatabaseUnavailable("It is away")
    mark(away, "ours")
    attempts = Attempts((print, (), {}), "ours", limit=2, patience=60, budget=budget, deadline=None)
    for _ in range(2000):
        assert attempts.judge(away)
        assert attempts.next() <= 0.25
    conflict = OperationalError("SELECT 1", {}, Refused(sqlstate="40001"))
    mark(conflict, "ours")
    assert attempts.judge(conflict)


def test_a_thousand_attempts_do_not_overflow_the_pause() -> None:
    attempts = Attempts(
        (print, (), {}), "ours", limit=5000, patience=1, budget=Budget(), deadline=None
    )
    attempts.number = 2000
    error = OperationalError("SELECT 1", {}, Refused(sqlstate="40001"))
    mark(error, "ours")
    assert attempts.judge(error)
    assert attempts.pause is not None
    assert attempts.pause <= 1


def test_an_attempt_that_was_not_made_is_not_counted() -> None:
    """The pause before it may be interrupted."""
    budget = Budget()
    attempts = Attempts((fail, (), {}), "x", limit=3, patience=1, budget=budget, deadline=None)
    error = OperationalError("", None, psycopg_error("40001"))
    mark(error, attempts._database)
    attempts.start()
    assert attempts.judge(error)
    attempts.next()
    assert budget.spent == 0
    attempts.start()
    assert budget.spent == 1


def psycopg_error(sqlstate: str) -> BaseException:
    error = RuntimeError()
    error.sqlstate = sqlstate  # type: ignore[attr-defined]
    return error


class Work:
    """What can be called, and is no function."""

    def __call__(self, session: Session) -> None: ...


@pytest.mark.parametrize(
    "fn", [fail, partial(fail), partial(partial(fail)), Work(), Work().__call__]
)
def test_the_place_of_what_is_called_is_the_users(fn: Callable[..., Any]) -> None:
    place = place_of(fn)
    assert place is not None
    assert place[0].co_filename == __file__


def test_the_place_of_what_is_not_python_is_that_of_its_call() -> None:
    place = place_of(len)
    assert place is not None
    assert place[0].co_name == "test_the_place_of_what_is_not_python_is_that_of_its_call"
