"""Unit: the only place where a unit of work begins, commits, rolls back and closes."""

import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Generic, Protocol

from sqlalchemy import Engine
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

from sessionscope import _guards, _hooks
from sessionscope._commit import verify_commits
from sessionscope._engines import Engines
from sessionscope._gate import Gate
from sessionscope._guards import UNIT, Place, Scope, caller, describe
from sessionscope._options import Options, check_isolation_level
from sessionscope._pool import interrupt
from sessionscope.exc import ConfigurationError, SessionEnded, TransactionDoomed

SessionT = TypeVar("SessionT", bound=Session, default=Session)

# Seconds for which close() waits for another thread to leave the session.
_PATIENCE = 5.0

_log = logging.getLogger("sessionscope")


class Source(Generic[SessionT]):
    """What all units of work of one Database share."""

    def __init__(self, options: Options, session_class: type[SessionT], name: str) -> None:
        self.name = name
        self.options = options
        self.gates = _make_gates(options)
        self.engines = Engines(options, self._demand)
        for engine in {id(e.dialect): e for e in (self.engines.read, self.engines.write)}.values():
            verify_commits(engine, name)
        # A read-only unit has no transaction to prepare.
        two_phase = options.session_options.get("twophase", False)
        self.read_only_overrides = {"twophase": False} if two_phase else {}
        self.sessionmaker = _make_sessionmaker(options, session_class, self.engines.write)

    def _demand(self) -> int:
        return sum(gate.in_use + gate.waiting for gate in self.gates)

    def bind(self, *, read_only: bool, isolation_level: str | None) -> Engine:
        """Return the engine for such units."""
        return self.engines.bind(read_only=read_only, isolation_level=isolation_level)

    def gate(self, *, read_only: bool) -> Gate:
        """Return the gate that admits such units."""
        return self.gates[-1 if read_only else 0]


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

    *opened_at* is the ``(code, line)`` that errors name, by default the caller's.
    A unit is used once.
    """

    __slots__ = (
        "_admitted_at",
        "_bind",
        "_committed",
        "_gate",
        "_is_open",
        "_scope",
        "_session",
        "_source",
    )

    def __init__(
        self,
        database: _HasSource[SessionT],
        *,
        read_only: bool = False,
        isolation_level: str | None = None,
        opened_at: Place | None = None,
    ) -> None:
        check_isolation_level(isolation_level)
        if opened_at is None:
            opened_at = caller(1)
        source = database._source  # pyright: ignore[reportPrivateUsage]  # its own half
        self._source = source
        self._scope = Scope(
            source, opened_at, read_only=read_only, autocommit=read_only and isolation_level is None
        )
        self._bind = source.bind(read_only=read_only, isolation_level=isolation_level)
        self._gate = source.gate(read_only=read_only)
        self._session: SessionT | None = None
        self._admitted_at = 0.0
        self._is_open = False
        self._committed = False

    @property
    def session(self) -> SessionT:
        """The unit's session. It exists from admission on."""
        if self._session is None:
            raise InvalidRequestError("This unit has no session yet: call admit() first")
        return self._session

    @property
    def needs_io(self) -> bool:
        """Whether ending the unit now may wait for the database, or runs hooks."""
        scope = self._scope
        if scope.used and (not scope.autocommit or scope.streams):
            return True
        return _hooks.has_hooks(self.session)

    def admit(self) -> None:
        """Wait for a slot, blocking this thread, and make the session.

        Opens no connection: that happens at the first statement. Raises PoolBusy,
        NestedUnit.
        """
        self._refuse_second_use()
        self._gate.admit()
        self._open()

    async def admit_async(self) -> None:
        """Async version of :meth:`admit`: waits on the event loop, without a thread."""
        self._refuse_second_use()
        if not self._gate.admit_at_once():
            await self._gate.admit_async()
        self._open()

    def commit(self) -> None:
        """Commit what the unit has done; if that fails, roll back and raise.

        Objects stay readable afterwards: this last commit does not expire them. A
        read-only unit has nothing to commit and sends nothing. Raises
        TransactionDoomed, CommitUnknown, SessionEnded, ReadOnlyUnit, and what
        flush() and COMMIT raise.
        """
        try:
            self._commit()
        except PendingRollbackError as error:
            self.rollback()
            if isinstance(error, TransactionDoomed):
                raise
            raise self._doomed(error) from error
        except BaseException:
            self.rollback()
            raise
        self._committed = True

    def rollback(self) -> None:
        """Roll back what the unit has not committed yet.

        Never raises, so that it cannot hide an error of yours: a connection that
        cannot roll back any more is not given back to the pool as it is.
        """
        try:
            self.session.rollback()
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
        if connection is None or self._source.options.is_memory:
            self.rollback()
            return
        with suppress(Exception):
            interrupt(connection)
        with suppress(Exception):
            connection.invalidate()

    def close(self) -> None:
        """Give the connection and the slot back, then run the hooks that are due.

        What was neither committed nor rolled back is rolled back. Never raises, so
        that it cannot hide an error of yours. Waits up to 5 seconds for another thread
        that is inside a call of the session's.
        """
        if self._give_back():
            _hooks.run_due(self.session)

    @staticmethod
    def end_all(units: "Collection[Unit[Any]]", how: "Callable[[Unit[Any]], None]") -> None:
        """End several units: *how* is ``Unit.commit``, ``Unit.rollback`` or ``Unit.discard``.

        All are flushed before the first one commits; if one fails, those that have not
        committed yet are rolled back. There is no atomicity across them. Hooks run
        when all of them are closed.
        """
        try:
            if how is Unit.commit and len(units) > 1:
                for unit in units:
                    unit.session.flush()
            for unit in units:
                how(unit)
        except BaseException:
            for unit in units:
                unit.rollback()
            raise
        finally:
            closed = [unit for unit in units if unit._give_back()]
            for unit in closed:
                _hooks.run_due(unit.session)

    def __enter__(self) -> SessionT:
        self._refuse_second_use()
        try:
            self.admit()
            assert self._session is not None
            return self._session
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
                self.rollback()
        finally:
            self.close()

    def __del__(self) -> None:
        """Give back what a unit holds that was abandoned without its close()."""
        if getattr(self, "_is_open", False):
            self._give_back()

    def _refuse_second_use(self) -> None:
        if self._session is not None:
            raise InvalidRequestError("A unit is used once: make another one with begin()")
        _guards.refuse_nested(self._source, self._source.name)

    def _give_back(self) -> bool:
        """Close the session and free the slot; return whether there was something to close."""
        session = self._session
        if not self._is_open:
            return False
        self._is_open = False
        try:
            if session is not None and self._scope.used:
                self._reset(session)
        finally:
            _guards.leave(self._scope)
            used = monotonic() - self._admitted_at
            self._gate.release(committed=self._committed, used=used)
        return session is not None

    def _reset(self, session: SessionT) -> None:
        """Close the session, if need be after another thread has left it."""
        try:
            # Not close(): that would make SQLAlchemy's own error hide SessionEnded.
            session.reset()
        except IllegalStateChangeError:
            self._reset_once_left(session)
        except Exception:
            self._throw_away(session)

    def _reset_once_left(self, session: SessionT) -> None:
        # A thread of a cancelled flow is inside; its next statement is refused.
        deadline = monotonic() + _PATIENCE
        while monotonic() < deadline:
            sleep(0.01)
            with suppress(IllegalStateChangeError):
                session.reset()
                return
        self._throw_away(session)

    def _throw_away(self, session: SessionT) -> None:
        self._log_failure("close()")
        with suppress(Exception):
            session.invalidate()

    def _open(self) -> None:
        self._is_open = True
        self._admitted_at = monotonic()
        try:
            overrides = self._source.read_only_overrides if self._scope.read_only else {}
            session = self._source.sessionmaker(bind=self._bind, **overrides)
            session.info[UNIT] = self._scope
            self._session = session
            _guards.enter(self._scope)
        except BaseException:
            self._give_back()
            raise

    def _commit(self) -> None:
        session = self.session
        if self._scope.read_only and not _hooks.has_hooks(session):
            session.flush()  # refuses changes that would be lost without a word
            return
        if not session.in_transaction():
            if not (self._scope.used or _hooks.has_hooks(session)):
                return
            self._refuse_closed(session)
        session.expire_on_commit = False
        session.commit()

    def _log_failure(self, what: str) -> None:
        opened_at = describe(self._scope.opened_at)
        _log.warning("%s failed in the unit of work opened at %s", what, opened_at, exc_info=True)

    def _refuse_closed(self, session: Session) -> None:
        """Raise if the session was closed inside the unit, which rolled its work back."""
        try:
            session.begin()
        except InvalidRequestError as error:
            raise SessionEnded(
                "session.close() was called inside the unit of work opened at "
                f"{describe(self._scope.opened_at)}, which rolls back what was not committed. "
                "Remove that line: the unit closes its session"
            ) from error

    def _doomed(self, error: PendingRollbackError) -> TransactionDoomed:
        if "during flush" not in str(error):
            return TransactionDoomed(
                "This transaction cannot commit (unit of work opened at "
                f"{describe(self._scope.opened_at)}): its connection was lost earlier, and the "
                "error was swallowed. Let the error leave the unit of work, and run it again"
            )
        return TransactionDoomed(
            "This transaction cannot commit (unit of work opened at "
            f"{describe(self._scope.opened_at)}): a flush failed earlier, which rolled it back, "
            "and the error was swallowed. Nothing was written. Let the error leave the unit of "
            "work, or flush in a savepoint and catch the error outside of it: "
            "with session.begin_nested(): ..."
        )


def _make_sessionmaker(
    options: Options, session_class: type[SessionT], engine: Engine
) -> sessionmaker[SessionT]:
    session_options: dict[str, Any] = {"close_resets_only": False, **options.session_options}
    try:
        factory = sessionmaker(engine, class_=session_class, **session_options)
        factory().close()  # an unknown option is an error here, not at the first request
    except TypeError as error:
        raise ConfigurationError(f"session_options has an unknown option: {error}") from error
    _guards.watch(factory)
    return factory


def _make_gates(options: Options) -> tuple[Gate, ...]:
    """Return the gate for writing units and the one for read-only units, or one for both."""
    limit, settings = options.limit, (options.pool_timeout, options.max_waiting)
    if options.is_sqlite and not options.is_memory and limit is not None and limit > 1:
        # A database file has one writer at a time: the others wait here, in order.
        return Gate(1, *settings), Gate(limit - 1, *settings)
    return (Gate(limit, *settings),)
