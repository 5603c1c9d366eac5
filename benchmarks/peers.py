"""The same routes over HTTP, served with sessionscope and with each of its peers.

First a survey: every subject once, with more and more clients. Then the ratios: ours and a peer
take turns within seconds, again and again, so that a drift of the machine hits both alike.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from sqlalchemy import URL

from benchmarks._environments import CannotRun, serve, versions, why
from benchmarks._load import Pace, quantile, sustain
from benchmarks._postgres import empty_database, text, through
from benchmarks._report import Figure, Plot, Report, Spread, Table
from benchmarks._servers import DidNotStart, Server
from benchmarks._settings import Settings
from benchmarks._subject import Subject
from benchmarks._subjects import DEF, OURS, SUBJECTS, chosen
from benchmarks.http import Seen, observe
from benchmarks.proxy import Proxy

READ_ONLY = "sessionscope read-only"

# Ours and theirs, one right after the other.
Duel = tuple[Seen, Seen]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    clients: tuple[int, ...]
    rounds: dict[int, int]
    """How often ours and a peer take turns, by the number of clients: the headlines."""
    seconds: float
    timeout: float

    @property
    def headlines(self) -> tuple[int, ...]:
        """The numbers of clients for which there are ratios."""
        return tuple(self.rounds)

    def pace(self, clients: int) -> Pace:
        """Return a pace whose warm-up is longer than the first answers of so many clients take."""
        seconds = self.seconds * (1 + clients / 250)
        return Pace(seconds, self.timeout, seconds / 2)


FULL = Scale((10, 50, 100, 200, 500), {100: 6, 500: 4}, seconds=1.0, timeout=2.5)
SHORT = Scale((20,), {20: 1}, seconds=0.6, timeout=1.0)


@dataclass
class Load:
    """What the clients ask for, of which servers, and what it came to."""

    name: str
    path: str
    settings: Settings
    plotted: tuple[str, ...]
    rows: dict[str, dict[int, Seen]] = field(default_factory=dict)
    duels: dict[tuple[str, str], dict[int, list[Duel]]] = field(default_factory=dict)

    def is_wedged(self, subject: str, clients: int) -> bool:
        """Whether a subject answered nothing any more in the survey."""
        seen = self.rows.get(subject, {}).get(clients)
        return seen is not None and seen.tally.wedged


def run(*, url: str | None, short: bool) -> Report:
    """Put three kinds of load on every subject."""
    report = Report("peers: req/s of the same routes, pool 5+10")
    failed = Table("Could not run", ["subject", "error"])
    runnable = _those_that_run(chosen(short=short), report, failed)
    scale = SHORT if short else FULL
    with empty_database(url) as database, _loads(database) as loads:
        for load in loads:
            _survey(runnable, failed, load, database, scale)
            for pair in _pairs(load):
                _alternate(pair, load, database, scale)
            report.tables.append(_table(load))
            report.figures.extend(_headlines(load, scale))
            report.plots.extend(_plot(load, style) for style in load.plotted)
    report.tables.insert(0, _matrix(loads, scale))
    return report


def _those_that_run(subjects: list[Subject], report: Report, failed: Table) -> list[Subject]:
    table = Table("What is compared", ["subject", "served as", "versions"])
    report.tables.extend([table, failed])
    runnable: list[Subject] = []
    for subject in subjects:
        try:
            table.rows.append([subject.name, subject.style, versions(subject)])
            runnable.append(subject)
        except CannotRun as error:
            failed.rows.append([subject.name, str(error)])
    return runnable


@contextmanager
def _loads(database: URL) -> Iterator[list[Load]]:
    near = Settings(text(database))
    with Proxy(database.host or "127.0.0.1", database.port or 5432, delay=0.005) as proxy:
        far = replace(near, url=through(database, proxy.port), pool_size=3, max_overflow=0)
        yield [
            Load("20 ms query", "/slow", near, tuple(OURS)),
            Load("no sleep", "/read", near, ()),
            Load("pool of 3, each round trip +5 ms", "/read", far, (DEF,)),
        ]


def _survey(
    subjects: list[Subject], failed: Table, load: Load, database: URL, scale: Scale
) -> None:
    """Put *load* on every subject; who fails takes no further part."""
    for subject in list(subjects):
        try:
            _visit(subject, load, database, scale)
        except (DidNotStart, CannotRun) as error:
            subjects.remove(subject)
            failed.rows.append([subject.name, why(error)])


def _visit(subject: Subject, load: Load, database: URL, scale: Scale) -> None:
    """Load one server with more and more clients; one that is wedged is replaced."""
    rows = load.rows.setdefault(subject.name, {})
    server = None
    with ExitStack() as stack:
        for clients in scale.clients:
            server = server or stack.enter_context(serve(subject, load.settings))
            seen = rows[clients] = _observe(server, load, database, clients, scale)
            if seen.tally.wedged:
                stack.close()
                server = None


def _alternate(pair: tuple[str, str], load: Load, database: URL, scale: Scale) -> None:
    """Put *load* on ours and on theirs in turns; who was wedged in the survey stays out."""
    counts = [n for n in scale.headlines if not any(load.is_wedged(name, n) for name in pair)]
    if not counts:
        return
    duels = load.duels.setdefault(pair, {})
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(SUBJECTS[name], load.settings)) for name in pair]
        for clients in counts:
            for turn in range(scale.rounds[clients]):
                order = servers if turn % 2 else servers[::-1]
                seen = {
                    server.variant: _observe(server, load, database, clients, scale)
                    for server in order
                }
                duels.setdefault(clients, []).append((seen[pair[0]], seen[pair[1]]))


def _observe(server: Server, load: Load, database: URL, clients: int, scale: Scale) -> Seen:
    pace = scale.pace(clients)
    return observe(database, server, partial(sustain, server.port, [load.path], clients, pace))


def _table(load: Load) -> Table:
    header = ["subject", "clients", "req/s", "p50 ms", "p99 ms", "errors", "cpu ms"]
    table = Table(f"HTTP: {load.name} ({load.path})", [*header, "backends", ""])
    for name, by_clients in load.rows.items():
        for clients, seen in by_clients.items():
            table.rows.append([name, str(clients), *_cells(seen)])
    return table


def _cells(seen: Seen) -> list[str]:
    tally = seen.tally
    return [
        f"{tally.rate:.0f}",
        *(f"{quantile(tally.answers, share):.0f}" for share in (0.5, 0.99)),
        str(len(tally.answers) - tally.ok),
        f"{seen.processor_ms:.2f}",
        str(seen.backends),
        "WEDGED" if tally.wedged else "",
    ]


def _headlines(load: Load, scale: Scale) -> Iterator[Figure]:
    for (ours, theirs), clients in product(_pairs(load), scale.headlines):
        found = _ratio(load, ours, theirs, clients)
        if found is not None:
            yield found


def _pairs(load: Load) -> list[tuple[str, str]]:
    """Return who is compared with whom: the same style, and reads with our reads too."""
    rivals = [s for s in SUBJECTS.values() if s.rival and s.name not in OURS.values()]
    pairs = [(OURS[rival.style], rival.name) for rival in rivals]
    if load.path == "/read":
        pairs += [(READ_ONLY, rival.name) for rival in rivals if rival.style == DEF]
    return [pair for pair in pairs if all(map(load.rows.get, pair))]


def _matrix(loads: list[Load], scale: Scale) -> Table:
    """Return all ratios at a glance: a row for each pair, a column for each load."""
    columns = list(product(loads, scale.headlines))
    header = ["ours / theirs", *(f"{load.name}: {clients} clients" for load, clients in columns)]
    table = Table("Ratio of req/s, median (min-max) of the rounds", header)
    for pair in dict.fromkeys(pair for load in loads for pair in _pairs(load)):
        cells = [_cell(_ratio(load, *pair, clients)) for load, clients in columns]
        table.rows.append([" / ".join(pair), *cells])
    return table


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.unit != "x":
        return "theirs wedged"
    return f"{figure.value:.2f} ({figure.low:.2f}-{figure.high:.2f})"


def _ratio(load: Load, our: str, their: str, clients: int) -> Figure | None:
    name = f"{load.name}, {clients} clients: {our} / {their}"
    duels = load.duels.get((our, their), {}).get(clients, [])
    if load.is_wedged(their, clients) or any(theirs.tally.wedged for _, theirs in duels):
        # Nothing can be divided by what is not there.
        rate = load.rows[our][clients].tally.rate
        note = f"{rate:.0f} against none: theirs is wedged"
        return Figure(name, rate, "req/s", at_least=1, note=note)
    if not duels:
        return None
    ours, theirs = (
        Spread.of(seen.tally.rate for seen in side) for side in zip(*duels, strict=True)
    )
    our_cpu, their_cpu = (
        Spread.of(seen.processor_ms for seen in side) for side in zip(*duels, strict=True)
    )
    ratio = Spread.of(a.tally.rate / b.tally.rate for a, b in duels)
    note = (
        f"{ours.median:.0f} against {theirs.median:.0f}/s, "
        f"cpu ms {our_cpu.median:.2f} against {their_cpu.median:.2f}"
    )
    return Figure.spread(name, ratio, at_least=1, note=note)


def _plot(load: Load, style: str) -> Plot:
    place = style.lower().replace(", ", "-").replace(" ", "-")
    kind = load.name.partition(",")[0].replace(" ", "-")
    plot = Plot(f"{kind}-{place}", f"{style}: {load.name}", "keep-alive clients", "requests/s")
    for name, by_clients in load.rows.items():
        if SUBJECTS[name].style == style:
            plot.lines[name] = [
                (clients, Spread.of([seen.tally.rate])) for clients, seen in by_clients.items()
            ]
    return plot
