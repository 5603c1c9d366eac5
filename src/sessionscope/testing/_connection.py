"""The one connection of a sandbox, which may be lost, forked, or rid of its transaction."""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from sessionscope.testing._dialects import Dialect
from sessionscope.testing._errors import LOST, SandboxError, escaped
from sessionscope.testing._places import here

OUTERMOST = "sessionscope"
_PROBE = "sessionscope_probe"


class SharedConnection:
    """A driver's connection, within one transaction that never commits."""

    def __init__(self, proxied: PoolProxiedConnection, dialect: SQLAlchemyDialect) -> None:
        self.real: Any = proxied.dbapi_connection
        self.is_async = dialect.is_async
        self.errors = dialect.loaded_dbapi
        self.dialect = Dialect(dialect.name, self.send)
        self._proxied = proxied
        self._sqlalchemy = dialect
        self._driver_connection: Any = proxied.driver_connection
        self._process = os.getpid()
        self._is_lost = False
        self._ended_by: str | None = None
        self._at_work: asyncio.Task[Any] | None = None
        self.dialect.begin()
        self.send(f"SAVEPOINT {OUTERMOST}")

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process whose connection it is."""
        return os.getpid() != self._process

    @property
    def is_alive(self) -> bool:
        """Whether the transaction around everything can go on."""
        return self._ended_by is None and not self._is_lost

    def send(self, statement: str) -> list[Any]:
        """Send a statement of the sandbox's own, and return its rows."""
        if self.dialect.name == "sqlite" and not self._is_in_transaction(statement):
            raise self.why_gone()  # SAVEPOINT would begin, and RELEASE commit
        try:
            rows: list[Any] = self._drive(partial(_execute, self.real, statement))
        except self.errors.Error as error:
            self.notice(error)
            raise
        return rows

    def try_to_send(self, statement: str) -> bool:
        """Return whether a statement of the sandbox's own could be carried out."""
        try:
            self.send(statement)
        except (self.errors.Error, SandboxError):
            return False
        return True

    def execute(self, statement: str, execute: Callable[[], None]) -> None:
        """Let *execute* send *statement*, which is the user's."""
        if not self.dialect.may_end_the_transaction(statement):
            self._drive(execute, interruptible=True)
            return
        self.try_to_send(f"SAVEPOINT {_PROBE}")
        self._drive(execute)
        if not self.try_to_send(f"RELEASE SAVEPOINT {_PROBE}"):
            self._ended_by = f"{' '.join(statement.split())[:80]!r} at {here()}"
            raise self.why_gone()

    def wait_for_what_was_cancelled(self) -> None:
        """Wait for the end of a statement for which its task waits no more."""
        if self._at_work is not None and not self._at_work.done():
            await_only(asyncio.wait([self._at_work]))

    def notice(self, error: Exception) -> None:
        """Learn from a driver's error whether the connection was lost."""
        if isinstance(error, self.errors.Error):
            lost = self._sqlalchemy.is_disconnect(error, self.real, None)
            self._is_lost = self._is_lost or lost

    def why_gone(self) -> SandboxError:
        """Return what ended the transaction around everything."""
        return SandboxError(LOST if self._is_lost else escaped(self._ended_by, self.dialect.name))

    def of_commit(self, error: Exception) -> Exception:
        """Return a driver's *error* as SQLAlchemy raises that of a COMMIT."""
        return sa_exc.DBAPIError.instance(
            "COMMIT", None, error, self.errors.Error, dialect=self._sqlalchemy
        )

    def roll_everything_back(self) -> bool:
        """End the transaction; return whether all that was written was still part of it."""
        undone = self.try_to_send(f"ROLLBACK TO SAVEPOINT {OUTERMOST}")
        if self._is_lost:
            self._proxied.invalidate()
        else:
            self.dialect.end()
            self.real.rollback()
        return undone

    def _drive(self, work: Callable[[], Any], *, interruptible: bool = False) -> Any:
        """Let the driver *work*, to its end even if the task that waits for it is cancelled."""
        return await_only(self._in_a_task(work, interruptible)) if self.is_async else work()

    async def _in_a_task(self, work: Callable[[], Any], interruptible: bool) -> Any:
        # Under a cancelled anyio scope every await is cancelled, and the second time psycopg
        # closes the connection. A task of its own is cancelled once.
        self._at_work = task = asyncio.ensure_future(greenlet_spawn(work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_retrieve)
            if interruptible:
                task.cancel()
            raise

    def _is_in_transaction(self, statement: str) -> bool:
        begun = bool(self._driver_connection.in_transaction)
        return begun or statement.startswith(("BEGIN", "PRAGMA"))


def _execute(connection: Any, statement: str) -> list[Any]:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Take a task's error, for which no one waits any more."""
    if not task.cancelled():
        task.exception()
