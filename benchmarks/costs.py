"""What one request costs with each subject: round trips, latency, and processor time.

The requests come one after the other from one client; the server's way to its database leads
through a proxy that counts and delays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import URL

from benchmarks._environments import CannotRun, serve, why
from benchmarks._load import Answer, in_series
from benchmarks._postgres import empty_database, text, through
from benchmarks._report import Figure, Report, Spread, Table, number
from benchmarks._servers import DidNotStart, Server
from benchmarks._settings import Settings
from benchmarks._subject import Subject
from benchmarks._subjects import DEF, OURS, SUBJECTS, chosen
from benchmarks.proxy import Proxy

DELAYS = (0.0, 0.001, 0.005)
PATHS = ("/read", "/write")
READ_ONLY = "sessionscope read-only"
# psycopg prepares a statement at its sixth execution, which takes a round trip once.
WARM_UP = 12
# Some end their transaction after the answer was sent, which counts as well.
SETTLE = 0.05


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    counted: int
    timed: int
    unused: int
    rounds: int


FULL = Scale(counted=10, timed=30, unused=1500, rounds=3)
SHORT = Scale(counted=3, timed=3, unused=50, rounds=1)


@dataclass
class Cost:
    """What one subject's requests cost."""

    flights: dict[str, int] = field(default_factory=dict)
    times: dict[tuple[str, float], Spread] = field(default_factory=dict)
    processor: dict[str, Spread] = field(default_factory=dict)
    """Microseconds of one request to `/unused` and to `/health`."""


def run(*, url: str | None, short: bool) -> Report:
    """Measure every subject in turn."""
    report = Report("costs: of one request, one client")
    failed = Table("Could not run", ["subject", "error"])
    costs: dict[str, Cost] = {}
    with empty_database(url) as database, _proxy(database) as proxy:
        settings = Settings(through(database, proxy.port))
        for subject in chosen(short=short):
            try:
                costs[subject.name] = _cost(
                    subject, settings, proxy, text(database), SHORT if short else FULL
                )
            except (DidNotStart, CannotRun) as error:
                said = why(error)
                failed.rows.append([subject.name, said])
    report.tables.extend([_trips(costs), _processor(costs), failed])
    report.figures.extend(_headlines(costs))
    return report


def _proxy(database: URL) -> Proxy:
    return Proxy(database.host or "127.0.0.1", database.port or 5432)


def _cost(subject: Subject, settings: Settings, proxy: Proxy, near: str, scale: Scale) -> Cost:
    cost = Cost()
    paths = PATHS[:1] if subject.name == READ_ONLY else PATHS
    with serve(subject, settings) as server:
        for path in paths:
            _expect_ok(in_series(server.port, [path] * WARM_UP, settle=SETTLE))
            counts = [_flights(server, proxy, path) for _ in range(scale.counted)]
            cost.flights[path] = round(Spread.of(counts).median)
            for delay in DELAYS:
                cost.times[path, delay] = _timed(server, proxy, path, delay, scale.timed)
    with serve(subject, Settings(near)) as server:
        for path in ("/unused", "/health"):
            _expect_ok(in_series(server.port, [path] * WARM_UP))
            one = partial(_microseconds, server, path, scale.unused)
            cost.processor[path] = Spread.of(one() for _ in range(scale.rounds))
    return cost


def _expect_ok(answers: Sequence[Answer]) -> None:
    refused = [answer.status for answer in answers if answer.status != 200]
    if refused:
        raise CannotRun(f"answers {refused[0]} to {len(refused)} of {len(answers)} requests")


def _flights(server: Server, proxy: Proxy, path: str) -> int:
    before = proxy.waited()
    _expect_ok(in_series(server.port, [path], settle=SETTLE))
    return proxy.waited() - before


def _timed(server: Server, proxy: Proxy, path: str, delay: float, requests: int) -> Spread:
    proxy.set_delay(delay)
    try:
        answers = in_series(server.port, [path] * requests)
    finally:
        proxy.set_delay(0.0)
    return Spread.of(answer.seconds * 1e3 for answer in answers)


def _microseconds(server: Server, path: str, requests: int) -> float:
    before = server.processor_seconds()
    _expect_ok(in_series(server.port, [path] * requests))
    return (server.processor_seconds() - before) / requests * 1e6


def _trips(costs: dict[str, Cost]) -> Table:
    header = ["subject", "request", "round trips", *(f"ms at +{d * 1e3:.0f}" for d in DELAYS)]
    table = Table("Waited round trips, and the median ms of a request", header)
    for name, cost in costs.items():
        for path, flights in cost.flights.items():
            spreads = [cost.times[path, delay] for delay in DELAYS]
            cells = [f"{s.median:.1f} ({s.low:.1f}-{s.high:.1f})" for s in spreads]
            table.rows.append([name, path, str(flights), *cells])
    return table


def _processor(costs: dict[str, Cost]) -> Table:
    header = ["subject", "µs, session declared", "min-max", "µs of /health", "difference"]
    table = Table("Processor µs of a request without a query", header)
    for name, cost in costs.items():
        used, health = cost.processor["/unused"], cost.processor["/health"]
        between = f"{used.low:.0f}-{used.high:.0f}"
        cells = [f"{used.median:.0f}", between, f"{health.median:.0f}"]
        table.rows.append([name, *cells, f"{used.median - health.median:.0f}"])
    return table


def _headlines(costs: dict[str, Cost]) -> list[Figure]:
    """Return how many times longer a read at +5 ms takes with each peer than with ours."""
    figures = []
    for subject in SUBJECTS.values():
        ours = READ_ONLY if subject.style == DEF else OURS[subject.style]
        if subject.rival and {subject.name, ours} <= costs.keys() and subject.name != ours:
            figures.append(_slower(subject.name, ours, costs))
    return figures


def _slower(theirs: str, ours: str, costs: dict[str, Cost]) -> Figure:
    key = ("/read", DELAYS[-1])
    their, our = costs[theirs].times[key], costs[ours].times[key]
    note = f"{number(their.median)} against {number(our.median)} ms"
    ratio = Spread(their.median / our.median, their.low / our.high, their.high / our.low)
    return Figure.spread(f"a read at +5 ms: {theirs} / {ours}", ratio, note=note)
