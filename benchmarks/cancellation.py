"""Counts behind the promises to cancelled units of work: the bound, the outcome, the pool."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from sqlalchemy import URL, func, select

import sessionscope
from benchmarks._aimed import AIMS, Aim, Aimed, aim_at_commit, make_commit_slow
from benchmarks._cancelled import WAYS, Server, Way, hold_all, listening
from benchmarks._fuzz import UNITS, Doing, cut_everywhere
from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Report, Table
from sessionscope import AsyncDatabase

_T = TypeVar("_T")
Loop = Callable[[], asyncio.AbstractEventLoop]

DRIVERS = ("asyncpg", "psycopg")
LOOPS: dict[str, Loop] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

POOL = 5
# Seconds that a statement takes, after which it is cancelled, and until all must be quiet.
STATEMENT, CANCELLED_AFTER, QUIET_AFTER = 3.0, 0.2, 1.2


@dataclass(frozen=True)
class Kept:
    """What was seen while units of work were cancelled, and after."""

    most: int
    samples: int
    quiet_after: float
    in_use: int
    said: tuple[str, ...]

    @property
    def is_quiet(self) -> bool:
        """Whether no statement ran on, nothing is held, and nobody complained."""
        return self.quiet_after <= QUIET_AFTER and not self.in_use and not self.said


def run(*, url: str | None, short: bool) -> Report:
    """Cancel units of work in many ways and at all moments; count what is left of them."""
    report = Report("cancellation: counts of what cancelled units of work leave behind")
    with empty_database(url) as database:
        _bound(report, database, units=10 if short else 60)
        _outcomes(report, database, times=20 if short else 200)
        _moments(report, database)
        _leaks(report, database, times=1 if short else 20)
    return report


def _bound(report: Report, database: URL, *, units: int) -> None:
    table = Table("Units cancelled", ["driver", "loop", "way", "connections", "samples", "quiet s"])
    for driver, loop in _pairs():
        kept = {
            name: run_on(LOOPS[loop], keep_bound(with_driver(database, driver), way, units=units))
            for name, way in WAYS.items()
        }
        for name, seen in kept.items():
            numbers = str(seen.most), str(seen.samples), f"{seen.quiet_after:.2f}"
            table.rows.append([driver, loop, name, *numbers])
        name = f"{driver}, {loop}: {units} units cancelled in each of {len(WAYS)} ways"
        most = max(seen.most for seen in kept.values())
        left = sum(not seen.is_quiet for seen in kept.values())
        report.figures.append(Figure(f"{name}: connections of {POOL}", most, "", POOL))
        report.figures.append(Figure(f"{name}: anything left after {QUIET_AFTER} s", left, "", 0))
    report.tables.append(table)


def _outcomes(report: Report, database: URL, *, times: int) -> None:
    make_commit_slow(database)
    table = Table(
        "Cancelled near COMMIT", ["driver", "loop", "way", "ended as", "wrong", "stray", "lost"]
    )
    for driver, loop in _pairs():
        wrong = 0
        for name, aim in AIMS.items():
            seen = run_on(LOOPS[loop], _aimed(with_driver(database, driver), aim, times))
            wrong += seen.wrong + seen.stray + seen.lost
            ends = ", ".join(f"{count} {end}" for end, count in sorted(seen.ends.items()))
            counts = str(seen.wrong), str(seen.stray), str(seen.lost)
            table.rows.append([driver, loop, name, ends, *counts])
        name = f"{driver}, {loop}: {times} aimed at COMMIT in each of {len(AIMS)} ways: wrong"
        report.figures.append(Figure(name, wrong, "", 0))
    report.tables.append(table)


async def _aimed(url: str, aim: Aim, times: int) -> Aimed:
    async with AsyncDatabase(url, pool_size=POOL, max_overflow=0) as database:
        return await aim_at_commit(database, aim, times=times, seed=1)


def _moments(report: Report, database: URL) -> None:
    table = Table("Cut at every await", ["driver", "loop", "unit", "connection", "runs", "ends"])
    for driver, loop in _pairs():
        faults: list[str] = []
        for name, doing, cold in _cuts():
            cut = cut_everywhere(with_driver(database, driver), doing, cold=cold, soon=cold)
            seen = run_on(LOOPS[loop], cut)
            faults += seen.faults
            ends = ", ".join(f"{count} {end}" for end, count in sorted(Counter(seen.ends).items()))
            state = "cold" if cold else "warm"
            table.rows.append([driver, loop, name, state, str(len(seen.ends)), ends])
        name = f"{driver}, {loop}: units cut at each await in turn: anything wrong after"
        report.figures.append(Figure(name, len(faults), "", 0, note="; ".join(faults[:1])))
    report.tables.append(table)


def _cuts() -> list[tuple[str, Doing, bool]]:
    return [(name, doing, cold) for name, doing in UNITS.items() for cold in (True, False)]


def _leaks(report: Report, database: URL, *, times: int) -> None:
    for driver in DRIVERS:
        url = text(database.set(drivername=f"postgresql+{driver}"))
        ended = [leak(url) for _ in range(times)]
        safe = sum(run.returncode == 0 and "3 at once" in run.stdout for run in ended)
        warned = sum(run.stderr.count("SessionLeakWarning: The session opened") for run in ended)
        name = f"{driver}, uvloop: 3 AsyncSessions leaked to another thread's collector"
        report.figures.append(Figure(f"{name}: runs that end well", safe, "", at_least=times))
        report.figures.append(Figure(f"{name}: warnings", warned, "", 3 * times, 3 * times))


def _pairs() -> list[tuple[str, str]]:
    return [(driver, loop) for driver in DRIVERS for loop in LOOPS]


def with_driver(url: URL, driver: str) -> str:
    """Return a PostgreSQL database's URL for another driver."""
    return text(url.set(drivername=f"postgresql+{driver}"))


def run_on(loop: Loop, work: Coroutine[Any, Any, _T]) -> _T:
    """Run *work* on an event loop of its own."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)


async def keep_bound(url: str, way: Way, *, units: int) -> Kept:
    """Cancel *units* units of work, as many at once as the pool has room for."""
    async with AsyncDatabase(url, pool_size=POOL - 2, max_overflow=2) as database:
        with listening() as said, Server(database.engine.url) as server:
            await asyncio.gather(*(_cancel(database, way, units // POOL) for _ in range(POOL)))
            quiet_after = await server.rests(QUIET_AFTER + 1)
            await hold_all(database, POOL)
        in_use = database.stats().in_use
        return Kept(server.most, server.samples, quiet_after, in_use, tuple(said))


async def _cancel(database: AsyncDatabase[Any], way: Way, times: int) -> None:
    async def work() -> None:
        async with database.begin() as session:
            await session.execute(select(func.pg_sleep(STATEMENT)))

    for _ in range(times):
        await way(work, database.ping, CANCELLED_AFTER)


# The sessions are in cycles: the collector alone finds them, in the thread that runs it.
_LEAK = """
import asyncio, gc, sys, threading
import uvloop
from sqlalchemy import text
from sessionscope import AsyncDatabase

database = AsyncDatabase(sys.argv[1], pool_size=3, max_overflow=0)

async def leak():
    session = database.sessionmaker()
    await session.execute(text("SELECT 1"))
    session.info["cycle"] = session

async def hold(together):
    async with database.begin() as session:
        await session.connection()
        await together.wait()

async def main():
    gc.disable()
    for _ in range(3):
        await leak()
    collector = threading.Thread(target=gc.collect)
    collector.start()
    await asyncio.to_thread(collector.join)
    together = asyncio.Barrier(3)
    async with asyncio.timeout(5):
        await asyncio.gather(*(hold(together) for _ in range(3)))
    print("3 at once")
    await database.dispose()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def leak(url: str) -> "subprocess.CompletedProcess[str]":
    """Leak sessions in a process of its own, which has been known to crash."""
    command = [sys.executable, "-W", "always", "-c", _LEAK, url]
    source = Path(sessionscope.__file__).parents[1]
    return subprocess.run(
        command, cwd=source, check=False, capture_output=True, text=True, timeout=60
    )
