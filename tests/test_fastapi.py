"""FastAPI: the session of a request, committed before the response is sent."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

import anyio
import httpx2
import pytest
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
from fastapi.exceptions import DependencyScopeError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.websockets import WebSocketDisconnect

from sessionscope import Database, Unit, after_commit
from sessionscope.exc import (
    ConfigurationError,
    DatabaseUnavailable,
    NestedUnit,
    PoolBusy,
    SessionEnded,
    TransactionDoomed,
)
from sessionscope.integrations.fastapi import install, session_per_request
from tests.fastapi_clients import ItemOut, Refused, app_of, disconnected, scope, send_nothing
from tests.models import Item, Note, names


@pytest.fixture
def app(database: Database) -> FastAPI:
    return app_of(database)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    """A client that sees what a real one would: a 500, not the exception."""
    return TestClient(app, raise_server_exceptions=False)


def test_a_returned_response_commits_before_it_is_sent(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.post("/items/{name}", response_model=ItemOut)
    def create(name: str, session: Annotated[Session, session_per_request(database)]) -> Item:
        item = Item(name=name)
        session.add(item)
        session.flush()
        return item

    assert client.post("/items/pear").json()["name"] == "pear"
    assert names(database) == ["pear"]


def test_the_row_is_there_when_the_first_byte_of_the_answer_is(
    app: FastAPI, database: Database
) -> None:
    """Seen from inside the server: at the moment of sending, not some time later."""
    seen: list[list[str]] = []

    @app.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="pear"))
        return "ok"

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        async def look(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.append(await asyncio.to_thread(names, database))
            await send(message)

        await app(scope, receive, look)

    TestClient(asgi).post("/")
    assert seen == [["pear"]]


@pytest.mark.parametrize("status", [200, 303, 404, 500])
def test_a_returned_response_commits_whatever_its_status(
    app: FastAPI, client: TestClient, database: Database, status: int
) -> None:
    @app.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> Response:
        session.add(Item(name="pear"))
        return Response(status_code=status)

    assert client.post("/", follow_redirects=False).status_code == status
    assert names(database) == ["pear"]


def test_session_rollback_undoes_and_the_response_stands(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="pear"))
        session.flush()
        session.rollback()
        return "undone"

    assert client.post("/").status_code == 200
    assert names(database) == []


@pytest.mark.parametrize("error", [Refused(), HTTPException(409), ValueError("unexpected")])
def test_an_exception_rolls_back_even_when_a_handler_answers_it(
    app: FastAPI, client: TestClient, database: Database, error: Exception
) -> None:
    """A middleware that looks at the status alone would commit a 303."""
    ran: list[str] = []

    @app.exception_handler(Refused)
    def redirect(request: Request, error: Exception) -> Response:
        return RedirectResponse("/elsewhere", 303)

    @app.post("/")
    def create(
        session: Annotated[Session, session_per_request(database)], background: BackgroundTasks
    ) -> None:
        background.add_task(ran.append, "task")
        session.add(Item(name="pear"))
        session.flush()
        raise error

    assert client.post("/", follow_redirects=False).status_code in (303, 409, 500)
    assert names(database) == []
    assert ran == []


def test_a_failed_commit_is_never_a_success_and_stops_background_tasks(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    ran: list[str] = []

    @app.post("/")
    def create(
        session: Annotated[Session, session_per_request(database)], background: BackgroundTasks
    ) -> str:
        background.add_task(ran.append, "task")
        session.add(Note(item_id=404))  # the constraint is checked at COMMIT
        session.flush()
        return "created"

    answers = [client.post("/").status_code for _ in range(20)]
    assert answers == [500] * 20
    assert ran == []
    assert database.stats().in_use == 0


def test_a_failed_commit_reaches_the_apps_own_handler(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.exception_handler(sa_exc.IntegrityError)
    def conflict(request: Request, error: Exception) -> Response:
        return PlainTextResponse("conflict", 409)

    @app.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Note(item_id=404))
        return "created"

    assert client.post("/").text == "conflict"


def test_a_swallowed_error_is_never_a_success(
    postgres: Database, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()

    @app.post("/")
    def create(session: Annotated[Session, session_per_request(postgres)]) -> str:
        session.add(Item(name="lost"))
        session.flush()
        with pytest.raises(sa_exc.ProgrammingError):
            session.execute(text("SELECT * FROM no_such_table"))
        return "created"

    with pytest.raises(TransactionDoomed, match="create"):
        TestClient(app).post("/")


def test_a_response_that_does_not_validate_rolls_back(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    """Serialization comes before the end of the unit."""

    @app.post("/", response_model=ItemOut)
    def create(session: Annotated[Session, session_per_request(database)]) -> dict[str, str]:
        session.add(Item(name="pear"))
        session.flush()
        return {"nonsense": "x"}

    assert client.post("/").status_code == 500
    assert names(database) == []


def test_lazy_attributes_load_while_the_response_is_serialized(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.get("/", response_model=list[ItemOut])
    def read(session: Annotated[Session, session_per_request(database)]) -> list[Item]:
        items = list(session.scalars(select(Item)))
        session.expire_all()
        return items

    with database.begin() as session:
        session.add(Item(name="pear"))
    assert client.get("/").json()[0]["name"] == "pear"


def test_a_request_has_one_session_however_it_asks_for_it(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    dependency = session_per_request(database)
    seen = []

    def user(session: Annotated[Session, dependency]) -> Session:
        return session

    @app.get("/")
    def read(
        aliased: Annotated[Session, dependency],
        through: Annotated[Session, Depends(user)],
        inline: Annotated[Session, session_per_request(database)],
        default: Session = session_per_request(database),
    ) -> int:
        seen.append({id(s) for s in (aliased, through, inline, default)})
        return database.stats().in_use

    assert client.get("/").json() == 1
    assert len(seen[0]) == 1


def test_it_writes_if_any_of_its_dependencies_wants_to_write(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    """Even when the one that only reads comes first."""

    def user(session: Annotated[Session, session_per_request(database, read_only=True)]) -> Session:
        return session

    @app.post("/")
    def create(
        reader: Annotated[Session, Depends(user)],
        writer: Annotated[Session, session_per_request(database)],
    ) -> bool:
        writer.add(Item(name="pear"))
        return reader is writer

    assert client.post("/").json() is True
    assert names(database) == ["pear"]


def test_a_router_level_dependency_counts_as_well(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    """include_router(dependencies=...) does not show on the route itself."""
    writes = session_per_request(database)
    router = APIRouter()

    @router.post("/")
    def create(
        session: Annotated[Session, session_per_request(database, read_only=True)],
    ) -> str:
        session.add(Item(name="pear"))
        return "ok"

    app.include_router(router, prefix="/included", dependencies=[writes])
    assert client.post("/included/").status_code == 200
    assert names(database) == ["pear"]


def test_a_reading_request_refuses_to_write(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.post("/")
    def create(
        session: Annotated[Session, session_per_request(database, read_only=True)],
    ) -> str:
        session.add(Item(name="pear"))
        return "created"

    assert client.post("/").status_code == 500
    assert names(database) == []


def test_dependency_overrides_replace_the_session(
    app: FastAPI, client: TestClient, database: Database, sqlite_url: str
) -> None:
    dependency = session_per_request(database)
    replaced: list[str] = []

    def fake() -> str:
        replaced.append("fake")
        return "a fake session"

    @app.get("/")
    def read(session: Annotated[Any, dependency]) -> str:
        return str(session)

    app.dependency_overrides[session_per_request(database).dependency] = fake
    assert client.get("/").json() == "a fake session"
    app.dependency_overrides.clear()
    assert "Session" in client.get("/").json()
    assert replaced == ["fake"]


def test_an_override_that_wants_to_write_is_heard(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    def read_user(
        session: Annotated[Session, session_per_request(database, read_only=True)],
    ) -> str:
        return "user"

    def create_user(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="user"))
        return "user"

    @app.get("/")
    def read(
        session: Annotated[Session, session_per_request(database, read_only=True)],
        user: Annotated[str, Depends(read_user)],
    ) -> str:
        return user

    app.dependency_overrides[read_user] = create_user
    assert client.get("/").status_code == 200
    assert names(database) == ["user"]


def test_two_test_clients_in_a_row_work(app: FastAPI, database: Database) -> None:
    """The first one's shutdown drains the Database, which works again afterwards."""

    @app.post("/{name}")
    def create(name: str, session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name=name))
        return name

    for name in ("one", "two"):
        with TestClient(app) as client:
            assert client.post(f"/{name}").status_code == 200
        assert database.stats().idle == 0
    assert sorted(names(database)) == ["one", "two"]


def test_a_mounted_app_answers_with_its_own_handlers(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    inner = FastAPI()
    app.mount("/inner", inner)

    @inner.exception_handler(sa_exc.IntegrityError)
    def conflict(request: Request, error: Exception) -> Response:
        return PlainTextResponse("of the inner app", 409)

    @inner.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Note(item_id=404))
        return "created"

    assert client.post("/inner/").text == "of the inner app"


def test_several_databases_in_opposite_order_do_not_deadlock(
    database: Database, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One slot in each: taken in the order that the routes name, they would wait for ever."""
    folder = tmp_path_factory.mktemp("two")
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 20}
    with (
        Database(f"sqlite:///{folder / 'one.db'}", **options) as one,
        Database(f"sqlite:///{folder / 'two.db'}", **options) as two,
    ):
        app = FastAPI()
        install(app, one, two)

        @app.get("/one-two")
        def one_two(
            a: Annotated[Session, session_per_request(one)],
            b: Annotated[Session, session_per_request(two)],
        ) -> int:
            return int(a.scalar(text("SELECT 1"))) + int(b.scalar(text("SELECT 1")))

        @app.get("/two-one")
        def two_one(
            b: Annotated[Session, session_per_request(two)],
            a: Annotated[Session, session_per_request(one)],
        ) -> int:
            return int(b.scalar(text("SELECT 1"))) + int(a.scalar(text("SELECT 1")))

        with TestClient(app) as client, ThreadPoolExecutor(20) as threads:
            paths = ["/one-two", "/two-one"] * 30
            assert [r.json() for r in threads.map(client.get, paths)] == [2] * 60


def test_several_databases_are_flushed_before_the_first_commit(
    postgres: Database, sqlite: Database
) -> None:
    app = FastAPI()

    @app.post("/")
    def create(
        a: Annotated[Session, session_per_request(postgres)],
        b: Annotated[Session, session_per_request(sqlite)],
    ) -> str:
        a.add(Item(name="one"))
        b.add_all([Item(id=1, name="two"), Item(id=2, name="two")])  # fails at the flush
        return "created"

    response = TestClient(app, raise_server_exceptions=False).post("/")
    assert response.status_code == 500
    assert names(postgres) == names(sqlite) == []
    assert postgres.stats().in_use == sqlite.stats().in_use == 0


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET"])
def test_every_method_ends_its_unit(
    app: FastAPI, client: TestClient, database: Database, method: str
) -> None:
    @app.api_route("/", methods=["GET", "HEAD", "OPTIONS"])
    def answer(session: Annotated[Session, session_per_request(database)]) -> str:
        session.execute(text("SELECT 1"))
        return "ok"

    assert client.request(method, "/").status_code == 200
    assert database.stats().in_use == 0


def test_an_async_endpoint_works_too(app: FastAPI, client: TestClient, database: Database) -> None:
    @app.post("/")
    async def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="pear"))
        return "created"

    assert client.post("/").status_code == 200
    assert names(database) == ["pear"]


def test_a_streaming_response_has_no_session_and_says_so(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    """The stream runs when the connection is back; using it would reopen it and leak."""
    errors: list[str] = []

    @app.get("/")
    def stream(session: Annotated[Session, session_per_request(database)]) -> StreamingResponse:
        session.execute(text("SELECT 1"))

        def rows() -> Iterator[str]:
            yield f"{database.stats().in_use} in use\n"
            try:
                session.execute(text("SELECT 1"))
            except SessionEnded as error:
                errors.append(str(error))
                yield "refused"

        return StreamingResponse(rows())

    assert client.get("/").text == "0 in use\nrefused"
    assert "(test_a_streaming_response_has_no_session_and_says_so.<locals>.stream)" in errors[0]


def test_a_stream_may_open_a_unit_of_its_own(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.get("/")
    def stream(session: Annotated[Session, session_per_request(database)]) -> StreamingResponse:
        session.execute(text("SELECT 1"))

        def rows() -> Iterator[str]:
            with database.begin(read_only=True) as session:
                yield str(session.scalar(text("SELECT 1")))

        return StreamingResponse(rows())

    assert client.get("/").text == "1"


def test_a_generator_endpoint_runs_after_its_unit(app: FastAPI, database: Database) -> None:
    @app.get("/", response_class=StreamingResponse)
    def stream(session: Annotated[Session, session_per_request(database)]) -> Iterator[bytes]:
        session.execute(text("SELECT 1"))
        yield b"never"

    with TestClient(app) as client, pytest.raises(SessionEnded):
        client.get("/")
    assert database.stats().in_use == 0


def test_a_background_task_has_no_session_and_a_free_flow(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    done: list[object] = []

    def task(session: Session) -> None:
        done.append(database.stats().in_use)
        try:
            session.execute(text("SELECT 1"))
        except SessionEnded:
            done.append("ended")
        done.append(names(database))

    @app.post("/")
    def create(
        session: Annotated[Session, session_per_request(database)], background: BackgroundTasks
    ) -> str:
        session.add(Item(name="pear"))
        background.add_task(task, session)
        return "created"

    assert client.post("/").status_code == 200
    assert done == [0, "ended", ["pear"]]


def test_after_commit_hooks_run_before_the_response(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    order: list[object] = []

    @app.post("/")
    def create(
        session: Annotated[Session, session_per_request(database)], background: BackgroundTasks
    ) -> str:
        background.add_task(order.append, "task")
        after_commit(session, lambda: order.append(names(database)))
        session.add(Item(name="pear"))
        return "created"

    assert client.post("/").status_code == 200
    assert order == [["pear"], "task"]


def test_a_websocket_is_refused_with_the_mend(
    app: FastAPI, client: TestClient, database: Database
) -> None:
    @app.websocket("/ws")
    async def chat(
        websocket: WebSocket, session: Annotated[Session, session_per_request(database)]
    ) -> None:
        pytest.fail("the endpoint ran")

    with TestClient(app) as strict, pytest.raises(ConfigurationError, match="one per message"):
        with strict.websocket_connect("/ws"):
            pytest.fail("it was accepted")
    assert database.stats().in_use == 0


def test_a_request_scoped_dependency_on_it_is_refused_at_start_up(database: Database) -> None:
    """FastAPI's own check: such a dependency would end after the session."""

    def too_late(
        session: Annotated[Session, session_per_request(database)],
    ) -> Iterator[Session]:
        yield session

    app = FastAPI()
    with pytest.raises(DependencyScopeError):

        @app.get("/")
        def read(session: Annotated[Session, Depends(too_late)]) -> None: ...


def test_base_http_middleware_around_changes_nothing(app: FastAPI, database: Database) -> None:
    async def passing(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)

    @app.post("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Note(item_id=404))
        return "created"

    @app.get("/")
    def read(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="pear"))
        return "created"

    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/").status_code == 500
        assert client.get("/").status_code == 200
    assert names(database) == ["pear"]
    assert database.stats().in_use == 0


def test_begin_inside_an_endpoint_with_a_session_is_refused_at_once(
    app: FastAPI, database: Database
) -> None:
    @app.get("/")
    def read(session: Annotated[Session, session_per_request(database)]) -> None:
        with database.begin():
            pytest.fail("it was opened")

    with TestClient(app) as client, pytest.raises(NestedUnit, match="read"):
        client.get("/")


def test_too_many_requests_are_answered_503_with_retry_after(sqlite_url: str) -> None:
    with Database(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0) as database:
        app = FastAPI()
        install(app, database)

        @app.get("/")
        def read(session: Annotated[Session, session_per_request(database)]) -> str:
            return "ok"

        with TestClient(app) as client:
            with held(database):
                response = client.get("/")
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["code"] == "pool_busy"
            assert client.get("/").status_code == 200


def test_a_database_that_is_down_is_503_and_a_warning_at_start_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Database("postgresql://user:s3cr3t@127.0.0.1:1/db") as database:
        app = FastAPI()
        install(app, database)

        @app.get("/")
        def read(session: Annotated[Session, session_per_request(database)]) -> str:
            session.execute(text("SELECT 1"))
            return "ok"

        with caplog.at_level(logging.WARNING, "sessionscope"), TestClient(app) as client:
            response = client.get("/")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert "Retry-After" in response.headers
    assert "does not answer at start-up" in caplog.text
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("cls", [PoolBusy, sa_exc.TimeoutError, sa_exc.SQLAlchemyError])
@pytest.mark.parametrize("is_async", [True, False])
def test_the_apps_own_handler_goes_before_ours(
    database: Database, cls: type[Exception], is_async: bool
) -> None:
    app = FastAPI()
    install(app, database)

    async def handle_async(request: Request, error: Exception) -> Response:
        return PlainTextResponse("mine", 429)

    def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("mine", 429)

    app.add_exception_handler(cls, handle_async if is_async else handle)

    @app.get("/")
    def read() -> None:
        raise PoolBusy("busy")

    assert TestClient(app).get("/").text == "mine"


def test_a_catch_all_handler_does_not_hide_503(database: Database) -> None:
    app = FastAPI()
    install(app, database)

    @app.exception_handler(Exception)
    def everything(request: Request, error: Exception) -> Response:
        return JSONResponse({}, 500)

    @app.get("/")
    def read() -> None:
        raise DatabaseUnavailable("down")

    assert TestClient(app, raise_server_exceptions=False).get("/").status_code == 503


def test_the_users_lifespan_runs_inside_ours(database: Database) -> None:
    seen: list[str] = []

    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        with database.begin() as session:
            session.execute(text("SELECT 1"))
        seen.append("up")
        yield {"answer": 42}
        with database.begin() as session:
            session.execute(text("SELECT 1"))
        seen.append("down")

    app = FastAPI(lifespan=asynccontextmanager(lifespan))
    install(app, database)

    @app.get("/")
    def read(request: Request) -> int:
        return int(request.state.answer)

    with TestClient(app) as client:
        assert client.get("/").json() == 42
    assert seen == ["up", "down"]


def test_a_client_that_disconnects_does_not_stop_the_commit(
    app: FastAPI, database: Database
) -> None:
    @app.get("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> str:
        session.add(Item(name="pear"))
        return "created"

    asyncio.run(app(scope(), disconnected, send_nothing))
    assert names(database) == ["pear"]
    assert database.stats().in_use == 0


@pytest.mark.parametrize("cancel", ["anyio", "asyncio"])
def test_a_cancelled_request_rolls_back_and_gives_its_slot_back(
    app: FastAPI, database: Database, cancel: str
) -> None:
    started = threading.Event()

    @app.get("/")
    async def create(session: Annotated[Session, session_per_request(database)]) -> None:
        session.add(Item(name="pear"))
        session.flush()
        started.set()
        await anyio.sleep_forever()

    async def by_anyio() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(app, scope(), disconnected, send_nothing)
            while not started.is_set():
                await anyio.sleep(0)
            group.cancel_scope.cancel()

    async def by_asyncio() -> None:
        task = asyncio.create_task(app(scope(), disconnected, send_nothing))
        while not started.is_set():
            await asyncio.sleep(0)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(by_anyio() if cancel == "anyio" else by_asyncio())
    assert names(database) == []
    assert database.stats().in_use == 0


def test_a_request_that_is_cancelled_while_it_waits_leaves_the_queue(sqlite_url: str) -> None:
    with Database(sqlite_url, pool_size=1, max_overflow=0) as database:
        app = FastAPI()

        @app.get("/")
        def read(session: Annotated[Session, session_per_request(database)]) -> None: ...

        async def main() -> None:
            task = asyncio.create_task(app(scope(), disconnected, send_nothing))
            while not database.stats().waiting:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        with held(database):
            asyncio.run(main())
            assert database.stats().waiting == 0
        assert database.stats().in_use == 0


@contextmanager
def held(database: Database) -> Iterator[None]:
    """Hold one unit in a thread of its own: a flow that no request belongs to."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with database.begin():
            inside.set()
            leave.wait(30)

    with ThreadPoolExecutor(1) as threads:
        holder = threads.submit(hold)
        assert inside.wait(10)
        try:
            yield
        finally:
            leave.set()
            holder.result(10)


def test_a_def_endpoint_that_outlives_its_cancelled_request_stores_nothing(
    database: Database,
) -> None:
    """asyncio.timeout() around the app cancels the request, and cannot cancel its thread."""
    app = FastAPI()
    inside, cancelled = threading.Event(), threading.Event()
    outcome: list[BaseException] = []
    done = threading.Event()

    @app.get("/")
    def create(session: Annotated[Session, session_per_request(database)]) -> None:
        try:
            session.execute(text("SELECT 1"))
            inside.set()
            cancelled.wait(10)
            session.add(Item(name="zombie"))
            session.flush()
        except BaseException as error:
            outcome.append(error)
            raise
        finally:
            done.set()

    async def main() -> None:
        task = asyncio.create_task(app(scope(), disconnected, send_nothing))
        await asyncio.to_thread(inside.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        await asyncio.to_thread(done.wait, 10)

    asyncio.run(main())
    with database.begin() as session:
        session.add(Item(name="next"))
    assert len(outcome) == 1
    assert names(database) == ["next"]
    assert database.stats().in_use == 0


def test_a_cancelled_read_is_discarded_off_the_event_loop(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would block the loop: a statement is interrupted, a thread is waited for."""
    app = FastAPI()
    started = threading.Event()
    ended_in: list[int] = []

    def discard(unit: Unit[Session]) -> None:
        ended_in.append(threading.get_ident())
        unit.rollback()

    monkeypatch.setattr(Unit, "discard", discard)

    @app.get("/")
    async def read(
        session: Annotated[Session, session_per_request(database, read_only=True)],
    ) -> None:
        session.execute(text("SELECT 1"))
        started.set()
        await anyio.sleep_forever()

    async def main() -> int:
        task = asyncio.create_task(app(scope(), disconnected, send_nothing))
        while not started.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return threading.get_ident()

    loop_thread = asyncio.run(main())
    assert len(ended_in) == 1
    assert ended_in[0] != loop_thread
    assert database.stats().in_use == 0


def test_overload_closes_a_websocket_instead_of_failing(app: FastAPI) -> None:
    @app.websocket("/ws")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        raise PoolBusy("busy")

    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        with pytest.raises(WebSocketDisconnect) as caught:
            websocket.receive_text()
    assert caught.value.code == 1013


def test_hooks_of_several_databases_run_when_all_are_closed(
    postgres: Database, sqlite: Database
) -> None:
    app = FastAPI()
    seen: list[list[str]] = []

    @app.post("/")
    def create(
        a: Annotated[Session, session_per_request(postgres)],
        b: Annotated[Session, session_per_request(sqlite)],
    ) -> None:
        for session in (a, b):
            session.add(Item(name="pear"))
            after_commit(session, lambda: seen.append(names(postgres) + names(sqlite)))

    assert TestClient(app).post("/").status_code == 200
    assert seen == [["pear", "pear"]] * 2


def test_wrong_arguments_name_the_line_to_write(database: Database) -> None:
    for wrong in (
        lambda: install(FastAPI()),
        lambda: install(FastAPI(), "sqlite://"),  # type: ignore[arg-type]
        lambda: session_per_request(database.engine),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match="write "):
            wrong()


def test_a_refused_second_database_leaves_no_slot_of_the_first(
    postgres: Database, sqlite_url: str
) -> None:
    with Database(sqlite_url, pool_size=1, max_overflow=0, pool_timeout=0) as full:
        app = FastAPI()
        install(app, postgres, full)

        @app.get("/")
        def read(
            a: Annotated[Session, session_per_request(postgres)],
            b: Annotated[Session, session_per_request(full)],
        ) -> None: ...

        with held(full):
            assert TestClient(app).get("/").status_code == 503
        assert postgres.stats().in_use == 0
        assert TestClient(app).get("/").status_code == 200


def test_a_hook_sees_the_requests_context(database: Database) -> None:
    """As a trace id must: the unit ends in another thread."""
    app = FastAPI()
    trace: ContextVar[str] = ContextVar("trace", default="none")
    seen: list[str] = []

    @app.post("/")
    async def create(session: Annotated[Session, session_per_request(database)]) -> None:
        trace.set("this request")
        session.add(Item(name="pear"))
        after_commit(session, lambda: seen.append(trace.get()))

    assert TestClient(app).post("/").status_code == 200
    assert seen == ["this request"]


CLIENTS = 200


@pytest.fixture
def crowd(postgres: Database) -> FastAPI:
    """Endpoints of the kind that deadlocks at 55 clients with the tutorial's session."""
    app = FastAPI()
    install(app, postgres)
    reads = session_per_request(postgres, read_only=True)
    writes = session_per_request(postgres)

    def user(session: Annotated[Session, reads]) -> int:
        return int(session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    @app.get("/authenticated", response_model=list[ItemOut])
    def authenticated(
        user: Annotated[int, Depends(user)], session: Annotated[Session, writes]
    ) -> list[Item]:
        return list(session.scalars(select(Item)))

    @app.get("/naive")
    def naive() -> int:
        with postgres.begin() as session:
            return int(session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")) or 0)

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


def get_all(app: FastAPI, paths: list[str]) -> list[int]:
    """Send all requests at once, each waiting for its own answer; return the statuses."""

    async def main() -> list[int]:
        transport = httpx2.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            responses = await asyncio.gather(*(client.get(path) for path in paths))
            return [response.status_code for response in responses]

    return asyncio.run(main())


def test_200_clients_at_once_are_all_served(crowd: FastAPI, postgres: Database) -> None:
    assert get_all(crowd, ["/authenticated"] * CLIENTS) == [200] * CLIENTS
    stats = postgres.stats()
    assert (stats.in_use, stats.waiting, stats.refused) == (0, 0, 0)


def test_endpoints_that_call_begin_themselves_do_not_bring_the_deadlock_back(
    crowd: FastAPI, postgres: Database
) -> None:
    """Those that would take the threads of the others are refused at once, not after 5 s."""
    statuses = get_all(crowd, ["/authenticated", "/naive"] * (CLIENTS // 2))
    assert set(statuses[0::2]) == {200}
    assert set(statuses[1::2]) <= {200, 503}
    assert postgres.stats().longest_wait < 5
    assert postgres.stats().in_use == 0


def test_ending_units_use_no_thread_of_the_framework(crowd: FastAPI, postgres: Database) -> None:
    """All 40 are taken by others; the commit still happens."""
    holding, leave = threading.Barrier(41), threading.Event()

    @crowd.get("/hold")
    def hold() -> None:
        holding.wait(10)
        leave.wait(60)

    @crowd.post("/write")
    async def write(session: Annotated[Session, session_per_request(postgres)]) -> str:
        session.add(Item(name="pear"))
        return "written"

    async def main() -> None:
        transport = httpx2.ASGITransport(app=crowd)
        async with (
            crowd.router.lifespan_context(crowd),
            httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client,
        ):
            holders = [asyncio.create_task(client.get("/hold")) for _ in range(40)]
            await asyncio.to_thread(holding.wait, 10)
            try:
                written = await asyncio.wait_for(client.post("/write"), 10)
                assert written.status_code == 200
            finally:
                leave.set()
            await asyncio.gather(*holders)

    asyncio.run(main())
    assert names(postgres) == ["pear"]
