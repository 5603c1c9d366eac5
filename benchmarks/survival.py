"""What becomes of units of work while connections are killed, servers restarted and COMMITs lost.

Writers append rows with unique names. What they were told (stored, failed, unknown) is compared
with the table: a row that was acknowledged and is not there is lost, one that is there twice was
applied twice, one that failed and is there was a lie.
"""

import multiprocessing
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psycopg
from sqlalchemy import create_engine, literal, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from benchmarks import _async_survival
from benchmarks._entries import Base, Entry, Number, Told
from benchmarks._postgres import conninfo
from benchmarks._report import Figure, Report
from sessionscope import Database
from sessionscope.exc import CommitUnknown, DeadlineExceeded
from sessionscope.testing import Fault, FaultProxy, PostgresServer

_WRITERS = 4
_PATIENCE = 60.0


def run(*, url: str | None, short: bool) -> Report:
    """Break things, and count."""
    report = Report("survival: of units of work, while things break")
    with PostgresServer() as server:
        report.figures.extend(_killed(server, seconds=3.0 if short else 15.0))
        report.figures.extend(_restarted(server, seconds=4.0 if short else 8.0))
        report.figures.extend(_ambiguous(server, 10 if short else 1000))
    with PostgresServer() as server:
        report.figures.extend(_silent(server))
        report.figures.extend(_forked(server))
        report.figures.extend(_incremented(server))
        report.figures.extend(_cancelled(server, 20 if short else 200))
    report.figures.extend(_incremented_on_mariadb())
    report.figures.extend(_incremented_in_a_file(short=short))
    return report


def _killed(server: PostgresServer, *, seconds: float) -> Iterator[Figure]:
    """Kill a backend of the writers every 20 ms."""
    for by_run in (True, False):
        with _writers(server, by_run=by_run) as (told, database, url):
            kills = _kill_backends(url, seconds)
        judged = told.judge(_found(database))
        how = "run()" if by_run else "begin()"
        note = f"{kills} backends killed in {seconds:g} s, {_WRITERS} writers; {_shown(told)}"
        yield Figure(f"kills, {how}: acknowledged", judged["acknowledged"], "units", note=note)
        for what in ("lost", "twice", "failed but stored"):
            yield Figure(f"kills, {how}: {what}", judged[what], "units", at_most=0)
        for what in ("failed", "unknown"):
            most = 0 if by_run else None
            yield Figure(f"kills, {how}: {what}", judged[what], "units", at_most=most)
        database.dispose()


def _restarted(server: PostgresServer, *, seconds: float) -> Iterator[Figure]:
    """A20: stop the server in the middle, and start it again."""
    with _writers(server, by_run=True) as (told, database, _):
        sleep(seconds / 2)
        stopped = monotonic()
        server.restart()
        down = monotonic() - stopped
        sleep(seconds / 2)
    judged = told.judge(_found(database))
    note = f"down for {down:.2f} s; {_shown(told)}"
    yield Figure("restart, run(): acknowledged", judged["acknowledged"], "units", note=note)
    for what in ("failed", "unknown", "lost", "twice"):
        yield Figure(f"restart, run(): {what}", judged[what], "units", at_most=0)
    database.dispose()


@contextmanager
def _writers(server: PostgresServer, *, by_run: bool) -> Iterator[tuple[Told, Database, str]]:
    url = server.create_database()
    database = Database(url)
    Base.metadata.create_all(database.engine)
    told, stop = Told(), threading.Event()
    names = map(str, count())
    threads = [
        threading.Thread(target=_write, args=(database, told, names, stop, by_run))
        for _ in range(_WRITERS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield told, database, url
    finally:
        stop.set()
        for thread in threads:
            thread.join(_PATIENCE)


def _write(
    database: Database, told: Told, names: Iterator[str], stop: threading.Event, by_run: bool
) -> None:
    while not stop.is_set():
        name = next(names)
        try:
            if by_run:
                database.run(_append, name)
            else:
                with database.begin() as session:
                    _append(session, name)
        except CommitUnknown as error:
            told.unknown.append(name)
            told.errors[type(error).__name__] += 1
        except Exception as error:
            told.failed.append(name)
            told.errors[type(error).__name__] += 1
        else:
            told.stored.append(name)


def _append(session: Session, name: str) -> None:
    session.add(Entry(name=name))


def _found(database: Database) -> Counter[str]:
    with database.begin(read_only=True) as session:
        return Counter(session.scalars(select(Entry.name)))


def _shown(told: Told) -> str:
    return ", ".join(f"{count} {name}" for name, count in told.errors.items()) or "no error"


def _kill_backends(url: str, seconds: float) -> int:
    kills = 0
    until = monotonic() + seconds
    with psycopg.connect(conninfo(make_url(url)), autocommit=True) as connection:
        while monotonic() < until:
            row = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "ORDER BY random() LIMIT 1) AS victim"
            ).fetchone()
            kills += row[0] if row else 0
            sleep(0.02)
    return kills


def _ambiguous(server: PostgresServer, times: int) -> Iterator[Figure]:
    """Cut the connection before, and after, the server has committed."""
    url = server.create_database()
    with Database(url) as direct:
        Base.metadata.create_all(direct.engine)
    faults: tuple[Fault, ...] = ("cut before", "cut after")
    for fault in faults:
        right = 0
        with (
            FaultProxy("127.0.0.1", make_url(url).port or 5432) as proxy,
            Database(proxy.through(url)) as database,
        ):
            for number in range(times):
                name, retried = f"{fault} {number}", database.stats().retried
                proxy.aim(fault, b"COMMIT")
                database.run(_append, name)
                again = database.stats().retried - retried
                right += _found(database)[name] == 1 and again == (fault == "cut before")
        yield Figure(f"{fault} COMMIT: resolved right", right, f"of {times}", at_least=times)


def _silent(server: PostgresServer) -> Iterator[Figure]:
    """A18: a server that takes everything and answers nothing."""
    url = server.create_database()
    late = []
    with (
        FaultProxy("127.0.0.1", make_url(url).port or 5432) as proxy,
        Database(proxy.through(url)) as database,
    ):
        for _ in range(10):
            proxy.heal()
            started = monotonic()
            try:
                with database.begin(timeout=0.5) as session:
                    session.execute(select(literal(1)))
                    proxy.go_silent()
                    session.execute(select(literal(1)))
            except DeadlineExceeded:
                late.append(monotonic() - started - 0.5)
    yield Figure("silent server: told", len(late), "of 10", at_least=10)
    yield Figure(
        "silent server: latest after the timeout", max(late) * 1e3, "ms", at_most=100,
        low=min(late) * 1e3, high=max(late) * 1e3,
    )  # fmt: skip


def _forked(server: PostgresServer) -> Iterator[Figure]:
    """A11: four forked children ask 200 questions each over an engine that was used before."""
    with Database(server.create_database()) as database:
        _right_answers(database, 10)
        right = _sum_of_children(4, partial(_right_answers, database, 200))
    yield Figure("forked children: right answers", right, "of 800", at_least=800)


def _right_answers(database: Database, times: int) -> int:
    right = 0
    for number in range(times):
        wanted = os.getpid() * 1000 + number
        with database.begin(read_only=number % 2 == 0) as session:
            right += session.scalar(select(literal(wanted))) == wanted
    return right


def _incremented(server: PostgresServer) -> Iterator[Figure]:
    """A12: ten threads increment one number."""
    with Database(server.create_database()) as database:
        Base.metadata.create_all(database.engine)
        with database.begin() as session:
            session.add(Number(id=1, value=0))
        increment = database.with_session(isolation_level="SERIALIZABLE")(_increment)
        errors = _in_threads(10, lambda: [increment() for _ in range(20)])
        value, retried = database.run(_value), database.stats().retried
    note = f"{len(errors)} errors, {retried} retries"
    yield Figure("SERIALIZABLE increments", value, "of 200", at_least=200, note=note)
    for driver in ("asyncpg", "psycopg"):
        url = _with_a_number(server)
        value, failed, retried = _async_survival.incremented(
            make_url(url).set(drivername=f"postgresql+{driver}")
        )
        note = f"{failed} errors, {retried} retries"
        yield Figure(f"{driver}, tasks: increments", value, "of 200", at_least=200, note=note)


def _with_a_number(server: PostgresServer) -> str:
    """Return a new database with the tables, and the number."""
    url = server.create_database()
    with Database(url) as database:
        Base.metadata.create_all(database.engine)
        with database.begin() as session:
            session.add(Number(id=1, value=0))
    return url


def _cancelled(server: PostgresServer, times: int) -> Iterator[Figure]:
    """A14: cancel units of tasks, many of them during COMMIT."""
    for driver in ("asyncpg", "psycopg"):
        url = make_url(_with_a_number(server)).set(drivername=f"postgresql+{driver}")
        with FaultProxy("127.0.0.1", url.port or 5432) as proxy:
            proxy.set_delay(_async_survival.DELAY)
            told, found = _async_survival.cancelled(url.set(port=proxy.port), times)
        judged = told.judge(found)
        note = f"{len(told.failed)} of {times} were cancelled in time"
        yield Figure(
            f"{driver}, cancelled: acknowledged", judged["acknowledged"], "units", note=note
        )
        for what in ("unknown", "lost", "twice", "failed but stored"):
            yield Figure(f"{driver}, cancelled: {what}", judged[what], "units", at_most=0)


def _incremented_on_mariadb() -> Iterator[Figure]:
    """A12 on MariaDB, where one listens on localhost: ten threads lock a row after reading another.

    Half of them go the other way round, so that there are deadlocks.
    """
    url = make_url("mysql+pymysql://root@127.0.0.1:3306")
    name = f"sessionscope_bench_{os.getpid()}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
    except OperationalError:
        return
    try:
        with Database(url.set(database=name)) as database:
            Base.metadata.create_all(database.engine)
            with database.begin() as session:
                session.add_all([Number(id=1, value=0), Number(id=2, value=0)])
            turns = count()

            def work() -> None:
                first = next(turns) % 2 + 1
                for _ in range(20):
                    database.run(_increment_both, first)

            errors = _in_threads(10, work)
            value, retried = database.run(_value), database.stats().retried
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name}"))
        server.dispose()
    note = f"{len(errors)} errors, {retried} retries"
    yield Figure("MariaDB, FOR UPDATE: increments", value, "of 200", at_least=200, note=note)


def _increment_both(session: Session, first: int) -> None:
    for number in (first, 3 - first):
        query = select(Number).where(Number.id == number).with_for_update()
        session.scalars(query).one().value += 1
        session.flush()


def _increment(session: Session) -> None:
    counter = session.get_one(Number, 1)
    counter.value += 1


def _value(session: Session) -> int:
    return session.get_one(Number, 1).value


def _in_threads(number: int, work: Callable[[], object]) -> list[BaseException]:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def _incremented_in_a_file(*, short: bool) -> Iterator[Figure]:
    """A15: eight processes increment one number in one SQLite file."""
    times = 10 if short else 100
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'counter.db'}"
        with Database(url) as database:
            Base.metadata.create_all(database.engine)
            with database.begin() as session:
                session.add(Number(id=1, value=0))
            done = _sum_of_children(8, partial(_increments, database, times))
            value = database.run(_value)
    yield Figure(
        "SQLite, 8 processes: increments", value, f"of {8 * times}", at_least=8 * times,
        note=f"{done} acknowledged",
    )  # fmt: skip


def _increments(database: Database, times: int) -> int:
    for _ in range(times):
        database.run(_increment)
    return times


def _sum_of_children(number: int, work: Callable[[], int]) -> int:
    """Return the sum of what *work* returns in so many forked children."""
    fork = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        pipes = [fork.Pipe(duplex=False) for _ in range(number)]
        children = [fork.Process(target=_send, args=(work, writer)) for _, writer in pipes]
        for child in children:
            child.start()
            stack.callback(child.join)
        for _, writer in pipes:
            writer.close()
        return sum(reader.recv() if reader.poll(_PATIENCE) else 0 for reader, _ in pipes)


def _send(work: Callable[[], int], writer: Any) -> None:
    writer.send(work())
