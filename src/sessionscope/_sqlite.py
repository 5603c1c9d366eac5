"""SQLite as its own manual recommends it for servers: WAL, foreign keys, explicit BEGIN.

The driver's legacy mode begins a transaction only before INSERT, UPDATE and
DELETE, which makes savepoints and DDL escape it. Here the driver is in autocommit
mode and BEGIN is sent when SQLAlchemy begins: BEGIN IMMEDIATE for a writing unit,
so that it waits for other writers at its start, where waiting is safe, and not in
its middle, where SQLite can only refuse (https://sqlite.org/lang_transaction.html).
"""

import sqlite3
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from sessionscope._options import Options

_BEGIN = "sessionscope_begin"
_QUERY_ONLY = "sessionscope_query_only"

# Left in the connection's info while a transaction that we began should be open.
BEGAN = "sessionscope.began"

MEMORY_READER = {_BEGIN: "BEGIN", _QUERY_ONLY: True}


def connect_args(options: Options) -> dict[str, Any]:
    """Return the arguments for sqlite3.connect()."""
    return {"isolation_level": None, "check_same_thread": False, "timeout": options.pool_timeout}


def begin_for(isolation_level: str, read_only: bool) -> dict[str, Any]:
    """Return execution options: SQLite's transactions are serializable or there is none."""
    if isolation_level == "AUTOCOMMIT":
        return {_BEGIN: None}
    return {_BEGIN: "BEGIN" if read_only else "BEGIN IMMEDIATE"}


def prepare_file(engine: Engine, *, writes: bool) -> None:
    """Set up an engine on a database file."""
    _prepare(engine, begin="BEGIN IMMEDIATE" if writes else None, wal=writes)


def prepare_memory(engine: Engine) -> None:
    """Set up the one engine of a database in memory, which writes and reads in turn."""
    _prepare(engine, begin="BEGIN IMMEDIATE", wal=False)


def _prepare(engine: Engine, *, begin: str | None, wal: bool) -> None:
    def connected(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        dbapi_connection.execute("PRAGMA foreign_keys = 1")
        if wal:
            _use_wal(dbapi_connection)

    def begun(connection: Connection) -> None:
        options = connection.get_execution_options()
        statement = options.get(_BEGIN, begin)
        if statement is not None:
            _begin(connection, statement, query_only=options.get(_QUERY_ONLY, False))

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    event.listen(engine, "reset", _reset)


def _use_wal(driver_connection: sqlite3.Connection) -> None:
    # It fails on a file that cannot be written, or that another process is switching
    # right now: every journal mode is correct, this one is only faster.
    with suppress(sqlite3.OperationalError):
        driver_connection.execute("PRAGMA journal_mode = WAL")


def _begin(connection: Connection, statement: str, *, query_only: bool) -> None:
    proxied = connection.connection
    # On the driver: an execute() of SQLAlchemy's costs more than BEGIN itself.
    driver_connection: Any = proxied.driver_connection
    try:
        driver_connection.execute(statement)
    except sqlite3.OperationalError as error:
        raise OperationalError(statement, None, error) from error
    if query_only:
        driver_connection.execute("PRAGMA query_only = 1")
        proxied.info[_QUERY_ONLY] = True
    proxied.info[BEGAN] = True


def _reset(driver_connection: Any, record: ConnectionPoolEntry, state: object) -> None:
    """Give the next user a connection as it was opened."""
    info = record.info
    if BEGAN in info:
        del info[BEGAN]
        # After a COMMIT that failed SQLite keeps the transaction open.
        if driver_connection.in_transaction:
            driver_connection.rollback()
    if info.pop(_QUERY_ONLY, False):
        driver_connection.execute("PRAGMA query_only = 0")
    if driver_connection.isolation_level is not None:
        # SQLAlchemy's isolation_level option switches the legacy mode back on.
        driver_connection.isolation_level = None
