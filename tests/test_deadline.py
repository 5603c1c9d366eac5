"""One deadline for a unit of work: in the queue, while connecting, at statements, at the commit."""

import gc
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.orm import Session

from benchmarks.proxy import Proxy as CountingProxy
from sessionscope import Database
from sessionscope._timer import Timer
from sessionscope._watch import UNIT
from sessionscope.exc import CommitUnknown, ConfigurationError, DeadlineExceeded, SessionEnded
from sessionscope.testing import FaultProxy
from tests.models import Item, create_tables, names

LIMIT = text("SELECT current_setting('statement_timeout')")
MILLISECONDS = text("SELECT setting::int FROM pg_settings WHERE name = 'statement_timeout'")

SLEEP = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT SLEEP(30)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n",
}

# The same, as something that may follow UNION ALL.
OUTSIDE = {
    "postgresql": "SELECT CASE WHEN pg_sleep(30) IS NULL THEN 1 ELSE 2 END",
    "mysql": SLEEP["mysql"],
    "sqlite": f"SELECT * FROM ({SLEEP['sqlite']})",
}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_statement_that_takes_too_long_is_cancelled(database: Database, read_only: bool) -> None:
    sleep = text(SLEEP[database.engine.dialect.name])
    with database.begin(read_only=read_only) as session:
        session.execute(select(1))  # connects
    started = monotonic()
    with (
        pytest.raises(DeadlineExceeded) as error,
        database.begin(timeout=0.3, read_only=read_only) as session,
    ):
        session.execute(sleep)
    assert error.value.phase == "query"
    assert monotonic() - started < 5
    assert names(database) == []


def test_a_silent_server_does_not_hold_a_thread(behind: Database, proxy: FaultProxy) -> None:
    """A18: without a deadline such a call hangs for ever, with every keep-alive in place."""
    behind.ping()
    started = monotonic()
    with pytest.raises(DeadlineExceeded) as error, behind.begin(timeout=0.3) as session:
        session.execute(select(1))
        proxy.go_silent()
        session.execute(select(1))
    assert error.value.phase == "query"
    assert monotonic() - started < 5
    proxy.heal()
    behind.ping()


def test_a_silent_server_does_not_hold_who_connects(behind: Database, proxy: FaultProxy) -> None:
    proxy.go_silent()
    with pytest.raises(DeadlineExceeded) as error, behind.begin(timeout=0.3) as session:
        session.execute(select(1))
    assert error.value.phase == "connect"


def test_a_commit_that_is_not_answered_is_unknown(behind: Database, proxy: FaultProxy) -> None:
    proxy.aim("hang", b"COMMIT")
    told = r"had not answered COMMIT when the 0\.3 s of the unit of work were over \(timeout\)"
    with pytest.raises(CommitUnknown, match=told), behind.begin(timeout=0.3) as session:
        session.add(Item(name="pear"))
    proxy.heal()


def test_a_unit_that_is_late_does_not_commit(database: Database) -> None:
    over = threading.Event()
    with pytest.raises(DeadlineExceeded) as error, database.begin(timeout=0.2) as session:
        session.add(Item(name="pear"))
        session.flush()
        over.wait(0.3)
    assert error.value.phase == "commit"
    assert names(database) == []


def test_the_queue_counts(postgres_url: str) -> None:
    with Database(postgres_url, pool_size=1, max_overflow=0) as database:
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with database.begin():
                inside.set()
                leave.wait(10)

        holder = threading.Thread(target=hold)
        holder.start()
        inside.wait(10)
        with pytest.raises(DeadlineExceeded) as error, database.begin(timeout=0.1):
            pass
        assert error.value.phase == "queue"
        leave.set()
        holder.join(10)
        assert not holder.is_alive()


def test_the_server_is_told(postgres: Database) -> None:
    """It ends the statement also if this process cannot."""
    with postgres.begin(timeout=30) as session:
        limit = session.scalar(text("SELECT current_setting('statement_timeout')"))
    told = postgres.engine.dialect.driver != "psycopg2"
    assert (limit != "0") is told
    with postgres.begin() as session:
        assert session.scalar(text("SELECT current_setting('statement_timeout')")) == "0"


@pytest.mark.parametrize("timeout", [0, -1, "5", True, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        Database("sqlite://", timeout=timeout)
    with pytest.raises(ConfigurationError, match="timeout"):
        Database("sqlite://").begin(timeout=timeout)


def test_a_deadline_reaches_no_connection_that_was_given_back(postgres_url: str) -> None:
    """A commit inside of the unit gives it back, and another unit may have it by then."""
    with Database(postgres_url, pool_size=1, max_overflow=0) as database:
        with pytest.raises(DeadlineExceeded), database.begin(timeout=0.3) as session:
            session.execute(select(1))
            session.commit()
            with database.engine.begin() as other:  # the only connection there is
                with pytest.raises(DeadlineExceeded) as error:
                    session.execute(select(1))
                assert error.value.phase == "connect"
                assert other.execute(select(1)).scalar() == 1


def test_what_was_cut_is_not_given_back_by_a_rollback_of_ones_own(psycopg: Database) -> None:
    """A cancellation that is late would hit its next user."""
    with psycopg.begin() as session:
        first = session.scalar(text("SELECT pg_backend_pid()"))
    with pytest.raises(DeadlineExceeded), psycopg.begin(timeout=0.2) as session:
        try:
            session.execute(text("SELECT pg_sleep(30)"))
        except DeadlineExceeded:
            session.rollback()
            raise
    with psycopg.begin() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != first


def test_the_server_ends_a_statement_that_this_process_cannot(
    psycopg: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timer, "expire", lambda timer: None)
    started = monotonic()
    with pytest.raises(DeadlineExceeded), psycopg.begin(timeout=0.2) as session:
        session.execute(text(SLEEP["postgresql"]))
    assert monotonic() - started < 10


def test_the_server_is_told_a_little_more(psycopg: Database) -> None:
    """Its own error, which is not a DeadlineExceeded, must not come first."""
    with psycopg.begin(timeout=5) as session:
        session.execute(select(1))  # connects
    before = monotonic()
    with psycopg.begin(timeout=5) as session:
        limit = session.scalar(MILLISECONDS)
    assert limit is not None
    assert 5000 - 1000 * (monotonic() - before) < limit - 50 <= 5000


@pytest.mark.parametrize(
    ("own", "expected"), [("2s", 2000), ("1500", 1500), ("1h", 30_000), ("0", 30_000)]
)
def test_a_smaller_limit_of_the_connections_own_stays(
    postgres_url: str, own: str, expected: int
) -> None:
    """Of the role, the database, or the options; whatever its unit."""
    options = {"connect_args": {"options": f"-c statement_timeout={own}"}}
    with Database(postgres_url, engine_options=options) as database:
        for _ in range(2):
            with database.begin(timeout=30) as session:
                limit = session.scalar(MILLISECONDS)
            assert limit == expected or expected - 1000 < limit <= 30_050
        with database.begin() as session:
            assert session.scalar(LIMIT) == ("1500ms" if own == "1500" else own)


def test_a_limit_that_was_lowered_meanwhile_stays(psycopg: Database) -> None:
    with psycopg.begin(timeout=30) as session:
        session.execute(text("SET statement_timeout = '3s'"))
    with psycopg.begin(timeout=30) as session:
        assert session.scalar(LIMIT) == "3s"


def test_a_deadline_takes_no_snapshot(psycopg: Database) -> None:
    """SET TRANSACTION is allowed before the first query only."""
    with psycopg.begin(timeout=30) as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        assert session.scalar(text("SHOW transaction_isolation")) == "serializable"


def test_waited_round_trips(postgres_url: str) -> None:
    """A deadline takes none: BEGIN takes along what the server is told, also the first time."""
    url = make_url(postgres_url)
    assert url.port is not None
    with Database(postgres_url) as database:
        create_tables(database)
    with CountingProxy("127.0.0.1", url.port) as proxy:
        trips = []
        for timeout in (None, 30.0):
            with Database(url.set(host="127.0.0.1", port=proxy.port)) as database:
                for _ in range(3):
                    before = proxy.waited()
                    with database.begin(timeout=timeout) as session:
                        session.add(Item(name=f"item {before}"))
                    trips.append(proxy.waited() - before)
    assert trips[:3] == trips[3:]


def ways_of_fetching() -> dict[str, Callable[[Session, str], object]]:
    def stream(session: Session, sleep: str) -> object:
        rows = text(f"SELECT 1 UNION ALL {sleep}").execution_options(yield_per=1)
        return list(session.execute(rows))

    def with_its_connection(session: Session, sleep: str) -> object:
        return session.connection().execute(text(sleep)).all()

    def with_a_cursor(session: Session, sleep: str) -> object:
        cursor = session.connection().connection.cursor()
        cursor.execute(sleep)
        return cursor.fetchall()

    return {f.__name__: f for f in (stream, with_its_connection, with_a_cursor)}


@pytest.mark.parametrize("way", ways_of_fetching().values(), ids=ways_of_fetching())
def test_what_is_fetched_outside_of_the_sessions_methods_ends_as_well(
    database: Database, way: Callable[[Session, str], object]
) -> None:
    started = monotonic()
    sleep = OUTSIDE[database.engine.dialect.name]
    with pytest.raises(DeadlineExceeded) as error, database.begin(timeout=0.3) as session:
        way(session, sleep)
    assert error.value.phase == "query"
    assert monotonic() - started < 5
    assert names(database) == []
    del error
    gc.collect()  # which PyMySQL may use to complain


def test_rows_that_were_not_read_are_not_asked_for_any_more(mysql: Database) -> None:
    """PyMySQL reads them when it collects what was to hold them, and complains."""
    rows = text("SELECT seq FROM seq_1_to_100000").execution_options(yield_per=1)
    with pytest.raises(DeadlineExceeded) as error, mysql.begin(timeout=0.3) as session:
        for _ in session.execute(rows):
            threading.Event().wait(0.4)  # the time runs out in the user's own code
    del error
    gc.collect()
    assert mysql.stats().in_use == 0


def test_rows_that_take_too_long_are_not_waited_for(behind: Database, proxy: FaultProxy) -> None:
    rows = text("SELECT generate_series(1, 10000)").execution_options(yield_per=10)
    started = monotonic()
    with pytest.raises(DeadlineExceeded), behind.begin(timeout=0.3) as session:
        for _ in session.execute(rows):
            proxy.go_silent()
    assert monotonic() - started < 5
    assert behind.stats().in_use == 0


def swallowed_then(ending: str) -> Callable[[Session], None]:
    def end(session: Session) -> None:
        with suppress(DeadlineExceeded):
            session.execute(select(1))
        getattr(session, ending)()

    return end


def late(ending: str) -> Callable[[Session], None]:
    def end(session: Session) -> None:
        threading.Event().wait(0.4)  # the time runs out in the user's own code
        getattr(session, ending)()

    return end


def in_time(ending: str) -> Callable[[Session], None]:
    def end(session: Session) -> None:
        getattr(session, ending)()

    return end


@pytest.mark.parametrize("ending", ["rollback", "close"])
@pytest.mark.parametrize("when", [swallowed_then, late, in_time])
def test_a_silent_server_does_not_hold_who_gives_up(
    behind: Database, proxy: FaultProxy, ending: str, when: Callable[[str], Callable[..., None]]
) -> None:
    """It is not waited for, and what may still be answered is not given back."""
    started = monotonic()
    with suppress(DeadlineExceeded, SessionEnded), behind.begin(timeout=0.3) as session:
        session.add(Item(name="pear"))
        session.flush()
        proxy.go_silent()
        when(ending)(session)
        assert behind.stats().idle == 0
    assert monotonic() - started < 5
    proxy.heal()
    assert behind.stats().in_use == 0
    assert names(behind) == []


def test_a_silent_server_does_not_hold_a_savepoint(behind: Database, proxy: FaultProxy) -> None:
    """Its end is no method of the session's."""
    started = monotonic()
    with pytest.raises(DeadlineExceeded), behind.begin(timeout=0.3) as session:
        with session.begin_nested():
            session.execute(select(1))
            proxy.go_silent()
    assert monotonic() - started < 5


def test_a_silent_server_does_not_hold_a_read_only_unit_that_ends(
    behind: Database, proxy: FaultProxy
) -> None:
    started = monotonic()
    snapshot = behind.begin(timeout=0.3, read_only=True, isolation_level="REPEATABLE READ")
    with suppress(DeadlineExceeded), snapshot as session:
        session.execute(select(1))
        proxy.go_silent()
    assert monotonic() - started < 5
    assert behind.stats().in_use == 0


def test_a_transaction_that_is_ended_by_hand_ends(behind: Database, proxy: FaultProxy) -> None:
    started = monotonic()
    with pytest.raises(CommitUnknown), behind.begin(timeout=0.3) as session:
        session.add(Item(name="pear"))
        session.flush()
        proxy.go_silent()
        transaction = session.get_transaction()
        assert transaction is not None
        transaction.commit()
    assert monotonic() - started < 5


def test_what_an_inner_commit_has_stored_stays(database: Database) -> None:
    sleep = text(SLEEP[database.engine.dialect.name])
    with pytest.raises(DeadlineExceeded), database.begin(timeout=1) as session:
        session.add(Item(name="pear"))
        session.commit()
        session.add(Item(name="plum"))
        session.flush()
        session.execute(sleep)
    assert names(database) == ["pear"]


@pytest.mark.parametrize("silent", [False, True])
def test_a_process_that_can_start_no_thread_cuts_all_the_same(
    behind: Database, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    started = monotonic()
    with pytest.raises(DeadlineExceeded), behind.begin(timeout=0.3) as session:
        session.execute(select(1))
        if silent:
            proxy.go_silent()
        monkeypatch.setattr(threading.Thread, "start", cannot_start)
        session.execute(text(SLEEP["postgresql"]))
    monkeypatch.undo()
    assert monotonic() - started < 5
    assert behind.stats().in_use == 0


def cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_process_that_can_start_no_thread_interrupts_sqlite(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeadlineExceeded), sqlite.begin(timeout=0.3) as session:
        session.execute(select(1))
        monkeypatch.setattr(threading.Thread, "start", cannot_start)
        session.execute(text(SLEEP["sqlite"]))


def test_a_connection_that_no_thread_can_open_takes_no_place(
    psycopg: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    psycopg.dispose()
    for _ in range(20):  # more than there are places
        with pytest.raises(RuntimeError), psycopg.begin(timeout=5) as session:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", cannot_start)
                session.execute(select(1))
    psycopg.ping()


def test_an_interrupt_while_connecting_begins_takes_no_place(
    psycopg: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thread.start() waits for the thread, which goes on and connects."""
    start = threading.Thread.start

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "sessionscope-connect":
            raise KeyboardInterrupt

    psycopg.dispose()
    for _ in range(20):  # more than there are places
        with pytest.raises(KeyboardInterrupt), psycopg.begin(timeout=5) as session:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", start_and_interrupt)
                session.execute(select(1))
    psycopg.ping()


def test_statements_that_follow_each_other_are_all_interrupted(sqlite: Database) -> None:
    """Inside of one call; an interrupt between two of them would reach none."""
    with sqlite.engine.connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        driver_connection.create_function("pause", 0, lambda: threading.Event().wait(0.1) or 1)
    with pytest.raises(DeadlineExceeded), sqlite.begin(timeout=0.3) as session:

        @event.listens_for(session, "before_flush")
        def flushing(*_: object) -> None:
            with suppress(Exception):
                session.connection().exec_driver_sql(SLEEP["sqlite"])
            session.connection().exec_driver_sql(SLEEP["sqlite"])

        session.add(Item(name="pear"))
        session.flush()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_lock_of_another_process_is_not_waited_for(sqlite: Database, read_only: bool) -> None:
    """SQLite does not see an interrupt while it waits, pool_timeout seconds by itself."""
    sqlite.dispose()
    assert sqlite.engine.url.database is not None
    other = sqlite3.connect(sqlite.engine.url.database, isolation_level=None)
    if read_only:  # with a write-ahead log nobody who reads waits
        other.execute("PRAGMA journal_mode = DELETE")
    with sqlite.begin(read_only=read_only) as session:
        session.execute(text("SELECT * FROM item"))
    other.execute("BEGIN EXCLUSIVE")
    started = monotonic()
    with pytest.raises(DeadlineExceeded):
        with sqlite.begin(timeout=0.3, read_only=read_only) as session:
            session.execute(text("SELECT * FROM item"))
    assert monotonic() - started < 3
    other.close()
    with sqlite.begin(read_only=read_only) as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 5000


def test_an_abandoned_unit_may_be_collected_while_its_deadline_passes(sqlite: Database) -> None:
    """The collector then ends it in the middle of expire(), in the same thread."""
    unit = sqlite.begin(timeout=30)
    timer = unit.__enter__().info[UNIT].timer
    ended: list[bool] = []

    def end() -> None:
        with timer._lock:
            timer.end()
            ended.append(True)

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(5)
    assert ended == [True]
    unit.__exit__(None, None, None)
