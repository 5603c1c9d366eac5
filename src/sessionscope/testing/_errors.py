"""What a sandbox has to say to the test that it is around."""

from sqlalchemy.exc import DontWrapMixin

from sessionscope import exc

# SQLAlchemy asks for a cursor while it prepares a statement, and would wrap these errors.


class SandboxError(exc.SessionScopeError, DontWrapMixin):
    """A test did what the one transaction of its sandbox cannot follow.

    It has ended that transaction, by COMMIT sent as text or by DDL on MySQL, so that its rows
    stay; or it uses the sandbox on another event loop, or after its end; or the transaction could
    not begin, because another process writes to the SQLite file.
    """

    error_code = "sandbox"


class PoolBusy(exc.PoolBusy, DontWrapMixin):
    """The sandbox's connection did not come free."""


class TransactionDoomed(exc.TransactionDoomed, DontWrapMixin):
    """A transaction of the sandbox was undone, and its work with it."""
