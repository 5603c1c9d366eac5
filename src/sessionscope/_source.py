"""Source: what all units of work of one Database share."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from threading import Thread
from time import monotonic, sleep
from typing import Any, Generic

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

from sessionscope import _guards, _outcome, _watch
from sessionscope._commit import is_committing, verify_commits
from sessionscope._deadline import Deadline
from sessionscope._engines import CreateEngine, Engines
from sessionscope._gate import Gate
from sessionscope._guards import Scope
from sessionscope._interrupt import stop
from sessionscope._options import Options
from sessionscope._places import describe, place_of
from sessionscope._retry import Attempts, Budget, Call
from sessionscope._telling import Telling
from sessionscope._timer import timed
from sessionscope._watch import UNIT
from sessionscope.events import Observer, SessionLeaked, Stats, UnitRetried
from sessionscope.exc import CommitUnknown, ConfigurationError, DatabaseUnavailable

SessionT = TypeVar("SessionT", default=Session)

# Seconds for which drain() waits for units that it has cut off.
CUTTING_SECONDS = 1.0


class Source(Generic[SessionT]):
    """What all units of work of one Database share."""

    def __init__(
        self,
        options: Options,
        name: str,
        observers: Iterable[Observer],
        create: CreateEngine = create_engine,
    ) -> None:
        self.name = name
        self.options = options
        self.telling = Telling(observers)
        self._budget = Budget()
        self.gates = _make_gates(options)
        self._reserve = Gate(1, options.pool_timeout, options.max_waiting, mend="")
        self.engines = Engines(options, create, self._demand)
        for engine in {id(e.dialect): e for e in (self.engines.read, self.engines.write)}.values():
            verify_commits(engine, name, self.engines.renew, options.quoted_outcome_table)
        self._two_phase = options.session_options.get("twophase", False)
        self.make_sessionmakers()

    def make_sessionmakers(self) -> None:
        """Make the factory of the sessions that users get, and the class of those of units."""
        self.sessionmaker, self.unit_class = self.guarded(self.options.session_class)
        self.timed_class = timed(self.unit_class, UNIT)

    def guarded(self, session_class: type[Any]) -> tuple[sessionmaker[Any], type[Any]]:
        """Return a guarded factory of synchronous sessions, and the class of those of units."""
        try:
            factory = sessionmaker(self.engines.write, class_=session_class, **self.session_options)
            factory().close()  # an unknown option is an error here, not at the first request
        except TypeError as error:
            raise ConfigurationError(f"session_options has an unknown option: {error}") from error
        is_async = self.options.is_async
        return factory, _guards.guard(factory, self._leaked, is_async=is_async)

    @property
    def session_options(self) -> dict[str, Any]:
        """The options of all sessions."""
        return {"close_resets_only": False, **self.options.session_options}

    def open_session(self, bind: Engine, scope: Scope) -> tuple[SessionT, Session]:
        """Return a session as the user gets it, and the synchronous one inside of it."""
        session_class = self.unit_class if scope.timer is None else self.timed_class
        session = session_class(**self.unit_options(self.sessionmaker.kw, bind, scope))
        return session, session

    def open_plain(self, bind: Engine, scope: Scope) -> tuple[Any, Session]:
        """Return a plain session, twice."""
        return self.open_session(bind, scope)

    def unit_options(self, options: dict[str, Any], bind: object, scope: Scope) -> dict[str, Any]:
        """Return a sessionmaker's *options* as those of one unit's session."""
        info = {**options["info"], UNIT: scope} if "info" in options else {UNIT: scope}
        if scope.read_only and self._two_phase:  # it has no transaction to prepare
            return {**options, "bind": bind, "info": info, "twophase": False}
        return {**options, "bind": bind, "info": info}

    def leaked(self, session: Session) -> None:
        """Warn of *session*, which has a connection and whose unit was abandoned."""
        _watch.report(session, self._leaked)

    def sleep(self, seconds: float) -> None:
        """Wait while another thread leaves a session."""
        sleep(seconds)

    def attempts(self, call: Call, limit: int, timeout: float | None) -> Attempts:
        """Return the attempts of *call*, whose time begins now."""
        seconds = self.options.timeout if timeout is None else timeout
        deadline = None if seconds is None else Deadline(seconds, place_of(call[0]))
        return Attempts(
            call,
            self.name,
            # Whether a lost COMMIT PREPARED has happened is not found out here.
            limit=1 if self._two_phase else limit,
            patience=self.options.pool_timeout,
            budget=self._budget,
            deadline=deadline,
        )

    def again(self, attempts: Attempts, call: Call, error: Exception) -> float:
        """Go on to the next attempt after *error*; return the seconds to wait before it."""
        number, pause = attempts.number, attempts.next()
        if self.telling.observers:
            opened_at = describe(place_of(call[0]))
            self.telling.tell(UnitRetried(opened_at, number, type(error).__name__, pause))
        return pause

    def resolve(self, unknown: CommitUnknown, scope: Scope) -> BaseException | None:
        """Return what the lost COMMIT of a unit was: its failure, or ``None`` if it happened."""
        if scope.identity is None or scope.is_split:  # of the other engine nothing is known
            return unknown
        seconds = None if scope.timer is None else scope.timer.deadline.remaining
        engine = self.engines.read
        committed = _outcome.has_committed(scope.identity, engine, self.sleep, seconds)
        if committed is None:
            return unknown
        return None if committed else unknown.lost

    def limit_waiting_threads(self, threads: Callable[[], int | None]) -> None:
        """Keep a framework's bounded thread pool from filling with units that wait."""
        for gate in self.gates:
            gate.limit_waiting_threads(threads)

    @contextmanager
    def draining(self) -> Generator[None]:
        """Refuse new units meanwhile."""
        gates = (*self.gates, self._reserve)
        for gate in gates:
            gate.start_draining()
        try:
            yield
        finally:
            for gate in gates:
                gate.stop_draining()

    def wait_until_empty(self, deadline: float) -> bool:
        """Return whether the last unit ended before *deadline*, on the monotonic clock."""
        gates = (*self.gates, self._reserve)
        return all(gate.wait_until_empty(deadline - monotonic()) for gate in gates)

    def cut_off(self, seconds: float) -> None:
        """End the units of work that are still open after so many *seconds* of draining."""
        for scope in _guards.open_scopes(self):
            scope.why = DatabaseUnavailable(
                f"The unit of work opened at {describe(scope.opened_at)} was cut off by "
                f"drain({seconds:g}), which has waited for it so long; it is rolled back"
            )
            self._cut_off(scope)

    def _cut_off(self, scope: Scope) -> None:
        connection = scope.connection
        scope.ended = True
        if connection is not None and not self.options.is_memory and not is_committing(connection):
            # In a thread of its own: a silent server does not answer to this either.
            Thread(target=stop, args=(connection,), name="sessionscope-stop", daemon=True).start()

    def stats(self) -> Stats:
        """Return what the Database is doing now and has done so far."""
        gates = (*self.gates, self._reserve)
        limits = [gate.limit for gate in self.gates if gate.limit is not None]
        return Stats(
            limit=sum(limits) if limits else None,
            in_use=sum(gate.in_use for gate in gates),
            idle=self.engines.idle,
            waiting=sum(gate.waiting for gate in gates),
            begun=sum(gate.begun for gate in gates),
            committed=sum(gate.committed for gate in gates),
            rolled_back=sum(gate.rolled_back for gate in gates),
            refused=sum(gate.refused for gate in gates),
            retried=self._budget.spent,
            longest_wait=max(gate.longest_wait for gate in gates),
            longest_use=max(gate.longest_use for gate in gates),
        )

    def _demand(self) -> int:
        return sum(gate.in_use + gate.waiting for gate in self.gates)

    def _leaked(self, opened_at: str) -> None:
        self.telling.tell(SessionLeaked(opened_at))

    def gate(self, *, read_only: bool, independent: bool) -> Gate:
        """Return the gate that admits such units."""
        if independent and not self.options.is_sqlite:
            return self._reserve
        return self.gates[-1 if read_only else 0]


def _make_gates(options: Options) -> tuple[Gate, ...]:
    """Return the gate for writing units and the one for read-only units, or one for both."""
    limit, settings = options.limit, (options.pool_timeout, options.max_waiting)
    if options.is_sqlite and not options.is_memory and limit is not None and limit > 1:
        # A database file has one writer at a time: the others wait here, in order.
        one_writer = ": an SQLite file has one writer at a time"
        return Gate(1, *settings, one_writer), Gate(limit - 1, *settings)
    return (Gate(limit, *settings),)
