"""The stack: how many transactions share the one transaction of one connection.

Each is a savepoint, and savepoints end in one way only: whoever rolls one back takes with it
what was written above. Hence three rules.

1. Who has written keeps its place, and the others wait until it has committed or rolled back,
   so that nobody's rollback undoes another one's work. Who has only read holds up nobody: its
   savepoint is given up when another one begins, and made anew at its next statement.
2. Nobody waits for one that waits for it. A transaction goes on top of those of its own flow of
   control, of the flows from which that one was started, and of the thread that opened the
   sandbox: the test itself, which waits for all that it starts.
3. What still waits gets PoolBusy after 10 seconds, with both places.

A commit gives the savepoint up once it is on top. Its rows then belong to the transaction
beneath, the test's own if one is open, and are undone with that. Whoever goes on top by rule 2
may lose rows by the rollback of another one, and is told (see _savepoints).
"""

import asyncio
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.pool import PoolProxiedConnection

from sessionscope.testing import _errors
from sessionscope.testing._connection import SharedConnection
from sessionscope.testing._errors import PoolBusy, SandboxError, TransactionDoomed
from sessionscope.testing._places import here
from sessionscope.testing._running import Running
from sessionscope.testing._savepoints import Savepoints
from sessionscope.testing._transaction import Transaction
from sessionscope.testing._turns import Turns


class Stack:
    """The transactions on one connection, within one that never commits."""

    def __init__(
        self,
        proxied: PoolProxiedConnection,
        dialect: SQLAlchemyDialect,
        connect: Callable[[], Any],
    ) -> None:
        self._connection = SharedConnection(proxied, dialect)
        self._dialect = self._connection.dialect
        self.real: Any = self._connection.real
        self.is_async = self._connection.is_async
        self.is_over = False
        self._savepoints = Savepoints(self._connection)
        self._turns = Turns(is_async=self.is_async)
        self._loop = asyncio._get_running_loop() if self.is_async else None
        self._running = Running(self.real, connect)
        self._abandoned: list[Transaction] = []

    @property
    def is_interrupted(self) -> bool:
        """Whether the garbage collector asks, in the middle of what this thread does here."""
        return not self.is_async and self._turns.is_inside

    def expect(self, transaction: Transaction) -> None:
        """Make room for what a new cursor is about to send, unseen unless :meth:`run` follows."""
        with self._turn(transaction):
            self._refuse(transaction)
            self._savepoints.raise_to_top(transaction)
            if not transaction.read_only:
                self._savepoints.expect_write(transaction)

    def run(self, transaction: Transaction, statement: str, execute: Callable[[str], None]) -> None:
        """Let *execute* send *statement*, as part of *transaction*."""
        with self._turn(transaction):
            self._refuse(transaction)
            self._savepoints.raise_to_top(transaction)
            transaction.unseen = None
            if self._dialect.may_write(statement) and not transaction.read_only:
                self._savepoints.note_write(transaction)
            sent = self._savepoints.as_sent(transaction, statement)
            if sent is None:
                return
            try:
                with self._running.of(transaction):
                    self._connection.execute(sent, partial(execute, sent))
            except Exception as error:
                transaction.failed = True
                self._connection.notice(error)
                self._go_on_without(transaction)
                raise
            except BaseException:  # cancelled, and it may be again at every await
                transaction.failed = True
                if transaction.autocommit:
                    self.abandon(transaction)
                raise
            if transaction.autocommit and transaction.wrote:
                self._savepoints.end(transaction)

    def interrupt(self, transaction: Transaction | None) -> None:
        """End the statement that is running if it is *transaction*'s, and not the connection."""
        with self._turns.inside():
            self._running.end(transaction)

    def commit(self, transaction: Transaction) -> None:
        """Let the transactions beneath have what *transaction* has written."""
        if transaction.read_only:
            self.rollback(transaction)
            return
        with self._turn():
            self._refuse(transaction)
            if transaction.savepoint is not None:
                self._check_constraints(transaction)
                self._savepoints.end(transaction)

    def rollback(self, transaction: Transaction) -> None:
        """Undo what *transaction* has written."""
        if transaction.savepoint is None or self.is_over or not self._connection.is_alive:
            return
        if self._connection.is_forked:
            return
        try:
            with self._turn(transaction):
                self._savepoints.undo(transaction)
        except (asyncio.CancelledError, PoolBusy):
            self.abandon(transaction)  # its user will not ask again
            raise

    def abandon(self, transaction: Transaction | None) -> None:
        """End a transaction at the next turn: the garbage collector can wait for nothing."""
        if transaction is not None and transaction.savepoint is not None:
            transaction.abandoned = True
            self._abandoned.append(transaction)
            with suppress(RuntimeError):  # the loop is closed, or the interpreter ends
                self._look_again_soon()

    def finish(self, *, check: bool) -> None:
        """Roll everything back, and raise what the test could not see of its own.

        *check* tells whether the test has ended normally so far: only then are the constraints
        checked of what it has not committed. Sends nothing in a forked child, whose parent goes on.
        """
        if self._connection.is_forked:
            return
        with self._turn():
            self.is_over = True
            broken = self._broken_constraint() if check else None
            undone = self._connection.roll_everything_back()
        if not undone:
            raise self._connection.why_gone()
        if broken is not None:
            raise broken

    @contextmanager
    def _turn(self, transaction: Transaction | None = None) -> Generator[None]:
        """Wait for the connection, and until *transaction* may go on top of the others."""

        def holder() -> Transaction | None:
            return self._holder_above(transaction) if transaction is not None else None

        def is_possible() -> bool:
            return holder() is None

        def too_late() -> Exception:
            found = holder()
            if found is None:
                return PoolBusy(_errors.STATEMENT_IS_RUNNING)
            return PoolBusy(_errors.held_up(found.begun_at, here()))

        if self._connection.is_forked:
            raise SandboxError(_errors.FORKED)
        with self._turns.turn(is_possible, too_late):
            self._connection.wait_for_what_was_cancelled()
            while self._abandoned and not self.is_over:
                self._end_abandoned(self._abandoned.pop())
            yield

    def _look_again_soon(self) -> None:
        # Not now: the lock of the turns may be this thread's.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._turns.look_again)
        else:
            threading.Thread(target=self._turns.look_again, daemon=True).start()

    def _holder_above(self, transaction: Transaction) -> Transaction | None:
        """Return who must end first: it has written, and does not wait for *transaction*."""
        for other in reversed(self._savepoints.above(transaction)):
            if other.keeps_its_place:
                is_new = transaction.savepoint is None
                waits = other.is_of_this_flow or (is_new and other.at_home)
                return None if waits else other
        return None

    def _refuse(self, transaction: Transaction) -> None:
        if self.is_over:
            raise SandboxError(_errors.OVER)
        if not self._connection.is_alive:
            raise self._connection.why_gone()
        if transaction.undone_by is not None:
            raise TransactionDoomed(transaction.undone_by)
        complaints = self._savepoints.complaints
        while complaints:
            warnings.warn(complaints.pop(0), RuntimeWarning, stacklevel=1)

    def _go_on_without(self, transaction: Transaction) -> None:
        """End a failed transaction that was one statement, and is no one's to roll back."""
        if not transaction.autocommit or not self._connection.is_alive:
            return
        if self._dialect.name == "postgresql":
            self._savepoints.undo(transaction)
        elif transaction.wrote:
            self._savepoints.end(transaction)

    def _end_abandoned(self, transaction: Transaction) -> None:
        if transaction.autocommit and not (transaction.read_only or transaction.failed):
            self._savepoints.end(transaction)
        else:
            self._savepoints.undo(transaction)

    def _check_constraints(self, transaction: Transaction) -> None:
        if not transaction.keeps_its_place or not self._savepoints.is_on_top(transaction):
            return
        self._dialect.check_constraints()
        if self._dialect.has_dangling_reference():
            raise self._connection.errors.IntegrityError("FOREIGN KEY constraint failed")

    def _broken_constraint(self) -> Exception | None:
        """Return what COMMIT would raise for the transactions that are still open."""
        writing = self._savepoints.writing
        if not self._connection.is_alive or not writing or any(each.failed for each in writing):
            return None
        try:
            self._check_constraints(writing[-1])
        except self._connection.errors.Error as error:
            return self._connection.of_commit(error)
        return None
