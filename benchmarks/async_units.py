"""What one asynchronous unit of work on PostgreSQL costs the processor, against plain SQLAlchemy.

The server runs in processes of its own, so that what is taken is the client's alone. Both
variants of a pair run on one event loop, in alternating rounds. Processor time is noisy, so the
instructions are counted as well, as for synchronous units, where valgrind is there.
"""

import asyncio
import gc
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple

from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from benchmarks._callgrind import count
from benchmarks._model import FIRST, Item
from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Report, Table, ratios

DRIVERS = ("asyncpg", "psycopg")
WARM_UP = 50
COUNTED = 100

Work = Callable[[], Awaitable[object]]
_Context = AbstractAsyncContextManager[AsyncSession]


class Pair(NamedTuple):
    """A unit of ours, what it is compared with, and how much of that it may cost."""

    name: str
    ours: Work
    theirs: Work
    at_most: float | None


def run(*, url: str | None, short: bool) -> Report:
    """Take the processor time of each pair of units on each driver."""
    rounds, units = (3, 30) if short else (15, 200)
    report = Report("async units: processor time against plain SQLAlchemy")
    table = Table("processor µs per unit", ["unit", "ours", "theirs"])
    with empty_database(url) as database:
        for driver in DRIVERS:
            address = text(database.set(drivername=f"postgresql+{driver}"))
            with Units(address) as compared:
                for pair in compared.pairs(is_asyncpg=driver == "asyncpg"):
                    name = f"{driver}: {pair.name}"
                    ours, theirs = (
                        partial(compared.microseconds, work, units)
                        for work in (pair.ours, pair.theirs)
                    )
                    ratio, our, their = ratios(ours, theirs, rounds)
                    report.figures.append(Figure.spread(name, ratio, at_most=pair.at_most))
                    table.rows.append([name, f"{our.median:.0f}", f"{their.median:.0f}"])
            if shutil.which("valgrind") and not short:
                report.tables.append(_counted(driver, address))
    report.tables.insert(0, table)
    return report


def _counted(driver: str, address: str) -> Table:
    """Count the instructions of each variant of each pair."""
    table = Table(f"{driver}: thousand instructions per unit", ["unit", "ours", "theirs", "ratio"])
    names = [name for name, *_ in _PAIRS]
    program = [sys.executable, "-m", "benchmarks.async_units", address]
    parts = count(program, 2 * len(names))
    for name, ours, theirs in zip(names, parts[::2], parts[1::2], strict=True):
        cells = (f"{part / COUNTED / 1e3:.0f}" for part in (ours, theirs))
        table.rows.append([name, *cells, f"{ours / theirs:.3f}"])
    return table


class Units:
    """Units of work on one event loop, ours and by hand."""

    def __init__(self, url: str) -> None:
        # Not at the top: what this import installs must not run in the processes of the others.
        from sessionscope import AsyncDatabase

        self._runner = asyncio.Runner()
        self._database = AsyncDatabase(url)
        self._engines = [
            create_async_engine(url),
            create_async_engine(url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True),
        ]
        plain, autocommit = (_factory(engine) for engine in self._engines)
        self._begin, self._autocommit = plain.begin, autocommit

    def __enter__(self) -> "Units":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._database.dispose())
        for engine in self._engines:
            self._runner.run(engine.dispose())
        self._runner.close()

    def pairs(self, *, is_asyncpg: bool) -> list[Pair]:
        """Return what is compared; the targets are asyncpg's."""
        write = self._database.begin
        ours_read = partial(_read, partial(write, read_only=True))
        ours_run = partial(self._database.run, _add)
        works = [
            (ours_read, partial(_read, self._begin)),
            (ours_read, partial(_read, self._autocommit)),
            (partial(_insert, write), partial(_insert, self._begin)),
            (ours_run, partial(_insert, self._begin)),
        ]
        return [
            Pair(name, ours, theirs, at_most if is_asyncpg else None)
            for (name, at_most), (ours, theirs) in zip(_PAIRS, works, strict=True)
        ]

    def counted(self, work: Work) -> None:
        """Run some units between two marks for callgrind."""
        self._runner.run(_between_marks(work))

    def microseconds(self, work: Work, units: int) -> float:
        """Return the processor time of one unit."""
        return self._runner.run(_time(work, units))


_PAIRS = (
    ("read / begin()", 0.65),
    ("read / AUTOCOMMIT", 1.0),
    ("INSERT / begin()", 1.02),
    ("INSERT by run() / begin()", 0.96),
)


def _count(address: str) -> None:
    """Run what callgrind counts: each variant of each pair between two marks."""
    with Units(address) as compared:
        for pair in compared.pairs(is_asyncpg=True):
            for work in (pair.ours, pair.theirs):
                compared.microseconds(work, WARM_UP)
                gc.collect()
                compared.counted(work)


def _factory(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


async def _time(work: Work, units: int) -> float:
    for _ in range(WARM_UP):
        await work()
    start = time.process_time()
    for _ in range(units):
        await work()
    return (time.process_time() - start) / units * 1e6


async def _between_marks(work: Work) -> None:
    os.getppid()
    for _ in range(COUNTED):
        await work()
    os.getppid()


async def _read(unit: Callable[..., _Context]) -> None:
    async with unit() as session:
        (await session.scalars(FIRST)).one()


async def _insert(unit: Callable[..., _Context]) -> None:
    async with unit() as session:
        session.add(Item(name="inserted"))


def _add(session: Session) -> None:
    session.add(Item(name="inserted"))


if __name__ == "__main__":
    _count(sys.argv[1])
