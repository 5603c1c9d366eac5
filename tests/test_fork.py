"""Forked processes: each has connections of its own, whatever the parent was doing."""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import literal, select, text

from sessionscope import AsyncDatabase, Database
from sessionscope._timer import Timer
from sessionscope._watch import UNIT
from tests.async_drivers import create_tables, on_servers
from tests.forks import answer_of_a_child
from tests.models import Item, names

CHILDREN, QUERIES = 4, 200


def wrong_answers(database: Database) -> int:
    """Ask many questions whose answers are known; return how many were wrong."""
    wrong = 0
    for number in range(QUERIES):
        with database.begin(read_only=number % 2 == 0) as session:
            wanted = os.getpid() * 1000 + number
            wrong += session.scalar(select(literal(wanted))) != wanted
    return wrong


def ask(database: Database, answers: "multiprocessing.Queue[int]") -> None:
    answers.put(wrong_answers(database))


def test_forked_children_ask_on_their_own(postgres: Database) -> None:
    """A11: with one engine used before the fork, 475 of 800 answers were another child's."""
    assert wrong_answers(postgres) == 0
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    children = [fork.Process(target=ask, args=(postgres, answers)) for _ in range(CHILDREN)]
    for child in children:
        child.start()
    assert [answers.get(timeout=60) for _ in children] == [0] * CHILDREN
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * CHILDREN
    assert wrong_answers(postgres) == 0


def test_a_unit_that_is_open_across_a_fork_is_the_parents(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="pear"))
        session.flush()
        said = answer_of_a_child(lambda: session.scalars(select(Item.name)).all())
        assert said.startswith("SessionEnded: scalars() was called at ")
        assert "belongs to the process before the fork" in said
        assert "with database.begin()" in said
        session.flush()
    assert names(database) == ["pear"]


def test_a_deadline_that_was_about_to_pass_does_not_hold_the_child(psycopg: Database) -> None:
    """The thread that ends units at their deadline holds a lock, and is not in the child."""
    holds, forked = threading.Event(), threading.Event()

    def hold(timer: Timer) -> None:
        with timer._lock:
            holds.set()
            forked.wait(30)

    def end() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # else it would wait for ever
        signal.alarm(10)
        unit.__exit__(None, None, None)

    unit = psycopg.begin(timeout=60)
    session = unit.__enter__()
    session.add(Item(name="pear"))
    session.flush()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(hold, session.info[UNIT].timer)
        holds.wait(10)
        said = answer_of_a_child(end)
        forked.set()
    unit.__exit__(None, None, None)
    assert "SessionEnded" in said
    assert names(psycopg) == ["pear"]


def test_the_end_of_an_inherited_block_does_nothing(postgres: Database) -> None:
    """A child that leaves the block ends neither the transaction nor the connection."""
    child = None
    try:
        with postgres.begin() as session:
            session.add(Item(name="pear"))
            session.flush()
            child = os.fork()
            if child == 0:
                raise RuntimeError("leaves the block")
            assert os.waitpid(child, 0)[1] == 0
            session.flush()
    except RuntimeError:
        os._exit(0 if child == 0 else 1)
    assert names(postgres) == ["pear"]


def test_a_child_opens_units_while_the_parent_holds_all(postgres_url: str) -> None:
    with (
        Database(postgres_url, pool_size=1, max_overflow=0) as database,
        database.begin() as session,
    ):
        session.execute(select(1))
        assert (
            answer_of_a_child(
                lambda: database.run(lambda session: session.scalar(select(literal(2))))
            )
            == "2"
        )
        assert session.scalar(select(literal(3))) == 3


def test_a_session_of_ones_own_is_refused_as_well(database: Database) -> None:
    with database.sessionmaker() as session:
        session.execute(select(1))
        said = answer_of_a_child(lambda: session.execute(select(1)))
        assert said.startswith("SessionEnded: execute() was called at ")


@on_servers
def test_an_asynchronous_database_is_used_on_both_sides(async_url: str) -> None:
    database = AsyncDatabase(async_url)

    async def ask() -> object:
        async with database.begin(read_only=True) as session:
            return await session.scalar(select(text("7")))

    async def parent() -> None:
        await create_tables(database)
        assert await ask() == 7
        # The child has a loop of its own, as a worker that is forked from a script.
        assert answer_of_a_child(in_a_new_loop(ask)) == "7"
        assert await ask() == 7
        await database.dispose()

    asyncio.run(parent())


def in_a_new_loop(work: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        asyncio.events._set_running_loop(None)
        return asyncio.run(work())  # type: ignore[arg-type]  # a coroutine function's

    return call
