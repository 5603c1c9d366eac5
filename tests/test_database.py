"""Database: run, with_session, stats, drain, dispose, and the class of its sessions."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Annotated, get_type_hints

import pytest
import sqlmodel
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database, Stats
from sessionscope.exc import ConfigurationError, PoolBusy
from tests.models import Item, create_tables, names


def add(session: Session, name: str, *, suffix: str = "") -> str:
    """Business logic: it receives a session."""
    session.add(Item(name=name + suffix))
    return name + suffix


def test_run_calls_with_a_session_as_one_unit(database: Database) -> None:
    assert database.run(add, "one", suffix="!") == "one!"
    assert names(database) == ["one!"]


def test_run_rolls_back_what_fails(database: Database) -> None:
    def fail(session: Session) -> None:
        add(session, "gone")
        session.flush()
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        database.run(fail)
    assert names(database) == []


def test_with_session_makes_an_entry_point(database: Database) -> None:
    @database.with_session()
    def entry(session: Session, name: str, *, suffix: str = "") -> str:
        return add(session, name, suffix=suffix)

    assert entry("one", suffix="!") == "one!"
    assert names(database) == ["one!"]


def test_with_session_takes_the_session_out_of_the_signature(database: Database) -> None:
    """Frameworks build requests, tasks and commands from it."""

    @database.with_session(read_only=True)
    def entry(session: Session, name: Annotated[str, "a name"], count: int = 1) -> list[str]:
        """What it does."""
        return []

    assert str(inspect.signature(entry)).replace("typing.", "") == (
        "(name: Annotated[str, 'a name'], count: int = 1) -> list[str]"
    )
    assert "session" not in inspect.get_annotations(entry)
    assert not hasattr(entry, "__wrapped__")
    assert entry.__name__ == "entry"
    assert entry.__doc__ == "What it does."
    assert entry.__module__ == __name__


def test_with_session_evaluates_annotations_that_are_text(database: Database) -> None:
    """A framework would look them up in the wrong module."""

    def entry(session: "Session", item: "Item") -> "Item":
        return item

    signature = inspect.signature(database.with_session()(entry))
    assert signature.parameters["item"].annotation is Item


def test_with_session_options_are_those_of_begin(database: Database) -> None:
    @database.with_session(read_only=True)
    def entry(session: Session) -> None:
        session.add(Item(name="refused"))

    with pytest.raises(Exception, match="read-only unit"):
        entry()


def test_with_session_works_on_methods(database: Database) -> None:
    class Shop:
        def __init__(self, prefix: str) -> None:
            self.prefix = prefix

        @database.with_session()
        def stock(self, session: Session, name: str) -> str:
            return add(session, self.prefix + name)

        @classmethod
        @database.with_session()
        def of_class(cls, session: Session, name: str) -> str:
            return add(session, f"{cls.__name__} {name}")

        @staticmethod
        @database.with_session()
        def of_none(session: Session, name: str) -> str:
            return add(session, name)

    assert Shop("a ").stock("pear") == "a pear"
    assert Shop.of_class("pear") == "Shop pear"
    assert Shop.of_none("pear") == "pear"
    assert str(inspect.signature(Shop("a ").stock)) == "(name: str) -> str"
    assert len(names(database)) == 3


async def an_async_function(session: Session) -> None: ...
async def an_async_generator(session: Session) -> AsyncIterator[int]:
    yield 1


def a_generator(session: Session) -> Iterator[int]:
    yield 1


def without_parameters() -> None: ...
def keyword_only(*, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("fn", "mend"),
    [
        (an_async_function, "Use an AsyncDatabase, or write it with `def`"),
        (an_async_generator, "Return a list"),
        (a_generator, "Return a list"),
        (without_parameters, r"write def without_parameters\(session, ...\)"),
        (keyword_only, r"write def keyword_only\(session, ...\)"),
        (classmethod(add), "below @classmethod"),  # type: ignore[arg-type]  # it is no method
        (42, "decorates functions"),
    ],
)
def test_with_session_refuses_what_would_work_after_its_unit(
    database: Database, fn: object, mend: str
) -> None:
    with pytest.raises(ConfigurationError, match=mend):
        database.with_session()(fn)  # type: ignore[call-overload]  # what users do by mistake


def test_with_session_without_its_parentheses_says_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match=r"write @database.with_session\(\) above def add"):
        Database("sqlite://").with_session(add)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # what users do by mistake
    with pytest.raises(ConfigurationError, match=r"write @database.with_session\(\) above def add"):
        AsyncDatabase("sqlite+aiosqlite://").with_session(add)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # what users do by mistake


def test_run_refuses_an_async_function_and_commits_nothing(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="Pass an `async def` to an AsyncDatabase"):
        database.run(an_async_function)  # type: ignore[unused-coroutine]
    assert database.stats().in_use == 0


def test_sessions_are_of_the_users_class(url: str) -> None:
    class MySession(Session):
        def mine(self) -> str:
            return "mine"

    with Database(url, session_class=MySession) as database:
        for read_only in (False, True):
            with database.begin(read_only=read_only) as session:
                assert session.mine() == "mine"
        with database.sessionmaker() as plain:
            assert plain.mine() == "mine"


def test_sqlmodel_sessions_work_with_exec(url: str) -> None:
    with Database(url, session_class=sqlmodel.Session) as database:
        create_tables(database)  # type: ignore[arg-type]  # a Database of another session class
        with database.begin() as session:
            session.add(Item(name="one"))
        with database.begin(read_only=True) as session:
            assert session.exec(select(Item.name)).all() == [("one",)]  # type: ignore[call-overload]


def test_session_options_go_to_the_sessionmaker(url: str) -> None:
    with Database(url, session_options={"autoflush": False}) as database:
        with database.begin() as session:
            assert session.autoflush is False


def test_engine_options_go_to_both_engines(url: str) -> None:
    with Database(url, engine_options={"echo": False, "pool_recycle": 1800}) as database:
        assert database.engine.pool._recycle == 1800
        assert database.read_engine.pool._recycle == 1800


def test_stats_count_what_happened(postgres: Database) -> None:
    before = postgres.stats()
    with postgres.begin() as session:
        session.execute(text("SELECT 1"))
        assert postgres.stats().in_use == 1
    with pytest.raises(ValueError, match="stop"), postgres.begin():
        raise ValueError("stop")
    after = postgres.stats()

    assert isinstance(after, Stats)
    assert after.limit == 15
    assert after.begun - before.begun == 2
    assert after.committed - before.committed == 1
    assert after.rolled_back - before.rolled_back == 1
    assert (after.in_use, after.waiting, after.refused) == (0, 0, 0)
    assert after.idle >= 1
    assert after.longest_use > 0
    with pytest.raises(AttributeError):
        after.begun = 0  # type: ignore[misc]


def test_begun_is_committed_plus_rolled_back_plus_in_use(database: Database) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait(10)
        for _ in range(10):
            # The unique name makes most of them fail.
            with suppress(sa_exc.IntegrityError), database.begin() as session:
                session.add(Item(name="same" if number % 2 else f"{number}"))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    stats = database.stats()
    assert stats.begun == stats.committed + stats.rolled_back
    assert stats.in_use == 0


def test_drain_waits_for_the_units_at_work_and_refuses_new_ones(postgres: Database) -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with postgres.begin() as session:
            session.add(Item(name="finished"))
            inside.set()
            leave.wait(10)

    with ThreadPoolExecutor(2) as threads:
        working = threads.submit(work)
        assert inside.wait(10)
        draining = threads.submit(postgres.drain, 10)
        with pytest.raises(PoolBusy, match="shutting down"):
            while True:
                postgres.ping()
        leave.set()
        assert draining.result(10) is True
        working.result(10)

    assert postgres.stats().idle == 0
    assert names(postgres) == ["finished"]  # it works again


def test_a_drained_database_keeps_what_is_in_memory() -> None:
    with Database("sqlite://") as database:
        create_tables(database).run(add, "kept")
        assert database.drain(1)
        assert names(database) == ["kept"]


def test_a_disposed_database_is_usable_again(postgres: Database) -> None:
    postgres.run(add, "one")
    postgres.dispose()
    assert postgres.stats().idle == 0
    assert names(postgres) == ["one"]


def test_the_with_block_disposes(postgres_url: str) -> None:
    with Database(postgres_url) as database:
        database.ping()
        assert database.stats().idle == 1
    assert database.stats().idle == 0


def test_ping_costs_one_unit(database: Database) -> None:
    database.ping()
    assert database.stats().in_use == 0


def test_begin_in_a_coroutine_takes_a_free_slot(database: Database) -> None:
    async def main() -> None:
        with database.begin() as session:
            add(session, "one")

    asyncio.run(main())
    assert names(database) == ["one"]


def test_with_session_takes_a_partial(database: Database) -> None:
    entry = database.with_session()(partial(add, suffix="!"))
    assert entry(name="one") == "one!"


def test_annotations_of_an_entry_point_can_be_read_from_anywhere(database: Database) -> None:
    def entry(session: "Session", item: "Item") -> "Item":
        return item

    assert get_type_hints(database.with_session()(entry)) == {"item": Item, "return": Item}


def test_run_refuses_a_generator_whose_work_would_come_too_late(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="return a list"):
        database.run(a_generator)
    assert database.stats().in_use == 0
