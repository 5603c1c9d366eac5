"""What a request costs that declares a session and sends no query: no network, no database.

Processor time on one core, where the system allows to choose it: else the way of a request from
one core to the other and back would be most of what is measured, and most of the noise.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy.orm import Session

from benchmarks._peers import seed
from benchmarks._report import Figure, Report, Spread, Table

MEMORY = "sqlite://"
BARE = "def route"
Answer = dict[str, str]


def async_route(app: FastAPI) -> None:
    """Serve an `async def` endpoint without a dependency."""

    @app.get("/")
    async def endpoint() -> Answer:
        return {"answer": "yes"}


def def_route(app: FastAPI) -> None:
    """Serve a `def` endpoint without a dependency."""

    @app.get("/")
    def endpoint() -> Answer:
        return {"answer": "yes"}


def async_yield(app: FastAPI) -> None:
    """Serve a `def` endpoint with an empty asynchronous generator as its dependency."""

    async def nothing() -> AsyncIterator[None]:
        yield None

    _serve_with(app, Depends(nothing))


def seed_shape(app: FastAPI) -> None:
    """Serve the tutorials' `get_db` on a `def` endpoint that does not use it."""
    peer = seed(MEMORY)

    def get_db() -> Iterator[Session]:
        with peer.unit() as db:
            yield db

    _serve_with(app, Depends(get_db))


def ours(app: FastAPI) -> None:
    """Serve our session on a `def` endpoint that does not use it."""
    _serve_ours(app, read_only=False)


def ours_read_only(app: FastAPI) -> None:
    """Serve our read-only session on a `def` endpoint that does not use it."""
    _serve_ours(app, read_only=True)


def _serve_ours(app: FastAPI, *, read_only: bool) -> None:
    from sessionscope import Database
    from sessionscope.integrations.fastapi import install, session_per_request

    database = Database(MEMORY)
    install(app, database)
    _serve_with(app, session_per_request(database, read_only=read_only))


def _serve_with(app: FastAPI, dependency: Any) -> None:
    @app.get("/")
    def endpoint(unused: Annotated[object, dependency]) -> Answer:
        return {"answer": "yes"}


# Each route's target: at most so many times the bare `def` route.
ROUTES: dict[str, tuple[Callable[[FastAPI], None], float | None]] = {
    "async def route": (async_route, None),
    BARE: (def_route, None),
    "def + empty async yield": (async_yield, None),
    "def + seed's get_db": (seed_shape, None),
    "def + our session, unused": (ours, 1.35),
    "def + our read-only session, unused": (ours_read_only, None),
}


def run(*, short: bool) -> Report:
    """Time each route in turn, round after round."""
    rounds, requests = (10, 50) if short else (100, 100)
    with _one_core():
        taken = asyncio.run(_rounds(_apps(), rounds, requests))
    report = Report("requests: without a query, in process")
    table = Table("µs per request", ["route", "µs", "min-max", "x def route"])
    for name, (_, target) in ROUTES.items():
        times, ratio = Spread.of(taken[name]), _ratio(taken, name)
        between = f"{times.low:.0f}-{times.high:.0f}"
        table.rows.append([name, f"{times.median:.0f}", between, str(ratio)])
        if name != BARE:
            report.figures.append(Figure.spread(f"{name} / {BARE}", ratio, at_most=target))
    report.tables.append(table)
    return report


@contextmanager
def _one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _ratio(taken: dict[str, list[float]], name: str) -> Spread:
    return Spread.of(one / bare for one, bare in zip(taken[name], taken[BARE], strict=True))


def _apps() -> dict[str, FastAPI]:
    apps = {name: FastAPI() for name in ROUTES}
    for name, app in apps.items():
        ROUTES[name][0](app)
    return apps


async def _rounds(apps: dict[str, FastAPI], rounds: int, requests: int) -> dict[str, list[float]]:
    for app in apps.values():
        await _microseconds(app, requests)
    taken: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds):
        for name, app in apps.items():
            taken[name].append(await _microseconds(app, requests))
    return taken


async def _microseconds(app: FastAPI, requests: int) -> float:
    start = time.process_time()
    for _ in range(requests):
        await _request(app)
    return (time.process_time() - start) / requests * 1e6


async def _request(app: FastAPI) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, _receive, _expect_ok)


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _expect_ok(message: Any) -> None:
    if message["type"] == "http.response.start" and message["status"] != 200:
        raise RuntimeError(f"A benchmarked route answered {message['status']}.")
