"""Interrupting: ending, on the server, the statement that a connection is running."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from inspect import isawaitable, iscoroutinefunction
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Pool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

# Seconds after which MySQL is asked again whether a connection has ended.
_KILLING_SECONDS = 0.01
# Seconds after which psycopg looks up while it waits for the server, as it does by itself.
_LOOK_UP_SECONDS = 0.1
# Seconds up to which SQLite counts as having nothing else to do.
_AT_ONCE = 0.02

_killing: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def interrupt(pool: Pool, driver_connection: Any) -> None:
    """End the statement, if any, that another thread or a cancelled task left running.

    Of an asynchronous driver's connection, in one of SQLAlchemy's greenlets. asyncpg
    does it by itself when the task that waits for the statement is cancelled.
    """
    if iscoroutinefunction(getattr(driver_connection, "interrupt", None)):  # aiosqlite
        await_only(_roll_back(driver_connection))
        return
    for name in ("cancel_safe", "cancel", "interrupt"):  # psycopg, psycopg2, sqlite3
        if hasattr(driver_connection, name):
            cancelling = getattr(driver_connection, name)()
            if isawaitable(cancelling):
                await_only(cancelling)
            return
    if hasattr(driver_connection, "thread_id"):  # MySQL's drivers
        _kill(pool, driver_connection.thread_id())


def cut(connection: Connection) -> None:
    """End what a connection is doing, from another thread, and the connection with it.

    SQLite's ends at once, and must not be closed while another thread is inside.
    """
    stop(connection)
    if connection.dialect.name != "sqlite":
        with suppress(Exception):
            connection.invalidate()


def stop(connection: Connection) -> None:
    """End the statement that a connection is running, from another thread."""
    with suppress(Exception):
        interrupt(connection.engine.pool, connection.connection.driver_connection)


def leave_to_interrupt(driver_connection: Any) -> None:
    """Keep psycopg's connections for tasks from interrupting a statement by themselves.

    They await that in the cancelled task, where a second cancellation makes them close their
    end at once; the server would run on, and no one could reach it any more.
    """
    libpq = getattr(driver_connection, "pgconn", None)
    if libpq is None:
        return
    waiting = sys.modules["psycopg.waiting"]

    def wait(
        steps: Any, interval: float = _LOOK_UP_SECONDS, **kwargs: Any
    ) -> Coroutine[Any, Any, Any]:
        result: Coroutine[Any, Any, Any] = waiting.wait_async(
            steps, libpq.socket, interval=interval, **kwargs
        )
        return result

    driver_connection.wait = wait


async def _roll_back(driver_connection: Any) -> None:
    """Roll aiosqlite's connection back, and interrupt only a statement that this must wait for.

    SQLite keeps the locks of a closed connection while a stream of it is still referred to,
    and an interrupt reaches all statements until that stream is closed.
    """
    rolling_back = asyncio.ensure_future(driver_connection.rollback())
    _, waiting = await asyncio.wait([rolling_back], timeout=_AT_ONCE)
    if waiting:
        await driver_connection.interrupt()
    await rolling_back


def _kill(pool: Pool, thread_id: int) -> None:
    """Have MySQL end a connection, over a new one: its protocol knows no other way."""
    # Not from the pool, where no place may be left.
    connect: Callable[[], Any] = pool._creator  # type: ignore[assignment]  # pyright: ignore[reportPrivateUsage, reportAssignmentType]
    with _one_at_a_time():
        beside = connect()
        try:
            beside.cursor().execute(f"KILL {thread_id}")
            while in_greenlet():  # it is an error once the server knows that connection no more
                await_only(asyncio.sleep(_KILLING_SECONDS))
                beside.cursor().execute(f"KILL {thread_id}")
        finally:
            beside.close()


@contextmanager
def _one_at_a_time() -> Generator[None]:
    """Let one task of an event loop in: a hundred cancellations take one connection more."""
    if not in_greenlet():
        yield
        return
    lock = _killing.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    await_only(lock.acquire())
    try:
        yield
    finally:
        lock.release()
