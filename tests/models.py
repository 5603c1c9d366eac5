"""Tables that the tests share."""

from sqlalchemy import Dialect, ForeignKeyConstraint, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionscope import Database


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


def looks_at_every_statement(*_: object, dialect: Dialect, **__: object) -> bool:
    """MySQL's constraints cannot be deferred to the commit."""
    return dialect.name == "mysql"


def looks_at_the_commit(*_: object, dialect: Dialect, **__: object) -> bool:
    return dialect.name != "mysql"


class Note(Base):
    """A row that must point at an item at the latest when its transaction commits."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]
    __table_args__ = (
        ForeignKeyConstraint(
            ["item_id"], ["item.id"], deferrable=True, initially="DEFERRED"
        ).ddl_if(callable_=looks_at_the_commit),
        ForeignKeyConstraint(["item_id"], ["item.id"]).ddl_if(callable_=looks_at_every_statement),
    )


def create_tables(database: Database) -> Database:
    Base.metadata.create_all(database.engine)
    return database


def names(database: Database) -> list[str]:
    """What is stored, seen through a unit of work of its own."""
    with database.begin(read_only=True) as session:
        return list(session.scalars(Item.__table__.select().with_only_columns(Item.name)))
