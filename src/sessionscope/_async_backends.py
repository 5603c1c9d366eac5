"""AsyncBackends: connections of event loops, opened and closed in tasks of their own.

A task that opens, uses or closes a connection may be cancelled at any await. Its
connection is then closed here, whatever becomes of the task: the statement that
still runs is cancelled on the server, and the connection keeps its place in the
bound until the server has closed its end.
"""

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from sessionscope._backends import CLOSING_SECONDS, Backends, keep_socket
from sessionscope._deadline import within
from sessionscope._interrupt import leave_to_interrupt
from sessionscope._loops import call_soon, start

# Seconds after which a server that does not answer is no longer waited for.
_PATIENCE = 10.0
# Seconds after which a connection is no longer opened that no task waits for.
_OPENING = 1.0
# Seconds up to which a task that is being cancelled waits until its statement has ended, and
# what is left of that once its deadline is over.
_INTERRUPTING = 1.0
_GRACE = 0.05


class AsyncBackends(Backends):
    """Async version of :class:`Backends`, called from SQLAlchemy's greenlets."""

    def forget(self) -> None:
        """Start anew with no connection and no task: what a forked child must do."""
        super().forget()
        self._loops: dict[int, asyncio.AbstractEventLoop] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def open(
        self,
        connect: Callable[[], DBAPIConnection],
        discard: Callable[[DBAPIConnection], None],
        timeout: float,
    ) -> DBAPIConnection:
        """Return a new connection; one whose task is cancelled is finished, then closed."""
        if not in_greenlet():
            raise MissingGreenlet(
                "The engine of an AsyncDatabase was used outside of SQLAlchemy's greenlets: write "
                "async with database.engine.connect() as connection: await connection.run_sync(...)"
            )
        self.take(timeout)
        opening = start(greenlet_spawn(connect), self._tasks)
        try:
            connection: DBAPIConnection = await_only(asyncio.shield(opening))
        except BaseException:
            opening.add_done_callback(lambda done: self._discard(done, discard))
            if not opening.done():
                opening.get_loop().call_later(_OPENING, opening.cancel)
            raise
        self._loops[id(self.note(connection))] = opening.get_loop()
        leave_to_interrupt(getattr(connection, "driver_connection", None))
        return connection

    def close(
        self,
        connection: DBAPIConnection,
        driver_connection: Any,
        close: Callable[[], None],
        cancel: Callable[[], None] | None,
    ) -> None:
        """Close a connection in a task of its own, on its own event loop.

        Waits a moment for that task if nothing need be cancelled. A task that is being
        cancelled waits, too, where that is possible: an event loop that is shut down waits
        for such tasks, and for no others.
        """
        loop = self._loops.pop(id(connection), None)
        if loop is None:  # it was closed before, or the parent process has opened it
            return
        self.forgets(connection)
        kept = keep_socket(driver_connection)

        def bury() -> asyncio.Task[None]:
            return start(self._bury(driver_connection, close, cancel, kept), self._tasks)

        if loop is asyncio._get_running_loop():
            burial = bury()
            if in_greenlet():
                _wait(burial, is_busy=cancel is not None)
        elif not (loop.is_running() and call_soon(loop, bury)):
            # Without their loop, all but aiosqlite's threads can only fail to close.
            can_close = hasattr(driver_connection, "stop")
            _drop(driver_connection, close if can_close else None, kept)
            self.give_back()

    async def settle(self) -> None:
        """Wait until all connections that are being closed are gone."""
        loop = asyncio.get_running_loop()
        # Again, because one that was still being opened is closed next.
        while closing := [task for task in self._tasks if task.get_loop() is loop]:
            await asyncio.wait(closing)

    def _discard(
        self,
        opening: "asyncio.Task[DBAPIConnection]",
        discard: Callable[[DBAPIConnection], None],
    ) -> None:
        if opening.cancelled() or opening.exception() is not None:
            self.give_back()
            return
        connection = self.note(opening.result())
        self._loops[id(connection)] = opening.get_loop()
        discard(connection)

    async def _bury(
        self,
        driver_connection: Any,
        close: Callable[[], None],
        cancel: Callable[[], None] | None,
        kept: socket.socket | None,
    ) -> None:
        try:
            try:
                await _end(close, cancel, kept, _PATIENCE)
            except asyncio.CancelledError:  # the event loop is being shut down, and waits for this
                await _end(close, cancel, kept, _INTERRUPTING)
        except (Exception, asyncio.CancelledError):
            _drop(driver_connection, close, kept)
        finally:
            if kept is not None:
                kept.close()
            self.give_back()


async def _end(
    close: Callable[[], None],
    cancel: Callable[[], None] | None,
    kept: socket.socket | None,
    patience: float,
) -> None:
    async with asyncio.timeout(patience):
        if cancel is not None:
            with suppress(Exception):
                await greenlet_spawn(cancel)
        await greenlet_spawn(close)
    if kept is not None:
        async with asyncio.timeout(patience):
            await _closed_by_server(kept)


def _wait(burial: "asyncio.Task[None]", *, is_busy: bool) -> None:
    cancelled = isinstance(sys.exception(), asyncio.CancelledError)
    if is_busy and not cancelled:
        return
    patience = max(within(_INTERRUPTING), _GRACE) if cancelled else CLOSING_SECONDS
    try:
        await_only(asyncio.wait([burial], timeout=patience))
    except asyncio.CancelledError:
        if not cancelled:
            raise


async def _closed_by_server(kept: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        kept.setblocking(False)
        # The driver may have sent no farewell, and our second handle keeps the line open.
        kept.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(kept, 65536):
            pass


def _drop(
    driver_connection: Any, close: Callable[[], None] | None, kept: socket.socket | None
) -> None:
    """End a connection without waiting for anything, from any thread."""
    libpq = getattr(driver_connection, "pgconn", None)
    with suppress(Exception):
        if libpq is not None:
            libpq.finish()
        elif hasattr(driver_connection, "terminate"):  # asyncpg
            driver_connection.terminate()
        elif close is not None:
            close()  # outside of a greenlet, drivers know not to wait
    if kept is not None:
        with suppress(OSError):
            kept.shutdown(socket.SHUT_RDWR)
        kept.close()
