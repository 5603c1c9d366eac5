"""Every error and warning of sessionscope.

    SessionScopeError
    ├── ConfigurationError      [sqlalchemy.exc.ArgumentError]
    ├── PoolBusy                [sqlalchemy.exc.TimeoutError]
    ├── DatabaseUnavailable     [sqlalchemy.exc.OperationalError]
    ├── TransactionDoomed       [sqlalchemy.exc.PendingRollbackError]
    ├── CommitUnknown
    ├── DeadlineExceeded        [TimeoutError]
    ├── SessionEnded            [sqlalchemy.exc.InvalidRequestError]
    ├── SessionShared           [sqlalchemy.exc.InvalidRequestError]
    ├── ReadOnlyUnit            [sqlalchemy.exc.InvalidRequestError]
    └── NestedUnit              [sqlalchemy.exc.InvalidRequestError]

    SessionLeakWarning          [ResourceWarning]
    IdleInTransactionWarning    [RuntimeWarning]

In brackets: the SQLAlchemy error, or the warning, that each one also is, so that an
existing ``except`` clause or filter still catches it.
"""

from typing import Any, ClassVar, Literal

from sqlalchemy import exc as sa_exc

__all__ = [
    "CommitUnknown",
    "ConfigurationError",
    "DatabaseUnavailable",
    "DeadlineExceeded",
    "IdleInTransactionWarning",
    "NestedUnit",
    "PoolBusy",
    "ReadOnlyUnit",
    "SessionEnded",
    "SessionLeakWarning",
    "SessionScopeError",
    "SessionShared",
    "TransactionDoomed",
]


class SessionScopeError(Exception):
    """Base of all errors that sessionscope raises.

    ``error_code`` is a short name that stays the same when the wording of a
    message changes: compare it, log it, send it to clients.
    """

    error_code: ClassVar[str] = "sessionscope"


class ConfigurationError(SessionScopeError, sa_exc.ArgumentError):
    """An option, a URL or a use of the library is wrong, whatever the database says."""

    error_code = "configuration"


class PoolBusy(SessionScopeError, sa_exc.TimeoutError):
    """No connection came free within ``pool_timeout``, or the queue is full.

    ``retry_after`` is the number of seconds after which a new attempt makes sense.
    """

    error_code = "pool_busy"
    retry_after: float = 1.0


class DatabaseUnavailable(SessionScopeError, sa_exc.OperationalError):
    """No connection to the database could be opened.

    ``orig`` is the driver's error, ``retry_after`` the number of seconds after which a
    new attempt makes sense, ``is_transient`` whether it does without a change of settings.
    """

    error_code = "database_unavailable"
    retry_after: float = 1.0
    is_transient: bool = True

    def __init__(self, message: str, orig: BaseException | None = None) -> None:
        # DBAPIError would put the driver's text in front of ours.
        sa_exc.StatementError.__init__(self, message, None, None, orig)
        # str() would add a link to SQLAlchemy's page on OperationalError.
        self.code = None  # type: ignore[assignment]  # the base class says str | None
        self.connection_invalidated = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.orig)


class TransactionDoomed(SessionScopeError, sa_exc.PendingRollbackError):
    """A statement failed earlier and was swallowed: this transaction cannot commit."""

    error_code = "transaction_doomed"


class CommitUnknown(SessionScopeError):
    """The connection was lost during COMMIT: the database may have committed, or not.

    ``lost`` is SQLAlchemy's error of the lost connection.
    """

    error_code = "commit_unknown"
    lost: BaseException | None = None


Phase = Literal["queue", "connect", "query", "commit"]


class DeadlineExceeded(SessionScopeError, TimeoutError):
    """The ``timeout`` of a unit of work ran out; what it had not committed is rolled back.

    ``phase`` says where: in the queue for a slot, while connecting, at a statement, or
    before COMMIT was sent.
    """

    error_code = "deadline_exceeded"
    phase: Phase = "query"


class SessionEnded(SessionScopeError, sa_exc.InvalidRequestError):
    """A session was used after its unit of work had ended."""

    error_code = "session_ended"


class SessionShared(SessionScopeError, sa_exc.InvalidRequestError):
    """A session was used by a second thread or task while a first one was inside a call.

    The second use was refused; the first goes on and may commit.
    """

    error_code = "session_shared"


class ReadOnlyUnit(SessionScopeError, sa_exc.InvalidRequestError):
    """A write was asked of a read-only unit of work; nothing was sent."""

    error_code = "read_only_unit"


class NestedUnit(SessionScopeError, sa_exc.InvalidRequestError):
    """A unit of work was asked for while the same flow of control holds one."""

    error_code = "nested_unit"


class SessionLeakWarning(ResourceWarning):
    """A session with an open transaction was never closed, and was collected as garbage."""


class IdleInTransactionWarning(RuntimeWarning):
    """A transaction was kept open for seconds without a statement."""
