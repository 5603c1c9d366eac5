"""A COMMIT whose answer is lost: what became of it is found out, not guessed."""

from collections.abc import Iterator
from threading import Thread
from time import sleep
from typing import Any

import psycopg as driver
import pytest
from sqlalchemy import text
from sqlalchemy.exc import InternalError
from sqlalchemy.orm import Session

from sessionscope import Database, _identity, _outcome, after_commit
from sessionscope._identity import Identity
from sessionscope._outcome import has_committed
from sessionscope.exc import CommitUnknown
from sessionscope.testing import Fault, FaultProxy
from tests.conftest import with_psycopg2
from tests.models import Item, names


def add(session: Session, name: str) -> Item:
    item = Item(name=name)
    session.add(item)
    return item


def test_a_commit_whose_answer_was_lost_is_a_success(behind: Database, proxy: FaultProxy) -> None:
    proxy.aim("cut after", b"COMMIT")
    called: list[str] = []

    def work(session: Session) -> Item:
        after_commit(session, called.append, "stored")
        return add(session, "pear")

    item = behind.run(work)
    assert proxy.hits == 1
    assert names(behind) == ["pear"]
    assert item.name == "pear"
    assert called == ["stored"]
    assert behind.stats().retried == 0


@pytest.mark.parametrize("call", ["execute", "commit"])
def test_a_socket_that_psycopg_finds_closed_is_a_lost_connection(
    psycopg: Database, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before libpq does: its connection does not count as closed yet."""
    target = driver.Cursor if call == "execute" else driver.Connection
    method = getattr(target, call)
    left = ["once"]

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        is_ours = call == "commit" or "INSERT" in str(args[0])
        if is_ours and left:
            left.pop()
            raise driver.OperationalError("connection socket closed")
        return result

    monkeypatch.setattr(target, call, fails)
    psycopg.run(add, "pear")
    assert not left
    assert names(psycopg) == ["pear"]
    assert psycopg.stats().retried == (1 if call == "execute" else 0)


def test_a_commit_that_never_arrived_is_run_again(behind: Database, proxy: FaultProxy) -> None:
    proxy.aim("cut before", b"COMMIT")
    called: list[str] = []

    def work(session: Session) -> None:
        after_commit(session, called.append, "stored")
        add(session, "pear")

    behind.run(work)
    assert proxy.hits == 1
    assert names(behind) == ["pear"]
    assert called == ["stored"]
    assert behind.stats().retried == 1


class Open:
    """A transaction that goes on, in a session beside."""

    def __init__(self, url: str) -> None:
        self.connection = driver.connect(url.replace("+psycopg", ""))
        with self.connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text::bigint")
            self.xid: int = cursor.fetchone()[0]  # type: ignore[index]  # it has one
            cursor.execute(_identity._WHICH_SERVER)
            self.server: str = cursor.fetchone()[0]  # type: ignore[index]  # likewise
        self.backend = self.connection.info.backend_pid

    def identity(self, server: str | None = None) -> Identity:
        return Identity(server or self.server, self.backend, self.xid)


@pytest.fixture
def opened(postgres_url: str) -> Iterator[Open]:
    opened = Open(postgres_url)
    yield opened
    opened.connection.close()


def test_another_server_or_timeline_does_not_answer_for_this_one(
    psycopg: Database, opened: Open
) -> None:
    """After a failover the same id may be another transaction's, and its session another's."""
    where, crash = opened.server.split()
    other = opened.identity(f"{where}9 {crash}")
    assert has_committed(other, psycopg.engine, sleep, 1.0) is None
    opened.connection.commit()  # its session was let alone
    assert has_committed(other, psycopg.engine, sleep, None) is None
    assert has_committed(opened.identity(), psycopg.engine, sleep, None) is True


def test_a_transaction_in_progress_is_waited_for(psycopg: Database, opened: Open) -> None:
    """A standby may still be asked for, or the network be slow."""
    asked = 0

    def commit(seconds: float) -> None:
        nonlocal asked
        asked += 1
        opened.connection.commit()

    assert has_committed(opened.identity(), psycopg.engine, commit, None) is True
    assert asked == 1


def test_a_session_that_goes_on_for_ever_is_ended(psycopg: Database, opened: Open) -> None:
    """Only then it is certain that it will not commit."""
    assert has_committed(opened.identity(), psycopg.engine, sleep, None) is False
    with pytest.raises(driver.OperationalError):
        opened.connection.commit()


@pytest.mark.parametrize(
    ("fault", "marker", "retried"),
    [
        ("cut after", b"COMMIT", 0),
        ("cut before", b"COMMIT", 1),
        ("cut before", b"pg_current_xact_id_if_assigned", 1),
        ("cut after", b"pg_current_xact_id_if_assigned", 1),
    ],
)
def test_psycopg2_asks_for_the_id_before_commit(
    psycopg: Database, proxy: FaultProxy, fault: Fault, marker: bytes, retried: int
) -> None:
    url = psycopg.engine.url.render_as_string(hide_password=False)
    with Database(with_psycopg2(proxy.through(url))) as database:
        proxy.aim(fault, marker)
        database.run(add, "pear")
        assert proxy.hits == 1
        assert database.stats().retried == retried
    assert names(psycopg) == ["pear"]


def test_an_id_of_before_a_crash_proves_a_failure_and_no_success(psycopg: Database) -> None:
    """The server gives those out again that were not in its log on disk yet."""
    with psycopg.begin() as session:
        xid = session.scalar(text("SELECT pg_current_xact_id()::text::bigint"))
        server = str(session.scalar(text(_identity._WHICH_SERVER)))
    assert xid is not None
    earlier = f"{server.split(maxsplit=1)[0]} 1.5"
    assert has_committed(Identity(earlier, 0, xid), psycopg.engine, sleep, None) is None
    in_future = Identity(earlier, 0, xid + 1_000_000)
    assert has_committed(in_future, psycopg.engine, sleep, None) is False
    with psycopg.engine.connect() as connection:
        other = connection.exec_driver_sql("SELECT pg_current_xact_id()::text::bigint").scalar_one()
        again = Identity(earlier, 0, other)
        # Nobody knows whose it is: the statistics may have been reset by hand, without a crash.
        assert has_committed(again, psycopg.engine, sleep, 0.3) is None
        connection.rollback()
    assert has_committed(again, psycopg.engine, sleep, None) is False


def test_a_transaction_whose_id_is_known_is_set_by_options(psycopg: Database) -> None:
    """PostgreSQL allows no SET TRANSACTION after a query, and takes the id's for one."""

    def work(session: Session, *settings: str) -> object:
        for setting in settings:
            session.execute(text(setting))
        return session.scalar(text("SHOW transaction_isolation"))

    late = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"
    with pytest.raises(InternalError) as error:
        psycopg.run(work, late)
    assert "Write with_session(isolation_level=...)" in error.value.__notes__[0]
    assert psycopg.with_session(isolation_level="SERIALIZABLE")(work)() == "serializable"
    assert psycopg.with_session(attempts=1)(work)(late) == "serializable"
    with pytest.raises(InternalError) as error:
        psycopg.run(work, "VACUUM")
    assert not hasattr(error.value, "__notes__")


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_an_id_does_not_answer_for_the_transaction_after_it(
    behind: Database, proxy: FaultProxy, ending: str, fault: Fault
) -> None:
    """What was ended by text has an outcome of its own, and the driver begins anew."""
    calls: list[int] = []

    def work(session: Session) -> None:
        calls.append(1)
        session.execute(text("SELECT 1"))
        session.execute(text(ending))
        session.add(Item(name="pear"))
        session.flush()
        proxy.aim(fault, b"COMMIT")

    with pytest.raises(CommitUnknown):
        behind.run(work)
    assert calls == [1]


def test_a_lost_commit_is_unknown_where_no_thread_is_to_be_had_to_ask(
    behind: Database, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_outcome, "_PATIENCE", 0.1)
    start = Thread.start

    def start_no_more(thread: Thread) -> None:
        if thread.name.startswith("sessionscope"):
            raise RuntimeError("can't start new thread")
        start(thread)

    def work(session: Session) -> None:
        add(session, "pear")
        proxy.aim("cut after", b"COMMIT")
        monkeypatch.setattr(Thread, "start", start_no_more)

    with pytest.raises(CommitUnknown):
        behind.run(work)
    assert names(behind) == ["pear"]


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
def test_without_run_a_lost_commit_is_unknown(
    behind: Database, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.aim(fault, b"COMMIT")
    with pytest.raises(CommitUnknown), behind.begin() as session:
        add(session, "pear")


def test_a_savepoint_does_not_hide_the_transactions_name(
    behind: Database, proxy: FaultProxy
) -> None:
    proxy.aim("cut after", b"COMMIT")

    def work(session: Session) -> None:
        with session.begin_nested():
            add(session, "pear")

    behind.run(work)
    assert proxy.hits == 1
    assert names(behind) == ["pear"]


def test_each_engines_transaction_has_its_own_name(
    psycopg: Database, behind: Database, proxy: FaultProxy
) -> None:
    """Of two, one that is lost says nothing of the other, and nothing is run twice."""
    binds = {Item: psycopg.engine}
    proxy.aim("cut before", b"COMMIT")
    calls: list[int] = []

    with Database(behind.engine.url, session_options={"binds": binds}) as database:

        def work(session: Session) -> None:
            calls.append(1)
            add(session, f"pear {len(calls)}")
            session.flush()
            session.execute(text("SELECT 1"), bind_arguments={"bind": database.engine})

        with pytest.raises(CommitUnknown):
            database.run(work)
    assert proxy.hits == 1
    assert calls == [1]
