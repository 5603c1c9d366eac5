"""Counts behind the promises: what becomes of commits, errors and sessions.

Each figure is ours; what the same comes to by hand stands in its note.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy import text as sql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from benchmarks._claims import count_over_http
from benchmarks._peers import Unit
from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Report

Work = Callable[[Session], object]


@dataclass(frozen=True)
class Subject:
    """An engine, and units of work on it."""

    engine: Engine
    unit: Unit


def by_hand(url: str, **pool: Any) -> Subject:
    """Return the tutorials' `get_db` with a commit after its `yield`."""
    engine = create_engine(url, **pool)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys = ON"))

    @contextmanager
    def get_db() -> Iterator[Session]:
        db = Session(engine)
        try:
            yield db
            db.commit()
        finally:
            db.close()

    return Subject(engine, get_db)


def ours(url: str, **pool: Any) -> Subject:
    """Return a `Database`."""
    from sessionscope import Database

    database = Database(url, **pool)
    return Subject(database.engine, database.begin)


def run(*, url: str | None) -> Report:
    """Count what comes of the same work by hand and with sessionscope."""
    report = Report("promises: counts, with those by hand in the notes")
    with empty_database(url) as database:
        report.figures.extend(count_over_http(database))
        report.figures.extend(_on_postgresql(text(database)))
    report.figures.extend(_on_sqlite())
    return report


def _on_postgresql(url: str) -> list[Figure]:
    pool = {"pool_size": 4, "max_overflow": 0, "pool_timeout": 2.0}
    subjects = by_hand(url, **pool), ours(url, **pool)
    swallowed = [_normal_ends(subject, _swallow) for subject in subjects]
    waits = [_hold_and_ask(subject.unit) * 1e3 for subject in subjects]
    for subject in subjects:
        subject.engine.dispose()
    name = "4 threads hold 4 connections, each asks for one more: refused after"
    return [
        _never("10 units with a swallowed error: ended normally, nothing stored", *swallowed),
        Figure(name, waits[1], "ms", at_most=10, note=f"by hand {waits[0]:.0f} ms"),
    ]


def _on_sqlite() -> list[Figure]:
    counts = {
        "10 units with a swallowed ON CONFLICT ROLLBACK: half stored": _half_stored,
        "the next unit fails after a failed COMMIT": _next_fails,
        "rows left by a rollback fixture": _rows_left,
    }
    return [_never(f"SQLite: {name}", *_on_files(count)) for name, count in counts.items()]


def _on_files(count: Callable[[Subject], int]) -> list[int]:
    """Count on fresh files: a poisoned connection must not spoil what comes next."""
    counts = []
    for make in (by_hand, ours):
        with tempfile.TemporaryDirectory() as folder:
            subject = make(f"sqlite:///{Path(folder, 'file.db')}")
            counts.append(count(subject))
            subject.engine.dispose()
    return counts


def _never(name: str, theirs: int, found: int) -> Figure:
    return Figure(name, found, "", 0, 0, note=f"by hand {theirs}")


def _normal_ends(subject: Subject, work: Work) -> int:
    return sum(_ends_normally(subject.unit, work) for _ in range(10))


def _ends_normally(unit: Unit, work: Work) -> bool:
    try:
        with unit() as session:
            work(session)
    except SQLAlchemyError:
        return False
    return True


def _execute(*statements: str) -> Work:
    def work(session: Session) -> None:
        for statement in statements:
            session.execute(sql(statement))

    return work


def _swallow(session: Session) -> None:
    _execute("INSERT INTO item (name) VALUES ('lost')")(session)
    with suppress(SQLAlchemyError):
        _execute("SELECT 1 / 0")(session)


def _hold_and_ask(unit: Unit) -> float:
    """Let each of four threads hold a connection and ask for one more; return the longest wait."""
    together = threading.Barrier(4)
    ask = _execute("SELECT 1")

    def hold_and_ask(_: int) -> float:
        with unit() as session:
            ask(session)
            together.wait()
            start = time.perf_counter()
            _ends_normally(unit, ask)
            waited = time.perf_counter() - start
            together.wait()
        return waited

    with ThreadPoolExecutor(4) as threads:
        return max(threads.map(hold_and_ask, range(4)))


def _half_stored(subject: Subject) -> int:
    with subject.unit() as session:
        _execute(
            "CREATE TABLE picky (n INTEGER PRIMARY KEY ON CONFLICT ROLLBACK)",
            "INSERT INTO picky VALUES (0)",
        )(session)
    return _normal_ends(subject, _conflict)


def _conflict(session: Session) -> None:
    add_next = _execute("INSERT INTO picky SELECT max(n) + 1 FROM picky")
    add_next(session)
    with suppress(SQLAlchemyError):
        _execute("INSERT INTO picky VALUES (0)")(session)
    add_next(session)


def _next_fails(subject: Subject) -> int:
    reference = "REFERENCES parent DEFERRABLE INITIALLY DEFERRED"
    with subject.unit() as session:
        _execute(
            "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
            f"CREATE TABLE child (parent INTEGER {reference})",
        )(session)
    _ends_normally(subject.unit, _execute("INSERT INTO child VALUES (1)"))
    return int(not _ends_normally(subject.unit, _execute("INSERT INTO parent VALUES (2)")))


def _rows_left(subject: Subject) -> int:
    """Roll back around a session that commits, as fixtures of tests do; return what is left."""
    with subject.engine.begin() as connection:
        connection.execute(sql("CREATE TABLE fixture (n INTEGER)"))
    with subject.engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            _execute("INSERT INTO fixture VALUES (1)")(session)
            session.commit()
        outer.rollback()
    with subject.engine.connect() as connection:
        return int(connection.execute(sql("SELECT count(*) FROM fixture")).scalar_one())
