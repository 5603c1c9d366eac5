"""Cursors of a unit with a deadline, for what it waits for outside of its session's methods.

Rows that are fetched one by one, statements of ``session.connection()``, savepoints that end
with their block, and the driver's own cursors reach the database through the connection that
the unit has taken from the pool. There a cursor of its own is made of the driver's.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from sqlalchemy import Connection

from sessionscope.exc import DeadlineExceeded

# What may wait for the database.
_WAITING = frozenset(
    {"callproc", "execute", "executemany", "fetchall", "fetchmany", "fetchone", "nextset"}
)


class _Timer(Protocol):
    @property
    def is_inside(self) -> bool: ...

    @property
    def is_over(self) -> bool: ...

    def run(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    def discard(self) -> bool: ...

    def end_with(self, work: Callable[[], Any]) -> Any: ...


class TimedCursor:
    """A driver's cursor whose calls end at the deadline of the unit that it belongs to."""

    __slots__ = ("_cursor", "_timer")

    _cursor: Any
    _timer: _Timer

    def __init__(self, cursor: Any, timer: _Timer) -> None:
        object.__setattr__(self, "_cursor", cursor)
        object.__setattr__(self, "_timer", timer)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._cursor, name)
        return partial(self._run, found) if name in _WAITING else found

    def _run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._timer.run(work, *args, **kwargs)
        except DeadlineExceeded:  # after which SQLAlchemy closes the connection, and no cursor
            if self._timer.discard():
                with suppress(Exception):
                    self._cursor.close()
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cursor, name, value)

    def close(self) -> None:
        """Close the cursor, which a server-side one tells the server."""
        self._timer.end_with(self._cursor.close)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetchone, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def watch_cursors(connection: Connection, timer: _Timer) -> None:
    """Let what is done over *connection* until it goes back end with *timer*."""
    proxied: Any = connection.connection
    # SQLite finds each row when it is asked for it.
    is_lazy = connection.dialect.name == "sqlite" and not connection.dialect.is_async

    def cursor(*args: Any, **kwargs: Any) -> Any:
        made = proxied.dbapi_connection.cursor(*args, **kwargs)
        if timer.is_inside and not (is_lazy or args or kwargs):  # not a server-side one
            return made  # all that it waits for, it waits for inside of this call
        return TimedCursor(made, timer)

    def rollback() -> None:
        timer.end_with(proxied.dbapi_connection.rollback)

    proxied.cursor, proxied.rollback = cursor, rollback
