"""One deadline for a unit of work: in the queue, while connecting, at statements, at the commit."""

import threading
from time import monotonic

import pytest
from sqlalchemy import select, text

from sessionscope import Database
from sessionscope.exc import CommitUnknown, ConfigurationError, DeadlineExceeded
from sessionscope.testing import FaultProxy
from tests.models import Item, names

SLEEP = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "SELECT SLEEP(30)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n",
}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_statement_that_takes_too_long_is_cancelled(database: Database, read_only: bool) -> None:
    sleep = text(SLEEP[database.engine.dialect.name])
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
    with pytest.raises(CommitUnknown), behind.begin(timeout=0.3) as session:
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
        holder.join()


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


def test_the_server_does_not_say_so_first(psycopg: Database) -> None:
    """It is told the limit, too; its own error would not be a DeadlineExceeded."""
    sleep = text(SLEEP["postgresql"])
    for _ in range(20):
        with pytest.raises(DeadlineExceeded), psycopg.begin(timeout=0.03) as session:
            session.execute(sleep)
    assert psycopg.stats().in_use == 0


def test_a_deadline_reaches_no_connection_that_was_given_back(postgres_url: str) -> None:
    """A commit inside of the unit gives it back, and another unit may have it by then."""
    with (
        Database(postgres_url, pool_size=1, max_overflow=0) as database,
        database.begin(timeout=0.3) as session,
    ):
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
