"""Very many units of work of all sorts: what the process and the server hold must not grow.

    python -m tests.faults.soak --units 1000000 --seed 1

Threads, and tasks of an event loop, do so many units each, against a server of their own: reads
and writes by run() and begin(), savepoints, errors that are raised or swallowed, hooks,
inner commits, deadlines that are met and missed, connections that are lost, cancellations.
Twenty times on the way everything that is held is counted.
"""

import argparse
import asyncio
import gc
import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from benchmarks._report import Figure, Report, Table, show
from sessionscope import AsyncDatabase, Database, after_commit
from sessionscope.exc import DeadlineExceeded, TransactionDoomed
from sessionscope.testing import PostgresServer
from tests.faults.breaking import ask, backends

WORKERS = 8
LIMIT = 10
_SAMPLES = 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Seconds that what has ended may take to be gone.
_PATIENCE = 2.0
# At four thousand bytes per thousand units, a million units leave four megabytes behind.
SLOPE = 4096.0

_READ = text("SELECT value FROM number WHERE id = :id")
_WRITE = text("UPDATE number SET value = value + 1 WHERE id = :id")
_WRONG = text("INSERT INTO number (id, value) VALUES (:id, 0)")
_SLEEP = text("SELECT pg_sleep(5)")
_END_PERHAPS = text(
    "SELECT CASE WHEN random() < 0.5 THEN pg_terminate_backend(pg_backend_pid()) END"
)


class Refused(Exception):
    """A unit's own error."""


@dataclass(frozen=True)
class Unit:
    """One unit of work: what it does, and how it is called."""

    work: Callable[..., object]
    by_run: bool = False
    read_only: bool = False
    timeout: float | None = None
    isolation_level: str | None = None
    raises: type[BaseException] | None = None
    cancelled: bool = False  # where there are tasks


def read(session: Session, row: int) -> None:
    session.execute(_READ, {"id": row}).scalar_one()


def write(session: Session, row: int) -> None:
    read(session, row)
    session.execute(_WRITE, {"id": row})


def write_and_refuse(session: Session, row: int) -> None:
    write(session, row)
    raise Refused


def fail_in_savepoint(session: Session, row: int) -> None:
    write(session, row)
    with suppress(IntegrityError), session.begin_nested():
        session.execute(_WRONG, {"id": row})
    read(session, row)


def swallow(session: Session, row: int) -> None:
    with suppress(IntegrityError):
        session.execute(_WRONG, {"id": row})


def commit_inside(session: Session, row: int) -> None:
    write(session, row)
    session.commit()
    write(session, row)


def with_hooks(session: Session, row: int) -> None:
    write(session, row)
    after_commit(session, int)


def take_too_long(session: Session, row: int) -> None:
    write(session, row)
    session.execute(_SLEEP)


def lose_connection(session: Session, row: int) -> None:
    write(session, row)
    session.execute(_END_PERHAPS)


def wait(session: Session, row: int) -> None:
    session.execute(_SLEEP)


# Each with its weight.
UNITS: dict[Unit, int] = {
    Unit(read, read_only=True): 3000,
    Unit(read): 1000,
    Unit(write, by_run=True): 2000,
    Unit(write): 1500,
    Unit(write, timeout=30.0): 500,
    Unit(write, by_run=True, isolation_level="SERIALIZABLE"): 300,
    Unit(write_and_refuse, raises=Refused): 500,
    Unit(fail_in_savepoint): 400,
    Unit(swallow, raises=TransactionDoomed): 200,
    Unit(commit_inside): 300,
    Unit(with_hooks): 300,
    Unit(lose_connection, by_run=True): 20,
    Unit(take_too_long, timeout=0.02, raises=DeadlineExceeded): 20,
    Unit(wait, raises=asyncio.CancelledError, cancelled=True): 20,
}


@dataclass(frozen=True)
class Sample:
    """What is held after so many units."""

    units: int
    seconds: float
    rss: int
    objects: int
    threads: int
    tasks: int
    descriptors: int
    connections: int

    @classmethod
    def take(cls, units: int, seconds: float, tasks: int, url: str) -> "Sample":
        connections = len(backends(url))
        gc.collect()
        return cls(
            units=units,
            seconds=seconds,
            rss=int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
            objects=len(gc.get_objects()),
            threads=threading.active_count(),
            tasks=tasks,
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            connections=connections,
        )


class Plan:
    """Which units follow each other, the same for each seed, and what became of them."""

    def __init__(self, seed: int, *, tasks: bool) -> None:
        self._random = Random(seed)
        self._units = [unit for unit in UNITS if tasks or not unit.cancelled]
        self._weights = [UNITS[unit] for unit in self._units]
        self.wrong: Counter[str] = Counter()

    def draw(self, count: int) -> Iterator[tuple[Unit, int]]:
        """The next *count* units, and the rows that they are about."""
        for unit in self._random.choices(self._units, self._weights, k=count):
            yield unit, self._random.randint(1, 100)

    def note(self, unit: Unit, error: BaseException | None) -> None:
        """Compare how a unit has ended with how it was meant to end."""
        if type(error) is not (unit.raises or type(None)):
            self.wrong[f"{unit.work.__name__}: {error!r}"[:200]] += 1


def in_threads(units: int, seed: int, url: str, count: int = _SAMPLES) -> tuple[list[Sample], Plan]:
    """Do the units in threads, with psycopg."""
    plan = Plan(seed, tasks=False)
    samples = []
    began = time.monotonic()
    with Database(url, pool_size=WORKERS, max_overflow=LIMIT - WORKERS) as database:
        base = threading.active_count() + 1  # with the one that watches deadlines
        for number in range(1, count + 1):
            todo, lock = plan.draw(units // count), threading.Lock()
            workers = [
                threading.Thread(target=_work, args=(database, plan, todo, lock))
                for _ in range(WORKERS)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            _until(lambda: threading.active_count() <= base)
            samples.append(Sample.take(number * (units // count), time.monotonic() - began, 0, url))
    return samples, plan


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def _work(
    database: Database, plan: Plan, todo: Iterator[tuple[Unit, int]], lock: threading.Lock
) -> None:
    while True:
        with lock:
            unit, row = next(todo, (None, 0))
        if unit is None:
            return
        error = None
        try:
            _call(database, unit, row)
        except BaseException as raised:
            error = raised
        plan.note(unit, error)


def _call(database: Database, unit: Unit, row: int) -> None:
    if unit.by_run and unit.isolation_level is None:
        database.run(unit.work, row)
    elif unit.by_run:
        again: Any = database.with_session(isolation_level=unit.isolation_level)(unit.work)
        again(row)
    else:
        with database.begin(read_only=unit.read_only, timeout=unit.timeout) as session:
            unit.work(session, row)


async def in_tasks(
    units: int, seed: int, url: str, count: int = _SAMPLES
) -> tuple[list[Sample], Plan]:
    """Do the units in tasks, with the driver of *url*."""
    plan = Plan(seed, tasks=True)
    samples = []
    began = time.monotonic()
    async with AsyncDatabase(url, pool_size=WORKERS, max_overflow=LIMIT - WORKERS) as database:
        for number in range(1, count + 1):
            todo = plan.draw(units // count)
            async with asyncio.TaskGroup() as group:
                for _ in range(WORKERS):
                    group.create_task(_work_async(database, plan, todo))
            await _until_alone()
            seconds, tasks = time.monotonic() - began, len(asyncio.all_tasks())
            samples.append(Sample.take(number * (units // count), seconds, tasks, url))
    return samples, plan


async def _until_alone() -> None:
    end = time.monotonic() + _PATIENCE
    while len(asyncio.all_tasks()) > 1 and time.monotonic() < end:
        await asyncio.sleep(0.01)


async def _work_async(
    database: AsyncDatabase, plan: Plan, todo: Iterator[tuple[Unit, int]]
) -> None:
    for unit, row in todo:
        error = None
        call = _call_async(database, unit, row)
        try:
            if unit.cancelled:
                await _cancelled(call)
            else:
                await call
        except BaseException as raised:
            error = raised
        plan.note(unit, error)


async def _cancelled(call: Awaitable[None]) -> None:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.01)
    task.cancel()
    await task


async def _call_async(database: AsyncDatabase, unit: Unit, row: int) -> None:
    if unit.by_run and unit.isolation_level is None:
        await database.run(unit.work, row)
    elif unit.by_run:
        again: Any = database.with_session(isolation_level=unit.isolation_level)(unit.work)
        await again(row)
    else:
        async with database.begin(read_only=unit.read_only, timeout=unit.timeout) as session:
            await session.run_sync(unit.work, row)


def run(units: int, seed: int, server: PostgresServer, count: int = _SAMPLES) -> Report:
    """Do so many *units* of each kind, and compare what is held at *count* times on the way."""
    report = Report(f"soak: {units} units each, seed {seed}")
    for kind in ("threads", "psycopg", "asyncpg"):
        url = server.create_database()
        ask(url, "CREATE TABLE number (id int PRIMARY KEY, value bigint NOT NULL)")
        ask(url, "INSERT INTO number SELECT id, 0 FROM generate_series(1, 100) AS id")
        if kind == "threads":
            samples, plan = in_threads(units, seed, url, count)
        else:
            driver = make_url(url).set(drivername=f"postgresql+{kind}")
            url_of_tasks = driver.render_as_string(hide_password=False)
            samples, plan = asyncio.run(in_tasks(units, seed, url_of_tasks, count))
        report.figures.extend(_figures(kind, samples, plan))
        report.tables.append(_table(kind, samples))
    return report


def _figures(kind: str, samples: list[Sample], plan: Plan) -> Iterator[Figure]:
    last = samples[-1]
    yield Figure(f"{kind}: units", last.units / last.seconds, "per second")
    note = ", ".join(f"{what} ({times})" for what, times in plan.wrong.most_common(3))
    yield Figure(
        f"{kind}: not as they should be", plan.wrong.total(), "units", at_most=0, note=note
    )
    warm = samples[len(samples) // 2 :]
    # What is made once is there by then.
    for name in ("threads", "tasks"):
        growth = getattr(last, name) - max(getattr(sample, name) for sample in warm[:-1][:3])
        yield Figure(f"{kind}: more {name}", growth, "", at_most=0)
    beside = [sample.descriptors - sample.connections for sample in warm]
    yield Figure(f"{kind}: more descriptors", beside[-1] - max(beside[:-1][:3]), "", at_most=0)
    most = max(sample.connections for sample in samples)
    yield Figure(f"{kind}: connections", most, "at most", at_most=LIMIT)
    # Each sample is an object itself.
    held = [(sample.units, sample.objects - number) for number, sample in enumerate(warm)]
    objects = _slope(held) * 1000
    yield Figure(f"{kind}: more objects", objects, "per 1,000 units", at_most=5.0)
    rss = _slope([(sample.units, sample.rss) for sample in warm]) * 1000
    note = f"{warm[0].rss / 2**20:.1f} MiB, then {last.rss / 2**20:.1f} MiB"
    yield Figure(f"{kind}: RSS", rss, "bytes per 1,000 units", at_most=SLOPE, note=note)


def _slope(points: list[tuple[int, int]]) -> float:
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _table(kind: str, samples: list[Sample]) -> Table:
    names = list(vars(samples[0]))
    rows = [[f"{value:.0f}" for value in vars(sample).values()] for sample in samples]
    return Table(f"{kind}, on the way", names, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with PostgresServer() as server:
        report = run(arguments.units, arguments.seed, server)
    show(report)
    misses = [figure.name for figure in report.figures if figure.verdict == "MISS"]
    print(
        f"\n{report.name}: {', '.join(misses) or 'nothing'} amiss "
        f"(python -m tests.faults.soak --units {arguments.units} --seed {arguments.seed})"
    )
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
