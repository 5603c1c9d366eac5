"""Interrupting: ending, on the server, the statement that a connection is running."""

from collections.abc import Callable
from inspect import isawaitable
from typing import Any

from sqlalchemy import Pool
from sqlalchemy.util import await_only


def interrupt(pool: Pool, driver_connection: Any) -> None:
    """End the statement, if any, that another thread or a cancelled task left running.

    Of an asynchronous driver's connection, in one of SQLAlchemy's greenlets. asyncpg
    does it by itself when the task that waits for the statement is cancelled.
    """
    for name in ("cancel_safe", "cancel", "interrupt"):  # psycopg, psycopg2, sqlite3
        if hasattr(driver_connection, name):
            cancelling = getattr(driver_connection, name)()
            if isawaitable(cancelling):
                await_only(cancelling)
            return
    if hasattr(driver_connection, "thread_id"):  # MySQL's drivers
        _kill(pool, driver_connection.thread_id())


def _kill(pool: Pool, thread_id: int) -> None:
    """Have MySQL end a connection, over a new one: its protocol knows no other way."""
    # Not from the pool, where no place may be left.
    connect: Callable[[], Any] = pool._creator  # type: ignore[assignment]  # pyright: ignore  # its own
    beside = connect()
    try:
        beside.cursor().execute(f"KILL {thread_id}")
    finally:
        beside.close()
