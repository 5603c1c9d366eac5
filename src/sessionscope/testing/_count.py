"""Counting statements, so that a test fails when a loop sends one for each row."""

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Engine, event
from sqlalchemy.engine.base import OptionEngine

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
    sent: list[Statement] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(Statement(" ".join(statement.split()), here()))

    engines = _engines(database)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
    if limit is not None and len(sent) > limit:
        raise TooManyStatements(_complaint(sent, limit))


def _engines(database: _Database) -> list[Engine]:
    write, read = (getattr(e, "sync_engine", e) for e in (database.engine, database.read_engine))
    # In memory the one is a view of the other, and hears its events.
    return [write] if isinstance(read, OptionEngine) else [write, read]


def _complaint(sent: list[Statement], limit: int) -> str:
    statement, times = Counter(sent).most_common(1)[0]
    said = f"{len(sent)} statements were sent, and limit={limit}"
    if times == 1:
        return "\n  ".join([f"{said}:", *(f"{each.place}: {each.text}" for each in sent)])
    return (
        f"{said}: {times} times at {statement.place}: {statement.text}\nLoad for all rows at "
        "once: select(...).options(selectinload(...)), or one statement in front of the loop"
    )
