"""The same routes over HTTP, served with sessionscope and with each of its peers.

Every subject is measured in every round, one after the other, so that a drift of the machine
hits all alike; a ratio is taken within a round.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

from sqlalchemy import URL

from benchmarks._environments import CannotRun, serve, versions, why
from benchmarks._load import Pace, quantile, sustain
from benchmarks._postgres import empty_database, text, through
from benchmarks._report import Figure, Plot, Report, Spread, Table, number
from benchmarks._servers import DidNotStart
from benchmarks._settings import Settings
from benchmarks._subject import Subject
from benchmarks._subjects import DEF, OURS, SUBJECTS, chosen
from benchmarks.http import Seen, observe
from benchmarks.proxy import Proxy

READ_ONLY = "sessionscope read-only"


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    clients: tuple[int, ...]
    headlines: tuple[int, ...]
    """For these there are as many rounds as the load has, for the others one."""
    repeats: bool
    pace: Pace


FULL = Scale((10, 50, 100, 200, 500), (100, 500), repeats=True, pace=Pace(0.8, 2.5, 0.3))
SHORT = Scale((20,), (20,), repeats=False, pace=Pace(0.3, 1.0, 0.2))


@dataclass
class Load:
    """What the clients ask for, of which servers, and what it came to."""

    name: str
    path: str
    settings: Settings
    rounds: int
    plotted: tuple[str, ...]
    rows: dict[str, dict[int, list[Seen]]] = field(default_factory=dict)


def run(*, url: str | None, short: bool) -> Report:
    """Put three kinds of load on every subject."""
    report = Report("peers: req/s of the same routes, pool 5+10")
    failed = Table("Could not run", ["subject", "error"])
    runnable = _those_that_run(chosen(short=short), report, failed)
    scale = SHORT if short else FULL
    with empty_database(url) as database, _loads(database) as loads:
        for load in loads:
            _measure(runnable, failed, load, database, scale)
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
            Load("20 ms query", "/slow", near, 3, tuple(OURS)),
            Load("no sleep", "/read", near, 2, ()),
            Load("pool of 3, each round trip +5 ms", "/read", far, 2, (DEF,)),
        ]


def _measure(
    subjects: list[Subject], failed: Table, load: Load, database: URL, scale: Scale
) -> None:
    """Put *load* on every subject, round after round; who fails once takes no further part."""
    for turn in range(load.rounds if scale.repeats else 1):
        counts = scale.headlines if turn else scale.clients
        for subject in list(subjects):
            try:
                _visit(subject, load, database, counts, scale.pace)
            except (DidNotStart, CannotRun) as error:
                subjects.remove(subject)
                failed.rows.append([subject.name, why(error)])


def _visit(subject: Subject, load: Load, database: URL, counts: Sequence[int], pace: Pace) -> None:
    """Load one server with more and more clients; one that is wedged is replaced."""
    rows = load.rows.setdefault(subject.name, {})
    server = None
    with ExitStack() as stack:
        for clients in counts:
            server = server or stack.enter_context(serve(subject, load.settings))
            burden = partial(sustain, server.port, [load.path], clients, pace)
            seen = observe(database, server, burden)
            rows.setdefault(clients, []).append(seen)
            if seen.tally.wedged:
                stack.close()
                server = None


def _table(load: Load) -> Table:
    header = ["subject", "clients", "req/s", "min-max", "p50 ms", "p99 ms", "errors", "cpu ms"]
    table = Table(f"HTTP: {load.name} ({load.path})", [*header, "backends", ""])
    for name, by_clients in load.rows.items():
        for clients, rounds in by_clients.items():
            table.rows.append([name, str(clients), *_cells(rounds)])
    return table


def _cells(rounds: list[Seen]) -> list[str]:
    rate = _rates(rounds)
    answers = [answer for seen in rounds for answer in seen.tally.answers]
    errors = sum(len(seen.tally.answers) - seen.tally.ok for seen in rounds)
    wedged = sum(seen.tally.wedged for seen in rounds)
    return [
        number(round(rate.median)),
        f"{rate.low:.0f}-{rate.high:.0f}",
        *(f"{quantile(answers, share):.0f}" for share in (0.5, 0.99)),
        str(errors),
        f"{Spread.of(seen.processor_ms for seen in rounds).median:.2f}",
        str(max(seen.backends for seen in rounds)),
        f"WEDGED in {wedged} of {len(rounds)}" if wedged else "",
    ]


def _rates(rounds: list[Seen]) -> Spread:
    return Spread.of(seen.tally.rate for seen in rounds)


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
    ours, theirs = (load.rows.get(name, {}).get(clients, []) for name in (our, their))
    if len(ours) != len(theirs) or not ours:
        return None
    name = f"{load.name}, {clients} clients: {our} / {their}"
    note = f"{_rates(ours).median:.0f} against {_rates(theirs).median:.0f}/s"
    if any(seen.tally.wedged for seen in theirs):
        # Nothing can be divided by what is not there.
        note = f"{note}: theirs is wedged"
        return Figure.spread(name, _rates(ours), "req/s", at_least=1, note=note)
    rates = [(a.tally.rate, b.tally.rate) for a, b in zip(ours, theirs, strict=True)]
    return Figure.spread(name, Spread.of(a / b for a, b in rates), at_least=1, note=note)


def _plot(load: Load, style: str) -> Plot:
    place = style.lower().replace(", ", "-").replace(" ", "-")
    kind = load.name.partition(",")[0].replace(" ", "-")
    plot = Plot(f"{kind}-{place}", f"{style}: {load.name}", "keep-alive clients", "requests/s")
    for name, by_clients in load.rows.items():
        if SUBJECTS[name].style == style:
            plot.lines[name] = [(clients, _rates(rounds)) for clients, rounds in by_clients.items()]
    return plot
