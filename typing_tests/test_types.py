"""The types of the lines that the README shows; read by mypy and pyright, never run."""

from collections.abc import Callable
from typing import assert_type

import sqlmodel
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from sessionscope import Database, Stats, Unit, after_commit


class MySession(Session):
    def mine(self) -> int:
        return 1


plain = Database("sqlite://")
assert_type(plain, Database[Session])
assert_type(plain.engine, Engine)
assert_type(plain.read_engine, Engine)
assert_type(plain.sessionmaker, sessionmaker[Session])
assert_type(plain.stats(), Stats)
assert_type(plain.drain(1.0), bool)
assert_type(Database.from_env(), Database[Session])

assert_type(
    Database[MySession].from_env(default="sqlite://", session_class=MySession), Database[MySession]
)

custom = Database("sqlite://", session_class=MySession)
assert_type(custom, Database[MySession])

models = Database("sqlite://", session_class=sqlmodel.Session)
assert_type(models, Database[sqlmodel.Session])


def with_plain() -> None:
    with plain.begin() as session:
        assert_type(session, Session)
    with plain.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert_type(session, Session)


def with_custom() -> None:
    with custom.begin() as session:
        assert_type(session, MySession)
        assert_type(session.mine(), int)
    with models.begin() as session:
        assert_type(session, sqlmodel.Session)
    unit = Unit(custom)
    assert_type(unit.session, MySession)


def transfer(session: Session, source: int, *, amount: float) -> str:
    after_commit(session, print, source, sep="")
    return "done"


assert_type(plain.run(transfer, 1, amount=2.0), str)
plain.run(transfer, "1", amount=2.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
plain.run(transfer, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@plain.with_session()
def entry(session: Session, name: str, *, count: int = 1) -> list[str]:
    return [name] * count


assert_type(entry("a", count=2), list[str])
entry(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Jobs:
    @plain.with_session(read_only=True)
    def nightly(self, session: Session, day: int) -> int:
        return day


assert_type(Jobs().nightly(3), int)

only_session: Callable[[], int] = plain.with_session()(lambda session: 1)
