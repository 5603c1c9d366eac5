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


OVER = (
    "This connection belongs to a sandbox that has ended: close the session, or commit or roll it "
    "back, before the test ends"
)
LOST = (
    "The connection of the sandbox was lost, and its transaction with it: nothing of it is stored, "
    "and the test cannot go on. What is to survive a lost connection is tested on a database "
    "without a sandbox (fixture postgres_url)"
)
FORKED = (
    "This process was forked from one with a sandbox, which is one connection of that one. Test "
    "what several processes do on a database without a sandbox (fixture postgres_url)"
)
STATEMENT_IS_RUNNING = "The sandbox's one connection did not come free: a statement is running"


def escaped(what: str | None, dialect: str) -> str:
    mend = (
        "On MySQL, DDL commits: create tables before the sandbox."
        if dialect == "mysql"
        else "Write session.commit() or session.rollback(), which are savepoints here."
    )
    return (
        f"{what or 'Something that the sandbox did not see'} has ended the sandbox's transaction: "
        "what was written until then may be stored for good, and other tests may see it. "
        f"{mend}"
    )


def held_up(holder: str, waiter: str) -> str:
    return (
        "In a sandbox all share one connection, and the transaction that has begun at "
        f"{holder} has written and did not end while {waiter} waited for it. Commit it "
        "first, or test on a database without a sandbox (fixture postgres_url)"
    )


def failed(begun_at: str) -> str:
    return (
        f"A statement of this transaction, begun at {begun_at}, failed earlier, and "
        "the error was swallowed. Roll back, or run what may fail in a savepoint: "
        "with session.begin_nested(): ..."
    )


def undone(begun_at: str, by: str) -> str:
    return (
        f"Of the transaction begun at {begun_at}, rows were undone by the rollback of the one "
        f"begun at {by}, which has a savepoint beneath them: in a sandbox both share one "
        "connection. Write session.commit() in the one before the other writes"
    )


def undone_after_its_commit(begun_at: str, by: str) -> str:
    return (
        f"What the transaction begun at {begun_at} has committed was undone by the rollback of the "
        f"one begun at {by}, which has a savepoint beneath it: in a sandbox both share one "
        "connection. Write session.commit() in that one first"
    )
