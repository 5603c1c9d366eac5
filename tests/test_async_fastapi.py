"""FastAPI with an AsyncDatabase: the promises of a Database's sessions, on the event loop."""

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Annotated, Any

import anyio
import httpx2
import pytest
import uvicorn
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    HTTPException,
    Request,
    Response,
    WebSocket,
)
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from sqlalchemy import exc as sa_exc
from sqlalchemy import make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from sessionscope import AsyncDatabase, Database, after_commit, after_rollback
from sessionscope.exc import ConfigurationError, NestedUnit, SessionEnded
from sessionscope.integrations.fastapi import install, session_per_request
from tests.async_drivers import names, on_one_of_each_kind, on_postgres, server_connections
from tests.models import Base, Item, Note
from tests.models import names as names_sync

pytestmark = pytest.mark.anyio

on_asyncpg = pytest.mark.parametrize("async_url", ["asyncpg"], indirect=True)

LIMIT = 15  # of a Database by default
SLEEP = text("SELECT pg_sleep(30)")


class ItemOut(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    name: str


@pytest.fixture
def app(async_database: AsyncDatabase) -> FastAPI:
    app = FastAPI()
    install(app, async_database)
    return app


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that sees what a real one would: a 500, not the exception."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://test", timeout=60
    ) as client:
        yield client


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a real server, to which a client's connection can be lost."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        url = "http://{}:{}".format(*listening.getsockname())
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def observer_of(url: str) -> AsyncIterator[AsyncDatabase]:
    async with AsyncDatabase(url, pool_size=1, max_overflow=0) as observer:
        yield observer


async def at_work(observer: AsyncDatabase) -> int:
    """How many of the server's connections run a statement or hold a transaction."""
    async with observer.begin(read_only=True) as session:
        found = await session.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state <> 'idle'"
            )
        )
    return int(found or 0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until it holds; a test that waits in vain times out."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def until_at_work(observer: AsyncDatabase, count: int) -> None:
    """Wait until the server sees that many at work."""
    async with asyncio.timeout(10):
        while await at_work(observer) != count:
            pass


async def until_it_waits_for_a_lock(observer: AsyncDatabase) -> None:
    """Wait until the server sees one that waits for another's transaction."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    async with asyncio.timeout(10):
        found = 0
        while not found:
            async with observer.begin(read_only=True) as session:
                found = await session.scalar(waiting) or 0


async def drained(*databases: AsyncDatabase | Database) -> bool:
    """Whether every unit ends by itself: a clean-up may go on after its request."""
    return all(
        [
            await each.drain(10)
            if isinstance(each, AsyncDatabase)
            else await asyncio.to_thread(each.drain, 10)
            for each in databases
        ]
    )


# --- The outcome of a request ---


async def test_the_row_is_there_when_the_first_byte_of_the_answer_is(
    app: FastAPI, async_database: AsyncDatabase
) -> None:
    seen: list[list[str]] = []

    @app.post("/{name}", response_model=ItemOut)
    async def create(
        name: str, session: Annotated[AsyncSession, session_per_request(async_database)]
    ) -> Item:
        item = Item(name=name)
        session.add(item)
        await session.flush()
        return item

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        async def look(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.append(await asyncio.create_task(names(async_database)))
            await send(message)

        await app(scope, receive, look)

    async with client_of(asgi) as client:
        assert (await client.post("/pear")).json()["name"] == "pear"
    assert seen == [["pear"]]
    assert async_database.stats().in_use == 0


@on_postgres
async def test_a_write_is_read_right_after_its_200_however_slow_the_commit(
    app: FastAPI, async_database: AsyncDatabase
) -> None:
    """A trigger that is deferred to the COMMIT makes it slow."""
    async with async_database.begin() as session:
        await session.execute(
            text(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END$$"
            )
        )
        await session.execute(
            text(
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION slow()"
            )
        )

    @app.post("/{name}")
    async def create(
        name: str, session: Annotated[AsyncSession, session_per_request(async_database)]
    ) -> None:
        session.add(Item(name=name))

    @app.get("/{name}")
    async def read(
        name: str,
        session: Annotated[AsyncSession, session_per_request(async_database, read_only=True)],
    ) -> bool:
        return await session.scalar(select(Item).where(Item.name == name)) is not None

    async with served(app) as client:
        for n in range(10):
            assert (await client.post(f"/{n}")).status_code == 200
            assert (await client.get(f"/{n}")).json() is True


@pytest.mark.parametrize("status", [200, 303, 404, 500])
@on_one_of_each_kind
async def test_a_returned_response_commits_whatever_its_status(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase, status: int
) -> None:
    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
    ) -> Response:
        session.add(Item(name="pear"))
        return Response(status_code=status)

    assert (await client.post("/")).status_code == status
    assert await names(async_database) == ["pear"]


async def test_a_failed_commit_is_never_a_success_and_stops_background_tasks(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    ran: list[str] = []

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> str:
        background.add_task(ran.append, "task")
        session.add(Note(item_id=404))  # the constraint is checked at COMMIT
        return "created"

    answers = await asyncio.gather(*(client.post("/") for _ in range(20)))
    assert [answer.status_code for answer in answers] == [500] * 20
    assert ran == []
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
async def test_a_failed_commit_reaches_the_apps_own_handler(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    @app.exception_handler(sa_exc.IntegrityError)
    async def conflict(request: Request, error: Exception) -> Response:
        return PlainTextResponse("conflict", 409)

    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> str:
        session.add(Note(item_id=404))
        return "created"

    assert (await client.post("/")).text == "conflict"


@on_postgres
async def test_a_swallowed_error_is_never_a_success(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> str:
        session.add(Item(name="lost"))
        await session.flush()
        with pytest.raises(sa_exc.ProgrammingError):
            await session.execute(text("SELECT * FROM no_such_table"))
        return "created"

    assert (await client.post("/")).status_code == 500
    assert await names(async_database) == []
    assert async_database.stats().committed == 1  # names()


class Refused(Exception):
    pass


@pytest.mark.parametrize("error", [Refused(), HTTPException(409), ValueError("unexpected")])
@on_one_of_each_kind
async def test_an_exception_rolls_back_even_when_a_handler_answers_it(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase, error: Exception
) -> None:
    ran: list[str] = []

    @app.exception_handler(Refused)
    async def redirect(request: Request, error: Exception) -> Response:
        return RedirectResponse("/elsewhere", 303)

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> None:
        background.add_task(ran.append, "task")
        session.add(Item(name="pear"))
        await session.flush()
        raise error

    assert (await client.post("/")).status_code in (303, 409, 500)
    assert await names(async_database) == []
    assert ran == []


async def test_a_response_that_does_not_validate_rolls_back(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    @app.post("/", response_model=ItemOut)
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
    ) -> dict[str, str]:
        session.add(Item(name="pear"))
        await session.flush()
        return {"nonsense": "x"}

    assert (await client.post("/")).status_code == 500
    assert await names(async_database) == []


# --- After the unit of work ---


async def test_streams_and_background_tasks_have_a_free_connection_and_no_session(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    seen: list[object] = []

    async def use(session: AsyncSession) -> None:
        seen.append(async_database.stats().in_use)
        with pytest.raises(SessionEnded, match=r"create\).*async with database\.begin\(\)"):
            await session.execute(text("SELECT 1"))
        seen.append(await names(async_database))

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> StreamingResponse:
        session.add(Item(name="pear"))
        background.add_task(use, session)

        async def rows() -> AsyncIterator[str]:
            await use(session)
            yield "streamed"

        return StreamingResponse(rows(), background=background)

    assert (await client.post("/")).text == "streamed"
    assert seen == [0, ["pear"]] * 2


@on_postgres
async def test_slow_streams_and_background_tasks_keep_no_connection(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase, async_url: str
) -> None:
    """More of them than connections, and the other requests are served at once."""
    slow, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def wait() -> None:
        slow.release()
        await go_on.wait()

    @app.get("/stream")
    async def stream(
        session: Annotated[AsyncSession, session_per_request(async_database)],
    ) -> StreamingResponse:
        await session.execute(text("SELECT 1"))

        async def rows() -> AsyncIterator[str]:
            await wait()
            yield "row"

        return StreamingResponse(rows())

    @app.get("/background")
    async def background(
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> None:
        await session.execute(text("SELECT 1"))
        background.add_task(wait)

    @app.get("/ping")
    async def ping(session: Annotated[AsyncSession, session_per_request(async_database)]) -> int:
        return int(await session.scalar(text("SELECT 1")) or 0)

    async with observer_of(async_url) as observer, asyncio.TaskGroup() as group:
        for path in ["/stream", "/background"] * 10:
            group.create_task(client.get(path))
        for _ in range(20):
            await slow.acquire()
        pings = await asyncio.gather(*(client.get("/ping") for _ in range(10)))
        assert [ping.status_code for ping in pings] == [200] * 10
        assert await at_work(observer) == 0
        go_on.set()


# --- Hooks ---


async def test_async_hooks_run_after_the_commit_and_before_the_response(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    """The unit has ended by then, so that a hook may open its own, which sees the row."""
    order: list[object] = []

    async def hook(name: str) -> None:
        async with async_database.begin() as session:
            order.append(list(await session.scalars(select(Item.name))))
            session.add(Item(name=name))

    @app.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> str:
        background.add_task(order.append, "task")
        after_commit(session, hook, "apple")
        after_commit(session, order.append, "plain")
        session.add(Item(name="pear"))
        return "created"

    assert (await client.post("/")).status_code == 200
    assert order == [["pear"], "plain", "task"]
    assert await names(async_database) == ["apple", "pear"]


@on_one_of_each_kind
async def test_a_failing_hook_leaves_the_success_a_success(
    app: FastAPI,
    client: httpx2.AsyncClient,
    async_database: AsyncDatabase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise ValueError("no mail today")

    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        after_commit(session, fail)
        session.add(Item(name="pear"))

    assert (await client.post("/")).status_code == 200
    assert await names(async_database) == ["pear"]
    assert "no mail today" in caplog.text


@on_one_of_each_kind
async def test_async_rollback_hooks_run_before_the_error_is_answered(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    order: list[object] = []
    trace: ContextVar[str] = ContextVar("trace", default="none")

    async def hook() -> None:
        order.append((trace.get(), await names(async_database)))

    @app.exception_handler(Refused)
    async def answer(request: Request, error: Exception) -> Response:
        order.append("handler")
        return PlainTextResponse("refused", 409)

    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        trace.set("this request")
        after_commit(session, pytest.fail, "committed")
        after_rollback(session, hook)
        session.add(Item(name="pear"))
        await session.flush()
        raise Refused

    assert (await client.post("/")).status_code == 409
    assert order == [("this request", []), "handler"]


# --- One session per request and database ---


@on_one_of_each_kind
async def test_a_request_has_one_session_however_it_asks_for_it(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    """It writes if one of its dependencies wants to, even when one that reads comes first."""
    dependency = session_per_request(async_database)

    async def user(
        session: Annotated[AsyncSession, session_per_request(async_database, read_only=True)],
    ) -> AsyncSession:
        return session

    @app.post("/")
    async def create(
        through: Annotated[AsyncSession, Depends(user)],
        aliased: Annotated[AsyncSession, dependency],
        inline: Annotated[AsyncSession, session_per_request(async_database)],
    ) -> list[int]:
        through.add(Item(name="pear"))
        return [len({id(s) for s in (through, aliased, inline)}), async_database.stats().in_use]

    assert (await client.post("/")).json() == [1, 1]
    assert await names(async_database) == ["pear"]


async def test_a_reading_request_refuses_to_write(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    """Also when it has read, and by a statement as well as by a flush."""

    @app.post("/{how}")
    async def create(
        how: str,
        session: Annotated[AsyncSession, session_per_request(async_database, read_only=True)],
    ) -> str:
        await session.scalars(select(Item))
        if how == "flush":
            session.add(Item(name="pear"))
        else:
            await session.execute(text("INSERT INTO item (name) VALUES ('pear')"))
        return "created"

    assert (await client.post("/flush")).status_code == 500
    assert (await client.post("/statement")).status_code == 500
    assert await names(async_database) == []
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
async def test_a_router_level_dependency_that_writes_is_heard(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    router = APIRouter()

    @router.post("/")
    async def create(
        session: Annotated[AsyncSession, session_per_request(async_database, read_only=True)],
    ) -> None:
        session.add(Item(name="pear"))

    app.include_router(
        router, prefix="/included", dependencies=[session_per_request(async_database)]
    )
    assert (await client.post("/included/")).status_code == 200
    assert await names(async_database) == ["pear"]


@on_one_of_each_kind
async def test_dependency_overrides_replace_the_session(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    async def fake() -> str:
        return "a fake session"

    @app.get("/")
    async def read(session: Annotated[Any, session_per_request(async_database)]) -> str:
        return str(session)

    app.dependency_overrides[session_per_request(async_database).dependency] = fake
    assert (await client.get("/")).json() == "a fake session"
    app.dependency_overrides.clear()
    assert "AsyncSession" in (await client.get("/")).json()


@on_one_of_each_kind
async def test_begin_inside_an_endpoint_with_a_session_is_refused_at_once(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    @app.get("/")
    async def read(session: Annotated[AsyncSession, session_per_request(async_database)]) -> str:
        with pytest.raises(NestedUnit, match="read"):
            async with async_database.begin():
                pytest.fail("it was opened")
        return "refused"

    assert (await client.get("/")).json() == "refused"


@on_one_of_each_kind
async def test_the_session_is_of_the_users_class(async_url: str) -> None:
    """SQLModel's has ``exec()``."""
    async with AsyncDatabase(async_url, session_class=SQLModelSession) as database:
        async with database.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        app = FastAPI()

        @app.post("/")
        async def create(
            session: Annotated[SQLModelSession, session_per_request(database)],
        ) -> list[str]:
            session.add(Item(name="pear"))
            return list(await session.exec(sqlmodel_select(Item.name)))

        async with client_of(app) as client:
            assert (await client.post("/")).json() == ["pear"]
        assert database.stats().committed == 1


# --- Load ---


@on_postgres
async def test_200_clients_at_once_are_all_served_by_15_connections(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase, async_url: str
) -> None:
    """Each through two dependencies, and the server never has more than the pool's."""

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

    samples: list[int] = []
    async with observer_of(async_url) as observer, asyncio.TaskGroup() as group:
        requests = [group.create_task(client.get("/")) for _ in range(200)]
        while not all(request.done() for request in requests):
            samples.append(await server_connections(observer))
    assert [request.result().status_code for request in requests] == [200] * 200
    assert 1 < max(samples) <= LIMIT
    stats = async_database.stats()
    assert (stats.in_use, stats.waiting, stats.refused) == (0, 0, 0)


@on_postgres
async def test_overload_is_answered_503_with_retry_after_in_time(async_url: str) -> None:
    """Those beyond the pool's are refused when they have waited, the others are served."""
    async with (
        AsyncDatabase(async_url, pool_size=2, max_overflow=1, pool_timeout=0.1) as database,
        observer_of(async_url) as observer,
    ):
        app = FastAPI()
        install(app, database)
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


async def send_nothing(message: Any) -> None: ...


async def disconnected() -> dict[str, str]:
    return {"type": "http.disconnect"}


SCOPE = {
    "type": "http",
    "method": "GET",
    "path": "/",
    "query_string": b"",
    "headers": [],
    "http_version": "1.1",
    "scheme": "http",
    "server": ("test", 80),
}


async def test_a_client_that_disconnects_does_not_stop_the_commit(
    app: FastAPI, async_database: AsyncDatabase
) -> None:
    @app.get("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))

    await app(dict(SCOPE), disconnected, send_nothing)
    assert await names(async_database) == ["pear"]
    assert async_database.stats().in_use == 0


async def cancel_by_asyncio(app: FastAPI, when: Awaitable[object]) -> None:
    task = asyncio.create_task(app(dict(SCOPE), disconnected, send_nothing))
    await when
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_by_timeout(app: FastAPI, when: Awaitable[object]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as deadline, asyncio.TaskGroup() as group:

            async def expire() -> None:
                await when
                deadline.reschedule(0)

            group.create_task(expire())
            await app(dict(SCOPE), disconnected, send_nothing)


async def cancel_by_anyio(app: FastAPI, when: Awaitable[object]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(app, dict(SCOPE), disconnected, send_nothing)
        await when
        group.cancel_scope.cancel()


cancelled_each_way = pytest.mark.parametrize(
    "cancel", [cancel_by_asyncio, cancel_by_timeout, cancel_by_anyio]
)
Cancel = Callable[[FastAPI, Awaitable[object]], Awaitable[None]]


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
            task = asyncio.create_task(app(dict(SCOPE), disconnected, send_nothing))
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


# --- Sync and async sessions in one app ---


@pytest.fixture
async def mixed(
    async_database: AsyncDatabase, async_url: str
) -> AsyncIterator[tuple[AsyncDatabase, Database]]:
    """The same PostgreSQL database, through an AsyncDatabase and through a Database."""
    with Database(make_url(async_url).set(drivername="postgresql")) as database:
        yield async_database, database


Mixed = tuple[AsyncDatabase, Database]


def mixed_app(databases: Mixed, work: Callable[[AsyncSession, Session], Any]) -> FastAPI:
    """An app whose one route does *work* with a session of each."""
    app = FastAPI()
    install(app, *databases)

    def of_thread(session: Annotated[Session, session_per_request(databases[1])]) -> Session:
        session.execute(text("SELECT 1"))
        return session

    async def create(
        a: Annotated[AsyncSession, session_per_request(databases[0])],
        b: Annotated[Session, Depends(of_thread)],
    ) -> None:
        await work(a, b)

    app.add_api_route("/", create, methods=["GET"])
    return app


async def status_of(app: FastAPI) -> int:
    async with client_of(app) as client:
        return (await client.get("/")).status_code


@on_postgres
async def test_a_sync_and_an_async_session_of_one_route_both_commit(mixed: Mixed) -> None:
    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Item(name="async"))
        b.add(Item(name="sync"))

    assert await status_of(mixed_app(mixed, work)) == 200
    assert await names(mixed[0]) == ["async", "sync"]
    assert mixed[0].stats().in_use == mixed[1].stats().in_use == 0


@on_postgres
@pytest.mark.parametrize("failing", ["async", "sync"])
async def test_a_flush_of_either_that_fails_stores_nothing(mixed: Mixed, failing: str) -> None:
    async def work(a: AsyncSession, b: Session) -> None:
        for session, name in ((a, "async"), (b, "sync")):
            session.add(Item(name=name))
            if name == failing:
                session.add(Item(name=name))

    assert await status_of(mixed_app(mixed, work)) == 500
    gc.collect()
    assert await names(mixed[0]) == []
    assert mixed[0].stats().in_use == mixed[1].stats().in_use == 0


@on_postgres
async def test_a_failed_async_commit_keeps_the_sync_one_from_happening(mixed: Mixed) -> None:
    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Note(item_id=404))
        b.add(Item(name="sync"))

    assert await status_of(mixed_app(mixed, work)) == 500
    assert await names(mixed[0]) == []
    assert mixed[0].stats().in_use == mixed[1].stats().in_use == 0


@on_postgres
async def test_an_exception_rolls_both_back(mixed: Mixed) -> None:
    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Item(name="async"))
        await a.flush()
        b.add(Item(name="sync"))
        await asyncio.to_thread(b.flush)
        raise HTTPException(409)

    assert await status_of(mixed_app(mixed, work)) == 409
    assert await names(mixed[0]) == []
    assert mixed[0].stats().in_use == mixed[1].stats().in_use == 0


@on_postgres
@cancelled_each_way
async def test_a_cancelled_request_leaves_nothing_of_either(mixed: Mixed, cancel: Cancel) -> None:
    started = asyncio.Event()

    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Item(name="async"))
        await a.flush()
        b.add(Item(name="sync"))
        await asyncio.to_thread(b.flush)
        started.set()
        await anyio.sleep_forever()

    await cancel(mixed_app(mixed, work), started.wait())
    assert await drained(*mixed)
    assert await names(mixed[0]) == []


@on_postgres
@pytest.mark.parametrize("cancel", [cancel_by_asyncio, cancel_by_timeout])
@pytest.mark.parametrize("waiting", ["async", "sync"])
async def test_a_request_that_is_cancelled_in_its_last_flush_leaves_nothing_of_either(
    mixed: Mixed, async_url: str, cancel: Cancel, waiting: str
) -> None:
    """A row that another transaction has inserted makes the flush of the same one wait.

    From anyio's cancellations FastAPI itself shields the end of dependencies.
    """

    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Item(name="taken" if waiting == "async" else "async"))
        b.add(Item(name="taken" if waiting == "sync" else "sync"))

    async with observer_of(async_url) as observer, AsyncDatabase(async_url) as other:
        async with other.begin() as blocking:
            blocking.add(Item(name="taken"))
            await blocking.flush()
            await cancel(mixed_app(mixed, work), until_it_waits_for_a_lock(observer))
            assert await drained(*mixed)
    assert await names(mixed[0]) == ["taken"]
    assert mixed[0].stats().longest_use < 5


@on_postgres
async def test_routes_of_one_app_may_differ_in_kind(mixed: Mixed) -> None:
    app = FastAPI()
    install(app, *mixed)

    @app.post("/async")
    async def create_async(session: Annotated[AsyncSession, session_per_request(mixed[0])]) -> None:
        session.add(Item(name="async"))

    @app.post("/sync")
    def create_sync(session: Annotated[Session, session_per_request(mixed[1])]) -> None:
        session.add(Item(name="sync"))

    async with client_of(app) as client:
        paths = ["/async", "/sync"]
        answers = await asyncio.gather(*(client.post(path) for path in paths))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert await names(mixed[0]) == ["async", "sync"]


# --- install() ---


@pytest.fixture(params=["psycopg", "asyncpg", "aiosqlite"])
def tables_url(request: pytest.FixtureRequest) -> str:
    """The tests' tables behind each driver, for tests whose event loops come and go."""
    is_sqlite = request.param == "aiosqlite"
    url = make_url(request.getfixturevalue("sqlite_url" if is_sqlite else "postgres_url"))
    with Database(url) as database:
        Base.metadata.create_all(database.engine)
    return url.set(drivername=f"{url.get_backend_name()}+{request.param}").render_as_string(False)


def sync_names(url: str) -> list[str]:
    backend = make_url(url).get_backend_name()
    with Database(make_url(url).set(drivername=backend)) as database:
        return sorted(names_sync(database))


def app_that_creates(database: AsyncDatabase) -> FastAPI:
    app = FastAPI()

    @app.post("/{name}")
    async def create(
        name: str, session: Annotated[AsyncSession, session_per_request(database)]
    ) -> None:
        session.add(Item(name=name))

    return app


def test_two_test_clients_in_a_row_work(tables_url: str) -> None:
    """Each has an event loop of its own; the first one's shutdown drains the Database."""
    database = AsyncDatabase(tables_url)
    app = app_that_creates(database)
    install(app, database)
    for name in ("one", "two"):
        with TestClient(app) as client:
            assert client.post(f"/{name}").status_code == 200
            assert client.post(f"/{name}-more").status_code == 200
        assert database.stats().idle == 0
    assert sync_names(tables_url) == ["one", "one-more", "two", "two-more"]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_test_client_without_a_lifespan_works(tables_url: str) -> None:
    """Each request then has an event loop of its own, which is closed when it is answered.

    asyncpg's connections cannot be closed in order after that.
    """
    database = AsyncDatabase(tables_url)
    client = TestClient(app_that_creates(database))
    for name in ("one", "two", "three"):
        assert client.post(f"/{name}").status_code == 200
    assert sync_names(tables_url) == ["one", "three", "two"]
    asyncio.run(database.dispose())
    gc.collect()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_database_that_is_down_is_503_and_a_warning_at_start_up(
    caplog: pytest.LogCaptureFixture, driver: str
) -> None:
    database = AsyncDatabase(f"postgresql+{driver}://user:s3cr3t@127.0.0.1:1/db")
    app = app_that_creates(database)
    install(app, database)
    with caplog.at_level(logging.WARNING, "sessionscope"), TestClient(app) as client:
        response = client.post("/pear")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert "Retry-After" in response.headers
    assert "does not answer at start-up" in caplog.text
    assert "s3cr3t" not in caplog.text


async def test_shutdown_waits_for_the_units_at_work(
    app: FastAPI, async_database: AsyncDatabase
) -> None:
    """And refuses new ones meanwhile; afterwards the Database works again."""
    inside, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with async_database.begin() as session:
            session.add(Item(name="pear"))
            inside.set()
            await leave.wait()

    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    working = asyncio.create_task(work())
    await inside.wait()
    stopping = asyncio.create_task(lifespan.__aexit__(None, None, None))
    while not async_database.stats().refused:
        await asyncio.sleep(0)
        refusal = asyncio.create_task(async_database.ping())
        await asyncio.wait([refusal], timeout=1)
        refusal.exception()
    assert not stopping.done()
    leave.set()
    await asyncio.gather(working, stopping)
    assert await names(async_database) == ["pear"]


def test_a_websocket_is_refused_with_the_mend(tables_url: str) -> None:
    database = AsyncDatabase(tables_url)
    app = FastAPI()
    install(app, database)

    @app.websocket("/ws")
    async def chat(
        websocket: WebSocket, session: Annotated[AsyncSession, session_per_request(database)]
    ) -> None:
        pytest.fail("the endpoint ran")

    with TestClient(app) as client, pytest.raises(ConfigurationError, match="async with"):
        with client.websocket_connect("/ws"):
            pytest.fail("it was accepted")
    assert database.stats().in_use == 0


@on_asyncpg
async def test_wrong_arguments_name_the_line_to_write(async_database: AsyncDatabase) -> None:
    for wrong, line in (
        (lambda: install(FastAPI(), async_database.engine), r"AsyncEngine .* write install\(app, "),  # type: ignore[arg-type]
        (lambda: session_per_request(async_database.engine), r"write session_per_request\("),  # type: ignore[arg-type]
        (lambda: session_per_request(async_database.sessionmaker), r"write session_per_request"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match=line):
            wrong()
