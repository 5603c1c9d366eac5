"""SQLite as its own manual recommends it for servers: WAL, foreign keys, explicit BEGIN.

The driver's legacy mode begins a transaction only before INSERT, UPDATE and
DELETE, which makes savepoints and DDL escape it. Here the driver is in autocommit
mode and BEGIN is sent when SQLAlchemy begins: BEGIN IMMEDIATE for a writing unit,
so that it waits for other writers at its start, where waiting is safe, and not in
its middle, where SQLite can only refuse (https://sqlite.org/lang_transaction.html).
"""

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import ceil
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from sessionscope._deadline import current
from sessionscope._options import Options

# Keys in a connection's info: how its next transaction begins, if not as usual.
_BEGIN = "sessionscope.begin"
_QUERY_ONLY = "sessionscope.query_only"
# How many milliseconds it waits for locks by itself, and as it is set now.
_PATIENCE = "sessionscope.patience"
_WAITS = "sessionscope.waits"
# And whether a transaction that we began should be open.
BEGAN = "sessionscope.began"

# Milliseconds by which a lock may be waited for too long, so that not each statement sets it.
_SLACK = 20


def connect_args(options: Options) -> dict[str, Any]:
    """Return the arguments for sqlite3.connect()."""
    return {
        "timeout": options.pool_timeout,
        **options.engine_options.get("connect_args", {}),
        "isolation_level": None,
        "check_same_thread": False,
    }


def prepare_file(engine: Engine, *, writes: bool) -> None:
    """Set up an engine on a database file."""
    _prepare(engine, begin="BEGIN IMMEDIATE" if writes else None, wal=writes)
    _limit_statements(engine)


def prepare_memory(engine: Engine) -> None:
    """Set up the one engine of a database in memory, which writes and reads in turn."""
    _prepare(engine, begin="BEGIN IMMEDIATE", wal=False)


def memory_reader(engine: Engine) -> Engine:
    """Return a view of *engine* whose transactions cannot write."""
    return _view(engine, {_BEGIN: "BEGIN", _QUERY_ONLY: True})


def at_isolation_level(engine: Engine, level: str, *, read_only: bool) -> Engine:
    """Return a view of *engine*: SQLite's transactions are serializable, or there is none."""
    begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
    return _view(engine, {_BEGIN: None if level == "AUTOCOMMIT" else begin})


def _view(engine: Engine, settings: dict[str, Any]) -> Engine:
    view = engine.execution_options()

    def connected(connection: Connection) -> None:
        connection.connection.info.update(settings)

    event.listen(view, "engine_connect", connected)
    return view


def _prepare(engine: Engine, *, begin: str | None, wal: bool) -> None:
    def connected(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        dbapi_connection.execute("PRAGMA foreign_keys = 1")
        if wal:
            _use_wal(dbapi_connection)

    def do_begin(proxied: PoolProxiedConnection) -> None:
        info = proxied.info
        statement = info.get(_BEGIN, begin)
        if statement is None:
            return
        dbapi_connection: Any = proxied.dbapi_connection
        if (deadline := current.get()) is not None:
            cursor = dbapi_connection.cursor()
            _wait_at_most(info, cursor, deadline.for_server)
            cursor.close()
        dbapi_connection.execute(statement)
        info[BEGAN] = True
        if _QUERY_ONLY in info:
            dbapi_connection.execute("PRAGMA query_only = 1")

    event.listen(engine, "connect", connected)
    event.listen(engine, "checkin", _restore)
    # Not the "begin" event: a listener on the Engine costs more than BEGIN does.
    engine.dialect.do_begin = do_begin  # type: ignore[method-assign, assignment]  # as a subclass would


def _use_wal(dbapi_connection: Any) -> None:
    # It fails on a file that cannot be written, or that another process is switching
    # right now: every journal mode is correct, this one is only faster.
    with suppress(sqlite3.OperationalError):
        dbapi_connection.execute("PRAGMA journal_mode = WAL")


def _limit_statements(engine: Engine) -> None:
    """Let no statement wait for another process's lock longer than its unit has time.

    While it waits, SQLite does not see that it is interrupted.
    """
    dialect = engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, partial(_execute, getattr(dialect, name)))  # as a subclass would


def _execute(execute: Callable[..., None], cursor: Any, statement: str, *rest: Any) -> None:
    deadline, context = current.get(), rest[-1]
    if deadline is not None and context is not None:
        _wait_at_most(context.root_connection.connection.info, cursor, deadline.for_server)
    execute(cursor, statement, *rest)


def _wait_at_most(info: dict[Any, Any], cursor: Any, seconds: float) -> None:
    wanted = ceil(seconds * 1000)
    if _WAITS not in info:
        cursor.execute("PRAGMA busy_timeout")
        info[_WAITS] = info[_PATIENCE] = cursor.fetchone()[0]
    if info[_WAITS] - wanted > _SLACK:
        cursor.execute(f"PRAGMA busy_timeout = {wanted}")
        cursor.fetchone()
        info[_WAITS] = wanted


def _restore(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    """Give the next user a connection as it was opened."""
    info = record.info
    for key in (_BEGIN, BEGAN):
        if key in info:
            del info[key]
    driver_connection = record.driver_connection
    if dbapi_connection is None or driver_connection is None:  # it was closed
        return
    try:
        in_transaction = driver_connection.in_transaction
    except (sqlite3.ProgrammingError, ValueError):  # it was closed, and no one has noticed
        record.invalidate()
        return
    if in_transaction:
        # After a COMMIT that failed SQLite keeps the transaction open.
        dbapi_connection.rollback()
    if _PATIENCE in info:
        del info[_WAITS]
        dbapi_connection.execute(f"PRAGMA busy_timeout = {info.pop(_PATIENCE)}")
    if _QUERY_ONLY in info:
        del info[_QUERY_ONLY]
        dbapi_connection.execute("PRAGMA query_only = 0")
    if dbapi_connection.isolation_level is not None:
        # SQLAlchemy's isolation_level option switches the legacy mode back on.
        dbapi_connection.isolation_level = None
