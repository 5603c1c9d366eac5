"""The one table that every benchmark reads and writes, and its statements."""

from sqlalchemy import Executable, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """The benchmarks' metadata."""


class Item(Base):
    """A row that is small, so that the unit around it is what costs."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def create_items(url: str) -> None:
    """Create the table in an empty database, with one row to read."""
    engine = create_engine(url)
    with Session(engine) as session:
        fill(session, commit=True)
    engine.dispose()


def fill(session: Session, *, commit: bool) -> None:
    """Create the table and its first row through *session*."""
    Base.metadata.create_all(session.connection())
    session.add(Item(id=1_000_000, name="first"))
    if commit:
        session.commit()


FIRST = select(Item).where(Item.id == 1_000_000)


def slow_first(seconds: float) -> Executable:
    """Return a statement that reads the first row and takes *seconds*."""
    return select(Item, func.pg_sleep(seconds)).where(Item.id == 1_000_000)
