"""count_statements: a test fails when a loop sends a statement for each row."""

import sys
import threading

import pytest
from sqlalchemy import ForeignKey, event, insert, literal, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sessionscope import AsyncDatabase, Database
from sessionscope.testing import TooManyStatements, count_statements, sandbox
from tests.async_drivers import on_one_of_each_kind
from tests.models import Item

on_one_of_each = pytest.mark.parametrize("url", ["sqlite-memory", "postgres"], indirect=True)


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list["Book"]] = relationship()


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelf.id"))


def count_books(session: Session) -> int:
    return sum(len(shelf.books) for shelf in session.scalars(select(Shelf)))


@on_one_of_each
def test_the_line_of_an_n_plus_1_is_named(database: Database) -> None:
    Base.metadata.create_all(database.engine)
    with sandbox(database):
        with database.begin() as session:
            session.add_all([Shelf(id=n, books=[Book()]) for n in range(1, 6)])
        with pytest.raises(TooManyStatements) as caught, count_statements(database, limit=2):
            assert database.run(count_books) == 5
    message = str(caught.value)
    assert message.startswith("6 statements were sent, and limit=2: 5 times at ")
    line = count_books.__code__.co_firstlineno + 1
    assert f"test_count_statements.py:{line} (count_books" in message
    assert "FROM book" in message
    assert "selectinload" in message


@on_one_of_each
def test_all_statements_count_whichever_engine_and_thread_sends_them(database: Database) -> None:
    with count_statements(database) as sent:
        with database.begin() as session:
            session.execute(insert(Item).values(name="pear"))
            session.execute(insert(Item), [{"name": "plum"}, {"name": "fig"}])
        thread = threading.Thread(target=database.ping)
        thread.start()
        thread.join()
        with database.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    assert [each.text.split()[0] for each in sent] == ["INSERT", "INSERT", "SELECT", "SELECT"]
    database.ping()
    assert len(sent) == 4, "it counts to the end of its block"


def test_the_limit_itself_is_allowed_and_different_ones_are_listed() -> None:
    with Database("sqlite://") as database:
        with count_statements(database, limit=1):
            database.ping()
        with pytest.raises(TooManyStatements, match=r"2 statements(.*\n.*py:\d+.*){2}"):
            with count_statements(database, limit=1), database.begin() as session:
                session.scalar(select(1))
                session.scalar(select(literal(2)))


def test_an_error_of_the_block_is_not_hidden() -> None:
    with Database("sqlite://") as database, pytest.raises(ZeroDivisionError):
        with count_statements(database, limit=0):
            database.ping()
            _ = 1 / 0


@pytest.mark.anyio
@on_one_of_each_kind
async def test_an_async_database_is_counted_too(async_database: AsyncDatabase) -> None:
    with count_statements(async_database) as sent:
        async with async_database.begin() as session:
            await session.scalar(select(1))
        async with async_database.begin(read_only=True) as session:
            await session.scalar(select(literal(2)))
    assert len(sent) == 2
    assert all("test_count_statements.py" in each.place for each in sent)


@pytest.mark.parametrize("url", ["sqlite-memory", "postgres"], indirect=True)
def test_counting_begins_and_ends_while_others_send_statements(database: Database) -> None:
    """SQLAlchemy walks through an engine's listeners without a lock."""
    event.listen(database.engine, "before_cursor_execute", lambda *arguments: None)
    errors: list[BaseException] = []
    is_over = threading.Event()

    def send() -> None:
        try:
            while not is_over.is_set():
                with database.engine.connect() as connection:
                    connection.scalar(select(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            with count_statements(database):
                pass
    finally:
        sys.setswitchinterval(interval)
        is_over.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_what_goes_to_another_database_does_not_count() -> None:
    with Database("sqlite://") as database, Database("sqlite://") as other:
        with count_statements(database) as sent, count_statements(other) as others:
            other.ping()
        assert (len(sent), len(others)) == (0, 1)


def test_a_database_that_stands_in_is_counted() -> None:
    with Database("sqlite://") as memory:
        database = Database("postgresql://nobody@127.0.0.1:1/nothing")
        with count_statements(database, limit=1) as sent, sandbox(database, bind=memory.engine):
            database.ping()
        assert len(sent) == 1
