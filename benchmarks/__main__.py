"""Run the benchmarks and print their figures beside the targets.

A full run, all of them and not --short, also writes docs/benchmarks.md and its plots.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    async_units,
    cancellation,
    checker,
    costs,
    flights,
    growth,
    http,
    instructions,
    peers,
    promises,
    questions,
    report,
    requests,
    sandbox,
    survival,
    waiting,
)
from benchmarks._report import Report, dump, machine, show


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(_all())}")
    parser.add_argument("--short", action="store_true", help="only see that it runs: no figures")
    parser.add_argument("--url", help="a PostgreSQL server to use instead of one of our own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(_all()):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    return arguments


def _all(url: str | None = None, *, short: bool = False) -> dict[str, Callable[[], Report]]:
    return {
        "requests": partial(requests.run, short=short),
        "flights": partial(flights.run, url=url, short=short),
        "instructions": partial(instructions.run, short=short),
        "async": partial(async_units.run, url=url, short=short),
        "cancellation": partial(cancellation.run, url=url, short=short),
        "survival": partial(survival.run, url=url, short=short),
        "promises": partial(promises.run, url=url),
        "http": partial(http.run, url=url, short=short),
        "peers": partial(peers.run, url=url, short=short),
        "questions": partial(questions.run, url=url, short=short),
        "costs": partial(costs.run, url=url, short=short),
        "growth": partial(growth.run, url=url, short=short),
        "sandbox": partial(sandbox.run, url=url, short=short),
        "waiting": partial(waiting.run, url=url, short=short),
        "checker": partial(checker.run, short=short),
    }


def main() -> None:
    """Run the benchmarks that the command line names, or all."""
    arguments = _parse()
    full = not arguments.names and not arguments.short
    target = arguments.json or (report.RUN if full else None)
    environment = machine()
    print(*(f"{name} {value}" for name, value in environment.items()), sep=" · ")
    reports = []
    for name, run in _all(arguments.url, short=arguments.short).items():
        if not arguments.names or name in arguments.names:
            start = time.monotonic()
            reports.append(run())
            environment[f"{name} took"] = f"{time.monotonic() - start:.0f} s"
            show(reports[-1])
            if target:
                # After each: a later one that fails costs no figures.
                dump(target, environment, reports)
    if full and target:
        report.write(target)


if __name__ == "__main__":
    main()
