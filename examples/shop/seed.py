"""The tables and the first goods on the shelves."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from sessionscope import Database

from .crud import ShopError
from .models import Item, User

USERS = [("Ada", "ada@example.org"), ("Grace", "grace@example.org"), ("Edgar", "edgar@example.org")]

# name, price in cents, stock
ITEMS = [
    ("Teapot", 2450, 500),
    ("Tea cup", 790, 2000),
    ("Tea strainer", 525, 120),
    ("Kettle", 4900, 3),
    ("Cake stand", 3275, 0),
]


def create_and_fill(database: Database) -> None:
    """Create the tables and fill them, unless somebody did so before or does so right now."""
    dialect = database.engine.dialect.name
    if dialect not in ("sqlite", "postgresql"):
        raise ShopError(f"this shop runs on SQLite and PostgreSQL, not on {dialect}")
    database.ping()
    migrate(database)
    database.run(fill)


def migrate(database: Database) -> None:
    """Do what ``alembic upgrade head`` does, on any Database."""
    config = Config(Path(__file__).with_name("alembic.ini"))
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def fill(session: Session) -> None:
    """Put the first goods on empty shelves."""
    # SQLite lets one writer in at a time anyway; on PostgreSQL two that both see
    # no goods would both bring them.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext('shop'))"))
    if session.scalar(select(func.count(User.id))):
        return
    session.add_all(User(name=name, email=email) for name, email in USERS)
    session.add_all(Item(name=name, price=price, stock=stock) for name, price, stock in ITEMS)
