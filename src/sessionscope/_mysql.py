"""MySQL and MariaDB: each statement of a unit with a deadline carries the limit of its time."""

from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultExecutionContext

from sessionscope._deadline import current

# What can be limited. MySQL knows a limit for SELECT only.
_LIMITED = {"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE", "WITH"}


def limit_statements(engine: Engine) -> None:
    """Tell the server, with each statement, how long its unit may still take."""
    if engine.dialect.name in ("mysql", "mariadb"):
        event.listen(engine, "do_execute", _executing)


def _executing(
    cursor: Any, statement: str, parameters: Any, context: DefaultExecutionContext
) -> bool:
    deadline = current.get()
    if deadline is None:
        return False
    is_mariadb = bool(getattr(context.dialect, "is_mariadb", False))
    cursor.execute(limited(statement, deadline.for_server, is_mariadb=is_mariadb), parameters)
    return True


def limited(statement: str, seconds: float, *, is_mariadb: bool) -> str:
    """Return *statement* with a limit of its time, if it can have one.

    https://mariadb.com/kb/en/set-statement/ and
    https://dev.mysql.com/doc/refman/8.4/en/optimizer-hints.html
    """
    verb, space, rest = statement.lstrip().partition(" ")
    if verb.upper() not in _LIMITED or not space:
        return statement
    if is_mariadb:
        return f"SET STATEMENT max_statement_time={max(0.001, seconds):.3f} FOR {statement}"
    if verb.upper() != "SELECT":
        return statement
    return f"{verb} /*+ MAX_EXECUTION_TIME({max(1, int(seconds * 1000))}) */ {rest}"
