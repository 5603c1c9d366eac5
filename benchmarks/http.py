"""Load over HTTP: bursts, throughput, reads where the pool is the limit, and overload.

Every server is a process of its own, the clients are this one, and the server connections of
each row are counted beside it. Two variants are compared in alternating rounds.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

from sqlalchemy import URL

from benchmarks._apps import VARIANTS
from benchmarks._load import LOST, REFUSED, Pace, Tally, burst, flood, quantile, sustain
from benchmarks._postgres import Backends, empty_database, text, through
from benchmarks._report import Figure, Report, Spread, Table, ratios
from benchmarks._servers import Server
from benchmarks._settings import Settings
from benchmarks.proxy import Proxy

OURS = "sessionscope"
COLUMNS = (
    *("ok/s", "ok", "503", "500", "lost", "p50 ms", "p99 ms"),
    *("health p50", "cpu ms/request", "backends", ""),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    rounds: int
    pace: Pace
    bursts: tuple[int, ...]
    burst_rounds: int
    burst_timeout: float
    paired_clients: tuple[int, ...]
    rivals: tuple[str, ...]
    by_hand: tuple[str, ...]
    survey: tuple[tuple[str, ...], tuple[int, ...]]


FULL = Scale(
    rounds=7,
    pace=Pace(3.0),
    bursts=(200, 500),
    burst_rounds=5,
    burst_timeout=8.0,
    paired_clients=(10, 100, 500),
    rivals=("max-concurrency", "max-concurrency-no-ping"),
    by_hand=("seed", "scope-function", "max-concurrency", "all-async-ping"),
    survey=(
        tuple(variant for variant in VARIANTS if variant != "late-commit"),
        (10, 50, 100, 200, 500),
    ),
)
SHORT = Scale(
    rounds=1,
    pace=Pace(0.6, 1.5, 0.2),
    bursts=(200,),
    burst_rounds=1,
    burst_timeout=3.0,
    paired_clients=(10,),
    rivals=("max-concurrency",),
    by_hand=("seed",),
    survey=((OURS,), (100,)),
)


class Seen(NamedTuple):
    """What a load came to, for the clients and for the server."""

    tally: Tally
    backends: int
    processor_ms: float
    """Per request."""


def observe(database: URL, server: Server, load: Callable[[], Tally]) -> Seen:
    """Put *load* on *server* and count its connections to *database* meanwhile."""
    before = server.processor_seconds()
    with Backends(database, server.application) as backends:
        tally = load()
    used = server.processor_seconds() - before
    return Seen(tally, backends.most, used / max(1, tally.sent) * 1e3)


class Bench:
    """One run: its database, its scale, and the report that it fills."""

    def __init__(self, database: URL, scale: Scale) -> None:
        self.database = database
        self.scale = scale
        self.settings = Settings(text(database))
        self.report = Report("http: load from another process, pool 5+10, a query of 20 ms")

    def observe(self, server: Server, load: Callable[[], Tally]) -> Seen:
        """Put *load* on *server* and count its connections meanwhile."""
        return observe(self.database, server, load)

    def add(self, *figures: Figure) -> None:
        """Add figures to the report."""
        self.report.figures.extend(figures)

    def table(self, title: str, *columns: str) -> Table:
        """Add a table of loads to the report, with *columns* that name the load."""
        table = Table(title, [*columns, *COLUMNS])
        self.report.tables.append(table)
        return table


def run(*, url: str | None, short: bool) -> Report:
    """Put every load on every variant that it concerns."""
    with empty_database(url) as database:
        bench = Bench(database, SHORT if short else FULL)
        bursts(bench)
        throughput(bench)
        pool_bound_reads(bench)
        overload(bench)
        survey(bench)
    return bench.report


def bursts(bench: Bench) -> None:
    """Let many clients ask at the same moment, once each."""
    table = bench.table("Bursts: one request per client", "load", "variant")
    for path in ("/slow", "/slow-auth"):
        for clients in bench.scale.bursts:
            _paired_burst(bench, table, path, clients)
    for path, variant in product(("/slow", "/slow-auth"), bench.scale.by_hand):
        load = _Burst([path], bench.scale.bursts[0], bench.scale.burst_timeout)
        with Server(variant, bench.settings) as server:
            table.rows.append([load.name, variant, *_cells(bench.observe(server, load.on(server)))])
    for clients in bench.scale.bursts:
        _naive_burst(bench, table, clients)


@dataclass(frozen=True)
class _Burst:
    paths: Sequence[str]
    clients: int
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.clients} x {' '.join(self.paths)}"

    def on(self, server: Server) -> Callable[[], Tally]:
        return partial(burst, server.port, self.paths, self.clients, self.timeout)


def _paired_burst(bench: Bench, table: Table, path: str, clients: int) -> None:
    load = _Burst([path], clients, bench.scale.burst_timeout)
    rounds: dict[str, list[Seen]] = {OURS: [], "all-async": []}
    with Server(OURS, bench.settings) as ours, Server("all-async", bench.settings) as theirs:
        walls = [_wall(bench, server, load, rounds) for server in (ours, theirs)]
        ratio, _, _ = ratios(walls[0], walls[1], bench.scale.burst_rounds)
    for variant, seen in rounds.items():
        worst = min(seen, key=lambda row: row.tally.ok)
        table.rows.append([f"{load.name}, worst round", variant, *_cells(worst)])
    worst_ok = min(row.tally.ok for row in rounds[OURS])
    most = max(row.backends for row in rounds[OURS])
    bench.add(
        Figure(f"{load.name}: answered 200, worst round", worst_ok, "", at_least=clients),
        Figure.spread(f"{load.name}: wall / all-async", ratio, at_most=1.15),
        Figure(f"{load.name}: server connections", most, "", at_most=bench.settings.limit),
    )


def _wall(
    bench: Bench, server: Server, load: _Burst, rounds: dict[str, list[Seen]]
) -> Callable[[], float]:
    def measure() -> float:
        seen = bench.observe(server, load.on(server))
        rounds[server.variant].append(seen)
        return seen.tally.wall

    return measure


def _naive_burst(bench: Bench, table: Table, clients: int) -> None:
    """Let half of the endpoints call `begin()` themselves, in the framework's threads."""
    load = _Burst(["/slow", "/slow-begin"], clients, bench.scale.burst_timeout)
    with Server(OURS, bench.settings) as server:
        seen = bench.observe(server, load.on(server))
    table.rows.append([load.name, OURS, *_cells(seen)])
    tally = seen.tally
    answered = tally.ok + len(tally.refusals)
    slowest = quantile(tally.refusals, 1.0, REFUSED) if tally.refusals else 0.0
    bench.add(
        Figure(f"{load.name}: 200 or 503", answered, "", at_least=clients, note=f"{tally.ok} ok"),
        Figure(f"{load.name}: slowest 503", slowest, "ms", at_most=1000),
        Figure(f"{load.name}: server connections", seen.backends, "", at_most=bench.settings.limit),
    )


def throughput(bench: Bench) -> None:
    """Compare the same writing session with FastAPI's `max_concurrency`, with and without ping."""
    for rival in bench.scale.rivals:
        target = 0.95 if rival == "max-concurrency" else None
        with ExitStack() as stack:
            servers = [stack.enter_context(Server(name, bench.settings)) for name in (OURS, rival)]
            for clients in bench.scale.paired_clients:
                name = f"req/s / {rival}, {clients} clients"
                _paired_rates(bench, name, servers, ["/slow"], clients, target)


def pool_bound_reads(bench: Bench) -> None:
    """Compare reads where three connections, 5 ms away, are the limit."""
    host, port = bench.database.host or "127.0.0.1", bench.database.port or 5432
    with Proxy(host, port, delay=0.005) as proxy, ExitStack() as stack:
        distant = through(bench.database, proxy.port)
        settings = replace(bench.settings, url=distant, pool_size=3, max_overflow=0)
        servers = [
            stack.enter_context(Server(name, settings))
            for name in ("sessionscope-read-only", "max-concurrency")
        ]
        name = "reads/s / max-concurrency=3, pool of 3 at +5 ms"
        _paired_rates(bench, name, servers, ["/read"], 30, 2.5)


def _paired_rates(
    bench: Bench,
    name: str,
    servers: Sequence[Server],
    paths: Sequence[str],
    clients: int,
    target: float | None,
) -> None:
    seen: dict[str, list[Seen]] = {server.variant: [] for server in servers}

    def rate(server: Server) -> float:
        load = partial(sustain, server.port, paths, clients, bench.scale.pace)
        seen[server.variant].append(bench.observe(server, load))
        return seen[server.variant][-1].tally.rate

    rates = [partial(rate, server) for server in servers]
    ratio, ours, theirs = ratios(rates[0], rates[1], bench.scale.rounds)
    processor = " against ".join(
        f"{Spread.of(row.processor_ms for row in rows).median:.2f}" for rows in seen.values()
    )
    most = max(row.backends for row in seen[servers[0].variant])
    note = f"{ours.median:.0f} against {theirs.median:.0f}/s, cpu ms {processor}, {most} backends"
    bench.add(Figure.spread(name, ratio, at_least=target, note=note))


def overload(bench: Bench) -> None:
    """Ask three times as much as the pool can serve, and look at what else is served."""
    # Queries of 100 ms and a short time limit: the pool is the limit here, not the processor.
    settings = replace(bench.settings, query_seconds=0.1, pool_timeout=1.0)
    rate = 3 * settings.limit / settings.query_seconds
    pace = Pace(max(2.0, bench.scale.pace.seconds), warm_up=1.5)
    table = bench.table(f"3 x overload: {rate:.0f} requests/s of 100 ms", "variant")
    for variant in ("max-concurrency", OURS):
        with Server(variant, settings) as server:
            seen = bench.observe(server, partial(flood, server.port, "/slow", rate, pace))
        table.rows.append([variant, *_cells(seen)])
        if variant == OURS:
            _refusals(bench, settings, seen)


def _refusals(bench: Bench, settings: Settings, seen: Seen) -> None:
    tally = seen.tally
    slowest, usual = (quantile(tally.refusals, share, REFUSED) for share in (1.0, 0.99))
    told = sum(refusal.retry_after for refusal in tally.refusals)
    allowed = (settings.pool_timeout + 0.1) * 1e3
    refused = len(tally.refusals)
    lost = tally.failed + tally.count(LOST)
    bench.add(
        Figure("3 x overload: /health p50", quantile(tally.health, 0.5), "ms", at_most=20),
        Figure(
            "3 x overload: slowest 503", slowest, "ms", at_most=allowed, note=f"p99 {usual:.0f} ms"
        ),
        Figure("3 x overload: 503 with Retry-After", told, "", at_least=max(1, refused)),
        Figure("3 x overload: neither 200 nor 503", lost, "", 0, 0),
        Figure("3 x overload: server connections", seen.backends, "", at_most=settings.limit),
    )


def survey(bench: Bench) -> None:
    """Put the same sustained load on every variant, each on a fresh server."""
    table = bench.table("Sustained load on /slow", "variant", "clients")
    for variant, clients in product(*bench.scale.survey):
        with Server(variant, bench.settings) as server:
            load = partial(sustain, server.port, ["/slow"], clients, bench.scale.pace)
            cells = _cells(bench.observe(server, load))
        table.rows.append([variant, str(clients), *cells])


def _cells(seen: Seen) -> list[str]:
    tally = seen.tally
    counts = (tally.ok, tally.count(REFUSED), tally.failed, tally.count(LOST))
    times = (quantile(tally.answers, 0.5), quantile(tally.answers, 0.99))
    health = f"{quantile(tally.health, 0.5):.1f}" if tally.health else "-"
    return [
        f"{tally.rate:.0f}",
        *map(str, counts),
        *(f"{time:.0f}" for time in times),
        health,
        f"{seen.processor_ms:.1f}",
        str(seen.backends),
        "WEDGED" if tally.wedged else "",
    ]
