"""Counting statements, so that a test fails when a loop sends one for each row."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event

from sessionscope.testing._places import here


class _Database(Protocol):
    @property
    def engine(self) -> Any: ...
    @property
    def read_engine(self) -> Any: ...


@dataclass(frozen=True)
class Statement:
    """One statement that was sent, and the line of yours that it comes from."""

    text: str
    place: str


class TooManyStatements(AssertionError):
    """More statements were sent than the limit of ``count_statements()`` allows."""


@contextmanager
def count_statements(
    database: _Database, *, limit: int | None = None
) -> Generator[list[Statement]]:
    """Collect the statements that are sent meanwhile through *database*, by any thread or task.

    What SQLAlchemy sends counts, savepoints of your own too; BEGIN, COMMIT and what a
    sandbox adds do not. Raises TooManyStatements at the end of the block if there are more than
    *limit*, naming the statement that was sent most often and the line that sent it.
    """
    count = _Count(database)
    _counts.add(count)
    try:
        yield count.sent
    finally:
        _counts.discard(count)
    sent = count.sent
    if limit is not None and len(sent) > limit:
        raise TooManyStatements(_complaint(sent, limit))


class _Count:
    def __init__(self, database: _Database) -> None:
        self.sent: list[Statement] = []
        self._database = database

    def is_of(self, connection: Connection) -> bool:
        """Return whether one of the Database's engines has opened the connection."""
        engines = (self._database.engine, self._database.read_engine)
        return any(connection.dialect is engine.dialect for engine in engines)


_counts: set[_Count] = set()


# For all engines, and once: to listen to an engine fails what is being executed on it.
@event.listens_for(Engine, "before_cursor_execute")
def _note(connection: Connection, cursor: object, statement: str, *rest: object) -> None:
    for count in tuple(_counts):
        if count.is_of(connection):
            count.sent.append(Statement(" ".join(statement.split()), here()))


def _complaint(sent: list[Statement], limit: int) -> str:
    statement, times = Counter(sent).most_common(1)[0]
    many = "1 statement was" if len(sent) == 1 else f"{len(sent)} statements were"
    said = f"{many} sent, and limit={limit}"
    if times == 1:
        return "\n  ".join([f"{said}:", *(f"{each.place}: {each.text}" for each in sent)])
    return (
        f"{said}: {times} times at {statement.place}: {statement.text}\nLoad for all rows at "
        "once: select(...).options(selectinload(...)), or one statement in front of the loop"
    )
