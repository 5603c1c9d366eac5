"""Round trips that one unit of work waits for, and what they cost on a distant database."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psycopg
from sqlalchemy import URL, make_url

from benchmarks._model import FIRST, Item
from benchmarks._peers import Peer, Unit, seed, sessionmaker_begin, sessionscope
from benchmarks._postgres import conninfo, empty_database, through
from benchmarks._report import Figure, Report, Spread, Table, number
from benchmarks.proxy import Proxy

DELAYS = (0.0, 0.001, 0.005)
# psycopg prepares a statement at its sixth execution, which takes a round trip once.
WARM_UP = 10


@dataclass(frozen=True)
class Work:
    """One unit of work, and how many round trips it is to wait for."""

    name: str
    run: Callable[[], None]
    target: int | None = None


def run(*, url: str | None, short: bool) -> Report:
    """Count and time units of work through a proxy."""
    with empty_database(url) as database, _proxy(database) as proxy:
        _check(database, proxy)
        peers = [
            make(through(database, proxy.port)) for make in (seed, sessionmaker_begin, sessionscope)
        ]
        try:
            return _measure(proxy, _works(*peers), short=short)
        finally:
            for peer in peers:
                peer.dispose()


def _proxy(database: URL) -> Proxy:
    return Proxy(database.host or "127.0.0.1", database.port or 5432)


def _check(database: URL, proxy: Proxy) -> None:
    """Refuse to count if a raw statement in driver autocommit is not one round trip."""
    url = make_url(through(database, proxy.port))
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        counted = _flights(proxy, lambda: connection.execute("SELECT 1").fetchone())
    if counted != 1:
        raise RuntimeError(f"The proxy counts {counted} round trips for one raw SELECT, not 1.")


def _works(theirs: Peer, plain: Peer, ours: Peer) -> list[Work]:
    return [
        Work("seed: read", partial(_read, theirs.read)),
        Work("sessionmaker.begin(), no ping: read", partial(_read, plain.read)),
        Work("ours, read-only: 1 SELECT", partial(_read, ours.read), 1),
        Work("ours, read-only: 3 SELECTs", partial(_read, ours.read, 3), 3),
        Work("ours, writing unit: 1 SELECT", partial(_read, ours.unit), 3),
        Work("seed: INSERT", partial(_insert, theirs)),
        Work("sessionmaker.begin(), no ping: INSERT", partial(_insert, plain)),
        Work("ours: INSERT", partial(_insert, ours), 3),
        Work("seed: POST with refresh", partial(_post_as_taught, theirs)),
        Work("ours: POST", partial(_post, ours)),
        Work("ours: POST with refresh", partial(_post_as_taught, ours)),
    ]


def _read(unit: Unit, times: int = 1) -> None:
    with unit() as session:
        for _ in range(times):
            session.scalars(FIRST).one()


def _insert(peer: Peer) -> None:
    with peer.unit() as session:
        session.add(Item(name="inserted"))
        if not peer.commits:
            session.commit()


def _post(peer: Peer) -> None:
    """Store an item and answer with its id, in a unit that commits at its end."""
    with peer.unit() as session:
        item = Item(name="posted")
        session.add(item)
        session.flush()
        assert item.id


def _post_as_taught(peer: Peer) -> None:
    """Store an item as tutorials do: add, commit, refresh."""
    with peer.unit() as session:
        item = Item(name="posted")
        session.add(item)
        session.commit()
        session.refresh(item)


def _measure(proxy: Proxy, works: list[Work], *, short: bool) -> Report:
    idle, units = (1.0, 20) if short else (5.0, 60)
    busy = {work.name: _warm_flights(proxy, work) for work in works}
    time.sleep(idle)
    rested = {work.name: _flights(proxy, work.run) for work in works}
    times = {work.name: [_latency(proxy, work, delay, units) for delay in DELAYS] for work in works}
    report = Report("flights: waited round trips per unit (psycopg)")
    for work in works:
        if work.target is not None:
            report.figures.extend(_counted(work, busy[work.name], rested[work.name], idle))
    report.figures.append(_speed_up(times))
    header = ["unit", "flights", f"after {idle:.0f} s", *(f"ms at +{d * 1e3:.0f}" for d in DELAYS)]
    table = Table("Round trips, and the median time of a unit with each made longer", header)
    for name, spreads in times.items():
        cells = [f"{spread.median * 1e3:.2f}" for spread in spreads]
        table.rows.append([name, number(busy[name].high), number(rested[name]), *cells])
    report.tables.append(table)
    return report


def _counted(work: Work, busy: Spread, rested: int, idle: float) -> list[Figure]:
    target = work.target
    return [
        Figure(work.name, busy.high, "flights", target, target),
        Figure(f"{work.name}, after {idle:.0f} s idle", rested, "flights", target, target),
    ]


def _speed_up(times: dict[str, list[Spread]]) -> Figure:
    theirs = times["seed: read"][-1].median
    ours = times["ours, read-only: 1 SELECT"][-1].median
    return Figure("seed's read / our read at +5 ms", theirs / ours, at_least=3.4)


def _warm_flights(proxy: Proxy, work: Work) -> Spread:
    for _ in range(WARM_UP):
        work.run()
    return Spread.of(_flights(proxy, work.run) for _ in range(WARM_UP))


def _flights(proxy: Proxy, run: Callable[[], object]) -> int:
    before = proxy.waited()
    run()
    return proxy.waited() - before


def _latency(proxy: Proxy, work: Work, delay: float, units: int) -> Spread:
    proxy.set_delay(delay)
    try:
        return Spread.of(_seconds(work.run) for _ in range(units))
    finally:
        proxy.set_delay(0.0)


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
