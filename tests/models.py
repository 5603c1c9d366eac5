"""Tables that the tests share."""

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sessionscope import Database


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class Note(Base):
    """A row that must point at an item at the latest when its transaction commits."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(
        ForeignKey("item.id", deferrable=True, initially="DEFERRED")
    )


def create_tables(database: Database) -> Database:
    Base.metadata.create_all(database.engine)
    return database


def names(database: Database) -> list[str]:
    """What is stored, seen through a unit of work of its own."""
    with database.begin(read_only=True) as session:
        return list(session.scalars(Item.__table__.select().with_only_columns(Item.name)))
