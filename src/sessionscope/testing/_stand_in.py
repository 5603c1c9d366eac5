"""What stands in for a driver's connection, a pool and a dialect's execution in a sandbox."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Connection, NullPool
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util.concurrency import in_greenlet

from sessionscope import Unit
from sessionscope.testing._errors import SandboxError
from sessionscope.testing._stack import Stack
from sessionscope.testing._transaction import Transaction

_LEVELS = ("AUTOCOMMIT", "READ COMMITTED", "READ UNCOMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class StandIn:
    """The sandbox's connection as one of its users sees it: with a transaction of its own.

    As with any driver, a transaction begins at the first statement after the last one ended.
    Settings are kept and sent nowhere: they are those of the real transaction around.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._is_read_only = False
        self._is_autocommit = False
        self._transaction: Transaction | None = None
        self._info: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stack.real, name)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if not self._stack.is_async or in_greenlet():
            self._stack.expect(self._begun())
        return self._stack.real.cursor(*args, **kwargs)

    def run(self, statement: str, execute: Callable[[str], None]) -> None:
        """Run a statement of SQLAlchemy's."""
        self._stack.run(self._begun(), statement, execute)

    @property
    def is_undone(self) -> bool:
        """Whether another one's rollback has undone what was written here."""
        return self._transaction is not None and self._transaction.undone_by is not None

    def belong_to(self, info: dict[Any, Any]) -> None:
        """Learn the ``Connection.info`` that tells whose this is."""
        self._info = info

    def be_read_only(self) -> None:
        """Serve a read-only engine."""
        self._is_read_only = self._is_autocommit = True

    def set_isolation_level(self, level: str) -> None:
        """Take of an isolation level whether it is none: the real one is that of the sandbox."""
        self._is_autocommit = level == "AUTOCOMMIT"

    def cancel_safe(self) -> None:
        """End the statement that is running here, by psycopg's name, which is looked for first.

        Only that: a cancellation that is late would hit another one's on the same connection.
        """
        self._stack.interrupt(self._transaction)

    def fileno(self) -> int:
        """Show no socket: whoever cuts it would cut it for all."""
        return -1

    def commit(self) -> None:
        transaction = self._transaction
        if transaction is not None:
            self._stack.commit(transaction)
            self._transaction = None  # a commit that fails is followed by a rollback

    def rollback(self) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is None:
            return
        if self._stack.is_interrupted:
            self._stack.abandon(transaction)
        elif transaction.autocommit and not transaction.read_only:
            self._stack.commit(transaction)
        else:
            self._stack.rollback(transaction)

    def close(self) -> None:
        if self._stack.is_async and not in_greenlet():
            self._stack.abandon(self._transaction)  # by the garbage collector
        else:
            self.rollback()

    def terminate(self) -> None:
        if self._stack.is_async:
            self._stack.abandon(self._transaction)  # its task was cancelled
        else:
            self.close()

    def _begun(self) -> Transaction:
        if self._transaction is None:
            self._transaction = Transaction(
                self._info, read_only=self._is_read_only, autocommit=self._is_autocommit
            )
        return self._transaction


class SandboxPool(NullPool):
    """Hands out stand-ins, on the event loop of the real connection."""

    # The pool's logger takes its name from here: with all others, under "sqlalchemy".
    __module__ = "sqlalchemy.pool"

    def __init__(self, stack: Stack, dialect: Dialect) -> None:
        make: Any = partial(StandIn, stack)
        super().__init__(make, dialect=dialect)
        self._loop = asyncio._get_running_loop()
        self._is_asyncio = dialect.is_async  # pyright: ignore[reportAttributeAccessIssue]  # as a subclass would

    def _do_get(self) -> ConnectionPoolEntry:
        if self._is_asyncio and asyncio._get_running_loop() is not self._loop:
            raise SandboxError(
                "An AsyncDatabase was used on another event loop than its sandbox, whose "
                "connection belongs to that one. TestClient has a loop of its own: use "
                "httpx.AsyncClient(transport=ASGITransport(app=app)) in an async test"
            )
        record = super()._do_get()
        stand_in: Any = record.dbapi_connection
        stand_in.belong_to(record.info)
        Unit.let_idle(record.info)  # the test's own session waits for all that the test starts
        return record

    def recreate(self) -> "SandboxPool":
        return self  # Engine.dispose() closes nothing here


@contextmanager
def executing_through_stand_ins(*dialects: Dialect) -> Generator[None]:
    """Make what *dialects* do to a stand-in part of its transaction."""
    kept = [(dialect, dict(vars(dialect))) for dialect in dialects]
    for dialect in dialects:
        for name, ours in _OURS.items():  # as a subclass would
            setattr(dialect, name, partial(ours, getattr(dialect, name)))
    try:
        yield
    finally:
        for dialect, own in kept:
            for name in _OURS:
                delattr(dialect, name)
                if name in own:
                    setattr(dialect, name, own[name])


def _execute(execute: Callable[..., None], cursor: Any, statement: str, *rest: Any) -> None:
    context = rest[-1]

    def send(statement: str) -> None:
        execute(cursor, statement, *rest)

    connection = context.root_connection.connection.dbapi_connection if context else None
    if isinstance(connection, StandIn):
        connection.run(statement, send)
    else:
        send(statement)


def _begin(begin: Callable[..., None], proxied: PoolProxiedConnection) -> None:
    if not isinstance(proxied.dbapi_connection, StandIn):  # they begin at their first statement
        begin(proxied)


def _roll_back_to(roll_back: Callable[..., None], connection: Connection, name: str) -> None:
    stand_in = connection.connection.dbapi_connection
    # A savepoint that went with another one's rollback is no more, and that is no news to who
    # rolls back, which ends with the transaction. Whoever would go on is told.
    if not (isinstance(stand_in, StandIn) and stand_in.is_undone):
        roll_back(connection, name)


def _set_isolation_level(set_level: Callable[..., None], connection: Any, level: str) -> None:
    if isinstance(connection, StandIn):
        connection.set_isolation_level(level)
    else:
        set_level(connection, level)


def _isolation_levels(levels: Callable[..., Any], connection: Any) -> Any:
    # Another database stands in for the one whose levels the application knows.
    return _LEVELS if isinstance(connection, StandIn) else levels(connection)


_OURS: dict[str, Callable[..., Any]] = {
    "do_begin": _begin,
    "do_execute": _execute,
    "do_executemany": _execute,
    "do_execute_no_params": _execute,
    "do_rollback_to_savepoint": _roll_back_to,
    "get_isolation_level_values": _isolation_levels,
    "set_isolation_level": _set_isolation_level,
}
