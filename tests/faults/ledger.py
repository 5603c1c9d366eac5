"""A ledger that clients write to while it is broken, and the judgement of what they were told.

Each unit of work has a name of its own, which it stores; most also move money between two
accounts. Afterwards every name is in the table or is not, and every balance is the sum
of the transfers that are there.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sessionscope import after_commit
from sessionscope.exc import CommitUnknown
from tests.faults.breaking import ask

ACCOUNTS = 20
BALANCE = 1000


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """What one unit has done. Its name is not unique, so that a second time can be seen."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    source: Mapped[int | None]
    target: Mapped[int | None]
    amount: Mapped[int] = mapped_column(default=0)


class Account(Base):
    """Some money."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int] = mapped_column(default=BALANCE)


def open_accounts(session: Session) -> None:
    session.add_all([Account(id=number) for number in range(ACCOUNTS)])


@dataclass(frozen=True)
class Order:
    """What one unit is to do, drawn at random."""

    name: str
    source: int
    target: int
    amount: int
    locks: bool = True

    @classmethod
    def draw(cls, name: str, random: Random, *, locks: bool) -> "Order":
        source, target = random.sample(range(ACCOUNTS), 2)
        amount = random.choice([0, random.randint(1, 9)])
        return cls(name, source, target, amount, locks)


def carry_out(session: Session, order: Order, done: Callable[[str], object]) -> None:
    """Store the order's name and move its money; call *done* with its name once committed."""
    after_commit(session, done, order.name)
    if not order.amount:
        session.add(Entry(name=order.name))
        return
    wanted = sorted((order.source, order.target))  # in one order, against deadlocks
    locks = order.locks or None
    found = {number: session.get_one(Account, number, with_for_update=locks) for number in wanted}
    found[order.source].balance -= order.amount
    found[order.target].balance += order.amount
    session.add(
        Entry(name=order.name, source=order.source, target=order.target, amount=order.amount)
    )


@dataclass
class Told:
    """What the clients were told of each name, by which call, and while what was broken."""

    acknowledged: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # by the hook after the commit
    errors: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    texts: dict[tuple[str, str, str], str] = field(default_factory=dict)  # of the first of each

    def note(self, name: str, call: str, fault: str, error: Exception | None) -> None:
        if error is None:
            self.acknowledged.append(name)
            return
        (self.unknown if isinstance(error, CommitUnknown) else self.failed).append(name)
        kind = fault, call, type(error).__name__
        self.errors[kind] += 1
        self.texts.setdefault(kind, " ".join(str(error).split()))


@dataclass(frozen=True)
class Judgement:
    """What of that is not true; all but *unknown* and *unknown_stored* must be nothing."""

    lost: list[str]
    twice: list[str]
    failed_but_stored: list[str]
    from_nowhere: list[str]
    told_twice: list[str]
    hooks_astray: list[str]
    wrong_balances: list[int]
    missing_money: int
    unknown: int
    unknown_stored: int


def judge(told: Told, url: str) -> Judgement:
    """Compare what was *told* with the tables."""
    entries = ask(url, "SELECT name, source, target, amount FROM entry")
    stored = Counter(name for name, *_ in entries)
    expected = dict.fromkeys(range(ACCOUNTS), BALANCE)
    for _, source, target, amount in entries:
        if amount:
            expected[source] -= amount
            expected[target] += amount
    balances = dict(ask(url, "SELECT id, balance FROM account"))
    names = Counter([*told.acknowledged, *told.failed, *told.unknown])
    hooks = Counter(told.done)
    acknowledged = set(told.acknowledged)
    return Judgement(
        lost=[name for name in told.acknowledged if name not in stored],
        twice=[name for name, times in stored.items() if times > 1],
        failed_but_stored=[name for name in told.failed if name in stored],
        from_nowhere=[name for name in stored if name not in names],
        told_twice=[name for name, times in names.items() if times > 1],
        # A hook runs once, for what is acknowledged and for nothing else.
        hooks_astray=[n for n in {*hooks, *acknowledged} if hooks[n] != (n in acknowledged)],
        wrong_balances=[n for n, balance in expected.items() if balances.get(n) != balance],
        missing_money=ACCOUNTS * BALANCE - sum(balances.values()),
        unknown=len(told.unknown),
        unknown_stored=sum(name in stored for name in told.unknown),
    )
