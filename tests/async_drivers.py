"""The asynchronous drivers that the tests run on, and what tests ask of each."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase
from tests.models import Base, Item

ASYNC_DRIVERS = ("psycopg", "asyncpg", "aiosqlite-file", "aiosqlite-memory", "asyncmy", "aiomysql")

# For tests of the fixtures async_url and async_database: fewer drivers than all.
on_postgres = pytest.mark.parametrize("async_url", ["psycopg", "asyncpg"], indirect=True)
on_mysql = pytest.mark.parametrize("async_url", ["asyncmy", "aiomysql"], indirect=True)
on_sqlite_files = pytest.mark.parametrize("async_url", ["aiosqlite-file"], indirect=True)
on_one_of_each_kind = pytest.mark.parametrize(
    "async_url", ["asyncpg", "aiosqlite-file", "aiosqlite-memory", "asyncmy"], indirect=True
)
on_servers = pytest.mark.parametrize(
    "async_url", ["psycopg", "asyncpg", "asyncmy", "aiomysql"], indirect=True
)

# The other event loop as well as asyncio's own.
on_uvloop_too = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)

_BACKEND_ID = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}


async def create_tables(database: AsyncDatabase[Any]) -> None:
    """Make the tests' tables."""
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


async def names(database: AsyncDatabase[Any]) -> list[str]:
    """What is stored, in order, seen through a unit of work of its own."""
    async with database.begin(read_only=True) as session:
        return sorted(await session.scalars(select(Item.__table__.c.name)))


async def backend_id(session: AsyncSession) -> int:
    """How the server calls the session's connection."""
    dialect = session.get_bind().dialect.name
    return int((await session.scalars(text(_BACKEND_ID[dialect]))).one())


async def kill(url: str, *backends: int) -> None:
    """End connections from beside, and wait until the server has."""
    async with beside(url) as other:
        for backend in backends:
            if other.engine.dialect.name == "postgresql":
                await _kill_on_postgres(other, backend)
            else:
                await _kill_on_mysql(other, backend)


async def _kill_on_postgres(other: AsyncDatabase, backend: int) -> None:
    async with other.begin(read_only=True) as session:
        await session.execute(text(f"SELECT pg_terminate_backend({backend}, 5000)"))


async def _kill_on_mysql(other: AsyncDatabase, backend: int) -> None:
    gone = text(f"SELECT id FROM information_schema.processlist WHERE id = {backend}")
    async with other.begin(read_only=True) as session:
        await session.execute(text(f"KILL {backend}"))
        while await session.scalar(gone) is not None:
            pass


@asynccontextmanager
async def beside(url: str) -> AsyncIterator[AsyncDatabase]:
    """Another Database on the same database."""
    async with AsyncDatabase(url) as other:
        yield other


async def server_connections(observer: AsyncDatabase) -> int:
    """How many connections the server has to this PostgreSQL database, without the observer's."""
    async with observer.begin(read_only=True) as session:
        count = await session.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND backend_type = 'client backend'"  # an autovacuum worker has a database, too
            )
        )
    return int(count or 0)


def through(url: str, port: int) -> str:
    """The same database behind a proxy at this port of localhost."""
    return make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


@asynccontextmanager
async def observer_of(url: str) -> AsyncIterator[AsyncDatabase]:
    """One more connection, from which the server can be asked."""
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


Collide = Callable[[AsyncSession], Awaitable[None]]


async def lock(session: AsyncSession, item_id: int) -> None:
    """Lock a row against all other transactions."""
    await session.execute(text(f"SELECT id FROM item WHERE id = {item_id} FOR UPDATE"))


@asynccontextmanager
async def a_rival_that_wins(database: AsyncDatabase) -> AsyncIterator[Collide]:
    """A transaction that holds item 2 and wants item 1, and what makes another the victim.

    The victim is the one that has changed fewer rows.
    """
    async with database.begin() as session:
        session.add_all([Item(id=1, name="one"), Item(id=2, name="two")])
    async with database.engine.connect() as rival:
        await rival.execute(text("UPDATE item SET name = 'rival' WHERE id = 2"))
        await rival.execute(text("INSERT INTO item VALUES (90, 'a'), (91, 'b'), (92, 'c')"))

        async def collide(session: AsyncSession) -> None:
            """Deadlock with the rival, with item 1 locked by *session*; swallow the error."""
            update = text("UPDATE item SET name = 'late' WHERE id = 1")
            waiting = asyncio.create_task(rival.execute(update))
            with pytest.raises(sa_exc.OperationalError, match="1213"):
                await lock(session, 2)
            await waiting

        yield collide
        await rival.rollback()
