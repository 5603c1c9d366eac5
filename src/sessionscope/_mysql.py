"""MySQL and MariaDB: each statement of a unit with a deadline carries the limit of its time.

But for an INSERT with many rows, which drivers send as one statement only if it begins with
INSERT; the unit's own deadline ends that one, too.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.engine.interfaces import Dialect

from sessionscope._deadline import current

# Key in a connection's info of MySQL's own limit for its SELECTs, in milliseconds; 0: none.
_OWN = "sessionscope.max_execution_time"

# What can be limited, after comments that are none of the server's own (/*! and /*M!).
_LIMITED = re.compile(
    r"(?:\s+|/\*(?!M?!).*?\*/|--\s.*?(?:\n|\Z)|#.*?(?:\n|\Z))*"
    r"(SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH)\b",
    re.IGNORECASE | re.DOTALL,
)
# MySQL heeds one comment with hints, the first one after the verb.
_HINTS = re.compile(r"\s*/\*\+(.*?)\*/", re.DOTALL)


def limit_statements(engine: Engine) -> None:
    """Tell the server, with each statement, how long its unit may still take."""
    dialect = engine.dialect
    if dialect.name not in ("mysql", "mariadb"):
        return
    # As a subclass would: whatever stands in for the dialect's own execution is called as ever.
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        many = name == "do_executemany"
        setattr(dialect, name, partial(_execute, dialect, getattr(dialect, name), many))


def forget_unread(driver_connection: Any) -> None:
    """Let PyMySQL not read what is left of a stream whose line was cut, and complain."""
    result: Any = getattr(driver_connection, "_result", None)
    if hasattr(result, "unbuffered_active"):
        result.unbuffered_active = False


def _execute(
    dialect: Dialect,
    execute: Callable[..., None],
    many: bool,
    cursor: Any,
    statement: str,
    *rest: Any,
) -> None:
    deadline = current.get()
    if deadline is not None:
        context = rest[-1]
        is_mariadb = bool(getattr(dialect, "is_mariadb", False))
        own = 0 if is_mariadb or context is None else _own_limit(cursor, context)
        statement = limited(
            statement, deadline.for_server, is_mariadb=is_mariadb, many=many, own=own
        )
    execute(cursor, statement, *rest)


def _own_limit(cursor: Any, context: Any) -> int:
    """Return the limit that a connection to MySQL has by itself. Asks once (a round trip)."""
    info = context.root_connection.connection.info
    if _OWN not in info:
        info[_OWN] = 0
        with suppress(Exception):  # MySQL before 5.7.8 has none
            cursor.execute("SELECT @@max_execution_time")
            info[_OWN] = int(cursor.fetchall()[0][0])
    return int(info[_OWN])


def limited(
    statement: str, seconds: float, *, is_mariadb: bool, many: bool = False, own: int = 0
) -> str:
    """Return *statement* with a limit of its time, if it can have one.

    A smaller limit that the connection has stays, and one in the statement's own hints.
    https://mariadb.com/kb/en/set-statement/ and
    https://dev.mysql.com/doc/refman/8.4/en/optimizer-hints.html
    """
    found = _LIMITED.match(statement)
    if found is None:
        return statement
    verb = found[1].upper()
    if is_mariadb:
        if many and verb in ("INSERT", "REPLACE"):
            return statement
        limit = f"{max(0.001, seconds):.3f}"
        own_limit = "@@max_statement_time"
        least = f"IF({own_limit} > 0 AND {own_limit} < {limit}, {own_limit}, {limit})"
        return f"SET STATEMENT max_statement_time={least} FOR {statement}"
    milliseconds = max(1, int(seconds * 1000))
    if verb != "SELECT" or 0 < own <= milliseconds:  # MySQL has a limit for SELECT only
        return statement
    head, rest = statement[: found.end()], statement[found.end() :]
    hints = _HINTS.match(rest)
    hint = f"MAX_EXECUTION_TIME({milliseconds})"
    if hints is None:
        return f"{head} /*+ {hint} */{rest}"
    if "MAX_EXECUTION_TIME" in hints[1].upper():
        return statement
    return f"{head} /*+ {hint} {hints[1].strip()} */{rest[hints.end() :]}"
