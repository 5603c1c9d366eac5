"""The tables and the first goods on the shelves."""

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from .crud import ShopError
from .models import Base, Item, User

USERS = [("Ada", "ada@example.org"), ("Grace", "grace@example.org"), ("Edgar", "edgar@example.org")]

# name, price in cents, stock
ITEMS = [
    ("Teapot", 2450, 500),
    ("Tea cup", 790, 2000),
    ("Tea strainer", 525, 120),
    ("Kettle", 4900, 3),
    ("Cake stand", 3275, 0),
]


def create_and_fill(session: Session) -> None:
    """Create the tables and fill them, unless somebody did so before or does so right now."""
    connection = session.connection()
    dialect = connection.dialect.name
    if dialect not in ("sqlite", "postgresql"):
        raise ShopError(f"this shop runs on SQLite and PostgreSQL, not on {dialect}")
    # SQLite lets one writer in at a time anyway; on PostgreSQL two that both see
    # no tables would both create them.
    if dialect == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext('shop'))"))
    Base.metadata.create_all(connection)
    if session.scalar(select(func.count(User.id))):
        return
    session.add_all(User(name=name, email=email) for name, email in USERS)
    session.add_all(Item(name=name, price=price, stock=stock) for name, price, stock in ITEMS)
