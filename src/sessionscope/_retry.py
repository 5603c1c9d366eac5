"""Retry: which failed units of work may run again, after how long, and how often.

Only a unit that has left nothing behind runs again, whole and with a fresh session: one that
the database has rolled back for the sake of others, or whose connection was lost
before COMMIT. Retrying a statement or a COMMIT alone would lose what the unit had read.
"""

import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from time import monotonic
from types import MethodType
from typing import Any

from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import object_mapper
from sqlalchemy.orm.exc import UnmappedInstanceError

from sessionscope._deadline import Deadline
from sessionscope.exc import ConfigurationError, DatabaseUnavailable, TransactionDoomed

# serialization_failure and deadlock_detected. CockroachDB has 40001 for all its restarts, and
# 40003 (statement_completion_unknown) for those that may have committed: that one is not here.
_SQLSTATES = {"40001", "40P01"}
# admin_shutdown, crash_shutdown, cannot_connect_now, and of class 08 those after which nothing
# can have been committed: 08007 is transaction_resolution_unknown.
_LOST_SQLSTATES = {"57P01", "57P02", "57P03", "08000", "08001", "08003", "08004", "08006"}
# ER_LOCK_DEADLOCK, ER_LOCK_WAIT_TIMEOUT, ER_CHECKREAD (MariaDB's snapshot isolation), and Galera's
# ER_UNKNOWN_COM_ERROR: the node is not ready.
_MYSQL_CODES = {1213, 1205, 1020, 1047}
# SQLITE_BUSY; its extended codes, like SQLITE_BUSY_SNAPSHOT, have it in their low byte.
_SQLITE_BUSY = 5
# SQLAlchemy's code of what a session says once its connection was lost in a transaction.
_INVALID = "8s2b"

# Key in an error's __dict__ of the Database that it comes from.
_DATABASE = "_sessionscope_database"

# A function and its arguments.
Call = tuple[Callable[..., Any], tuple[object, ...], Mapping[str, object]]

# How often a unit of work is tried by default. Of ten tasks that all increment one row, in
# SERIALIZABLE transactions, one in four attempts gets through while nine others begin anew: sixteen
# have been needed for one of 200.
ATTEMPTS = 30
# Seconds: before the second attempt at most the first, before later ones twice as long each time.
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 1.0
# While it cannot be reached: a unit that waits goes on so soon after its return.
_LONGEST_PAUSE_AWAY = 0.25
# How many retries more than successes a Database allows, in all its threads and tasks.
_RESERVE = 1000


class Budget:
    """How often units may run again: in the long run, no more often than units succeed.

    Without it, a database that fails every unit would get several times its usual load. Attempts to
    reach one that is away are counted only: each waiting unit makes a few in a second.
    """

    def __init__(self) -> None:
        self.spent = 0  # on attempts that were made
        self._left = _RESERVE

    def deposit(self) -> None:
        """Count a unit that has succeeded."""
        if self._left < _RESERVE:  # a race costs one retry
            self._left += 1

    def withdraw(self, *, free: bool) -> bool:
        """Take one retry, of the allowance unless it is *free*; return whether there was one."""
        if not free:
            if self._left <= 0:
                return False
            self._left -= 1
        return True


class Attempts:
    """The attempts of one call: how many there were, and whether there is another one.

    *limit* bounds those that the database has failed. A database that cannot be reached is
    waited for instead, at most *patience* seconds. All of them have one *deadline*.
    """

    def __init__(
        self,
        call: Call,
        database: str,
        *,
        limit: int,
        patience: float,
        budget: Budget,
        deadline: Deadline | None,
    ) -> None:
        self.number = 1
        self.limit = limit
        self.deadline = deadline
        self.pause: float | None = None  # before the next attempt, once there is to be one
        self.undone: Callable[[], object] | None = None  # runs the last attempt's hooks, if need be
        self._call = call
        self._database = database
        self._patience = patience
        self._budget = budget
        self._failures = 0
        self._is_over = False
        self._unreachable_since: float | None = None
        self._began = self._attempt_began = monotonic()

    def judge(self, error: BaseException) -> bool:
        """Decide whether another attempt follows on *error*, and after which pause."""
        self.pause = self._pause_after(error)
        if self.pause is None and self.number > 1:
            seconds = monotonic() - self._began
            _add_note(error, f"This was attempt {self.number}, after {seconds:.2f} s")
        return self.pause is not None

    def start(self) -> None:
        """Count an attempt that has begun."""
        if self.number > 1:
            self._budget.spent += 1

    def next(self) -> float:
        """Count the next attempt; return the seconds to wait before it."""
        assert self.pause is not None
        pause, self.pause = self.pause, None
        self.number += 1
        self._attempt_began = monotonic() + pause
        return pause

    def give_up(self) -> Callable[[], object] | None:
        """Allow no attempt any more; return what runs the hooks of one that was not the last."""
        self._is_over = True
        undone, self.undone = self.undone, None
        return undone

    def succeeded(self) -> None:
        """Count the call as a success."""
        self._budget.deposit()

    def _pause_after(self, error: BaseException) -> float | None:
        if self._is_over or self.limit == 1 or not is_transient(error, self._database):
            return None
        if not self._has_another(error):
            return None
        pause = random.uniform(0.0, self._longest_pause)  # noqa: S311  # spreads load, guards nothing
        if self.deadline is not None and self.deadline.remaining <= pause:
            return None
        if (why := _what_forbids(self._call)) is not None:
            _add_note(error, f"It was not run again, because one of its arguments is {why}")
            return None
        if not self._budget.withdraw(free=self._is_away):
            _add_note(error, "It was not run again: too many units of work fail at the moment")
            return None
        return pause

    @property
    def _longest_pause(self) -> float:
        # Full jitter. Those who are in each other's way need as long as they take to pass.
        first = max(_FIRST_PAUSE, 2 * (monotonic() - self._attempt_began))
        longest = _LONGEST_PAUSE_AWAY if self._is_away else _LONGEST_PAUSE
        return min(longest, first * 2.0 ** min(self.number - 1, 20))

    @property
    def _is_away(self) -> bool:
        """Whether the database could not be reached by the last attempt."""
        return self._unreachable_since is not None

    def _has_another(self, error: BaseException) -> bool:
        if isinstance(error, DatabaseUnavailable):
            return not self._is_out_of_patience()
        self._unreachable_since = None
        self._failures += 1
        return self._failures < self.limit

    def _is_out_of_patience(self) -> bool:
        now = monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
        return now - self._unreachable_since >= self._patience


def check_attempts(attempts: object) -> None:
    """Raise ConfigurationError if *attempts* is not a number of attempts."""
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigurationError(
            f"attempts={attempts!r} must be a whole number, 1 or more (1: never run again)"
        )


def mark(error: BaseException, database: str) -> None:
    """Note that *error* comes from *database*; a unit runs again for its own errors only."""
    error.__dict__[_DATABASE] = database


def is_transient(error: BaseException | None, database: str) -> bool:
    """Return whether the unit of *database* that *error* has ended may succeed another time.

    Such an error means that the database has rolled the whole unit back, or has never
    seen its COMMIT.
    """
    if isinstance(error, TransactionDoomed):  # what dooms it was swallowed
        cause = error.__cause__
        if isinstance(cause, PendingRollbackError):  # of the connection, not of a flush
            return cause.code == _INVALID and error.__dict__.get(_DATABASE) is database
        return is_transient(cause, database)
    if not isinstance(error, DBAPIError) or error.__dict__.get(_DATABASE) is not database:
        return False
    if isinstance(error, DatabaseUnavailable):
        return error.is_transient
    if error.connection_invalidated:
        return True
    sqlstate = sqlstate_of(error.orig)
    if sqlstate is not None:
        return sqlstate in _SQLSTATES | _LOST_SQLSTATES
    if is_busy(error.orig):
        return True
    return code_of(error.orig) in _MYSQL_CODES


def code_of(error: BaseException | None) -> int | None:
    """Return the number that MySQL's drivers put first in their errors, if there is one."""
    arguments: tuple[Any, ...] = getattr(error, "args", ())
    return arguments[0] if arguments and type(arguments[0]) is int else None


def is_busy(error: BaseException | None) -> bool:
    """Return whether SQLite says that another connection has the database."""
    return bool(getattr(error, "sqlite_errorcode", 0) & 0xFF == _SQLITE_BUSY)


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error, if it has one."""
    sqlstate: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return sqlstate


def _what_forbids(call: Call) -> str | None:
    """Return which argument, or part of one, a second attempt would not find as it was."""
    for argument in _inside(call, depth=3):
        if isinstance(argument, Iterator | AsyncIterator):
            return "an iterator, which the first attempt has consumed: pass a list"
        with suppress(UnmappedInstanceError):
            return (
                f"a mapped {object_mapper(argument).class_.__name__}, to which a second attempt "
                "would apply its changes twice: pass its primary key, and session.get() it inside"
            )
    return None


def _inside(arguments: Iterable[object], depth: int) -> Iterator[object]:
    for argument in arguments:
        yield argument
        if depth:
            yield from _inside(_parts_of(argument), depth - 1)


def _parts_of(argument: Any) -> Iterable[object]:
    kind: type[object] = argument.__class__
    if issubclass(kind, partial):
        return argument.func, *argument.args, argument.keywords
    if issubclass(kind, MethodType):
        return (argument.__self__,)
    if issubclass(kind, Mapping):
        return [*argument.keys(), *argument.values()]
    return list(argument) if issubclass(kind, list | tuple | set | frozenset) else ()


def _add_note(error: BaseException, note: str) -> None:
    error.add_note(f"sessionscope: {note}.")
