"""Clients append names and move money while a nemesis breaks server, backends and network.

    python -m tests.faults.nemesis --seconds 600 --seed 1

Nine clients, threads with psycopg and tasks with psycopg and asyncpg, write over a
proxy to a server of their own, by run(), with_session(isolation_level="SERIALIZABLE") and begin().
Every few seconds one fault is drawn, the same ones for the same seed. At the end what the clients
were told is compared with the tables; after each fault it is measured how long it
took until the next success, and until all three kinds of clients were as fast as before it.
"""

import argparse
import statistics
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from random import Random

from sqlalchemy import make_url

from benchmarks._report import Figure, Report, Table, show
from sessionscope import Database
from sessionscope.testing import FaultProxy, PostgresServer
from tests.faults.breaking import (
    ask,
    backends,
    configure,
    kill_backend,
    processes_of,
    stopped,
    terminate_all,
    until,
)
from tests.faults.clients import CALM, Clients, tasks, threads
from tests.faults.ledger import Base, Judgement, Told, judge, open_accounts

# Of each kind.
CLIENTS = 3
# Seconds for which nothing is broken after each fault.
_CALM = 2.5
_KILL_EVERY = 0.02
# What counts as full throughput: for half a second, four fifths of what it was in the calm before,
# of whose beginning the fault before it may have a part.
_SETTLED = 0.6
_WINDOW = 0.5
_FULL = 0.8
# Targets, in milliseconds.
FIRST_SUCCESS = 500.0
FULL_THROUGHPUT = 2000.0

COMMIT = b"COMMIT"


@dataclass(frozen=True)
class World:
    """What can be broken, and the randomness to do it with."""

    server: PostgresServer
    url: str
    proxy: FaultProxy
    random: Random


def terminate_backends(world: World, seconds: float) -> None:
    """pg_terminate_backend(), one every 20 ms."""
    for pid in _victims(world, seconds):
        ask(world.url, f"SELECT pg_terminate_backend({pid})")


def kill_one_backend(world: World, seconds: float) -> None:
    """SIGKILL, after which the server ends all others and recovers."""
    kill_backend(world.url, next(_victims(world, 5.0)))


def stop_backends(world: World, seconds: float) -> None:
    """SIGSTOP of half of them, then SIGCONT."""
    pids = backends(world.url)
    with stopped(*world.random.sample(pids, len(pids) // 2)):
        time.sleep(seconds)


def stop_server(world: World, seconds: float) -> None:
    """SIGSTOP of all of the server's processes, then SIGCONT."""
    with stopped(*processes_of(world.server)):
        time.sleep(seconds)


def crash_server(world: World, seconds: float) -> None:
    """pg_ctl stop -m immediate, then start."""
    world.server.stop("immediate")
    time.sleep(seconds)
    world.server.start()


def restart_server(world: World, seconds: float) -> None:
    """pg_ctl stop -m fast, then start."""
    world.server.stop("fast")
    time.sleep(seconds)
    world.server.start()


def lose_standby(world: World, seconds: float) -> None:
    """Every COMMIT waits for a standby that is not there."""
    configure(world.url, "synchronous_standby_names", "ghost")
    time.sleep(seconds)
    configure(world.url, "synchronous_standby_names", "")


def cut_before_commit(world: World, seconds: float) -> None:
    """Connections are cut before COMMIT has reached the server."""
    world.proxy.aim("cut before", COMMIT, times=10)
    time.sleep(seconds)


def cut_after_commit(world: World, seconds: float) -> None:
    """Connections are cut when the server has answered COMMIT."""
    world.proxy.aim("cut after", COMMIT, times=10)
    time.sleep(seconds)


def hang_at_commit(world: World, seconds: float) -> None:
    """The server gets COMMIT, and no answer comes back."""
    world.proxy.aim("hang", COMMIT, times=3)
    time.sleep(seconds)


def cut_all(world: World, seconds: float) -> None:
    """All connections are cut, every 100 ms."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        world.proxy.cut()
        time.sleep(0.1)


def delay(world: World, seconds: float) -> None:
    """What clients send is 50 ms late."""
    world.proxy.set_delay(0.05)
    time.sleep(seconds)


def black_hole(world: World, seconds: float) -> None:
    """Nothing passes, and no connection ends."""
    world.proxy.go_silent()
    time.sleep(seconds)


def slice_up(world: World, seconds: float) -> None:
    """Everything comes in pieces of 1 to 7 bytes."""
    world.proxy.set_slices(world.random.randint(1, 7))
    time.sleep(seconds)


FAULTS: tuple[Callable[[World, float], None], ...] = (
    terminate_backends,
    kill_one_backend,
    stop_backends,
    stop_server,
    crash_server,
    restart_server,
    lose_standby,
    cut_before_commit,
    cut_after_commit,
    hang_at_commit,
    cut_all,
    delay,
    black_hole,
    slice_up,
)


def _victims(world: World, seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if pids := backends(world.url):
            yield world.random.choice(pids)
        time.sleep(_KILL_EVERY)


@dataclass(frozen=True)
class Strike:
    """One fault: which, and from when to when."""

    fault: str
    began: float
    ended: float


def run(seconds: float, seed: int, calm: float = _CALM) -> Report:
    """Break things for so many *seconds*, with a *calm* after each fault, and count."""
    told = Told()
    with PostgresServer(max_connections=100) as server:
        url = server.create_database()
        with Database(url) as database:
            Base.metadata.create_all(database.engine)
            database.run(open_accounts)
        all_clients = [Clients(name, seed, told) for name in ("threads", "psycopg", "asyncpg")]
        with (
            FaultProxy("127.0.0.1", make_url(url).port or 0) as proxy,
            _working(all_clients, proxy.through(url)),
        ):
            world = World(server, url, proxy, Random(seed))
            strikes = list(_strikes(world, seconds, calm, all_clients))
            proxy.heal()
        terminate_all(url)
        until(lambda: not backends(url))
        judgement = judge(told, url)
    report = Report(f"nemesis: {seconds:g} s, seed {seed}")
    report.figures.extend(_truth(told, judgement, all_clients))
    report.figures.extend(_recovery(strikes, calm, all_clients))
    report.tables.append(_errors(told))
    return report


@contextmanager
def _working(all_clients: list[Clients], url: str) -> Iterator[None]:
    by_thread, by_psycopg, by_asyncpg = all_clients
    with ExitStack() as stack:
        stack.enter_context(threads(by_thread, CLIENTS, url))
        stack.enter_context(tasks(by_psycopg, CLIENTS, url, "psycopg"))
        stack.enter_context(tasks(by_asyncpg, CLIENTS, url, "asyncpg"))
        yield


def _strikes(
    world: World, seconds: float, calm: float, all_clients: list[Clients]
) -> Iterator[Strike]:
    end = time.monotonic() + seconds
    time.sleep(calm)
    for fault in _drawn(world.random):
        if time.monotonic() > end:
            return
        name = fault.__name__.replace("_", " ")
        _tell(all_clients, name)
        began = time.monotonic()
        fault(world, world.random.uniform(0.1, calm / 2))
        world.proxy.heal()
        yield Strike(name, began, time.monotonic())
        _tell(all_clients, CALM)
        time.sleep(calm)


def _drawn(random: Random) -> Iterator[Callable[[World, float], None]]:
    """All faults in a random order, again and again."""
    while True:
        yield from random.sample(FAULTS, len(FAULTS))


def _tell(all_clients: list[Clients], fault: str) -> None:
    for clients in all_clients:
        clients.fault = fault


def _truth(told: Told, judgement: Judgement, all_clients: list[Clients]) -> Iterator[Figure]:
    stored = judgement.unknown_stored
    note = f"{stored} of them stored, {judgement.unknown - stored} not; each was a CommitUnknown"
    yield Figure("acknowledged", len(told.acknowledged), "units", at_least=1)
    yield Figure("failed", len(told.failed), "units")
    yield Figure("unknown", judgement.unknown, "units", note=note)
    for part in fields(judgement):
        if part.name.startswith("unknown"):
            continue
        found = getattr(judgement, part.name)
        amount = len(found) if isinstance(found, list) else found
        note = f"{found[:3]}" if isinstance(found, list) and found else ""
        yield Figure(part.name.replace("_", " "), amount, "", at_most=0, at_least=0, note=note)
    left = sum(stats.in_use + stats.waiting for clients in all_clients for stats in clients.stats)
    yield Figure("slots that are not given back", left, "", at_most=0)


def _recovery(strikes: list[Strike], calm: float, all_clients: list[Clients]) -> Iterator[Figure]:
    """How long after a fault all kinds of clients had a success, and were as fast as before it."""
    first, full = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    together = sorted(chain.from_iterable(clients.successes for clients in all_clients))
    successes = [sorted(clients.successes) for clients in all_clients]
    for strike in strikes:
        first[strike.fault].append(max(_first_success(strike, one) for one in successes) * 1e3)
        full[strike.fault].append(_full_throughput(strike, calm * _SETTLED, together) * 1e3)
    for what, found, bound in (
        ("first success", first, FIRST_SUCCESS),
        ("full throughput", full, FULL_THROUGHPUT),
    ):
        for fault, times in sorted(found.items()):
            yield Figure(
                f"{what} after: {fault}", max(times), "ms at most", at_most=bound,
                low=min(times), high=max(times),
                note=f"median {statistics.median(times):.0f} ms of {len(times)}",
            )  # fmt: skip


def _first_success(strike: Strike, successes: list[float]) -> float:
    """Return the seconds from the fault's end to the next success."""
    index = bisect_left(successes, strike.ended)
    return successes[index] - strike.ended if index < len(successes) else float("inf")


def _full_throughput(strike: Strike, calm: float, successes: list[float]) -> float:
    """Return the seconds from the fault's end until as many succeed as before it.

    A kind of client that stands still is a third of them.
    """
    before = _count(successes, strike.began - calm, strike.began) / calm
    wanted = _FULL * before * _WINDOW
    after = successes[bisect_left(successes, strike.ended) :]
    for start in chain([strike.ended], after):
        if _count(successes, start, start + _WINDOW) >= wanted:
            return start - strike.ended
    return float("inf")


def _count(times: list[float], start: float, end: float) -> int:
    return bisect_left(times, end) - bisect_left(times, start)


def _errors(told: Told) -> Table:
    rows = [
        [*where, str(times), told.texts[where][:120]]
        for where, times in sorted(told.errors.items())
    ]
    return Table("What was raised", ["while", "by", "error", "times", "the first one"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.nemesis", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    report = run(arguments.seconds, arguments.seed)
    show(report)
    told = {figure.name: figure for figure in report.figures}
    misses = [figure.name for figure in report.figures if figure.verdict == "MISS"]
    print(
        f"\n{report.name}: {told['acknowledged'].value} acknowledged, {told['failed'].value} "
        f"failed, {told['unknown'].value} unknown; "
        f"{', '.join(misses) or 'nothing'} amiss "
        f"(python -m tests.faults.nemesis --seconds {arguments.seconds:g} --seed {arguments.seed})"
    )
    sys.exit(bool(misses))


if __name__ == "__main__":
    main()
