"""FastAPI with an AsyncDatabase under load, and with requests that are cut off."""

import asyncio
from collections.abc import AsyncIterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx2
import pytest
from fastapi import (
    Depends,
    FastAPI,
    Request,
    Response,
)
from fastapi.responses import StreamingResponse
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from sessionscope import AsyncDatabase
from sessionscope.integrations.fastapi import session_per_request
from tests.async_drivers import (
    names,
    observer_of,
    on_postgres,
    on_uvloop_too,
    server_connections,
    until_at_work,
)
from tests.fastapi_clients import (
    Cancel,
    ItemOut,
    app_of,
    cancelled_each_way,
    client_of,
    disconnected,
    drained,
    scope,
    send_nothing,
    served,
    until,
)
from tests.models import Item

pytestmark = pytest.mark.anyio

LIMIT = 15  # of a Database by default
SLEEP = text("SELECT pg_sleep(30)")


@pytest.fixture
def app(async_database: AsyncDatabase) -> FastAPI:
    return app_of(async_database)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client


@pytest.mark.parametrize("paths", [["/"], ["/", "/naive"]], ids=["sessions", "begin-too"])
@on_uvloop_too
@on_postgres
async def test_200_clients_at_once_are_all_served_by_15_connections(
    app: FastAPI,
    client: httpx2.AsyncClient,
    async_database: AsyncDatabase,
    async_url: str,
    paths: list[str],
) -> None:
    """Each through two dependencies, or a unit of its own; the server never has more."""

    async def user(
        session: Annotated[AsyncSession, session_per_request(async_database, read_only=True)],
    ) -> int:
        return int(await session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    @app.get("/", response_model=list[ItemOut])
    async def read(
        user: Annotated[int, Depends(user)],
        session: Annotated[AsyncSession, session_per_request(async_database)],
    ) -> list[Item]:
        return list(await session.scalars(select(Item)))

    @app.get("/naive")
    async def naive() -> int:
        async with async_database.begin() as session:
            return int(await session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    samples: list[int] = []
    async with observer_of(async_url) as observer, asyncio.TaskGroup() as group:
        all_paths = islice(cycle(paths), 200)
        requests = [group.create_task(client.get(path)) for path in all_paths]
        while not all(request.done() for request in requests):
            samples.append(await server_connections(observer))
    assert [request.result().status_code for request in requests] == [200] * 200
    assert 1 < max(samples) <= LIMIT
    stats = async_database.stats()
    assert (stats.in_use, stats.waiting, stats.refused) == (0, 0, 0)


@on_postgres
async def test_two_sessions_in_one_request_are_one_slot(async_url: str) -> None:
    """With a session each, 50 clients would hold all connections and wait for a second one."""
    async with AsyncDatabase(async_url, pool_size=15, max_overflow=0) as database:
        app = app_of(database)

        async def audit(
            session: Annotated[AsyncSession, session_per_request(database)],
        ) -> int:
            return int(await session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

        @app.get("/")
        async def read(
            session: Annotated[AsyncSession, session_per_request(database, read_only=True)],
            audited: Annotated[int, Depends(audit)],
        ) -> int:
            return audited + int(await session.scalar(text("SELECT 1")) or 0)

        async with client_of(app) as client:
            answers = await asyncio.gather(*(client.get("/") for _ in range(50)))
        assert [answer.json() for answer in answers] == [2] * 50
        assert database.stats().begun == 50


async def test_several_databases_in_opposite_order_do_not_deadlock(tmp_path: Path) -> None:
    """One slot in each: taken in the order that the routes name, they would wait for ever."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 20}
    async with (
        AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'one.db'}", **options) as one,
        AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'two.db'}", **options) as two,
    ):
        app = app_of(one, two)

        async def answer(a: AsyncSession, b: AsyncSession) -> int:
            first = await a.scalar(text("SELECT 1"))
            return int(first or 0) + int(await b.scalar(text("SELECT 1")) or 0)

        @app.get("/one-two")
        async def one_two(
            a: Annotated[AsyncSession, session_per_request(one)],
            b: Annotated[AsyncSession, session_per_request(two)],
        ) -> int:
            return await answer(a, b)

        @app.get("/two-one")
        async def two_one(
            b: Annotated[AsyncSession, session_per_request(two)],
            a: Annotated[AsyncSession, session_per_request(one)],
        ) -> int:
            return await answer(b, a)

        async with client_of(app) as client:
            paths = ["/one-two", "/two-one"] * 25
            answers = await asyncio.gather(*(client.get(path) for path in paths))
        assert [each.json() for each in answers] == [2] * 50


@on_postgres
async def test_overload_is_answered_503_with_retry_after_in_time(async_url: str) -> None:
    """Those beyond the pool's are refused when they have waited, the others are served."""
    async with (
        AsyncDatabase(async_url, pool_size=2, max_overflow=1, pool_timeout=0.1) as database,
        observer_of(async_url) as observer,
    ):
        app = app_of(database)
        release = asyncio.Event()

        @app.get("/")
        async def read(session: Annotated[AsyncSession, session_per_request(database)]) -> None:
            await session.execute(text("SELECT 1"))
            await release.wait()

        async with client_of(app) as client, asyncio.TaskGroup() as group:
            requests = [group.create_task(client.get("/")) for _ in range(20)]
            answers = [await each for each in islice(asyncio.as_completed(requests), 17)]
            assert await server_connections(observer) == 3
            release.set()
        assert {answer.status_code for answer in answers} == {503}
        assert int(answers[0].headers["Retry-After"]) >= 1
        assert answers[0].json()["code"] == "pool_busy"
        assert sorted(each.result().status_code for each in requests) == [200] * 3 + [503] * 17
        assert database.stats().longest_wait < 1


# --- Cancellation and disconnects ---


async def test_a_client_that_disconnects_does_not_stop_the_commit(
    app: FastAPI, async_database: AsyncDatabase
) -> None:
    @app.get("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))

    await app(scope(), disconnected, send_nothing)
    assert await names(async_database) == ["pear"]
    assert async_database.stats().in_use == 0


@cancelled_each_way
async def test_a_cancelled_request_rolls_back_and_gives_its_slot_back(
    app: FastAPI, async_database: AsyncDatabase, cancel: Cancel
) -> None:
    started = asyncio.Event()

    @app.get("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))
        await session.flush()
        started.set()
        await anyio.sleep_forever()

    await cancel(app, started.wait())
    assert await drained(async_database)
    assert await names(async_database) == []


@cancelled_each_way
@on_uvloop_too
@on_postgres
async def test_a_request_that_is_cancelled_in_a_query_frees_the_servers_backend(
    app: FastAPI, async_database: AsyncDatabase, async_url: str, cancel: Cancel
) -> None:
    @app.get("/")
    async def read(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))
        await session.execute(SLEEP)

    async with observer_of(async_url) as observer:
        await cancel(app, until_at_work(observer, 1))
        await until_at_work(observer, 0)
    assert await drained(async_database)
    assert await names(async_database) == []


async def test_a_request_that_is_cancelled_while_it_waits_leaves_the_queue(async_url: str) -> None:
    async with AsyncDatabase(async_url, pool_size=1, max_overflow=0) as database:
        app = FastAPI()

        @app.get("/")
        async def read(session: Annotated[AsyncSession, session_per_request(database)]) -> None: ...

        async with database.begin():
            task = asyncio.create_task(app(scope(), disconnected, send_nothing))
            await until(lambda: database.stats().waiting == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert database.stats().waiting == 0
        assert database.stats().in_use == 0


class CancelsOnDisconnect:
    """What many write against clients that give up: the request ends with its connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await self.app(scope, receive, send)
            group.cancel_scope.cancel()


class Passes(BaseHTTPMiddleware):
    """Runs the app in a task group of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


@on_postgres
@pytest.mark.parametrize("inner", [None, Passes])
async def test_a_middleware_that_cancels_leaves_no_slot_and_no_backend_behind(
    app: FastAPI, async_database: AsyncDatabase, async_url: str, inner: type[Passes] | None
) -> None:
    """All clients of a full pool disconnect in the middle of a query, on a real server."""
    if inner is not None:
        app.add_middleware(inner)
    app.add_middleware(CancelsOnDisconnect)

    @app.get("/")
    async def read(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))
        await session.execute(SLEEP)

    async with observer_of(async_url) as observer, served(app) as client:
        requests = [asyncio.create_task(client.get("/")) for _ in range(LIMIT)]
        await until_at_work(observer, LIMIT)
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        await until_at_work(observer, 0)
        assert await server_connections(observer) <= LIMIT
    assert await names(async_database) == []
    assert async_database.stats().in_use == 0


@on_postgres
@pytest.mark.parametrize("in_a_query", [True, False])
async def test_a_client_that_leaves_a_stream_frees_the_units_slot_and_backend(
    app: FastAPI, async_database: AsyncDatabase, async_url: str, in_a_query: bool
) -> None:
    """The stream's own unit; without a middleware, Starlette notices at the next chunk."""
    if in_a_query:
        app.add_middleware(CancelsOnDisconnect)

    @app.get("/")
    async def stream() -> StreamingResponse:
        async def rows() -> AsyncIterator[str]:
            async with async_database.begin() as session:
                session.add(Item(name="pear"))
                await session.flush()
                while True:
                    yield "row"
                    await session.execute(SLEEP if in_a_query else text("SELECT 1"))

        return StreamingResponse(rows())

    async with observer_of(async_url) as observer, served(app) as client:
        async with client.stream("GET", "/") as response:
            rows = response.aiter_text()  # dropped, it would close the response
            assert (await anext(rows)).startswith("row")
            await until_at_work(observer, 1)
        await until_at_work(observer, 0)
        await until(lambda: async_database.stats().in_use == 0)
    assert await names(async_database) == []
