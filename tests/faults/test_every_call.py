"""A fault at the k-th call of the driver, for every k: nothing is lost, leaked or claimed.

One unit of work is run again and again. Each time another one of the calls that it makes of the
driver fails (connect, cursor, execute, fetch, commit, rollback, close), in each of the ways in
which such a call can fail.
"""

import asyncio
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from sessionscope import AsyncDatabase, Database, after_commit, after_rollback
from sessionscope.exc import CommitUnknown, DatabaseUnavailable
from tests.faults.fake_dbapi import (
    CANCEL,
    DISCONNECT,
    ERROR,
    INTERRUPT,
    STOP,
    Fault,
    Script,
    async_driver,
    driver,
)
from tests.models import Base, Item

# With 2, all kinds of units run, and each pair of calls fails as well: what a fault leaves to
# clean up meets another one.
FAULTS_PER_UNIT = int(os.environ.get("CALLS_FAULTS", "1"))

SYNC_FAULTS = (ERROR, DISCONNECT, INTERRUPT, STOP)
ASYNC_FAULTS = (ERROR, DISCONNECT, STOP, CANCEL)
URLS = {"sqlite": "sqlite:///", "server": "scripted:///"}
EXPECTED_CALLS = {"cursor", "execute", "fetch", "cursor.close"}
CLEANING_UP = 6  # calls more than those of a unit that meets no fault
ASYNC_URLS = {"sqlite": "sqlite+aiosqlite:///", "server": "scripted+aio:///"}


class Undone(Exception):
    """The unit's own error."""


def write(session: Session) -> None:
    session.add(Item(id=1, name="one"))
    session.flush()
    assert [item.name for item in session.scalars(select(Item))] == ["one"]
    with session.begin_nested():
        session.add(Item(id=2, name="two"))


def write_and_raise(session: Session) -> None:
    write(session)
    raise Undone


def commit_in_the_middle(session: Session) -> None:
    session.add(Item(id=1, name="one"))
    session.commit()
    assert [item.name for item in session.scalars(select(Item))] == ["one"]
    session.add(Item(id=2, name="two"))


def read(session: Session) -> None:
    assert list(session.scalars(select(Item))) == []


@dataclass(frozen=True)
class Program:
    """A unit of work: what it does, how it is opened, and what is stored after each commit."""

    work: Callable[[Session], None]
    stages: tuple[tuple[str, ...], ...] = ((), ("one", "two"))
    read_only: bool = False
    again: bool = False  # by run()
    raises: type[BaseException] | None = None

    @property
    def whole(self) -> tuple[str, ...]:
        return self.stages[-1]


PROGRAMS = {
    "begin": Program(write),
    "run": Program(write, again=True),
    "raises": Program(write_and_raise, ((),), raises=Undone),
    "commits": Program(commit_in_the_middle, ((), ("one",), ("one", "two"))),
    "reads": Program(read, ((),), read_only=True),
}


@dataclass
class Outcome:
    """What became of one unit."""

    calls: list[str] = field(default_factory=list)
    stored: tuple[str, ...] = ()
    hooks: list[str] = field(default_factory=list)
    error: BaseException | None = None  # what left the block
    reported: bool = False  # that it has ended well
    problems: list[str] = field(default_factory=list)

    def note(self, database: Database | AsyncDatabase[Any], script: Script, path: Path) -> None:
        """Note what is stored, and what was lost: slots, connections, or the count of them."""
        self.calls = script.calls
        script.start({})
        forget_frames(self.error)
        stats = database.stats()
        if stats.in_use or stats.waiting:
            self.problems.append(f"{stats.in_use} slots in use, {stats.waiting} waiting")
        for engine in (database.engine, database.read_engine):
            assert isinstance(engine.pool, QueuePool)
            if out := engine.pool.checkedout():
                self.problems.append(f"{out} connections are checked out")
        if len(script.open) != stats.idle:
            self.problems.append(f"{len(script.open)} connections are open, {stats.idle} idle")
        count = database._source.engines.backends.count
        if count != stats.idle:
            self.problems.append(f"{count} connections are counted, {stats.idle} idle")
        self.stored = stored(path)


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error refer to: SQLite's locks, as long as a cursor lives."""
    while error is not None:
        error.__traceback__ = None
        forget_frames(error.__cause__)
        forget_frames(getattr(error, "orig", None))
        forget_frames(getattr(error, "lost", None))
        error = error.__context__


def stored(path: Path) -> tuple[str, ...]:
    """What is in the file, seen through a connection of its own."""
    with closing(sqlite3.connect(path, timeout=0.1)) as connection:
        return tuple(name for (name,) in connection.execute("SELECT name FROM item ORDER BY id"))


def empty(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as connection:
        connection.execute("DELETE FROM item")


def hooked(program: Program, outcome: Outcome) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        after_commit(session, outcome.hooks.append, "committed")
        after_rollback(session, outcome.hooks.append, "rolled back")
        program.work(session)

    return work


class Stage:
    """A Database on a faulty driver, and one unit of work that runs on it again and again.

    A *warm* Database is the same for all faults, and has a connection of each kind. A cold
    one is new each time: it connects, and asks the server what it is.
    """

    database: Database

    def __init__(self, url: str, path: Path, program: Program, *, warm: bool) -> None:
        self.path = path
        self.program = program
        self.warm = warm
        self._url = f"{url}{path}"
        self._open()

    def __call__(self, faults: Mapping[int, Fault]) -> Outcome:
        """Run the unit once, with *faults* at its calls."""
        empty(self.path)
        if self.warm:
            self._warm_up()
        else:
            self._open()
        outcome = Outcome()
        self.script.start(faults)
        try:
            self._run(hooked(self.program, outcome))
            outcome.reported = True
        except BaseException as error:
            outcome.error = error
        outcome.note(self.database, self.script, self.path)
        try:
            self._go_on()
        except Exception as error:
            outcome.problems.append(f"afterwards: {error!r}")
        if not self.warm:
            self.close()
            if self.script.open:
                outcome.problems.append(f"{len(self.script.open)} are open after dispose()")
        return outcome

    def close(self) -> None:
        self.database.dispose()

    def _open(self) -> None:
        self.script = Script()
        options = {"module": driver(self.script)}
        self.database = Database(self._url, pool_timeout=0.5, engine_options=options)

    def _run(self, work: Callable[[Session], None]) -> None:
        if self.program.again:
            self.database.run(work)
        else:
            with self.database.begin(read_only=self.program.read_only) as session:
                work(session)

    def _warm_up(self) -> None:
        for read_only in (False, True):
            with self.database.begin(read_only=read_only) as session:
                session.scalar(select(Item.id))

    def _go_on(self) -> None:
        """Write and read at once."""
        with self.database.begin() as session:
            session.add(Item(id=9, name="afterwards"))
        with self.database.begin(read_only=True) as session:
            assert session.get(Item, 9) is not None


class AsyncStage:
    """Async version of :class:`Stage`, on one event loop."""

    def __init__(self, url: str, path: Path, program: Program, *, warm: bool) -> None:
        self.path = path
        self.program = program
        self.warm = warm
        self._url = f"{url}{path}"
        self._runner = asyncio.Runner()
        self._open()

    def __call__(self, faults: Mapping[int, Fault]) -> Outcome:
        """Run the unit once, with *faults* at its calls."""
        return self._runner.run(self._strike(faults))

    async def _strike(self, faults: Mapping[int, Fault]) -> Outcome:
        empty(self.path)
        if self.warm:
            await self._warm_up()
        else:
            self._open()
        outcome = Outcome()
        self.script.start(faults)
        task = self.script.task = asyncio.create_task(self._run(outcome))
        await asyncio.wait([task])
        outcome.error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self.script.task = None
        await self._clean_up()
        outcome.note(self.database, self.script, self.path)
        try:
            await self._go_on()
        except Exception as error:
            outcome.problems.append(f"afterwards: {error!r}")
        if not self.warm:
            await self._dispose()
            if self.script.open:
                outcome.problems.append(f"{len(self.script.open)} are open after dispose()")
        return outcome

    def close(self) -> None:
        self._runner.run(self._dispose())
        self._runner.close()

    async def _clean_up(self) -> None:
        """Wait for what goes on after a cancellation, which is delivered at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                while self.database.stats().in_use:
                    await asyncio.sleep(0)
        await self.database._source.engines.settle()

    async def _dispose(self) -> None:
        await self.database.dispose()
        await self.database._source.engines.settle()

    def _open(self) -> None:
        self.script = Script(like_a_server=self._url.startswith("scripted"))
        options = {"module": async_driver(self.script)}
        self.database = AsyncDatabase(self._url, pool_timeout=0.5, engine_options=options)

    async def _run(self, outcome: Outcome) -> None:
        work = hooked(self.program, outcome)
        if self.program.again:
            await self.database.run(work)
        else:
            async with self.database.begin(read_only=self.program.read_only) as session:
                await session.run_sync(work)
        outcome.reported = True
        await asyncio.sleep(0)  # where a cancellation that had to wait is delivered

    async def _warm_up(self) -> None:
        for read_only in (False, True):
            async with self.database.begin(read_only=read_only) as session:
                await session.scalar(select(Item.id))

    async def _go_on(self) -> None:
        """Write and read at once."""
        async with self.database.begin() as session:
            session.add(Item(id=9, name="afterwards"))
        async with self.database.begin(read_only=True) as session:
            assert await session.get(Item, 9) is not None


def judge(outcome: Outcome, program: Program) -> Iterator[str]:
    """Yield what no fault may bring about, whatever it was."""
    yield from outcome.problems
    if outcome.reported and outcome.stored != program.whole:
        yield f"was reported as committed, and stored {outcome.stored}"
    if outcome.stored not in program.stages:
        yield f"was torn: stored {outcome.stored}"
    if len(outcome.hooks) > 1:
        yield f"ran hooks {outcome.hooks}"
    if "committed" in outcome.hooks and outcome.stored != program.whole and not outcome.stored:
        yield "ran a hook of a commit that was none"
    if outcome.reported and outcome.hooks != ["committed"]:
        yield f"was committed and ran hooks {outcome.hooks}"


def judge_one(outcome: Outcome, program: Program, at: int, fault: Fault) -> Iterator[str]:
    """Yield what is wrong in the answer to one fault."""
    error, call = outcome.error, outcome.calls[at - 1]
    if error is None:
        if fault.name in ("interrupt", "stop", "cancel"):
            yield f"swallowed {fault}"
        return
    if not outcome.reported:
        # Of a commit that is cancelled while a session's own method waits for it, no one can tell.
        is_open = call == "commit" and fault.make is None
        done = outcome.calls[: at - 1].count("commit") + (call == "commit" and fault.late)
        done = min(done, len(program.stages) - 1)
        if outcome.stored not in program.stages[done : done + 1 + is_open]:
            yield f"failed with {error!r}, and stored {outcome.stored}"
    # SQLAlchemy overlooks that a cursor cannot be closed; then COMMIT is the first to know.
    may_be_unknown = fault.loses and call in ("commit", "cursor.close")
    if isinstance(error, CommitUnknown) and not may_be_unknown:
        yield f"raised {error!r}"
    is_lost = call == "commit" and fault.loses and not program.read_only
    if is_lost and not isinstance(error, CommitUnknown):
        yield f"raised {error!r} when the connection was lost during COMMIT"
    if not isinstance(error, (CommitUnknown, program.raises or CommitUnknown)):
        yield from _judge_kind(error, program, call, fault)


def _judge_kind(error: BaseException, program: Program, call: str, fault: Fault) -> Iterator[str]:
    if fault.make is None:
        if not isinstance(error, asyncio.CancelledError):
            yield f"raised {error!r} when it was cancelled"
    elif fault.name in ("interrupt", "stop"):
        if type(error) is not type(fault.make()):
            yield f"raised {error!r} in the place of {fault}"
    elif not isinstance(error, DBAPIError):
        yield f"raised {error!r} for a driver's error"
    elif isinstance(error, DatabaseUnavailable) is not (call == "connect"):
        if isinstance(error, DatabaseUnavailable):
            return  # a new connection is asked what it is
        yield f"raised {error!r}"
    elif fault.loses and call != "connect" and not error.connection_invalidated:
        yield f"raised {error!r}, and kept a lost connection"
    elif program.again and (fault.loses or call == "connect"):
        yield f"did not run again after {error!r}"


Strike = Callable[[Mapping[int, Fault]], Outcome]


def strike_everywhere(
    strike: Strike, program: Program, faults: tuple[Fault, ...]
) -> tuple[list[str], Counter[str]]:
    """Let each fault strike at each call; return what was wrong, and how often it did."""
    plain = strike({})
    assert list(judge(plain, program)) == []
    assert type(plain.error) is (program.raises or type(None))
    broken: list[str] = []
    count: Counter[str] = Counter()
    for at, call in enumerate(plain.calls, start=1):
        # No connection is lost before there is one.
        ways = tuple(fault for fault in faults if not (fault.loses and call == "connect"))
        if call == "commit":  # which an error that is not the connection's has not carried out
            ways += tuple(replace(fault, late=True) for fault in faults if fault != ERROR)
        for fault in ways:
            outcome = strike({at: fault})
            assert outcome.calls[at - 1] == call
            wrong = [*judge(outcome, program), *judge_one(outcome, program, at, fault)]
            broken += [f"{fault} at {at}, {call}: {each}" for each in wrong]
            count[call] += 1
    return broken, count


def strike_twice(
    strike: Strike, program: Program, faults: tuple[Fault, ...]
) -> tuple[list[str], int]:
    """Let a second fault strike at each call after the first; return what was wrong."""
    broken: list[str] = []
    count = 0
    calls = len(strike({}).calls)
    for first, second in combinations(range(1, calls + CLEANING_UP), 2):
        for fault, other in product(faults, repeat=2):
            outcome = strike({first: fault, second: other})
            if len(outcome.calls) < second:
                break  # the first fault ends it, or nothing is left to do after it
            wrong = list(judge(outcome, program))
            broken += [f"{fault} at {first}, {other} at {second}: {each}" for each in wrong]
            count += 1
    return broken, count


on_each_dialect = pytest.mark.parametrize("dialect", ["sqlite", "server"])
both_colours = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def keep_no_log() -> Iterator[None]:
    """Keep no error that is logged: the cursors in its frames keep SQLite's locks."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the tables."""
    path = tmp_path / "unit.db"
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:  # who reads is in nobody's way
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    engine.dispose()
    return path


def stage(dialect: str, path: Path, program: Program, *, is_async: bool, warm: bool) -> Any:
    kind, urls = (AsyncStage, ASYNC_URLS) if is_async else (Stage, URLS)
    return closing(kind(urls[dialect], path, program, warm=warm))


CASES = [
    pytest.param(dialect, name, warm, id=f"{dialect}-{name}-{'warm' if warm else 'cold'}")
    for dialect, name, warm in product(URLS, PROGRAMS, [False, True])
    if FAULTS_PER_UNIT > 1 or (name in ("begin", "raises", "reads") if warm else name == "begin")
]


@pytest.mark.parametrize(("dialect", "name", "warm"), CASES)
@both_colours
def test_a_fault_at_each_call(
    is_async: bool, dialect: str, name: str, warm: bool, path: Path
) -> None:
    """Nothing is lost or leaked, a success is one, the error is the right one, and on it goes."""
    program = PROGRAMS[name]
    faults = ASYNC_FAULTS if is_async else SYNC_FAULTS
    with stage(dialect, path, program, is_async=is_async, warm=warm) as strike:
        broken, count = strike_everywhere(strike, program, faults)
    print(f"{count.total()} faults at {len(count)} kinds of calls: {dict(count)}")
    assert broken == []
    expected = EXPECTED_CALLS | (set() if warm else {"connect"})
    expected |= set() if program.read_only or program.raises else {"commit"}
    assert set(count) >= expected


@pytest.mark.skipif(FAULTS_PER_UNIT < 2, reason="make faults-calls has the time for pairs")
@on_each_dialect
@both_colours
def test_two_faults_at_each_pair_of_calls(is_async: bool, dialect: str, path: Path) -> None:
    """Where a fault is being cleaned up another one strikes."""
    program = PROGRAMS["begin"]
    faults = (ERROR, DISCONNECT, CANCEL if is_async else INTERRUPT)
    with stage(dialect, path, program, is_async=is_async, warm=True) as strike:
        broken, count = strike_twice(strike, program, faults)
    print(f"{count} pairs of faults")
    assert broken == []
    assert count > 100
