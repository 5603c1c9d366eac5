"""Write docs/benchmarks.md and its plots from the JSON of a run; nothing is measured.

`python -m benchmarks.report [FILE ...]`, of a run that was made in several parts.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._environments import ROOT
from benchmarks._plots import draw
from benchmarks._report import Figure

DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"
RUN = PLOTS / "run.json"

Run = dict[str, Any]

INTRODUCTION = """\
# Benchmarks

Everything here was measured by `make bench`, which also wrote this page; nothing is typed in. What
ran, when and on what stands at its end. Ratios come first, because they carry over to other
machines; absolute figures do not.

**Noise.** Each ratio is the median of its rounds with the lowest and the highest beside it
(min-max): ours and a peer take turns within seconds, so that a drift of the machine hits both
alike. Where a range holds 1.00, call it a draw. The tables of req/s are one look at each, minutes
apart: read them for their order of magnitude, and for who is wedged.
"""

METHOD = """\
## How it is measured

- Each peer is set up as its own documentation has it for FastAPI or Flask, and commits in its own
  way: advanced-alchemy with `commit_mode="autocommit"`, fastapi-async-sqlalchemy with
  `commit_on_exit=True`, fastapi-sqla and context-async-sqlalchemy by their middleware, oslo.db by a
  `writer` opened in the endpoint (its transaction belongs to one thread, so a `yield` dependency
  cannot hold it), the Flask extensions and the tutorial's `get_db` by `session.commit()` in the
  endpoint. The setups are a few lines each in `benchmarks/*_sites.py`; corrections are welcome.
- The same routes everywhere (`benchmarks/_bodies.py`), the same pool (5 + 10), each peer's own
  defaults for the rest, so a ping per checkout only where the peer has one by default (oslo.db).
- FastAPI runs on one uvicorn process with the standard event loop, Flask on waitress with 40
  threads, as many as FastAPI has for `def` endpoints. `def` endpoints use psycopg, `async def`
  ones asyncpg. Each subject is compared with ours of the same style.
- fastapi-sqla needs an older FastAPI, so it runs in an environment of its own.
- The clients are another process on the same machine and take processor time from the server; a
  keep-alive client sends its next request when the last is answered.
- *psycopg alone* and *asyncpg alone* are the drivers with their own pools: no session, no objects,
  no transaction. They are the limit, not a rival.
- *Wedged*: no request was answered 200 in the second half of the load. *Errors*: every answer but
  200, and none in time. *Backends*: most server connections seen at once.
"""

CAVEATS = """\
## What these numbers do not say

- Nothing about your queries: the rows are tiny and the schema has one table. A handler that takes
  50 ms of processor time makes every difference here invisible.
- Nothing about several server processes, TLS, PgBouncer or a database on another machine beyond
  the delay that a proxy adds to each round trip.
- A peer that ends its session after the answer is sent shows a shorter latency for one client, and
  the same round trips; what that order costs is in the questions.
- The peers do more than hand out sessions (repositories, migrations, pagination); that is not
  measured. Where a peer's documentation offers several ways, one was chosen.
- *sessionscope read-only* is for requests that only read. Compare *sessionscope* where they write.
"""


def write(*files: Path, document: Path = DOCUMENT, plots: Path = PLOTS) -> None:
    """Write the document and the plots of the run, or of its parts, in *files*."""
    parts = [json.loads(file.read_text()) for file in files]
    plots.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for report in part["reports"]:
            for plot in _drawn(report):
                draw(plot, plots / f"{plot['name']}.svg")
    document.write_text("\n".join(_document(parts, plots.name)).strip() + "\n")


def _drawn(report: Run) -> list[Any]:
    return [plot for plot in report["plots"] if plot["lines"]]


def _document(parts: Sequence[Run], plots: str) -> Iterator[str]:
    reports = {
        report["name"].partition(":")[0]: report for part in parts for report in part["reports"]
    }
    yield INTRODUCTION
    yield from _ratios(reports)
    if questions := reports.pop("questions", None):
        yield from _section(questions, plots)
    for report in reports.values():
        yield from _section(report, plots)
    yield METHOD
    yield CAVEATS
    yield "## The run\n"
    for part in parts:
        yield from _markdown(["", ""], part["machine"].items())


def _ratios(reports: Run) -> Iterator[str]:
    """Yield what stands first; the first table of the peers leaves their section."""
    yield "## Ratios\n"
    peers = reports.get("peers", {"tables": []})
    if peers["tables"]:
        matrix = peers["tables"].pop(0)
        yield f"{matrix['title']}, ours / theirs: more than 1 is better for us.\n"
        yield from _markdown(matrix["header"], matrix["rows"])
    others = [report for name, report in reports.items() if name != "peers"]
    figures = [figure for report in others for figure in report["figures"]]
    ratios = [figure for figure in figures if figure["unit"] == "x"]
    yield from _figures(ratios)


def _section(report: Run, plots: str) -> Iterator[str]:
    name, _, rest = report["name"].partition(":")
    yield f"## {name.capitalize()}\n"
    yield f"{rest.strip().capitalize()}.\n"
    for plot in _drawn(report):
        yield f"![{plot['title']}: {plot['y']} by {plot['x']}]({plots}/{plot['name']}.svg)\n"
    if name != "peers":
        yield from _figures(figure for figure in report["figures"] if figure["unit"] != "x")
    for table in report["tables"]:
        if table["rows"]:
            yield f"### {table['title']}\n"
            yield from _markdown(table["header"], table["rows"])


def _figures(figures: Iterable[Run]) -> Iterator[str]:
    rows = [Figure(**figure).cells() for figure in figures]
    if rows:
        yield from _markdown(["figure", "measured", "min-max", "target", "", "note"], rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(_escaped(cell) for cell in row)} |"
    yield ""


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    write(*([Path(name) for name in sys.argv[1:]] or [RUN]))
