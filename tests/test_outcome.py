"""A COMMIT whose answer is lost: what became of it is found out, not guessed."""

import pytest
from sqlalchemy.orm import Session

from sessionscope import Database, after_commit
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


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
def test_without_run_a_lost_commit_is_unknown(
    behind: Database, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.aim(fault, b"COMMIT")
    with pytest.raises(CommitUnknown), behind.begin() as session:
        add(session, "pear")
