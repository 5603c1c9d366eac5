"""A few seconds of the nemesis: what clients are told is true, whatever breaks."""

from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import Database
from sessionscope.exc import CommitUnknown
from tests.faults import nemesis
from tests.faults.ledger import Base, Judgement, Order, Told, carry_out, judge, open_accounts

TRUE = Judgement([], [], [], [], [], [], [], 0, unknown=0, unknown_stored=0)


@pytest.mark.usefixtures("postgres_server")  # where there is none, this is skipped
def test_what_clients_are_told_is_true() -> None:
    """How soon they recover is not judged here, where other tests run beside this one."""
    report = nemesis.run(seconds=5.0, seed=1, calm=0.4)
    judged = [figure for figure in report.figures if " after: " not in figure.name]
    assert [figure for figure in judged if figure.verdict == "MISS"] == []


@pytest.fixture
def ledger(postgres_url: str) -> tuple[Told, str]:
    """Two units that are what they were told."""
    told = Told()
    with Database(postgres_url) as database:
        Base.metadata.create_all(database.engine)
        database.run(open_accounts)
        for order in (Order("one", 1, 2, 5), Order("two", 3, 4, 0)):
            database.run(carry_out, order, told.done.append)
            told.note(order.name, "run", "nothing", None)
    return told, postgres_url


def test_the_truth_is_found_to_be_true(ledger: tuple[Told, str]) -> None:
    told, url = ledger
    told.note("three", "run", "nothing", CommitUnknown())
    told.note("four", "run", "nothing", ValueError())
    assert judge(told, url) == Judgement([], [], [], [], [], [], [], 0, 1, 0)


def lose(told: Told) -> None:
    told.note("three", "run", "nothing", None)
    told.done.append("three")


def deny(told: Told) -> None:
    told.acknowledged.remove("one")
    told.done.remove("one")
    told.note("one", "run", "nothing", ValueError())


def forget(told: Told) -> None:
    told.acknowledged.remove("one")
    told.done.remove("one")


def contradict(told: Told) -> None:
    told.note("one", "run", "nothing", None)


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (lose, {"lost": ["three"]}),
        (deny, {"failed_but_stored": ["one"]}),
        (forget, {"from_nowhere": ["one"]}),
        (contradict, {"told_twice": ["one"]}),
        (lambda told: told.done.append("two"), {"hooks_astray": ["two"]}),
        (lambda told: told.done.remove("two"), {"hooks_astray": ["two"]}),
    ],
)
def test_lies_are_found(
    ledger: tuple[Told, str], lie: Callable[[Told], None], found: dict[str, list[str]]
) -> None:
    """A judge that finds nothing proves nothing."""
    told, url = ledger
    lie(told)
    judgement = judge(told, url)
    assert {**vars(TRUE), **found} == vars(judgement)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("INSERT INTO entry (name, amount) VALUES ('two', 0)", {"twice": ["two"]}),
        (
            "UPDATE account SET balance = balance - 1 WHERE id = 7",
            {"wrong_balances": [7], "missing_money": 1},
        ),
        (
            "UPDATE account SET balance = balance - 1 + 2 * (id - 7) WHERE id IN (7, 8)",
            {"wrong_balances": [7, 8]},
        ),
    ],
)
def test_what_is_wrong_in_the_tables_is_found(
    ledger: tuple[Told, str], statement: str, found: dict[str, object]
) -> None:
    told, url = ledger

    def break_it(session: Session) -> None:
        session.execute(text(statement))

    with Database(url) as database:
        database.run(break_it)
    assert {**vars(TRUE), **found} == vars(judge(told, url))
