"""Every test runs on SQLite and on a real PostgreSQL, and leaves no row behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from fastapi.testclient import TestClient
from sessionscope import Database
from sessionscope.testing import sandbox

from app.database import database as application
from app.main import app

ALEMBIC = Path(__file__).parent.with_name("alembic.ini")


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def migrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A database of the tests' own, as the migrations make it."""
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    else:
        url = f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'test.db'}"
    with Database(url) as migrated:
        config = Config(ALEMBIC)
        with migrated.engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        yield migrated


@pytest.fixture
def database(migrated: Database) -> Iterator[Database]:
    """The application's Database: on that one, and all is rolled back at the end of the test."""
    with sandbox(application, bind=migrated.engine):
        yield application


@pytest.fixture
def client(database: Database) -> Iterator[TestClient]:
    """A client of the application."""
    with TestClient(app) as client:
        yield client
