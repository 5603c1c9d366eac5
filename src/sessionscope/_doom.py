"""What the driver knows of a transaction that can no longer commit.

psycopg and sqlite3 know its state at any time; asyncpg hides it. MySQL's error packets carry no
state: after an error one ping (a round trip) brings the server's status, because a
deadlock (1213) rolls back the whole transaction, while most errors undo their
statement only (https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html).
"""

import re
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect, ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from sessionscope import _sqlite

# Tells whether COMMIT on this connection would not commit.
IsDoomed = Callable[[PoolProxiedConnection], bool]

# Marks, in a connection's info, that the server has ended its transaction by itself.
LOST = "sessionscope.lost"

# The key in a connection's info of what failed in its transaction.
SUSPECT = "sessionscope.suspect"
# And of whether MySQL had a transaction open before its latest statement.
WAS_OPEN = "sessionscope.was_open"
# The SQLSTATE of every statement that PostgreSQL is sent after one has failed.
IN_FAILED_TRANSACTION = "25P02"

# libpq's PQTRANS_INERROR: only a ROLLBACK can follow.
_PQTRANS_INERROR = 3

SERVER_STATUS_IN_TRANS = 1
# ER_LOCK_DEADLOCK, ER_LOCK_TABLE_FULL, ER_XA_RBDEADLOCK: InnoDB rolls back the transaction.
_ROLL_BACK = {1213, 1206, 1614}
# ER_LOCK_WAIT_TIMEOUT with innodb_rollback_on_timeout, ER_CHECKREAD with
# innodb_snapshot_isolation: the server's settings decide, its status tells.
_MAY_ROLL_BACK = {1205, 1020}
# These commit before they begin, even if they fail then: the transaction is not lost.
_COMMIT_FIRST = {"ALTER", "CREATE", "DROP", "GRANT", "LOCK", "RENAME", "REVOKE", "TRUNCATE"}
# The same, and what else ends a transaction, after comments; what is temporary does not
# (https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html).
_COMMITS = re.compile(
    r"(?:\s|/\*.*?\*/|(?:--|#)[^\n]*\n)*"
    r"(?:ALTER|ANALYZE|BEGIN|CHECK|COMMIT|CREATE(?!\s+TEMPORARY)|DROP(?!\s+TEMPORARY)|FLUSH|GRANT|"
    r"LOCK|OPTIMIZE|RENAME|REPAIR|REVOKE|START|TRUNCATE)\b",
    re.IGNORECASE | re.DOTALL,
)


def is_never_doomed(proxied: PoolProxiedConnection) -> bool:
    """Say no, for a driver that tells nothing."""
    return False


def has_lost_transaction(context: ExceptionContext) -> bool:
    """Return whether the error has ended the whole transaction, not its statement alone."""
    assert context.connection is not None
    proxied = context.connection.connection
    if context.is_disconnect:  # which is said otherwise; a closed connection knows no state
        return False
    if context.dialect.name == "sqlite":
        return doom_check("sqlite", context.dialect.driver)(proxied)
    return context.dialect.name in ("mysql", "mariadb") and _mysql_has_lost(context, proxied)


def _mysql_has_lost(context: ExceptionContext, proxied: PoolProxiedConnection) -> bool:
    code = next(iter(context.original_exception.args), None)
    statement = context.statement
    if statement is None or not isinstance(code, int):
        return False
    if statement.lstrip().partition(" ")[0].upper() in _COMMIT_FIRST:
        return False
    before = _mysql_status(proxied)
    if before is None:
        return code in _ROLL_BACK
    after = _mysql_status_now(context, proxied)
    # The status is that before the last SELECT: what a first SELECT FOR UPDATE locked is not in it.
    was_open = before & SERVER_STATUS_IN_TRANS or code in _ROLL_BACK | _MAY_ROLL_BACK
    return bool(was_open and not after & SERVER_STATUS_IN_TRANS)


def commits_by_itself(statement: str, proxied: PoolProxiedConnection) -> bool:
    """Return whether MySQL commits at *statement*, or has done so at the one before.

    Of a procedure that commits only the server's status tells, once it has returned.
    """
    is_open = (_mysql_status(proxied) or 0) & SERVER_STATUS_IN_TRANS
    was_open, proxied.info[WAS_OPEN] = proxied.info.get(WAS_OPEN), is_open
    return bool(was_open and not is_open) or _COMMITS.match(statement) is not None


def _mysql_status(proxied: PoolProxiedConnection) -> int | None:
    """Return the server's status as the last packet told it; ``None``: the driver hides it."""
    return getattr(proxied.driver_connection, "server_status", None)


def _mysql_status_now(context: ExceptionContext, proxied: PoolProxiedConnection) -> int:
    """Ask the server; a connection that is gone has nothing more to commit."""
    assert proxied.dbapi_connection is not None
    with suppress(context.dialect.loaded_dbapi.Error):
        ping(context.dialect, proxied.dbapi_connection)
        return _mysql_status(proxied) or 0
    return 0


def ping(dialect: Dialect, dbapi_connection: DBAPIConnection) -> None:
    """Make a round trip; raises the driver's error if the connection is lost."""
    if dialect.driver in ("asyncmy", "aiomysql"):
        # Older SQLAlchemys leave it out: they ask PyMySQL, which has no such argument any more.
        dbapi_connection.ping(False)
    else:
        dialect.do_ping(dbapi_connection)


def _is_lost(proxied: PoolProxiedConnection) -> bool:
    return LOST in proxied.info


def _psycopg_is_doomed(proxied: PoolProxiedConnection) -> bool:
    driver_connection: Any = proxied.driver_connection
    return bool(driver_connection.pgconn.transaction_status == _PQTRANS_INERROR)


def _psycopg2_is_doomed(proxied: PoolProxiedConnection) -> bool:
    driver_connection: Any = proxied.driver_connection
    return bool(driver_connection.info.transaction_status == _PQTRANS_INERROR)


def _asyncpg_is_doomed(proxied: PoolProxiedConnection) -> bool:
    """Ask the server (a round trip), if something has failed: the driver does not tell."""
    driver_connection: Any = proxied.driver_connection
    if SUSPECT not in proxied.info or not driver_connection.is_in_transaction():
        return False
    try:
        await_only(driver_connection.execute("SELECT 1"))
    except Exception as error:
        return getattr(error, "sqlstate", None) == IN_FAILED_TRANSACTION
    return False


def _sqlite_is_doomed(proxied: PoolProxiedConnection) -> bool:
    driver_connection: Any = proxied.dbapi_connection
    return _sqlite.BEGAN in proxied.info and not driver_connection.in_transaction


def _aiosqlite_is_doomed(proxied: PoolProxiedConnection) -> bool:
    driver_connection: Any = proxied.driver_connection
    if _sqlite.BEGAN not in proxied.info:
        return False
    try:
        return not driver_connection.in_transaction
    except ValueError as error:  # it is closed, and SQLAlchemy's adapter would not send COMMIT
        raise sqlite3.ProgrammingError("Cannot operate on a closed database.") from error


def doom_check(dialect_name: str, driver: str) -> IsDoomed:
    """Return the check of a connection's transaction for such a driver."""
    if dialect_name in ("mysql", "mariadb"):
        return _is_lost
    return _CHECKS.get((dialect_name, driver), is_never_doomed)


_CHECKS: dict[tuple[str, str], IsDoomed] = {
    ("postgresql", "psycopg"): _psycopg_is_doomed,
    ("postgresql", "psycopg_async"): _psycopg_is_doomed,
    ("postgresql", "psycopg2"): _psycopg2_is_doomed,
    ("postgresql", "asyncpg"): _asyncpg_is_doomed,
    ("sqlite", "pysqlite"): _sqlite_is_doomed,
    ("sqlite", "aiosqlite"): _aiosqlite_is_doomed,
}
