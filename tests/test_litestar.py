"""Litestar: what the contract suite does not show, of the dependency and of install()."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from litestar import Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect
from litestar.testing import AsyncTestClient, TestClient
from litestar.types import Message, Scope
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError, NestedUnit, PoolBusy, SessionEnded
from sessionscope.integrations.litestar import install, session_per_request
from tests.models import Item, Note, names

ASession = NamedDependency[Session]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Litestar's logging stays in its tests."""
    before = logging.getLogger().handlers[:], logging.getLogger().level
    yield
    logging.getLogger().handlers[:], level = before
    logging.getLogger().setLevel(level)


def app_of(*handlers: Any, database: Database, **options: Any) -> Litestar:
    dependencies = {
        "session": session_per_request(database),
        "reading": session_per_request(database, read_only=True),
        **options.pop("dependencies", {}),
    }
    return Litestar(
        list(handlers),
        dependencies=dependencies,
        on_app_init=[install(database)],
        logging_config=None,
        **options,
    )


def test_a_request_has_one_session_which_writes_if_any_dependency_wants_to(
    database: Database,
) -> None:
    async def user(reading: ASession) -> int:
        return id(reading)

    @post("/", sync_to_thread=True)
    def create(session: ASession, user: NamedDependency[int]) -> bool:
        session.add(Item(name="pear"))
        return user == id(session)

    @get("/", sync_to_thread=True)
    def read(reading: ASession, user: NamedDependency[int]) -> list[str]:
        assert database.stats().in_use == 1
        return list(reading.scalars(text("SELECT name FROM item")))

    app = app_of(create, read, database=database, dependencies={"user": user})
    with TestClient(app) as client:
        assert client.post("/").json() is True
        assert client.get("/").json() == ["pear"]
    assert database.stats().in_use == 0


def test_a_dependency_that_fails_leaves_nothing_open(database: Database) -> None:
    """Litestar does not end the generators before it: install() rolls back at once."""

    async def failing(session: ASession) -> int:
        session.add(Item(name="pear"))
        session.flush()
        raise ValueError

    @post("/", sync_to_thread=True)
    def create(session: ASession, failing: NamedDependency[int]) -> None: ...

    def handle(request: Request[Any, Any, Any], error: Exception) -> Response[str]:
        return Response("failed", status_code=418)

    in_use_when_sent: list[int] = []

    async def look(message: Message, scope: Scope) -> None:
        in_use_when_sent.append(database.stats().in_use)

    app = app_of(
        create,
        database=database,
        dependencies={"failing": failing},
        exception_handlers={ValueError: handle},
        before_send=[look],
    )
    with TestClient(app) as client:
        assert [client.post("/").status_code for _ in range(20)] == [418] * 20
    assert set(in_use_when_sent) == {0}
    assert names(database) == []


def test_the_handler_is_in_the_flow_of_the_unit_also_beside_other_dependencies(
    database: Database,
) -> None:
    """Litestar resolves them in tasks of their own."""

    async def other() -> AsyncGenerator[int]:
        yield 1

    async def third() -> int:
        return 3

    @get("/", sync_to_thread=True)
    def read(session: ASession, other: NamedDependency[int], third: NamedDependency[int]) -> str:
        with pytest.raises(NestedUnit, match=r"\.read\)"), database.begin():
            pytest.fail("it was opened")
        return "refused"

    app = app_of(read, database=database, dependencies={"other": other, "third": third})
    with TestClient(app) as client:
        assert client.get("/").text == "refused"


def test_a_failed_commit_reaches_the_apps_handler_and_stops_background_tasks(
    database: Database,
) -> None:
    ran: list[str] = []

    async def run() -> None:
        ran.append("task")

    @post("/", sync_to_thread=True)
    def create(session: ASession) -> Response[str]:
        session.add(Note(item_id=404))
        return Response("created", background=BackgroundTask(run))

    def conflict(request: Request[Any, Any, Any], error: Exception) -> Response[str]:
        return Response("conflict", status_code=409)

    handlers = {sa_exc.IntegrityError: conflict}
    with TestClient(app_of(create, database=database, exception_handlers=handlers)) as client:
        assert client.post("/").status_code == 409
    assert ran == []


def test_a_background_task_has_no_session(database: Database) -> None:
    seen: list[object] = []

    async def look(session: Session) -> None:
        seen.append(database.stats().in_use)
        with pytest.raises(SessionEnded):
            session.execute(text("SELECT 1"))
        seen.append(await asyncio.to_thread(names, database))

    @post("/", sync_to_thread=True)
    def create(session: ASession) -> Response[str]:
        session.add(Item(name="pear"))
        return Response("created", background=BackgroundTask(look, session))

    with TestClient(app_of(create, database=database)) as client:
        assert client.post("/").status_code == 201
    assert seen == [0, ["pear"]]


def test_several_databases_are_flushed_before_the_first_commit(
    psycopg: Database, sqlite: Database
) -> None:
    @post("/", sync_to_thread=True)
    def create(session: ASession, other: ASession) -> None:
        session.add(Item(name="one"))
        other.add_all([Item(id=1, name="two"), Item(id=2, name="two")])  # fails at the flush

    dependencies = {"other": session_per_request(sqlite)}
    with TestClient(app_of(create, database=psycopg, dependencies=dependencies)) as client:
        assert client.post("/").status_code == 500
    assert names(psycopg) == names(sqlite) == []
    assert psycopg.stats().in_use == sqlite.stats().in_use == 0


def test_the_apps_own_handler_goes_before_ours(sqlite: Database) -> None:
    @get("/")
    async def read() -> None:
        raise PoolBusy("busy")

    def handle(request: Request[Any, Any, Any], error: Exception) -> Response[str]:
        return Response("mine", status_code=429)

    handlers = {sa_exc.SQLAlchemyError: handle}
    with TestClient(app_of(read, database=sqlite, exception_handlers=handlers)) as client:
        assert client.get("/").status_code == 429
    with TestClient(app_of(read, database=sqlite)) as client:
        assert client.get("/").status_code == 503


def test_a_websocket_is_refused_with_the_mend(sqlite: Database) -> None:
    @websocket("/ws")
    async def chat(socket: WebSocket[Any, Any, Any], session: ASession) -> None:
        pytest.fail("the handler ran")

    with TestClient(app_of(chat, database=sqlite)) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws"):
            pytest.fail("it was accepted")
    assert sqlite.stats().in_use == 0


def test_without_install_the_error_names_the_line_to_write(sqlite: Database) -> None:
    @get("/")
    async def read(session: ASession) -> None: ...

    app = Litestar([read], dependencies={"session": session_per_request(sqlite)}, debug=True)
    with TestClient(app) as client:
        assert "on_app_init=[install(database)]" in client.get("/").text
    with pytest.raises(ConfigurationError, match="on_app_init"):
        install()
    with pytest.raises(ConfigurationError, match="write session_per_request"):
        session_per_request(sqlite.engine)  # type: ignore[arg-type]  # on purpose


def test_start_and_end(caplog: pytest.LogCaptureFixture, sqlite: Database) -> None:
    """A database that is down is a warning; the user's lifespan runs inside; two apps in a row."""

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncGenerator[None]:
        await asyncio.to_thread(sqlite.ping)
        yield
        await asyncio.to_thread(sqlite.ping)

    @post("/", sync_to_thread=True)
    def create(session: ASession) -> None:
        session.execute(text("SELECT 1"))

    down = Database("postgresql://user:s3cr3t@127.0.0.1:1/db")
    app = Litestar(
        [create],
        dependencies={"session": session_per_request(sqlite)},
        on_app_init=[install(sqlite, down)],
        lifespan=[lifespan],
        logging_config=None,
    )
    with caplog.at_level(logging.WARNING, "sessionscope"):
        for _ in range(2):
            with TestClient(app) as client:
                assert client.post("/").status_code == 201
            assert sqlite.stats().idle == 0
    assert "does not answer at start-up" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_a_request_that_is_cancelled_rolls_back(database: Database) -> None:
    started = asyncio.Event()

    @post("/")
    async def create(session: ASession) -> None:
        session.add(Item(name="pear"))
        session.flush()
        started.set()
        await asyncio.Event().wait()

    app = app_of(create, database=database)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }

    async def nothing(*_: Any) -> Any: ...

    async def main() -> None:
        task = asyncio.create_task(app(scope, nothing, nothing))  # type: ignore[arg-type]  # a scope in short
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert names(database) == []
    assert database.stats().in_use == 0


def test_handlers_that_call_begin_themselves_do_not_take_the_threads_of_the_others(
    psycopg: Database,
) -> None:
    """They would wait in threads that the holders of connections need: refused at once."""

    @get("/declared", sync_to_thread=True)
    def declared(session: ASession) -> int:
        return int(session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    @get("/naive", sync_to_thread=True)
    def naive() -> int:
        with psycopg.begin() as session:
            return int(session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    async def main() -> list[int]:
        app = app_of(declared, naive, database=psycopg)
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # their own ASGI types
        async with (
            app.lifespan(),
            httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            answers = [client.get(path) for path in ["/declared", "/naive"] * 100]
            return [answer.status_code for answer in await asyncio.gather(*answers)]

    statuses = asyncio.run(main())
    assert set(statuses[0::2]) == {200}
    assert set(statuses[1::2]) <= {200, 503}
    assert psycopg.stats().longest_wait < 5
    assert psycopg.stats().in_use == 0


@pytest.mark.anyio
async def test_an_async_session_is_shared_with_dependencies(async_database: AsyncDatabase) -> None:
    async def user(reading: NamedDependency[AsyncSession]) -> int:
        return id(reading)

    @post("/")
    async def create(
        session: NamedDependency[AsyncSession], user: NamedDependency[int]
    ) -> dict[str, Any]:
        session.add(Item(name="pear"))
        return {"shared": user == id(session)}

    app = Litestar(
        [create],
        dependencies={
            "session": session_per_request(async_database),
            "reading": session_per_request(async_database, read_only=True),
            "user": user,
        },
        on_app_init=[install(async_database)],
        logging_config=None,
    )
    async with AsyncTestClient(app) as client:
        assert (await client.post("/")).json() == {"shared": True}
    async with async_database.begin(read_only=True) as session:
        assert await session.scalar(text("SELECT count(*) FROM item")) == 1
