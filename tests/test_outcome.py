"""A COMMIT whose answer is lost: what became of it is found out, not guessed."""

from time import sleep

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import Database, after_commit
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
        query = Identity("", 0, 3).ask_outcome
        _, server = connection.exec_driver_sql(query).one()
    same, other = Identity(server, 0, xid), Identity(server[:-1] + "9", 0, xid)
    assert has_committed(same, psycopg.engine, sleep, None) is True
    assert has_committed(other, psycopg.engine, sleep, None) is None


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
