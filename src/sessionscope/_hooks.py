"""after_commit and after_rollback: work that waits for the outcome of a transaction.

SQLAlchemy's own ``after_commit`` event also fires when a savepoint is released,
whose rows may still be rolled back, and fires while the connection is in use. Here
the event only marks; ``after_transaction_end`` decides. The listeners are put on
the one session that asks for a hook, so that a unit of work without hooks pays
nothing for them.
"""

import logging
from asyncio import CancelledError
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from typing import ParamSpec, Protocol

from sqlalchemy import Connection, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from sessionscope._guards import refuse_ended
from sessionscope._watch import UNIT
from sessionscope.exc import ConfigurationError

_P = ParamSpec("_P")
_HOOKS = "sessionscope.hooks"
# A hook as it was registered.
Hook = partial[object]
_log = logging.getLogger("sessionscope")


class _AsyncSession(Protocol):
    """An AsyncSession, as far as hooks go."""

    @property
    def sync_session(self) -> Session: ...


def after_commit(
    session: Session | _AsyncSession,
    fn: Callable[_P, object],
    /,
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> None:
    """Call ``fn(*args, **kwargs)`` once what *session* has done so far is committed.

    It is called once, after the unit of work has ended and its connection is back
    in the pool, in the order in which outcomes were decided, and never if the transaction, or
    the savepoint in which it was registered, is rolled back. What it raises is
    logged: a commit that has happened cannot fail any more. SystemExit and KeyboardInterrupt
    are raised again when those after it have run. With an asynchronous session
    *fn* may be an ``async def``, which is awaited in the task of the unit: if that is
    cancelled, so is *fn*; those after it run, and then the cancellation is delivered again.

    Like add() it begins the session's transaction, which takes no connection yet, so that a
    rollback() that comes first drops it; session.begin() must come before it.

    A session that no Database opened calls it when its transaction has ended. If
    such a session has joined an outer transaction that only others can commit
    (``join_transaction_mode="rollback_only"``), it is not called, and a warning
    is logged.
    """
    _add(session, partial(fn, *args, **kwargs), on_commit=True)


def after_rollback(
    session: Session | _AsyncSession,
    fn: Callable[_P, object],
    /,
    *args: _P.args,
    **kwargs: _P.kwargs,
) -> None:
    """Call ``fn(*args, **kwargs)`` once what *session* has done so far is rolled back.

    The counterpart of :func:`after_commit`: called once, after the unit of work has
    ended, when the transaction or the savepoint in which it was registered was
    rolled back, or the commit failed. A cancelled task does not wait for it.
    """
    _add(session, partial(fn, *args, **kwargs), on_commit=False)


def has_hooks(session: Session) -> bool:
    """Return whether anything waits for the outcome of *session*."""
    return _HOOKS in session.info


def run_due(session: Session) -> bool:
    """Run what is due once a session's unit of work has ended; return whether one was cancelled."""
    hooks: _Hooks | None = session.info.pop(_HOOKS, None)
    if hooks is None:
        return False
    hooks.settle_rest()
    return hooks.run()


def mark_committed(session: Session) -> None:
    """Let the hooks know that *session*'s transaction, which was lost, has been committed."""
    hooks: _Hooks | None = session.info.get(_HOOKS)
    if hooks is not None:
        hooks.mark(session)


def take(session: Session) -> Callable[[], object] | None:
    """Take what is due from a unit of work that is to run again; return what runs it after all."""
    hooks: _Hooks | None = session.info.pop(_HOOKS, None)
    if hooks is None:
        return None
    hooks.settle_rest()
    return hooks.run


@contextmanager
def hand_to(take: Callable[[Hook], object]) -> Generator[None]:
    """Call *take* meanwhile with each hook that is due, in any thread or task, and not the hook."""
    global _take  # noqa: PLW0603  # hooks are run by whoever ends a unit, wherever
    kept, _take = _take, take
    try:
        yield
    finally:
        _take = kept


_take: Callable[[Hook], object] | None = None


class _Hook:
    """One callable, and the savepoint it was registered in: ``None`` outside of any."""

    __slots__ = ("call", "on_commit", "savepoint")

    def __init__(self, call: Hook, on_commit: bool, savepoint: SessionTransaction | None) -> None:
        self.call = call
        self.on_commit = on_commit
        self.savepoint = savepoint


class _Hooks:
    """The hooks of one session: those that wait for an outcome, and those that are due."""

    def __init__(self, session: Session) -> None:
        self._waiting: list[_Hook] = []
        self._due: list[Hook] = []
        self._committed: SessionTransaction | None = None
        event.listen(session, "after_commit", self.mark)
        event.listen(session, "after_transaction_end", self._settle)

    def add(self, session: Session, call: Hook, *, on_commit: bool) -> None:
        if session.autobegin and not session.in_transaction():
            # rollback() tells nobody where none has begun. A session that was closed for good
            # is refused at the end of its unit.
            with suppress(InvalidRequestError):
                session.begin()
        self._waiting.append(_Hook(call, on_commit, session.get_nested_transaction()))

    def settle_rest(self) -> None:
        """Count as rolled back what never saw a transaction begin."""
        self._due += [hook.call for hook in self._waiting if not hook.on_commit]
        self._waiting = []

    def run(self) -> bool:
        """Run what is due, in order; return whether one of them was cancelled.

        Raises what asks to leave the process, after the last one.
        """
        due, self._due = self._due, []
        take = _take
        cancelled = False
        leaving: BaseException | None = None
        for call in due:
            try:
                result = call() if take is None else take(call)
                if isawaitable(result):
                    await_only(result)
            except (Exception, CancelledError) as error:  # it may await a task that was cancelled
                cancelled |= isinstance(error, CancelledError)
                _log.exception(
                    "%r failed after the end of its transaction, which stands as it ended", call
                )
            except (KeyboardInterrupt, SystemExit) as error:  # the others are owed their outcome
                leaving = leaving or error
        if leaving is not None:
            raise leaving
        return cancelled

    def mark(self, session: Session) -> None:
        """Note that the innermost transaction of *session* is committed."""
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def _settle(self, session: Session, transaction: SessionTransaction) -> None:
        """Decide about the hooks of *transaction*, which has ended."""
        if transaction.parent is not None and not transaction.nested:
            return  # the inner transaction of a flush
        savepoint = transaction if transaction.nested else None
        committed = self._committed is transaction
        waiting, self._waiting = self._waiting, []
        for hook in waiting:
            if hook.savepoint is not savepoint:
                self._waiting.append(hook)
            elif committed and savepoint is not None:
                hook.savepoint = _enclosing_savepoint(savepoint)
                self._waiting.append(hook)
            elif hook.on_commit is committed and not (committed and _commits_nothing(session)):
                self._due.append(hook.call)
        if savepoint is None and UNIT not in session.info:
            self.run()


def _add(session: Session | _AsyncSession, call: Hook, *, on_commit: bool) -> None:
    plain = session if isinstance(session, Session) else session.sync_session
    refuse_ended(plain)
    if iscoroutinefunction(call.func) and not _is_async(plain):
        raise ConfigurationError(
            f"The hook {call.func.__qualname__}() is an `async def` function, which no one would "
            "await in a synchronous session: write it with `def`"
        )
    hooks: _Hooks | None = plain.info.get(_HOOKS)
    if hooks is None:
        hooks = plain.info[_HOOKS] = _Hooks(plain)
    hooks.add(plain, call, on_commit=on_commit)


def _is_async(session: Session) -> bool:
    return session.bind is not None and session.bind.dialect.is_async


def _enclosing_savepoint(savepoint: SessionTransaction) -> SessionTransaction | None:
    parent = savepoint.parent
    while parent is not None and not parent.nested:
        parent = parent.parent
    return parent


def _commits_nothing(session: Session) -> bool:
    """Return whether the session's commit left the outer transaction that it joined open."""
    bind = session.bind
    if not isinstance(bind, Connection) or not bind.in_transaction():
        return False
    mode = session.join_transaction_mode
    pending = mode == "rollback_only" or (
        mode == "conditional_savepoint" and not bind.in_nested_transaction()
    )
    if pending:
        _log.warning(
            "An after_commit hook was dropped: the session has joined an outer transaction with "
            "join_transaction_mode=%r, so that its commit() commits nothing. Give the session "
            "join_transaction_mode='create_savepoint'",
            mode,
        )
    return pending
