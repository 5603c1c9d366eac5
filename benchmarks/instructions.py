"""Processor instructions per unit of work on in-memory SQLite, where only Python code costs.

Each variant runs in a fresh process under callgrind, so that nothing of one is in another.
callgrind writes a part of its profile whenever `getppid` is called, and the units run between
two such calls: start-up and warm-up are in other parts. Without valgrind, each variant's
processor time is taken instead.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benchmarks._callgrind import count
from benchmarks._environments import HERE, CannotRun, python_of, why
from benchmarks._model import FIRST, Item, fill
from benchmarks._peers import ENVIRONMENTS, PEERS, Peer, Unit
from benchmarks._report import Figure, Report, Spread, Table
from benchmarks._unguarded import take_guards_away

KINDS = ("empty", "one SELECT", "one INSERT")
READ_ONLY = "sessionscope read_only"
UNGUARDED = "sessionscope unguarded"
UNGUARDED_READ_ONLY = f"{UNGUARDED} read_only"
VARIANTS = (*PEERS, READ_ONLY, UNGUARDED, UNGUARDED_READ_ONLY)
# How much the guards may cost a unit that reads.
GUARDS_AT_MOST = 1.03
WARM_UP = 20
UNITS = 100

Costs = dict[str, Spread]


def run(*, short: bool) -> Report:
    """Count what each variant costs; with *short*, take processor time as without valgrind."""
    counted = shutil.which("valgrind") is not None and not short
    measure = _callgrind if counted else partial(_processor_times, rounds=3 if short else 15)
    costs: dict[str, Costs] = {}
    failed = Table("Could not run", ["variant", "error"])
    with ThreadPoolExecutor(os.cpu_count() if counted else 1) as pool:
        running = {variant: pool.submit(measure, variant) for variant in VARIANTS}
        for variant, future in running.items():
            try:
                costs[variant] = future.result()
            except (CannotRun, subprocess.CalledProcessError) as error:
                said = why(error)
                failed.rows.append([variant, said])
    report = _report(costs, "thousand instructions" if counted else "processor µs")
    report.tables.append(failed)
    return report


def _report(costs: dict[str, Costs], unit: str) -> Report:
    report = Report(f"instructions: {unit} per unit (in-memory SQLite)")
    table = Table(f"{unit} per unit", ["variant", *KINDS])
    for variant, by_kind in costs.items():
        table.rows.append([variant, *(_cell(by_kind, kind) for kind in KINDS)])
    theirs = costs["sessionmaker.begin"]
    for kind, at_most in zip(KINDS, (None, 1.05, None), strict=True):
        ratio = costs["sessionscope"][kind].median / theirs[kind].median
        name = f"begin() / sessionmaker.begin(), {kind}"
        report.figures.append(Figure(name, ratio, at_most=at_most))
    for guarded, unguarded in (("sessionscope", UNGUARDED), (READ_ONLY, UNGUARDED_READ_ONLY)):
        ratio = costs[guarded]["one SELECT"].median / costs[unguarded]["one SELECT"].median
        name = f"{guarded}: with guards / without, one SELECT"
        report.figures.append(Figure(name, ratio, at_most=GUARDS_AT_MOST))
    report.tables.append(table)
    return report


def _cell(costs: Costs, kind: str) -> str:
    return f"{costs[kind].median:.0f}" if kind in costs else "-"


def _callgrind(variant: str) -> Costs:
    kinds = [kind for kind in KINDS if _has(variant, kind)]
    parts = count([_python(variant), "-m", "benchmarks.instructions", variant], len(kinds))
    return {kind: Spread.of([part / UNITS / 1e3]) for kind, part in zip(kinds, parts, strict=True)}


def _python(variant: str) -> str:
    return python_of(ENVIRONMENTS.get(variant, HERE))


def _processor_times(variant: str, *, rounds: int) -> Costs:
    """Take the processor time in a process of the variant's own."""
    program = [_python(variant), "-m", "benchmarks.instructions", variant, str(rounds)]
    told = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    return {kind: Spread.of(times) for kind, times in json.loads(told.splitlines()[-1]).items()}


def _time(variant: str, rounds: int) -> None:
    """Print the processor time of each kind of unit, round after round."""
    works = {kind: _work(variant, kind) for kind in KINDS if _has(variant, kind)}
    taken: dict[str, list[float]] = {kind: [] for kind in works}
    for _ in range(rounds):
        for kind, work in works.items():
            taken[kind].append(_processor_time(work))
    print(json.dumps(taken))


def _processor_time(work: Callable[[], None]) -> float:
    start = time.process_time()
    _repeat(work, UNITS)
    return (time.process_time() - start) / UNITS * 1e6


def _has(variant: str, kind: str) -> bool:
    return not variant.endswith(" read_only") or kind != "one INSERT"


def _work(variant: str, kind: str) -> Callable[[], None]:
    """Return one unit of *kind* on a warm database of *variant*'s own."""
    name = variant.removesuffix(" read_only")
    if name == UNGUARDED:
        take_guards_away()
        name = "sessionscope"
    peer = PEERS[name]("sqlite://")
    _fill(peer)
    unit = peer.read if variant.endswith(" read_only") else peer.unit
    works = {
        "empty": partial(_empty, unit),
        "one SELECT": partial(_select, unit),
        "one INSERT": partial(_insert, unit, commits=peer.commits),
    }
    _repeat(works[kind], WARM_UP)
    return works[kind]


def _fill(peer: Peer) -> None:
    with peer.unit() as session:
        fill(session, commit=not peer.commits)


def _empty(unit: Unit) -> None:
    with unit():
        pass


def _select(unit: Unit) -> None:
    with unit() as session:
        session.scalars(FIRST).one()


def _insert(unit: Unit, *, commits: bool) -> None:
    with unit() as session:
        session.add(Item(name="inserted"))
        if not commits:
            session.commit()


def _repeat(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


def _count(variant: str) -> None:
    """Run what callgrind counts: the units of each kind between two marks."""
    for kind in KINDS:
        if _has(variant, kind):
            work = _work(variant, kind)
            gc.collect()
            os.getppid()
            _repeat(work, UNITS)
            os.getppid()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _time(sys.argv[1], int(sys.argv[2]))
    else:
        _count(sys.argv[1])
