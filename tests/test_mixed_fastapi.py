"""FastAPI with a Database and an AsyncDatabase in one app, or in one request."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import anyio
import pytest
from fastapi import (
    Depends,
    FastAPI,
    HTTPException,
)
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.integrations.fastapi import session_per_request
from tests.async_drivers import names, observer_of, on_postgres, until_it_waits_for_a_lock
from tests.fastapi_clients import (
    Cancel,
    app_of,
    cancel_by_asyncio,
    cancel_by_timeout,
    cancelled_each_way,
    client_of,
    disconnected,
    drained,
    scope,
    send_nothing,
)
from tests.models import Item, Note

pytestmark = pytest.mark.anyio


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
    app = app_of(*databases)

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
    """A row that another transaction has inserted makes the flush of the same one wait."""

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
@pytest.mark.parametrize("waiting", ["async", "sync"])
async def test_what_anyio_cancels_in_its_last_flush_is_stored_as_a_whole_or_not_at_all(
    mixed: Mixed, async_url: str, waiting: str
) -> None:
    """Newer versions of FastAPI shield the end of dependencies from it, which then commits."""

    async def work(a: AsyncSession, b: Session) -> None:
        a.add(Item(name="taken" if waiting == "async" else "async"))
        b.add(Item(name="taken" if waiting == "sync" else "sync"))

    async with observer_of(async_url) as observer, AsyncDatabase(async_url) as other:
        async with other.begin() as blocking, anyio.create_task_group() as group:
            blocking.add(Item(name="taken"))
            await blocking.flush()
            group.start_soon(mixed_app(mixed, work), scope(), disconnected, send_nothing)
            await until_it_waits_for_a_lock(observer)
            group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await blocking.rollback()
        assert await drained(*mixed)
    assert len(await names(mixed[0])) in (0, 2)


@on_postgres
async def test_routes_of_one_app_may_differ_in_kind(mixed: Mixed) -> None:
    app = app_of(*mixed)

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
