"""Alembic on the shop's own Database."""

import subprocess
import sys
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from sessionscope import Database
from shop.models import Base
from shop.tests.conftest import Shop

ALEMBIC = Path(__file__).parent.with_name("alembic.ini")


def alembic(environment: dict[str, str], url: str, *arguments: str) -> None:
    """Run Alembic as a user does, from another folder."""
    subprocess.run(
        [sys.executable, "-m", "alembic", "--config", str(ALEMBIC), *arguments],
        env={**environment, "DATABASE_URL": url},
        cwd="/",
        check=True,
    )


def test_models_and_migrations_agree(shop: Shop) -> None:
    """A table or a column that only one of them has is a new migration to be written."""
    with shop.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_command_migrates_the_database_of_the_shop(
    url: str, environment: dict[str, str]
) -> None:
    """There is one URL, that of database.py; and what goes up comes down."""
    alembic(environment, url, "upgrade", "head")
    with Database(url) as database:
        assert {*Base.metadata.tables} < {*inspect(database.engine).get_table_names()}
    alembic(environment, url, "downgrade", "base")
    with Database(url) as database:
        assert inspect(database.engine).get_table_names() == ["alembic_version"]
