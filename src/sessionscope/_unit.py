"""Unit: the only place where a unit of work begins, commits, rolls back and closes."""

import logging
from collections.abc import Callable, Collection, Mapping, MutableMapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Protocol

from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from sessionscope import _async_unit, _guards, _hooks, _identity, _overlap, _watch
from sessionscope._deadline import Deadline
from sessionscope._guards import Scope
from sessionscope._interrupt import cut, stop
from sessionscope._options import check_isolation_level, check_timeout
from sessionscope._places import Place, caller, describe
from sessionscope._retry import Attempts, mark
from sessionscope._source import SessionT, Source
from sessionscope._timer import Timer
from sessionscope._watch import UNIT
from sessionscope.events import Outcome, UnitBegan, UnitEnded, UnitRefused, UnitWaited
from sessionscope.exc import (
    CommitUnknown,
    PoolBusy,
    SessionEnded,
    SessionScopeError,
    TransactionDoomed,
)

# Seconds for which close() waits for another thread to leave the session.
_PATIENCE = 5.0
# SQLAlchemy's code of what a session says once a flush has failed (https://sqlalche.me/e/20/7s2a).
_FAILED_FLUSH = "7s2a"
# Seconds up to which a unit counts as admitted without waiting.
_AT_ONCE = 0.001

_log = logging.getLogger("sessionscope")


class _HasSource(Protocol[SessionT]):
    @property
    def _source(self) -> Source[SessionT]: ...


class Unit(Generic[SessionT]):
    """One unit of work, step by step: what ``begin()`` and the integrations are made of.

    ``with Unit(database) as session:`` is all of this, in the right order::

        unit = Unit(database)
        unit.admit()  # or: await unit.admit_async()
        try:
            ...  # use unit.session
        except BaseException:
            unit.rollback()
            raise
        else:
            unit.commit()  # rolls back by itself when it raises
        finally:
            unit.close()

    That of an AsyncDatabase is ended with ``await Unit.end_all_async([unit], Unit.commit)``, or
    ``Unit.rollback``, in place of the last three, which only work in SQLAlchemy's greenlets.
    *opened_at* is the ``(code, line)`` that errors name, by default the caller's. A *plain*
    unit of an AsyncDatabase has a plain Session, for code that runs in SQLAlchemy's greenlets.
    *attempts* are those of the call that this unit is one attempt of. A unit is used once.
    """

    __slots__ = (
        "_admitted_at",
        "_attempts",
        "_bind",
        "_committed",
        "_deadline",
        "_failure",
        "_gate",
        "_given",
        "_is_open",
        "_is_plain",
        "_scope",
        "_session",
        "_source",
        "_timeout",
    )

    def __init__(
        self,
        database: _HasSource[SessionT],
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        timeout: float | None = None,
        independent: bool = False,
        opened_at: Place | None = None,
        plain: bool = False,
        attempts: Attempts | None = None,
    ) -> None:
        if isolation_level is not None:
            check_isolation_level(isolation_level)
        if timeout is not None:
            check_timeout(timeout)
        source = database._source  # pyright: ignore[reportPrivateUsage]  # its own half
        self._source = source
        self._scope = Scope(
            source,
            opened_at or caller(1),
            is_async=source.options.is_async,
            read_only=read_only,
            # In memory there is one connection, which is also that of the units that write.
            autocommit=read_only
            and isolation_level is None
            and not (source.options.pooler or source.options.is_memory),
            independent=independent,
        )
        self._bind = source.engines.bind(
            read_only=read_only, isolation_level=isolation_level, independent=independent
        )
        self._scope.has_committed = isolation_level == "AUTOCOMMIT" and not read_only
        self._gate = source.gate(read_only=read_only, independent=independent)
        self._timeout = source.options.timeout if timeout is None else timeout
        self._deadline: Deadline | None = None
        self._attempts = attempts
        self._failure: BaseException | None = None
        self._is_plain = plain
        self._given: SessionT | None = None
        self._session: Session | None = None
        self._admitted_at = 0.0
        self._is_open = False
        self._committed = False

    @property
    def session(self) -> SessionT:
        """The unit's session. It exists from admission on."""
        if self._given is None:
            raise _no_session()
        return self._given

    @property
    def is_async(self) -> bool:
        """Whether the unit is an AsyncDatabase's, and ends on its event loop."""
        return self._scope.is_async

    @property
    def has_changes(self) -> bool:
        """Whether the session has changes that it has not sent yet."""
        return not self._plain._is_clean()  # pyright: ignore[reportPrivateUsage]  # as commit() asks

    @property
    def needs_io(self) -> bool:
        """Whether ending the unit now may wait for the database, or runs hooks."""
        scope = self._scope
        if scope.used and (not scope.autocommit or scope.streams):
            return True
        return self._session is not None and _hooks.has_hooks(self._session)

    def admit(self) -> None:
        """Wait for a slot, blocking this thread, and make the session.

        Opens no connection: that happens at the first statement. Raises PoolBusy,
        DeadlineExceeded, NestedUnit.
        """
        started = self._start()
        try:
            self._gate.admit(self._patience)
        except PoolBusy as busy:
            raise self._refused(busy, started) from busy.__cause__
        self._open(started)

    async def admit_async(self) -> None:
        """Async version of :meth:`admit`: waits on the event loop, without a thread."""
        started = self._start()
        try:
            if not self._gate.admit_at_once():
                await self._gate.admit_async(self._patience)
        except PoolBusy as busy:
            raise self._refused(busy, started) from busy.__cause__
        self._open(started)

    def commit(self) -> None:
        """Commit what the unit has done; if that fails, roll back and raise.

        Objects stay readable afterwards: this last commit does not expire them. A
        read-only unit has nothing to commit and sends nothing. Raises
        TransactionDoomed, CommitUnknown, SessionEnded, ReadOnlyUnit, DeadlineExceeded, and
        what flush() and COMMIT raise.
        """
        try:
            self._commit()
        except BaseException as error:
            self._failure = self._meaning(error)
            if self._failure is not None:
                self.rollback()
                if self._failure is error:
                    raise
                raise self._failure from error
            # COMMIT was lost, and has happened: rollback() would expire what it stored.
            _hooks.mark_committed(self._plain)
        self._committed = True

    def rollback(self) -> None:
        """Roll back what the unit has not committed yet.

        Never raises, so that it cannot hide an error of yours: a connection that
        cannot roll back any more is not given back to the pool as it is.
        """
        if _overlap.is_in_use(self._plain):
            return  # close() waits for the other thread or task, and rolls back
        try:
            self._plain.rollback()
        except Exception:
            # close() resets the session, and the pool rolls back what it gets back.
            self._log_failure("rollback()")

    def discard(self) -> None:
        """Roll back by closing the connection, because another thread may be using it.

        For a unit whose flow was cancelled while a thread that it started goes on:
        that thread's statement is interrupted, and what it sends afterwards is refused
        instead of reaching the connection's next user. A database in memory, which is
        its connection, is rolled back only. Never raises.
        """
        connection = self._scope.connection
        self._scope.ended = True
        if connection is None or self.is_async or self._source.options.is_memory:
            self.rollback()
            return
        cut(connection)

    def failed(self, error: BaseException | None) -> None:
        """Say that *error* has left the unit, which is to be rolled back for it."""
        self._failure = error

    def close(self) -> None:
        """Give the connection and the slot back, then run the hooks that are due.

        What was neither committed nor rolled back is rolled back. Never raises, so
        that it cannot hide an error of yours, but for the SystemExit of a hook. Waits up to 5
        seconds for another thread that is inside a call of the session's.
        """
        if self._give_back():
            self._run_due()

    @staticmethod
    def encloses(info: Mapping[Any, Any]) -> bool:
        """For integrations: whether this flow of control is part of a connection's unit.

        *info* is ``Connection.info``. Part of a unit is the flow that opened it, and what that
        flow has started since: its tasks, and the threads that got its context.
        """
        scope: Scope | None = info.get(UNIT)
        return scope is not None and _guards.is_held(scope)

    @staticmethod
    def let_idle(info: MutableMapping[Any, Any]) -> None:
        """For integrations: let sessions without a unit of work keep a transaction open for long.

        On the connection whose ``Connection.info`` is given, which serves others meanwhile.
        """
        info[_watch.MAY_IDLE] = True

    @staticmethod
    def hand_hooks_to(take: "Callable[[partial[object]], object]") -> AbstractContextManager[None]:
        """For integrations: call *take* meanwhile with each hook that is due, and not the hook.

        Whichever unit or session it belongs to, and whichever thread or task ends that. A hook
        is the ``partial`` of what ``after_commit()`` or ``after_rollback()`` was given.
        """
        return _hooks.hand_to(take)

    @staticmethod
    def end_all(units: "Collection[Unit[Any]]", how: "Callable[[Unit[Any]], None]") -> None:
        """End several units: *how* is ``Unit.commit``, ``Unit.rollback`` or ``Unit.discard``.

        All are flushed before the first one commits; if one fails, those that have not
        committed yet are rolled back. There is no atomicity across them. Hooks run
        when all of them are closed.
        """
        try:
            Unit._close_all(units, how)
        finally:
            Unit._run_hooks(units)

    @staticmethod
    async def end_all_async(
        units: "Collection[Unit[Any]]", how: "Callable[[Unit[Any]], None]"
    ) -> None:
        """Async version of :meth:`end_all`, for the units of AsyncDatabases.

        No cancellation prevents it. One that comes before COMMIT was sent rolls back;
        one that comes later is delivered at the next ``await`` after the outcome, which
        may be that of a hook: it ends the hook, and then comes back after the last one.
        """
        for unit in units:
            _guards.leave(unit._scope)
        if not any(unit.needs_io for unit in units):
            await greenlet_spawn(Unit.end_all, units, how)
        elif how is not Unit.commit:
            await _async_unit.end(partial(Unit.end_all, units, how))
        else:
            if any(unit.has_changes for unit in units):
                undo = partial(Unit.end_all, units, Unit.rollback)
                await _async_unit.flush(partial(Unit.flush_all, units), undo)
            # Hooks may be slow: in this task, they see when it is cancelled.
            hooks = partial(Unit._run_hooks_async, units)
            await _async_unit.commit(partial(Unit._close_all, units, how), hooks)

    @staticmethod
    def flush_all(units: "Collection[Unit[Any]]") -> None:
        """Send the changes of all units that are still pending. Raises what flush() raises."""
        for unit in units:
            try:
                unit._plain.flush()
            except BaseException as error:
                unit._failure = unit._meaning(error)
                if unit._failure is error or unit._failure is None:
                    raise
                raise unit._failure from error

    @staticmethod
    def _close_all(units: "Collection[Unit[Any]]", how: "Callable[[Unit[Any]], None]") -> None:
        """End several units, all but their hooks."""
        try:
            if how is Unit.commit and len(units) > 1:
                Unit.flush_all(units)
            for unit in units:
                how(unit)
        except BaseException:
            for unit in units:
                unit.rollback()
            raise
        finally:
            for unit in units:
                unit._give_back()

    @staticmethod
    def _run_hooks(units: "Collection[Unit[Any]]") -> bool:
        """Run the hooks of units that are closed; return whether one was cancelled."""
        cancelled = False
        leaving: BaseException | None = None
        for unit in units:
            try:
                cancelled |= unit._run_due()
            except (KeyboardInterrupt, SystemExit) as error:
                leaving = leaving or error
        if leaving is not None:
            raise leaving
        return cancelled

    @staticmethod
    async def _run_hooks_async(units: "Collection[Unit[Any]]") -> bool:
        if any(_hooks.has_hooks(unit._plain) for unit in units):
            return bool(await greenlet_spawn(Unit._run_hooks, units))
        return Unit._run_hooks(units)  # without a greenlet, which takes longer than the look

    def __enter__(self) -> SessionT:
        if self._given is not None:
            raise _used_twice()
        try:
            self.admit()
            return self.session
        except BaseException:  # an interrupt, at the worst moment
            self.close()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self.commit()
            else:
                self.failed(exc)
                self.rollback()
        finally:
            self.close()

    def __del__(self) -> None:
        """Give back what a unit holds that was abandoned without its close()."""
        if not getattr(self, "_is_open", False):
            return
        try:
            if self._session is not None and self._scope.used and not self._scope.forked:
                self._source.leaked(self._session)
        finally:
            if self.is_async:  # its connection is closed on its event loop
                self._is_open = False
                self._end()
            else:
                self._give_back()

    @property
    def _plain(self) -> Session:
        """The session on which the rules are carried out."""
        if self._session is None:
            raise _no_session()
        return self._session

    @property
    def _patience(self) -> float:
        """Seconds for which the unit waits for its slot."""
        timeout = self._gate.timeout
        return timeout if self._deadline is None else min(timeout, self._deadline.remaining)

    def _start(self) -> float:
        """Begin to count the time; return when that was."""
        if self._session is not None:
            raise _used_twice()
        _guards.refuse_nested(self._scope, self._source.name, self._source.options)
        attempts, scope = self._attempts, self._scope
        if attempts is not None:
            self._deadline = attempts.deadline
            scope.may_run_again = attempts.limit > 1
        elif self._timeout is not None:
            self._deadline = Deadline(self._timeout, scope.opened_at)
        return monotonic()

    def _refused(self, busy: PoolBusy, started: float) -> SessionScopeError:
        """Return the error for a unit that got no slot."""
        if self._source.telling.observers:
            self._source.telling.tell(UnitRefused(self._opened_at, monotonic() - started))
        deadline = self._deadline
        return deadline.exceeded("queue") if deadline is not None and deadline.is_over else busy

    def _meaning(self, error: BaseException) -> BaseException | None:
        """Return what the failure of a flush or a commit means; ``None``: it did commit."""
        if isinstance(error, CommitUnknown):
            return self._source.resolve(error, self._scope)
        if isinstance(error, PendingRollbackError) and not isinstance(error, TransactionDoomed):
            doomed = self._doomed(error)
            mark(doomed, self._source.name)
            return doomed
        return error

    def _run_due(self) -> bool:
        """Run the hooks that are due, unless the unit is to run again."""
        attempts, failure = self._attempts, self._failure
        has_committed = self._committed or self._scope.has_committed
        if attempts is None or failure is None or has_committed or not attempts.judge(failure):
            return _hooks.run_due(self._plain)
        attempts.undone = _hooks.take(self._plain)
        return False

    def _give_back(self) -> bool:
        """Close the session and free the slot; return whether there was something to close."""
        session = self._session
        if not self._is_open:
            return False
        self._is_open = False
        try:
            if session is not None and self._scope.used and not self._scope.forked:
                self._reset(session)
        finally:
            self._end()
        return session is not None

    def _end(self) -> None:
        scope = self._scope
        if not scope.left:
            _guards.leave(scope)
        scope.ended = True
        scope.connection = None
        if scope.timer is not None:
            scope.timer.end()
            scope.timer = None
        if scope.is_async and self._session is not None:
            _watch.leave(self._session)
        used = monotonic() - self._admitted_at
        self._gate.release(committed=self._committed, used=used)
        if self._source.telling.observers:
            outcome: Outcome = "committed" if self._committed else "rolled back"
            self._source.telling.tell(UnitEnded(self._opened_at, outcome, used))

    def _reset(self, session: Session) -> None:
        """Close the session, if need be after another thread has left it."""
        if _overlap.USER in session.__dict__:
            self._reset_once_left(session)
            return
        try:
            # Not close(): that would make SQLAlchemy's own error hide SessionEnded.
            _overlap.reset(session)
        except IllegalStateChangeError:
            self._reset_once_left(session)
        except Exception:
            self._throw_away(session)

    def _reset_once_left(self, session: Session) -> None:
        # A thread of a cancelled flow is inside, or a task that no one awaited.
        deadline = monotonic() + _PATIENCE
        while monotonic() < deadline:
            self._source.sleep(0.01)
            if _overlap.is_in_use(session):
                continue
            try:
                _overlap.reset(session)
            except IllegalStateChangeError:
                continue
            except Exception:
                break
            return
        self._throw_away(session)

    def _throw_away(self, session: Session) -> None:
        self._log_failure("close()")
        connection = self._scope.connection
        if (
            connection is not None
            and _overlap.is_in_use(session)
            and self._source.options.is_sqlite
        ):
            stop(connection)  # and not closed: it goes back when no thread knows the session
            return
        with suppress(Exception):
            _overlap.invalidate(session)

    def _open(self, started: float) -> None:
        self._is_open = True
        self._admitted_at = monotonic()
        scope = self._scope
        try:
            if self._deadline is not None:
                scope.timer = Timer(self._deadline, is_async=scope.is_async)
            if self._deadline is not None or scope.may_run_again:
                scope.on_begin = _identity.begin
            open_session = self._source.open_plain if self._is_plain else self._source.open_session
            self._given, self._session = open_session(self._bind, self._scope)
            _guards.enter(self._scope)
        except BaseException:
            self._give_back()
            raise
        if self._attempts is not None:
            self._attempts.undone = None  # of an attempt that failed: this one has its own
            self._attempts.start()
        if self._source.telling.observers:
            self._tell_begun(self._admitted_at - started)

    def _commit(self) -> None:
        session = self._session
        if session is None:
            raise _no_session()
        if self._scope.read_only and not _hooks.has_hooks(session):
            if self.has_changes or _overlap.USER in session.__dict__:
                session.flush()  # refuses what would be lost without a word, or another's use
            return
        if not session.in_transaction():
            if not (self._scope.used or _hooks.has_hooks(session)):
                return
            self._refuse_closed(session)
        session.expire_on_commit = False
        session.commit()

    @property
    def _opened_at(self) -> str:
        return describe(self._scope.opened_at)

    def _tell_begun(self, waited: float) -> None:
        telling = self._source.telling
        if waited > _AT_ONCE:
            telling.tell(UnitWaited(self._opened_at, waited))
        attempt = self._attempts.number if self._attempts is not None else 1
        telling.tell(UnitBegan(self._opened_at, self._scope.read_only, attempt))

    def _log_failure(self, what: str) -> None:
        _log.warning(
            "%s failed in the unit of work opened at %s", what, self._opened_at, exc_info=True
        )

    def _refuse_closed(self, session: Session) -> None:
        """Raise if the session was closed inside the unit, which rolled its work back."""
        try:
            session.begin()
        except InvalidRequestError as error:
            raise SessionEnded(
                "session.close() was called inside the unit of work opened at "
                f"{self._opened_at}, which rolls back what was not committed. "
                "Remove that line: the unit closes its session"
            ) from error

    def _doomed(self, error: PendingRollbackError) -> TransactionDoomed:
        if error.code != _FAILED_FLUSH:
            return TransactionDoomed(
                "This transaction cannot commit (unit of work opened at "
                f"{self._opened_at}): its connection was lost earlier, and the "
                "error was swallowed. Let the error leave the unit of work, and run it again"
            )
        return TransactionDoomed(
            "This transaction cannot commit (unit of work opened at "
            f"{self._opened_at}): a flush failed earlier, which rolled it back, "
            "and the error was swallowed. Nothing was written. Let the error leave the unit of "
            "work, or flush in a savepoint and catch the error outside of it: "
            f"{'async ' if self.is_async else ''}with session.begin_nested(): ..."
        )


def _used_twice() -> InvalidRequestError:
    return InvalidRequestError("A unit is used once: make another one with begin()")


def _no_session() -> InvalidRequestError:
    return InvalidRequestError("This unit has no session yet: call admit() first")
