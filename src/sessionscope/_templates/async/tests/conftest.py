"""Every test runs on SQLite and on a real PostgreSQL, and leaves no row behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from httpx2 import ASGITransport, AsyncClient
from sessionscope import AsyncDatabase
from sessionscope.testing import async_sandbox
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession

from app.database import database as application
from app.main import app

ALEMBIC = Path(__file__).parent.with_name("alembic.ini")


@pytest.fixture
def anyio_backend() -> str:
    """The tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def migrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a database of the tests' own, as the migrations make it."""
    if request.param == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
    else:
        url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('sqlite') / 'test.db'}"
    asyncio.run(migrate(url))
    return url


async def migrate(url: str) -> None:
    """Run all migrations."""
    async with AsyncDatabase(url) as empty, empty.engine.connect() as connection:
        await connection.run_sync(upgrade)


def upgrade(connection: Connection) -> None:
    """Do what `alembic upgrade head` does, on this connection."""
    config = Config(ALEMBIC)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


@pytest.fixture
async def async_database(migrated: str) -> AsyncIterator[AsyncDatabase]:
    """The application's Database: on that one, and all is rolled back at the end of the test."""
    async with AsyncDatabase(migrated) as real, async_sandbox(application, bind=real.engine):
        yield application


@pytest.fixture
async def async_session(async_database: AsyncDatabase) -> AsyncIterator[AsyncSession]:
    """A session of the test's own, to prepare rows and to look at them."""
    async with async_database.sessionmaker() as session:
        yield session


@pytest.fixture
async def client(async_database: AsyncDatabase) -> AsyncIterator[AsyncClient]:
    """A client of the application, on the event loop of the test."""
    transport = ASGITransport(app=app)
    async with AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
