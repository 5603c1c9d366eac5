"""A COMMIT whose answer is lost: what became of it is found out, not guessed."""

from time import sleep

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import Database, _identity, after_commit
from sessionscope._identity import Identity
from sessionscope._outcome import has_committed
from sessionscope.exc import CommitUnknown
from sessionscope.testing import Fault, FaultProxy
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


def test_another_server_or_timeline_does_not_answer_for_this_one(psycopg: Database) -> None:
    """After a failover the same id may be another transaction's."""
    with psycopg.begin() as session:
        xid = session.scalar(text("SELECT pg_current_xact_id()::text::bigint"))
    assert xid is not None
    with psycopg.engine.connect() as connection:
        server = str(connection.exec_driver_sql(_identity._WHICH_SERVER).scalar_one())
    where, crash = server.split()
    same, other = Identity(server, 0, xid), Identity(f"{where}9 {crash}", 0, xid)
    assert has_committed(same, psycopg.engine, sleep, None) is True
    assert has_committed(other, psycopg.engine, sleep, None) is None


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
        assert has_committed(again, psycopg.engine, sleep, None) is False
        connection.rollback()
    assert has_committed(again, psycopg.engine, sleep, None) is False


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
def test_without_run_a_lost_commit_is_unknown(
    behind: Database, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.aim(fault, b"COMMIT")
    with pytest.raises(CommitUnknown), behind.begin() as session:
        add(session, "pear")
