"""The savepoints on one connection: those of open transactions, and those that they make.

To roll one back undoes whatever was written since, by whomever. Those who lose rows by another
one's rollback are told: by TransactionDoomed if they have not committed, else by a warning.
"""

import itertools
import threading

from sessionscope.testing import _errors
from sessionscope.testing._connection import OUTERMOST, SharedConnection
from sessionscope.testing._places import here
from sessionscope.testing._transaction import Transaction

_KINDS = (["SAVEPOINT"], ["RELEASE"], ["ROLLBACK"])


class Savepoints:
    """The transactions that are open on a connection, the last one on top."""

    def __init__(self, connection: SharedConnection) -> None:
        self._connection = connection
        self._dialect = connection.dialect
        self._home = None if connection.is_async else threading.get_ident()
        self._stack: list[Transaction] = []
        self._numbers = itertools.count(1)
        self._latest = 0  # the number of the savepoint that was made last
        self._writes: set[tuple[int, Transaction]] = set()  # after which savepoint, and whose
        self.complaints: list[str] = []  # of those who have lost what they had committed

    @property
    def writing(self) -> list[Transaction]:
        """Those that have written and did not end, the last one on top."""
        return [each for each in self._stack if each.keeps_its_place]

    def above(self, transaction: Transaction) -> list[Transaction]:
        """Return those on top of *transaction*, or of the place that it is going to have."""
        if transaction.savepoint is None:
            return list(self._stack)
        return self._stack[self._stack.index(transaction) + 1 :]

    def is_on_top(self, transaction: Transaction) -> bool:
        """Return whether nothing was begun since."""
        return self._stack[-1:] == [transaction]

    def raise_to_top(self, transaction: Transaction) -> None:
        """Make room for a statement of *transaction*."""
        self._give_up_reader(transaction)
        if transaction.savepoint is not None:
            return
        name = f"{OUTERMOST}_{len(self._stack)}"
        if not self._connection.try_to_send(f"SAVEPOINT {name}"):
            self._undo_failed()
            self._connection.send(f"SAVEPOINT {name}")
        transaction.savepoint = name
        at_home = threading.get_ident() == self._home
        transaction.begin(self._next_number(), here(), at_home=at_home)
        self._stack.append(transaction)
        transaction.belong_to_this_flow()
        if transaction.read_only:
            self._dialect.make_read_only()

    def expect_write(self, transaction: Transaction) -> None:
        """Note that *transaction* may write what no one sees, and has if it was to before."""
        self._count_unseen(transaction)
        transaction.unseen = self._latest

    def note_write(self, transaction: Transaction) -> None:
        """Note that *transaction* writes now."""
        transaction.wrote = True
        self._writes.add((self._latest, transaction))

    def as_sent(self, transaction: Transaction, statement: str) -> str | None:
        """Return a statement with the name that its savepoint has here, None if it is left out.

        SQLAlchemy counts savepoints for each connection, so that two have the same name, of which
        MySQL keeps one. What was begun inside of one does not end when that is released.
        """
        *what, name = statement.rstrip("; \n").split(" ")
        if what == ["SAVEPOINT"] and name.isidentifier():
            transaction.savepoints[name] = self._next_number()
            self.note_write(transaction)  # to give up ours would end that one as well
        if what[:1] not in _KINDS or name not in transaction.savepoints:
            return statement
        number = transaction.savepoints[name]
        if what[0] == "RELEASE" and self._others_since(number, transaction):
            return None  # it ends with the transaction
        if what[0] == "ROLLBACK":
            inside = [each for each in self._stack if each.number > number]
            self._drop(inside, transaction)
            self._note_undone(number, transaction)
        return " ".join([*what, f"{name}_{number}"])

    def undo(self, transaction: Transaction) -> None:
        """Roll back what *transaction* has written, and end it."""
        if transaction.savepoint is None:  # another one's rollback has undone it meanwhile
            return
        self._give_up_reader(transaction)
        self._drop(self.above(transaction), transaction)
        self._connection.send(f"ROLLBACK TO SAVEPOINT {transaction.savepoint}")
        self._note_undone(transaction.number, transaction)
        transaction.wrote, transaction.unseen = False, None
        self.end(transaction)
        if transaction.read_only:
            self._dialect.end_read_only()

    def end(self, transaction: Transaction) -> None:
        """Release the savepoints on top of which nothing goes on any more."""
        self._count_unseen(transaction)
        transaction.ended = True
        self._give_up_reader(transaction)
        first = len(self._stack)
        while first and self._can_be_released(self._stack[first - 1]):
            first -= 1
        if first < len(self._stack):
            lowest = self._stack[first].savepoint
            for ended in self._stack[first:]:
                ended.savepoint = None
            del self._stack[first:]
            if not self._stack:
                self._writes.clear()  # no one is left whose rollback would undo them
            self._connection.send(f"RELEASE SAVEPOINT {lowest}")  # goes on if it is cancelled

    def _next_number(self) -> int:
        self._latest = next(self._numbers)
        return self._latest

    def _count_unseen(self, transaction: Transaction) -> None:
        if transaction.unseen is not None:
            transaction.wrote = True
            self._writes.add((transaction.unseen, transaction))

    def _can_be_released(self, transaction: Transaction) -> bool:
        # That would end what another one has made since, and may still go back to.
        return transaction.ended and not any(
            number > transaction.number
            for other in self._stack
            if not other.ended
            for number in other.savepoints.values()
        )

    def _others_since(self, number: int, transaction: Transaction) -> bool:
        """Return whether others than *transaction* have a savepoint that is younger."""
        others = (each for each in self._stack if each is not transaction)
        return any(max(each.number, *each.savepoints.values(), 0) > number for each in others)

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
        released = may_keep and self._connection.try_to_send(f"RELEASE SAVEPOINT {name}")
        if not released:
            self._connection.send(f"ROLLBACK TO SAVEPOINT {name}")
            self._connection.send(f"RELEASE SAVEPOINT {name}")
        if reader.read_only:
            self._dialect.end_read_only()
        elif not released:
            reader.undone_by = _errors.failed(reader.begun_at)

    def _undo_failed(self) -> None:
        """Undo the transaction on top, which PostgreSQL has aborted, so that others can go on."""
        if not self._stack:
            raise self._connection.why_gone()
        failed = self._stack[-1]
        self.undo(failed)
        failed.undone_by = _errors.failed(failed.begun_at)

    def _drop(self, above: list[Transaction], beneath: Transaction) -> None:
        """Take those on top off the stack, which a rollback of the one *beneath* undoes."""
        for each in above:
            each.savepoint = None
            if not each.has_committed:
                each.undone_by = _errors.undone(each.begun_at, beneath.begun_at)
        del self._stack[len(self._stack) - len(above) :]

    def _note_undone(self, number: int, by: Transaction) -> None:
        """Tell those who lose rows by a rollback of *by*'s to the savepoint of that number."""
        undone = {write for write in self._writes if write[0] >= number}
        self._writes -= undone
        writers = {transaction for _, transaction in undone}
        writers.update(each for each in self._stack if (each.unseen or 0) >= number)
        for writer in sorted(writers - {by}, key=lambda each: each.number):
            if writer.has_committed:
                told = _errors.undone_after_its_commit(writer.begun_at, by.begun_at)
                self.complaints.append(told)
            else:
                writer.undone_by = _errors.undone(writer.begun_at, by.begun_at)
