"""Units of work at random, against a dict, beside the same steps on a plain SQLAlchemy session.

The dict says what is stored if the unit reports success. The plain session says whether the
unit had to fail: where SQLAlchemy alone has stored everything, we must as well. Both databases
are looked at through connections of their own after each end.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # no stubs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from sqlalchemy import Engine, create_engine, delete, event, insert, select, text
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import QueuePool

from sessionscope import Database, after_commit, after_rollback
from sessionscope.exc import TransactionDoomed
from tests.models import Base, Item, Note

# What a database holds: ("item", 3) -> its name, ("note", 1) -> its item's id.
Rows = dict[tuple[str, int], str | int]

KEYS = st.integers(1, 6)
WAYS = st.sampled_from(["begin", "run", "with_session"])

# What fails on each kind of database, at once and without touching a row.
FAILING = {
    "postgresql": ["SELECT * FROM no_such_table", "SELECT 1/0", "SELECT CAST('x' AS integer)"],
    "sqlite": ["SELECT * FROM no_such_table", "SELECT abs(-9223372036854775808)"],
    "mysql": ["SELECT * FROM no_such_table", "SIGNAL SQLSTATE '45000'"],
}


class Oops(Exception):
    """The error that leaves a unit."""


class Side:
    """A session, and what it says that it has stored, savepoint by savepoint."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.forget()

    def forget(self) -> None:
        """Begin anew, after an end."""
        self.levels: list[Rows] = [{}]
        self.savepoints: list[SessionTransaction] = []
        # SQLite has ended the transaction, and stores each further statement at once.
        self.is_adrift = False
        self.has_failed = False

    @property
    def pending(self) -> Rows:
        """What is stored if the next commit reports success."""
        return {key: value for level in self.levels for key, value in level.items()}

    def attempt(self, step: Callable[[Session], object], rows: Rows) -> Exception | None:
        """Take a step that leaves *rows*; return its error, which is swallowed."""
        try:
            step(self.session)
        except Exception as error:
            self.has_failed = True
            return error
        self.levels[-1].update(rows)
        return None

    def open_savepoint(self) -> bool:
        """Return whether that was possible."""
        try:
            self.savepoints.append(self.session.begin_nested())
        except Exception:
            return False
        self.levels.append({})
        return True

    def close_savepoint(self, *, release: bool) -> bool:
        """End the innermost savepoint; return whether it was released."""
        savepoint, rows = self.savepoints.pop(), self.levels.pop()
        if release:
            with suppress(Exception):
                savepoint.commit()
                self.levels[-1].update(rows)
                return True
        with suppress(Exception):
            savepoint.rollback()
        return False

    def end(self, finish: Callable[[], object]) -> Exception | None:
        """End the transaction; one that cannot commit is rolled back. Return the error."""
        try:
            finish()
        except Exception as error:
            self.session.rollback()
            return error
        return None


class Arena:
    """Our Database, a plain engine of the same kind, and a second connection to each."""

    def __init__(self, url: str, plain_url: str) -> None:
        self.database = Database(url, pool_timeout=1.0)
        self.plain = create_engine(plain_url)
        self.name = self.plain.dialect.name
        if self.name == "sqlite":
            _begin_as_the_manual_says(self.plain)
        self.ours_seen = create_engine(url, isolation_level="AUTOCOMMIT")
        self.plain_seen = create_engine(plain_url, isolation_level="AUTOCOMMIT")
        for engine in (self.database.engine, self.plain):
            Base.metadata.create_all(engine)
        self.count: Counter[str] = Counter()

    def rows(self, engine: Engine) -> Rows:
        """Return what is stored."""
        with engine.connect() as connection:
            items = connection.execute(select(Item.id, Item.name))
            found: Rows = {("item", row.id): row.name for row in items}
            notes = connection.execute(select(Note.id, Note.item_id))
            return found | {("note", row.id): row.item_id for row in notes}

    def fill(self, engine: Engine, rows: Rows) -> None:
        """Make *rows* what is stored."""
        with engine.connect() as connection:
            for table in (Note, Item):
                connection.execute(delete(table))
            for table, kind, column in ((Item, "item", "name"), (Note, "note", "item_id")):
                given = [{"id": n, column: value} for (k, n), value in rows.items() if k == kind]
                if given:
                    connection.execute(insert(table), given)

    def close(self) -> None:
        self.database.dispose()
        for engine in (self.plain, self.ours_seen, self.plain_seen):
            engine.dispose()


def _begin_as_the_manual_says(engine: Engine) -> None:
    """Let SQLite's savepoints be real on a plain engine, by SQLAlchemy's own recipe."""

    def connected(dbapi_connection: Any, record: object) -> None:
        dbapi_connection.isolation_level = None
        dbapi_connection.execute("PRAGMA foreign_keys = 1")

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)


class Ended:
    """How a unit has ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def open_unit(database: Database, how: str) -> tuple[greenlet, Session]:
    """Open a unit of work that stays open between the steps, whichever way it is opened.

    Switched to again, the greenlet ends it with the error that it is given, if any, and
    returns how that went.
    """
    outside = getcurrent()

    def body(session: Session) -> None:
        error = outside.switch(session)
        if error is not None:
            raise error

    def whole() -> Ended:
        try:
            if how == "begin":
                with database.begin() as session:
                    body(session)
            elif how == "run":
                database.run(body)
            else:
                database.with_session()(body)()
        except BaseException as error:
            return Ended(error)
        return Ended(None)

    inside = greenlet(whole)
    session = inside.switch()
    assert isinstance(session, Session)
    return inside, session


class Hooks:
    """Which hooks of a unit are to run, as its savepoints and transactions end."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.due: list[str] = []
        self._waiting: list[list[str]] = [[]]
        self._number = 0

    def add(self, session: Session) -> None:
        """Register one of each kind."""
        self._number += 1
        for name, register in (("commit", after_commit), ("rollback", after_rollback)):
            hook = f"{name} {self._number}"
            register(session, self.ran.append, hook)
            self._waiting[-1].append(hook)

    def open(self) -> None:
        self._waiting.append([])

    def close(self, *, released: bool) -> None:
        hooks = self._waiting.pop()
        if released:
            self._waiting[-1] += hooks
        else:
            self._decide(hooks, "rollback")

    def end(self, *, committed: bool) -> None:
        hooks = [hook for level in self._waiting for hook in level]
        self._decide(hooks, "commit" if committed else "rollback")
        self._waiting = [[]]

    def _decide(self, hooks: Iterable[str], outcome: str) -> None:
        self.due += [hook for hook in hooks if hook.startswith(outcome)]


class Units(RuleBasedStateMachine):
    """One unit of work after the other, each taken through steps at random."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.stored: Rows = {}
        self.unit: greenlet | None = None
        self.alarm: Exception | None = None
        for engine in (self.arena.ours_seen, self.arena.plain_seen):
            self.arena.fill(engine, {})

    @precondition(lambda self: self.unit is None)
    @rule(how=WAYS)
    def begin(self, how: str) -> None:
        self._count("steps")
        self.unit, session = open_unit(self.arena.database, how)
        self.ours, self.plain = Side(session), Side(Session(self.arena.plain))
        self.hooks = Hooks()

    @precondition(lambda self: self.unit)
    @rule(key=KEYS, by_orm=st.booleans())
    def insert(self, key: int, by_orm: bool) -> None:
        """Which fails if the row is there: by a flush, or by a statement."""
        self._step(partial(_add if by_orm else _insert, key=key), _row(key))

    @precondition(lambda self: self.unit)
    @rule(key=KEYS, by_orm=st.booleans())
    def insert_in_savepoint(self, key: int, by_orm: bool) -> None:
        """As the guide says it: what may fail, in a savepoint, caught outside of it."""

        def step(session: Session) -> None:
            with session.begin_nested():
                (_add if by_orm else _insert)(session, key)

        self._step(step, _row(key))

    @precondition(lambda self: self.unit and self.arena.name == "sqlite")
    @rule(key=KEYS)
    def insert_or_rollback(self, key: int) -> None:
        """Which ends the whole transaction if the row is there."""
        sql = f"INSERT OR ROLLBACK INTO item (id, name) VALUES ({key}, 'item {key}')"
        if self._step(_execute(sql), _row(key)) is not None:
            self.plain.is_adrift = True

    @precondition(lambda self: self.unit)
    @rule(key=KEYS, item=KEYS)
    def refer(self, key: int, item: int) -> None:
        """A row that must point at another one when the transaction commits."""
        note = insert(Note).values(id=key, item_id=item)
        self._step(lambda session: session.execute(note), {("note", key): item})

    @precondition(lambda self: self.unit)
    @rule(number=st.integers(0, 5))
    def fail(self, number: int) -> None:
        """Swallow an error."""
        statements = FAILING[self.arena.name]
        self._step(_execute(statements[number % len(statements)]))

    @precondition(lambda self: self.unit)
    @rule()
    def read(self) -> None:
        """Which flushes and finds nothing to do, or is refused."""
        self._step(lambda session: list(session.scalars(select(Item.id))))

    @precondition(lambda self: self.unit)
    @rule()
    def hook(self) -> None:
        self._count("steps")
        self.hooks.add(self.ours.session)

    @precondition(lambda self: self.unit)
    @rule()
    def open_savepoint(self) -> None:
        self._count("steps")
        self.plain.open_savepoint()
        if self.ours.open_savepoint():
            self.hooks.open()

    @precondition(lambda self: self.unit and self.ours.savepoints)
    @rule(release=st.booleans())
    def close_savepoint(self, release: bool) -> None:
        self._count("steps", "savepoints")
        if self.plain.savepoints:
            self.plain.close_savepoint(release=release)
        self.hooks.close(released=self.ours.close_savepoint(release=release))

    @precondition(lambda self: self.unit)
    @rule()
    def rollback(self) -> None:
        self._count("steps")
        self.ours.session.rollback()
        self._rolled_back()

    @precondition(lambda self: self.unit)
    @rule()
    def commit(self) -> None:
        """In the middle: what comes later is a transaction of its own."""
        self._count("steps")
        self._committed(self.ours.end(self.ours.session.commit))

    @precondition(lambda self: self.unit)
    @rule(raising=st.integers(0, 3))
    def end(self, raising: int) -> None:
        self._count("steps")
        self._end(Oops() if raising == 0 else None)

    def teardown(self) -> None:
        if self.unit is not None:
            self._end(Oops())

    def _count(self, *names: str) -> None:
        self.arena.count.update(names)

    def _step(
        self, step: Callable[[Session], object], rows: Rows | None = None
    ) -> Exception | None:
        """Take a step on both sides, and go on whatever comes of it; return the plain error."""
        self._count("steps")
        error = self.ours.attempt(step, rows or {})
        plain_error = self.plain.attempt(step, rows or {})
        if error is not None:
            self._count("swallowed")
            if plain_error is None:
                self.alarm = error
        return plain_error

    def _end(self, error: Oops | None) -> None:
        assert self.unit is not None
        unit, self.unit = self.unit, None
        self._count("units")
        ended = unit.switch(error)
        assert isinstance(ended, Ended), "the unit has run again"
        try:
            if error is None:
                assert ended.error is None or isinstance(ended.error, Exception)
                self._committed(ended.error)
            else:
                assert ended.error is error
                self._rolled_back()
        finally:
            self.plain.session.close()
        ran, due = Counter(self.hooks.ran), Counter(self.hooks.due)
        assert ran == due, f"hooks that ran: {ran}; that were due: {due}"
        self.arena.count["hooks"] += len(self.hooks.ran)
        self._check_pool()

    def _rolled_back(self) -> None:
        """Roll the plain session back, too, and look."""
        self.plain.session.rollback()
        self.hooks.end(committed=False)
        self._look(self.stored)

    def _committed(self, error: Exception | None) -> None:
        """Compare what our commit has answered with what is stored, and with a plain one."""
        expected = self.stored if error else self.stored | self.ours.pending
        self._count("failed" if error else "committed")
        if isinstance(error, TransactionDoomed):
            self._count("doomed")
        self.hooks.end(committed=error is None)
        # Where nothing is to be stored, no row tells that PostgreSQL has answered with ROLLBACK.
        is_told = bool(self.plain.pending) or not self.plain.has_failed
        plain_error = self.plain.end(self.plain.session.commit)
        if plain_error is None and is_told:
            arena = self.arena
            whole = arena.rows(arena.plain_seen) == self.stored | self.plain.pending
            if not whole:
                self._count("false commits of plain sessions")
            elif not self.plain.is_adrift:
                alarm = error or self.alarm
                assert alarm is None, f"a false alarm: {alarm!r}"
        self._look(expected)

    def _look(self, expected: Rows) -> None:
        """Compare what is stored with what it must be, and begin anew with both sides alike."""
        arena = self.arena
        ours = arena.rows(arena.ours_seen)
        assert ours == expected, "a false commit, or a torn unit"
        self.stored = ours
        if arena.rows(arena.plain_seen) != ours:
            arena.fill(arena.plain_seen, ours)
        self.alarm = None
        self.ours.forget()
        self.plain.forget()

    def _check_pool(self) -> None:
        database = self.arena.database
        stats = database.stats()
        assert (stats.in_use, stats.waiting) == (0, 0)
        assert isinstance(database.engine.pool, QueuePool)
        assert database.engine.pool.checkedout() == 0


def _row(key: int) -> Rows:
    return {("item", key): f"item {key}"}


def _add(session: Session, key: int) -> None:
    session.add(Item(id=key, name=f"item {key}"))
    session.flush()
    session.expunge_all()  # the database alone says whether a row is there


def _insert(session: Session, key: int) -> None:
    session.execute(insert(Item).values(id=key, name=f"item {key}"))


def _execute(sql: str) -> Callable[[Session], object]:
    return lambda session: session.execute(text(sql))
