"""How costs grow: with the objects a session holds, with units at once, with idle sessions.

Each peer runs in a process of its own, which prints what it measured as JSON.
"""

import json
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from benchmarks._environments import HERE, CannotRun, python_of, why
from benchmarks._model import Item, fill
from benchmarks._peers import ENVIRONMENTS, PEERS, Peer
from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Plot, Report, Spread, Table

OBJECTS = (1, 10, 100, 1000)
UNITS = (1, 5, 15, 50, 150, 500)
IDLE = 500
QUERY_SECONDS = 0.005
POOL = {"pool_size": 5, "max_overflow": 10}
RIVAL = "sessionmaker.begin"

Measured = dict[str, Any]


def run(*, url: str | None, short: bool) -> Report:
    """Measure every peer in turn."""
    report = Report("growth: with objects, units at once, and idle sessions")
    failed = Table("Could not run", ["peer", "error"])
    measured: dict[str, Measured] = {}
    rounds, seconds = (3, 0.2) if short else (15, 1.0)
    with empty_database(url) as database:
        for peer in PEERS:
            try:
                measured[peer] = _in_child(peer, text(database), rounds, seconds)
            except (CannotRun, subprocess.CalledProcessError) as error:
                said = why(error)
                failed.rows.append([peer, said])
    report.tables.extend([_objects(measured), _at_once(measured), _idle(measured), failed])
    report.plots.append(_plot(measured))
    report.figures.extend(_headlines(measured))
    return report


def _in_child(peer: str, url: str, rounds: int, seconds: float) -> Measured:
    python = python_of(ENVIRONMENTS.get(peer, HERE))
    command = [python, "-m", "benchmarks.growth", peer, url, str(rounds), str(seconds)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: Measured = json.loads(told.stdout.splitlines()[-1])
    return measured


def _objects(measured: dict[str, Measured]) -> Table:
    header = ["peer", *(f"{count} held" for count in OBJECTS)]
    table = Table("Processor µs of ending a unit that has read objects (in-memory SQLite)", header)
    for peer, found in measured.items():
        spreads = [Spread.of(found["objects"][str(count)]) for count in OBJECTS]
        table.rows.append([peer, *(f"{s.median:.0f} ({s.low:.0f}-{s.high:.0f})" for s in spreads)])
    return table


def _at_once(measured: dict[str, Measured]) -> Table:
    title = "Units/s (p99 ms) with so many threads on a pool of 5+10, a query of 5 ms"
    table = Table(title, ["peer", *map(str, UNITS), "errors"])
    for peer, found in measured.items():
        rows = [found["units"][str(count)] for count in UNITS]
        cells = [f"{row['rate']:.0f} ({row['p99']:.0f})" for row in rows]
        table.rows.append([peer, *cells, str(sum(row["errors"] for row in rows))])
    return table


def _idle(measured: dict[str, Measured]) -> Table:
    table = Table("Memory of one open unit that has sent nothing", ["peer", "bytes"])
    for peer, found in measured.items():
        table.rows.append([peer, f"{found['memory']:.0f}"])
    return table


def _plot(measured: dict[str, Measured]) -> Plot:
    plot = Plot("units-at-once", "Units at once, pool 5+10, a query of 5 ms", "threads", "units/s")
    for peer, found in measured.items():
        rates = [(count, found["units"][str(count)]["rate"]) for count in UNITS]
        plot.lines[peer] = [(float(count), Spread(rate, rate, rate)) for count, rate in rates]
    return plot


def _headlines(measured: dict[str, Measured]) -> list[Figure]:
    if not {"sessionscope", RIVAL} <= measured.keys():
        return []
    ours, theirs = measured["sessionscope"], measured[RIVAL]
    pairs = zip(ours["objects"]["1000"], theirs["objects"]["1000"], strict=True)
    ending = Spread.of(our / their for our, their in pairs)
    most = [found["units"][str(UNITS[-1])]["rate"] for found in (ours, theirs)]
    return [
        Figure.spread(f"end of a unit with 1000 objects: ours / {RIVAL}", ending),
        Figure(f"units/s with {UNITS[-1]} threads: ours / {RIVAL}", most[0] / most[1]),
        Figure(f"memory of an idle unit: ours / {RIVAL}", ours["memory"] / theirs["memory"]),
    ]


def _child(name: str, url: str, rounds: int, seconds: float) -> None:
    """Measure one peer in this process and print it."""
    make = PEERS[name]
    units = {count: _rush(make(url, **POOL), count, seconds) for count in UNITS}
    memory = _memory(make(url, pool_size=IDLE, max_overflow=0))
    objects = _endings(make("sqlite://"), rounds)
    print(json.dumps({"objects": objects, "units": units, "memory": memory}))


def _endings(peer: Peer, rounds: int) -> dict[int, list[float]]:
    """Return the processor µs from the last use of a unit's session to its end."""
    with peer.unit() as session:
        fill(session, commit=False)
        session.add_all([Item(name="held") for _ in range(max(OBJECTS))])
        session.commit()
    _ending(peer, 1)
    return {count: [_ending(peer, count) for _ in range(rounds)] for count in OBJECTS}


def _ending(peer: Peer, count: int) -> float:
    with peer.unit() as session:
        held = session.scalars(select(Item).limit(count)).all()
        assert len(held) == count
        start = time.process_time()
        if not peer.commits:
            session.commit()
    return (time.process_time() - start) * 1e6


def _memory(peer: Peer) -> float:
    """Return the bytes per unit that is open at the same time as many others."""
    for _ in range(10):
        with peer.unit():
            pass
    tracemalloc.start()
    # Each in a context of its own, as each request has one.
    flows = [Context() for _ in range(IDLE)]
    before, _ = tracemalloc.get_traced_memory()
    opened = [flow.run(peer.unit) for flow in flows]
    sessions = [flow.run(unit.__enter__) for flow, unit in zip(flows, opened, strict=True)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({id(session) for session in sessions}) == IDLE
    for flow, unit in zip(flows, opened, strict=True):
        flow.run(unit.__exit__, None, None, None)
    peer.dispose()
    return (after - before) / IDLE


def _rush(peer: Peer, count: int, seconds: float) -> dict[str, float]:
    """Let *count* threads do one unit after the other."""
    units: list[tuple[float, bool]] = []
    errors: list[Exception] = []
    ends: list[float] = []
    # One end for all: the last threads start long after the first.
    together = threading.Barrier(count, lambda: ends.append(time.perf_counter() + seconds))
    work = partial(_repeat, peer, together, ends, units, errors)
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peer.dispose()
    # What was under way at the end counts for the times, not for the rate.
    rate = sum(in_time for _, in_time in units) / seconds
    times = sorted(taken for taken, _ in units)
    p99 = times[int(0.99 * (len(times) - 1))] if times else float("inf")
    return {"rate": rate, "p99": p99 * 1e3, "errors": len(errors)}


def _repeat(
    peer: Peer,
    together: threading.Barrier,
    ends: list[float],
    units: list[tuple[float, bool]],
    errors: list[Exception],
) -> None:
    together.wait()
    while (start := time.perf_counter()) < ends[0]:
        try:
            _sleep(peer.unit)
        except Exception as error:  # each peer has errors of its own
            errors.append(error)
        else:
            finished = time.perf_counter()
            units.append((finished - start, finished <= ends[0]))


def _sleep(unit: Callable[[], Any]) -> None:
    with unit() as session:
        assert isinstance(session, Session)
        session.execute(select(func.pg_sleep(QUERY_SECONDS)))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
