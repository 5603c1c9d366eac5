"""The models are what the migrations make."""

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sessionscope import AsyncDatabase
from sqlalchemy import Connection

from app.models import Base


@pytest.mark.anyio
async def test_models_and_migrations_agree(async_database: AsyncDatabase) -> None:
    """Where they do not: make migration NAME="what has changed"."""
    async with async_database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


def differences(connection: Connection) -> Any:
    """Return what a new migration would have to do."""
    return compare_metadata(MigrationContext.configure(connection), Base.metadata)
