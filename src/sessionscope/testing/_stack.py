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
beneath, the test's own if one is open, and are undone with that.
"""

import asyncio
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.interfaces import Dialect as SQLAlchemyDialect
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from sessionscope import Unit
from sessionscope.testing._dialects import Dialect
from sessionscope.testing._errors import PoolBusy, SandboxError, TransactionDoomed
from sessionscope.testing._places import here
from sessionscope.testing._running import Running
from sessionscope.testing._turns import Turns

_OUTERMOST = "sessionscope"
_PROBE = "sessionscope_probe"
_OF_SAVEPOINTS = (["SAVEPOINT"], ["RELEASE"], ["ROLLBACK"])


class Transaction:
    """What one user of the connection has done since its last commit or rollback."""

    __slots__ = (
        "abandoned",
        "at_home",
        "autocommit",
        "begun_at",
        "ended",
        "failed",
        "info",
        "number",
        "read_only",
        "savepoint",
        "savepoints",
        "took_over",
        "took_over_number",
        "undone_by",
        "unseen",
        "wrote",
    )

    def __init__(self, info: Mapping[Any, Any], *, read_only: bool, autocommit: bool) -> None:
        self.info = info
        self.read_only = read_only
        self.autocommit = autocommit
        self.begun_at = ""
        self.savepoint: str | None = None  # as long as it is on the stack
        self.number = 0  # what was begun later has a higher one
        self.savepoints: dict[str, int] = {}  # those of begin_nested(), with such numbers
        self.at_home = False  # the thread that opened the sandbox has begun it
        self.wrote = False
        self.unseen = False  # a cursor was made that may write what no one sees
        self.failed = False
        self.ended = False
        self.abandoned = False  # to be ended at the next turn, whoever has it
        self.took_over: str | None = None  # where one has begun whose commit is now part of it
        self.took_over_number = 0
        self.undone_by: str | None = None  # what has rolled it back unasked

    @property
    def keeps_its_place(self) -> bool:
        """Whether it has written, or may have, and has not ended."""
        return (self.wrote or self.unseen) and not (self.ended or self.abandoned)


# The transactions that the current flow of control, or one that started it, has begun.
_begun: ContextVar[tuple[Transaction, ...]] = ContextVar("sessionscope_begun", default=())


class Stack:
    """The transactions on one connection, within one that never commits."""

    def __init__(
        self,
        proxied: PoolProxiedConnection,
        dialect: SQLAlchemyDialect,
        connect: Callable[[], Any],
    ) -> None:
        self.real: Any = proxied.dbapi_connection
        self._proxied = proxied
        self._process = os.getpid()
        self._is_lost = False
        self._driver_connection: Any = proxied.driver_connection
        self.is_async = dialect.is_async
        self.is_over = False
        self._errors = dialect.loaded_dbapi
        self._sqlalchemy = dialect
        self._dialect = Dialect(dialect.name, self._send)
        self._turns = Turns(is_async=self.is_async)
        self._home = None if self.is_async else threading.get_ident()
        self._stack: list[Transaction] = []
        self._abandoned: list[Transaction] = []
        self._numbers = itertools.count(1)
        self._ended_by: str | None = None
        self._running = Running(self.real, connect)
        self._complaint: str | None = None
        self._at_work: asyncio.Task[Any] | None = None
        self._dialect.begin()
        self._send(f"SAVEPOINT {_OUTERMOST}")

    @property
    def is_interrupted(self) -> bool:
        """Whether the garbage collector asks, in the middle of what this thread does here."""
        return not self.is_async and self._turns.is_inside

    def expect(self, transaction: Transaction) -> None:
        """Make room for what a new cursor is about to send, unseen unless :meth:`run` follows."""
        with self._turn(transaction):
            self._refuse(transaction)
            self._raise_to_top(transaction)
            transaction.unseen = not transaction.read_only

    def run(self, transaction: Transaction, statement: str, execute: Callable[[str], None]) -> None:
        """Let *execute* send *statement*, as part of *transaction*."""
        with self._turn(transaction):
            self._refuse(transaction)
            self._raise_to_top(transaction)
            transaction.unseen = False
            if not self._dialect.reads(statement) and not transaction.read_only:
                transaction.wrote = True
            sent = self._as_sent(transaction, statement)
            if sent is None:
                return
            try:
                with self._running.of(transaction):
                    self._execute(sent, partial(execute, sent))
            except Exception as error:
                transaction.failed = True
                self._notice(error)
                self._go_on_without(transaction)
                raise
            except BaseException:  # cancelled, and it may be again at every await
                transaction.failed = True
                if transaction.autocommit:
                    self.abandon(transaction)
                raise
            if transaction.autocommit and transaction.wrote:
                self._end(transaction)

    def interrupt(self, transaction: Transaction | None) -> None:
        """End the statement that is running if it is *transaction*'s, and not the connection."""
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
                self._end(transaction)

    def rollback(self, transaction: Transaction) -> None:
        """Undo what *transaction* has written."""
        if transaction.savepoint is None or self.is_over or self._ended_by is not None:
            return
        if self._is_lost or self._is_forked:
            return
        with self._turn(transaction):
            self._undo(transaction)

    def abandon(self, transaction: Transaction | None) -> None:
        """End a transaction at the next turn: the garbage collector can wait for nothing."""
        if transaction is not None and transaction.savepoint is not None:
            transaction.abandoned = True
            self._abandoned.append(transaction)

    def finish(self, *, check: bool) -> None:
        """Roll everything back, and raise what the test could not see of its own.

        *check* tells whether the test has ended normally so far: only then are the constraints
        checked of what it has not committed. Sends nothing in a forked child, whose parent goes on.
        """
        if self._is_forked:
            return
        with self._turn():
            self.is_over = True
            broken = self._broken_constraint() if check and self._ended_by is None else None
            undone = self._try(f"ROLLBACK TO SAVEPOINT {_OUTERMOST}")
            if self._is_lost:
                self._proxied.invalidate()
            else:
                self._dialect.end()
                self.real.rollback()
        if not undone:
            raise self._escaped()
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
            return _too_late(holder())

        if self._is_forked:
            raise SandboxError(_FORKED)
        with self._turns.turn(is_possible, too_late):
            if self._at_work is not None and not self._at_work.done():
                await_only(asyncio.wait([self._at_work]))
            while self._abandoned and not self.is_over:
                self._end_abandoned(self._abandoned.pop())
            yield

    def _holder_above(self, transaction: Transaction) -> Transaction | None:
        """Return who must end first: it has written, and does not wait for *transaction*."""
        is_new = transaction.savepoint is None
        above = self._stack if is_new else self._stack[self._stack.index(transaction) + 1 :]
        for other in reversed(above):
            if other.keeps_its_place:
                waits = other in _begun.get() or Unit.encloses(other.info)
                return None if waits or (is_new and other.at_home) else other
        return None

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _refuse(self, transaction: Transaction) -> None:
        if self.is_over:
            raise SandboxError(
                "This connection belongs to a sandbox that has ended: close the session, or "
                "commit or roll it back, before the test ends"
            )
        if self._ended_by is not None or self._is_lost:
            raise self._escaped()
        if transaction.undone_by is not None:
            raise TransactionDoomed(transaction.undone_by)
        if self._complaint is not None:
            complaint, self._complaint = self._complaint, None
            warnings.warn(complaint, RuntimeWarning, stacklevel=1)

    def _raise_to_top(self, transaction: Transaction) -> None:
        self._give_up_reader(transaction)
        if transaction.savepoint is not None:
            return
        name = f"{_OUTERMOST}_{len(self._stack)}"
        if not self._try(f"SAVEPOINT {name}"):
            self._undo_failed()
            self._send(f"SAVEPOINT {name}")
        transaction.savepoint = name
        transaction.ended = transaction.failed = transaction.wrote = False
        transaction.abandoned = False
        transaction.took_over = None
        transaction.number = next(self._numbers)
        transaction.savepoints = {}
        transaction.at_home = threading.get_ident() == self._home
        transaction.begun_at = here()
        self._stack.append(transaction)
        _begun.set((*(other for other in _begun.get() if not other.ended), transaction))
        if transaction.read_only:
            self._dialect.make_read_only()

    def _as_sent(self, transaction: Transaction, statement: str) -> str | None:
        """Return a statement with the name that its savepoint has here, None if it is left out.

        SQLAlchemy counts savepoints for each connection, so that two have the same name, of which
        MySQL keeps one. What was begun inside of one does not end when that is released.
        """
        *what, name = statement.rstrip("; \n").split(" ")
        if what == ["SAVEPOINT"] and name.isidentifier():
            transaction.wrote = True  # to give up ours would end that one as well
            transaction.savepoints[name] = next(self._numbers)
        if what[:1] not in _OF_SAVEPOINTS or name not in transaction.savepoints:
            return statement
        number = transaction.savepoints[name]
        inside = [each for each in self._stack if each.number > number]
        if what[0] == "RELEASE" and inside:
            return None  # it ends with the transaction
        if what[0] == "ROLLBACK":
            self._undo_inside(transaction, inside)
            if transaction.took_over is not None and transaction.took_over_number > number:
                self._complaint = _undone_with(transaction)
                transaction.took_over = None
        return " ".join([*what, f"{name}_{number}"])

    def _undo_inside(self, transaction: Transaction, inside: list[Transaction]) -> None:
        """Undo those that have begun in a savepoint of *transaction*'s."""
        if not inside:
            return
        first = inside[0].savepoint
        self._drop(inside, transaction)
        self._send(f"ROLLBACK TO SAVEPOINT {first}")
        self._send(f"RELEASE SAVEPOINT {first}")

    def _give_up_reader(self, transaction: Transaction) -> None:
        """Take the savepoint on top away if it is another one's, who has only read."""
        reader = self._stack[-1] if self._stack else transaction
        if reader is transaction or reader.keeps_its_place or reader.ended or reader.abandoned:
            return
        del self._stack[-1]
        name, reader.savepoint = reader.savepoint, None
        # Not rolled back: a stream ends with its savepoint then. One that only reads may have
        # written where the database does not refuse it.
        may_keep = self._dialect.refuses_writes or not reader.read_only
        released = may_keep and self._try(f"RELEASE SAVEPOINT {name}")
        if not released:
            self._send(f"ROLLBACK TO SAVEPOINT {name}")
            self._send(f"RELEASE SAVEPOINT {name}")
        if reader.read_only:
            self._dialect.end_read_only()
        elif not released:
            reader.undone_by = _failed(reader)

    def _undo_failed(self) -> None:
        """Undo the transaction on top, which PostgreSQL has aborted, so that others can go on."""
        if not self._stack:
            raise self._escaped()
        failed = self._stack[-1]
        self._undo(failed)
        failed.undone_by = _failed(failed)

    def _execute(self, statement: str, execute: Callable[[], None]) -> None:
        if not self._dialect.may_end_the_transaction(statement):
            self._drive(execute, interruptible=True)
            return
        self._try(f"SAVEPOINT {_PROBE}")
        self._drive(execute)
        if not self._try(f"RELEASE SAVEPOINT {_PROBE}"):
            self._ended_by = f"{' '.join(statement.split())[:80]!r} at {here()}"
            raise self._escaped()

    def _go_on_without(self, transaction: Transaction) -> None:
        """End a failed transaction that was one statement, and is no one's to roll back."""
        if not transaction.autocommit or self._ended_by is not None or self._is_lost:
            return
        if self._dialect.name == "postgresql":
            self._undo(transaction)
        elif transaction.wrote:
            self._end(transaction)

    def _undo(self, transaction: Transaction) -> None:
        if transaction.savepoint is None:  # another one's rollback has undone it meanwhile
            return
        self._give_up_reader(transaction)
        place = self._stack.index(transaction)
        self._drop(self._stack[place + 1 :], transaction)
        self._send(f"ROLLBACK TO SAVEPOINT {transaction.savepoint}")
        if transaction.took_over is not None:
            self._complaint = _undone_with(transaction)
        transaction.wrote = False
        self._end(transaction)
        if transaction.read_only:
            self._dialect.end_read_only()

    def _drop(self, above: list[Transaction], beneath: Transaction) -> None:
        """Take those on top off the stack, which the rollback of the one *beneath* undoes."""
        for each in above:
            each.undone_by = _undone(each, beneath)
            each.savepoint = None
        del self._stack[len(self._stack) - len(above) :]

    def _end_abandoned(self, transaction: Transaction) -> None:
        if transaction.autocommit and not (transaction.read_only or transaction.failed):
            self._end(transaction)
        else:
            self._undo(transaction)

    def _end(self, transaction: Transaction) -> None:
        """Release the savepoints on top of which nothing goes on any more."""
        transaction.ended = True
        self._give_up_reader(transaction)
        first = len(self._stack)
        while first and self._stack[first - 1].ended:
            first -= 1
        if first < len(self._stack):
            self._send(f"RELEASE SAVEPOINT {self._stack[first].savepoint}")
            for ended in self._stack[first:]:
                ended.savepoint = None
                if first and ended.wrote:
                    self._stack[first - 1].took_over = ended.begun_at
                    self._stack[first - 1].took_over_number = ended.number
            del self._stack[first:]

    def _check_constraints(self, transaction: Transaction) -> None:
        if not (transaction.wrote or transaction.unseen) or self._stack[-1] is not transaction:
            return
        self._dialect.check_constraints()
        if self._dialect.has_dangling_reference():
            raise self._errors.IntegrityError("FOREIGN KEY constraint failed")

    def _broken_constraint(self) -> Exception | None:
        """Return what COMMIT would raise for the transactions that are still open."""
        writing = [each for each in self._stack if each.keeps_its_place]
        if not writing or any(each.failed for each in writing):
            return None
        try:
            self._check_constraints(writing[-1])
        except self._errors.Error as error:
            return sa_exc.DBAPIError.instance(
                "COMMIT", None, error, self._errors.Error, dialect=self._sqlalchemy
            )
        return None

    def _send(self, statement: str) -> list[Any]:
        if self._dialect.name == "sqlite" and not self._is_in_transaction(statement):
            raise self._escaped()  # SAVEPOINT would begin, and RELEASE commit
        try:
            rows: list[Any] = self._drive(partial(_execute, self.real, statement))
        except self._errors.Error as error:
            self._notice(error)
            raise
        return rows

    def _notice(self, error: Exception) -> None:
        if isinstance(error, self._errors.Error):
            lost = self._sqlalchemy.is_disconnect(error, self.real, None)
            self._is_lost = self._is_lost or lost

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

    def _try(self, statement: str) -> bool:
        try:
            self._send(statement)
        except (self._errors.Error, SandboxError):
            return False
        return True

    def _escaped(self) -> SandboxError:
        if self._is_lost:
            return SandboxError(_LOST)
        what = self._ended_by or "Something that the sandbox did not see"
        mend = (
            "On MySQL, DDL commits: create tables before the sandbox."
            if self._dialect.name == "mysql"
            else "Write session.commit() or session.rollback(), which are savepoints here."
        )
        return SandboxError(
            f"{what} has ended the sandbox's transaction: what was written until then may be "
            f"stored for good, and other tests may see it. {mend}"
        )


_LOST = (
    "The connection of the sandbox was lost, and its transaction with it: nothing of it is stored, "
    "and the test cannot go on. What is to survive a lost connection is tested on a database "
    "without a sandbox (fixture postgres_url)"
)
_FORKED = (
    "This process was forked from one with a sandbox, which is one connection of that one. Test "
    "what several processes do on a database without a sandbox (fixture postgres_url)"
)


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


def _too_late(holder: Transaction | None) -> Exception:
    if holder is None:
        return PoolBusy("The sandbox's one connection did not come free: a statement is running")
    return PoolBusy(
        "In a sandbox all share one connection, and the transaction that has begun at "
        f"{holder.begun_at} has written and did not end while {here()} waited for it. Commit it "
        "first, or test on a database without a sandbox (fixture postgres_url)"
    )


def _failed(transaction: Transaction) -> str:
    return (
        f"A statement of this transaction, begun at {transaction.begun_at}, failed earlier, and "
        "the error was swallowed. Roll back, or run what may fail in a savepoint: "
        "with session.begin_nested(): ..."
    )


def _undone_with(beneath: Transaction) -> str:
    return (
        f"What the transaction begun at {beneath.took_over} has committed was undone by the "
        f"rollback of the one begun at {beneath.begun_at}, which was open around it: in a sandbox "
        "both share one connection. Commit that one first"
    )


def _undone(transaction: Transaction, beneath: Transaction) -> str:
    return (
        f"The transaction begun at {transaction.begun_at} was undone by the rollback of the one "
        f"begun at {beneath.begun_at}, around it: in a sandbox both share one connection"
    )
