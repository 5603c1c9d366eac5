"""FastAPI with an AsyncDatabase: the promises of a Database's sessions, on the event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Annotated, Any

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
)
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sessionscope import AsyncDatabase, after_commit, after_rollback
from sessionscope.exc import NestedUnit, SessionEnded
from sessionscope.integrations.fastapi import session_per_request
from tests.async_drivers import (
    a_rival_that_wins,
    at_work,
    create_tables,
    lock,
    names,
    observer_of,
    on_mysql,
    on_one_of_each_kind,
    on_postgres,
    on_sqlite_files,
    on_uvloop_too,
)
from tests.fastapi_clients import (
    Cancel,
    ItemOut,
    Refused,
    app_of,
    cancel_by_asyncio,
    cancel_by_timeout,
    client_of,
    served,
)
from tests.models import Item, Note

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(async_database: AsyncDatabase) -> FastAPI:
    return app_of(async_database)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(app) as client:
        yield client


# --- The outcome of a request ---


@on_uvloop_too
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
                "$$BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END$$"
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
        for n in range(30):
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

    @app.post("/{name}")
    async def create(
        name: str,
        session: Annotated[AsyncSession, session_per_request(async_database)],
        background: BackgroundTasks,
    ) -> str:
        background.add_task(ran.append, "task")
        session.add_all([Item(name=name), Note(item_id=404)])  # is checked at COMMIT
        return "created"

    answers = await asyncio.gather(*(client.post(f"/{n}") for n in range(20)))
    assert [answer.status_code for answer in answers] == [500] * 20
    assert ran == []
    assert await names(async_database) == []
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


@on_postgres
async def test_an_error_inside_of_a_savepoint_is_no_failure(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="kept"))
        with pytest.raises(sa_exc.ProgrammingError):
            async with session.begin_nested():
                await session.execute(text("SELECT * FROM no_such_table"))

    assert (await client.post("/")).status_code == 200
    assert await names(async_database) == ["kept"]


@on_sqlite_files
async def test_what_sqlite_has_rolled_back_by_itself_is_never_a_success(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    again = text("INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")

    @app.post("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(id=1, name="lost"))
        await session.flush()
        with pytest.raises(sa_exc.IntegrityError):
            await session.execute(again)

    assert (await client.post("/")).status_code == 500
    assert await names(async_database) == []


@on_mysql
async def test_a_swallowed_deadlock_is_never_a_success(
    app: FastAPI, client: httpx2.AsyncClient, async_database: AsyncDatabase
) -> None:
    """MariaDB has rolled back everything, and would commit nothing without a word."""

    async with a_rival_that_wins(async_database) as collide:

        @app.post("/")
        async def create(
            session: Annotated[AsyncSession, session_per_request(async_database)],
        ) -> None:
            session.add(Item(id=3, name="lost"))
            await session.flush()
            await lock(session, 1)
            await collide(session)

        assert (await client.post("/")).status_code == 500
    assert await names(async_database) == ["one", "two"]


@pytest.mark.parametrize("error", [Refused(), HTTPException(409), ValueError("unexpected")])
@on_uvloop_too
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


@on_one_of_each_kind
@pytest.mark.parametrize("cancel", [cancel_by_asyncio, cancel_by_timeout])
async def test_a_request_that_is_cancelled_in_a_slow_hook_has_committed(
    app: FastAPI, async_database: AsyncDatabase, cancel: Cancel
) -> None:
    """The hook is cut off, at once, and the next one is not."""
    order: list[str] = []
    began = asyncio.Event()

    async def slow() -> None:
        began.set()
        try:
            await asyncio.sleep(10)
            order.append("in vain")
        finally:
            order.append("cut off")

    @app.get("/")
    async def create(session: Annotated[AsyncSession, session_per_request(async_database)]) -> None:
        session.add(Item(name="pear"))
        after_commit(session, slow)
        after_commit(session, order.append, "next")

    await cancel(app, began.wait())
    assert order == ["cut off", "next"]
    assert await names(async_database) == ["pear"]
    assert async_database.stats().in_use == 0


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


class ShopSession(AsyncSession):
    """A user's own."""

    async def find(self, name: str) -> Item | None:
        return (await self.scalars(select(Item).where(Item.name == name))).one_or_none()


@on_one_of_each_kind
async def test_the_session_is_of_the_users_class(async_url: str) -> None:
    async with AsyncDatabase(async_url, session_class=ShopSession) as database:
        await create_tables(database)
        app = app_of(database)

        @app.post("/{name}", response_model=ItemOut | None)
        async def create(
            name: str, session: Annotated[ShopSession, session_per_request(database)]
        ) -> Item | None:
            session.add(Item(name=name))
            return await session.find(name)

        async with client_of(app) as client:
            assert (await client.post("/pear")).json()["name"] == "pear"
        assert await names(database) == ["pear"]


@on_one_of_each_kind
async def test_sqlmodels_session_has_its_exec(async_url: str) -> None:
    async with AsyncDatabase(async_url, session_class=SQLModelSession) as database:
        await create_tables(database)
        app = app_of(database)

        @app.post("/")
        async def create(
            session: Annotated[SQLModelSession, session_per_request(database)],
        ) -> list[str]:
            session.add(Item(name="pear"))
            return list(await session.exec(sqlmodel_select(Item.name)))

        async with client_of(app) as client:
            assert (await client.post("/")).json() == ["pear"]
        assert database.stats().committed == 1
