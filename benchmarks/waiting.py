"""How well `sessionscope doctor` predicts waiting: its simulation beside units that do wait.

Units arrive by chance, in threads, and hold one of five connections for 20 ms or 50 ms of
`pg_sleep()`. What the doctor is told is what its user would know: the rate, and how long units hold
a connection.
"""

import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.sql.functions import Function, func

from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Report, Table
from sessionscope import Database
from sessionscope.doctor._queue import simulate
from sessionscope.events import Event, UnitEnded, UnitWaited

_SLOTS = 5
_HOLDS = (0.02, 0.05)
_THREADS = 200
# Of the slots' time. Beyond, a minute is too short for a steady mean.
_LOADS = (0.6, 0.75, 0.85)


@dataclass
class Seen:
    """What the observer was told, in seconds."""

    waits: list[float] = field(default_factory=list)
    holds: list[float] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, UnitWaited):
            self.waits.append(event.seconds)
        elif isinstance(event, UnitEnded):
            self.holds.append(event.seconds)

    @property
    def mean_wait(self) -> float:
        """Of all units: those that got their slot at once are told of no wait."""
        return sum(self.waits) / len(self.holds)


def run(*, url: str | None, short: bool) -> Report:
    """Compare the mean wait at three loads."""
    report = Report("waiting: mean wait for a slot, as predicted / as measured")
    table = Table(
        "five slots, units of 20 or 50 ms",
        ["slots busy", "units/s", "units", "hold ms", "measured ms", "predicted ms"],
    )
    with empty_database(url) as database:
        for busy in _LOADS:
            rate = busy * _SLOTS / statistics.mean(_HOLDS)
            seen, arrived = _measure(text(database), rate, seconds=2.0 if short else 60.0)
            told = simulate(_SLOTS, arrived, seen.holds, timeout=60.0)
            ratio = told.mean / seen.mean_wait
            report.figures.append(Figure(f"{busy:.0%} busy", ratio, at_least=0.75, at_most=1.25))
            table.rows.append(
                [
                    f"{told.busy:.0%}",
                    f"{arrived:.0f}",
                    str(len(seen.holds)),
                    f"{statistics.mean(seen.holds) * 1e3:.1f}",
                    f"{seen.mean_wait * 1e3:.2f}",
                    f"{told.mean * 1e3:.2f}",
                ]
            )
    report.tables.append(table)
    return report


def _measure(url: str, rate: float, seconds: float) -> tuple[Seen, float]:
    """Return what was seen, and how many units arrived per second."""
    seen = Seen()
    chance = random.Random(1)  # it guards nothing
    database = Database(url, pool_size=_SLOTS, max_overflow=0, pool_timeout=60.0, observers=[seen])
    with database, ThreadPoolExecutor(_THREADS) as threads:
        for _ in range(2 * _SLOTS):  # the connections are open before anything is measured
            threads.submit(_unit, database, 0.05)
        time.sleep(0.5)
        seen.waits.clear()
        seen.holds.clear()
        began = due = time.perf_counter()
        units = 0
        while due < began + seconds:
            due += chance.expovariate(rate)
            time.sleep(max(0.0, due - time.perf_counter()))
            threads.submit(_unit, database, chance.choice(_HOLDS))
            units += 1
        elapsed = time.perf_counter() - began
    return seen, units / elapsed


def _unit(database: Database, seconds: float) -> None:
    sleep: Function[object] = func.pg_sleep(seconds)
    with database.begin() as session:
        session.execute(select(sleep))
