"""The read-only engine: writes are refused before they are sent, or by the server."""

from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.pool import ConnectionPoolEntry

from sessionscope._watch import UNIT
from sessionscope.exc import ReadOnlyUnit

_SWITCH = {
    "postgresql": "SET default_transaction_read_only = on",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = 1",
}

_STREAMING = "sessionscope.streaming"


def make_read_only(engine: Engine, *, by_session: bool) -> None:
    """Refuse writes before they are sent, and have the server refuse the rest.

    *by_session*: by a setting of each connection, where its transactions do not say so themselves.
    """
    switch = _SWITCH.get(engine.dialect.name) if by_session else None

    def connected(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        if switch is not None:
            cursor = dbapi_connection.cursor()
            cursor.execute(switch)
            cursor.close()

    event.listen(engine, "connect", connected)
    # Events of the dialect: one on the Engine would cost each Connection much more.
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, _executing)
    if engine.dialect.name == "postgresql":
        event.listen(engine, "reset", partial(_end_stream, engine.dialect))


def _executing(cursor: Any, statement: str, *parameters_and_context: Any) -> None:
    context: DefaultExecutionContext = parameters_and_context[-1]
    _refuse_writes(statement, context)
    if context.dialect.name == "postgresql":
        _begin_for_stream(context)


def make_view_read_only(view: Engine) -> None:
    """Refuse writes on a view of a writing engine, whose dialect it shares."""
    event.listen(view, "before_cursor_execute", _refuse_to_write)


def _refuse_to_write(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
    _refuse_writes(statement, rest[1])


def _refuse_writes(statement: str, context: DefaultExecutionContext) -> None:
    if context.isinsert or context.isupdate or context.isdelete or context.isddl:
        raise ReadOnlyUnit(
            f"A read-only unit of work cannot write ({statement.split(None, 1)[0]} was refused, "
            "nothing was sent): open the unit with begin() or session_per_request(database), "
            "without read_only=True"
        )


def _begin_for_stream(context: DefaultExecutionContext) -> None:
    """Give a server-side cursor the transaction that PostgreSQL wants for it."""
    options = context.execution_options
    if options.get("stream_results") or options.get("yield_per"):
        proxied = context.root_connection.connection
        driver_connection: Any = proxied.dbapi_connection
        if driver_connection.autocommit:
            # The driver sends BEGIN before the DECLARE; default_transaction_read_only holds.
            _set_autocommit(context.dialect, driver_connection, on=False)
            proxied.info[_STREAMING] = True
            if UNIT in proxied.info:
                proxied.info[UNIT].streams = True


def _end_stream(
    dialect: Dialect, dbapi_connection: Any, record: ConnectionPoolEntry, state: object
) -> None:
    if record.info.pop(_STREAMING, False):
        dbapi_connection.rollback()
        _set_autocommit(dialect, dbapi_connection, on=True)


def _set_autocommit(dialect: Dialect, dbapi_connection: Any, *, on: bool) -> None:
    if dialect.driver == "asyncpg":
        # SQLAlchemy's adapter, whose autocommit = False returns to its first level.
        dbapi_connection.isolation_level = "autocommit" if on else None
    else:
        dbapi_connection.autocommit = on
