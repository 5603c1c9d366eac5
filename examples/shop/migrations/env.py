"""Alembic's environment: migrations run on the Database of the shop."""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import context
from sqlalchemy import Connection, text

from shop.database import database
from shop.models import Base


def migrate(connection: Connection) -> None:
    """Run the migrations that are wanted in one transaction: all of them or none."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        render_as_batch=True,  # SQLite changes a table by making a new one
    )
    with foreign_keys_off(connection), context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Who migrates at the same time waits here, and then finds nothing left to do.
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('migrations'))"))
        context.run_migrations()
        if connection.dialect.name == "sqlite":
            lost = connection.execute(text("PRAGMA foreign_key_check")).all()
            if lost:
                raise RuntimeError(f"these rows would refer to rows that are not there: {lost}")


@contextmanager
def foreign_keys_off(connection: Connection) -> Iterator[None]:
    """Let SQLite drop the old table of a batch without deleting what refers to it."""
    if connection.dialect.name != "sqlite":
        yield
        return
    # Below SQLAlchemy, which would begin a transaction, where this has no effect.
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA foreign_keys = 0")
    try:
        yield
    finally:
        cursor.execute("PRAGMA foreign_keys = 1")
        cursor.close()


def print_sql() -> None:
    """Print the SQL instead of running it: alembic upgrade head --sql."""
    context.configure(
        dialect_name=database.engine.dialect.name,
        target_metadata=Base.metadata,
        literal_binds=True,
    )
    with context.begin_transaction():
        context.run_migrations()


# Whoever calls from Python brings a connection: see seed.py.
given: Connection | None = context.config.attributes.get("connection")
if context.is_offline_mode():
    print_sql()
elif given is not None:
    migrate(given)
else:
    with database.engine.connect() as connection:
        migrate(connection)
