"""The models are what the migrations make."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sessionscope import Database

from app.models import Base


def test_models_and_migrations_agree(database: Database) -> None:
    """Where they do not: make migration NAME="what has changed"."""
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
