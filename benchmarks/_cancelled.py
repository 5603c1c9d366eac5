"""Ways to cancel a unit of work, and what the server and the event loop say of it."""

import asyncio
import gc
import logging
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import anyio
import psycopg
from sqlalchemy import URL

from benchmarks._postgres import conninfo
from sessionscope import AsyncDatabase

Work = Callable[[], Awaitable[object]]
# Cancels the work some seconds after it was begun. The clean-up is what shielded code does.
Way = Callable[[Work, Work, float], Coroutine[Any, Any, None]]


async def once(work: Work, clean_up: Work, seconds: float) -> None:
    """Cancel as a framework does whose client has gone."""
    await _cancel(work, seconds, times=1)


async def twice(work: Work, clean_up: Work, seconds: float) -> None:
    """Cancel what the first cancellation has begun to clean up as well."""
    await _cancel(work, seconds, times=2)


async def _cancel(work: Work, seconds: float, times: int) -> None:
    task = asyncio.ensure_future(work())
    await asyncio.sleep(seconds)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(task, return_exceptions=True)


async def in_time(work: Work, clean_up: Work, seconds: float) -> None:
    """Cancel as asyncio's own timeout does."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work()


async def moved_on(work: Work, clean_up: Work, seconds: float) -> None:
    """Cancel as anyio does: again at every await inside of the scope."""
    with anyio.move_on_after(seconds):
        await work()


async def shielded(work: Work, clean_up: Work, seconds: float) -> None:
    """Cancel as anyio does, and use the database again in a shielded clean-up."""
    with anyio.move_on_after(seconds):
        try:
            await work()
        finally:
            with anyio.CancelScope(shield=True):
                await clean_up()


WAYS: dict[str, Way] = {
    "task.cancel()": once,
    "task.cancel() twice": twice,
    "asyncio.timeout()": in_time,
    "anyio.move_on_after()": moved_on,
    "anyio, shielded clean-up": shielded,
}


class Server:
    """Samples a PostgreSQL database's connections from a thread, while in a block."""

    INTERVAL = 0.01
    _QUERY = (
        "SELECT count(*), count(*) FILTER (WHERE state <> 'idle') FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'"
    )

    def __init__(self, url: URL) -> None:
        self._url = url
        self._stop = threading.Event()
        self.samples = 0
        self.most = 0
        self.connections = 0
        self.busy = 0

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(conninfo(self._url), autocommit=True)
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    async def rests(self, patience: float) -> float:
        """Return after how many seconds no connection was busy, at most *patience*."""
        start, seen = time.monotonic(), self.samples
        while self.busy or self.samples < seen + 2:
            if time.monotonic() - start > patience:
                break
            await asyncio.sleep(self.INTERVAL)
        return time.monotonic() - start

    def _sample(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            row = self._connection.execute(self._QUERY).fetchone()
            assert row is not None
            self.connections, self.busy = row
            self.most = max(self.most, self.connections)
            self.samples += 1


@contextmanager
def listening() -> Iterator[list[str]]:
    """Yield a list of what is logged, warned of, or raised where no one can catch it."""
    said: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda raised: said.append(repr(raised))
    ear = _Ear(said)
    logging.getLogger().addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
            gc.collect()
        # psycopg's, of streams that were cut off: SQLAlchemy leaves them to the collector.
        messages = [str(warning.message) for warning in warned]
        said += [message for message in messages if "ServerCursor" not in message]
    finally:
        logging.getLogger().removeHandler(ear)
        sys.unraisablehook = hook


class _Ear(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


class Moment:
    """Cancels *task* when it, or what it has started, waits for the n-th time.

    *soon* is one turn of the event loop later: what was waited for may have happened.
    """

    def __init__(self, at: int, *, soon: bool = False) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.is_reached = False
        self._left = at
        self._soon = soon

    def waits(self) -> None:
        """Count one wait."""
        if self.task is None or self.task.done():
            return
        self._left -= 1
        if self._left == 0:
            self.is_reached = True
            if self._soon:
                asyncio.get_running_loop().call_soon(self.task.cancel)
            else:
                self.task.cancel()


@asynccontextmanager
async def watched_by(moment: Moment) -> AsyncIterator[None]:
    """Let *moment* count what the tasks that are made in the block wait for."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()

    def make(loop: Any, coro: Any, **kwargs: Any) -> "asyncio.Task[Any]":
        return asyncio.Task(_run(coro, moment), loop=loop, **kwargs)

    loop.set_task_factory(make)
    try:
        yield
    finally:
        loop.set_task_factory(before)


async def _run(coro: Coroutine[Any, Any, Any], moment: Moment) -> Any:
    return await _Counted(coro, moment)


class _Counted:
    def __init__(self, coro: Coroutine[Any, Any, Any], moment: Moment) -> None:
        self._coro = coro
        self._moment = moment

    def __await__(self) -> Generator[Any, Any, Any]:
        go_on: Callable[[Any], Any] = self._coro.send
        what: Any = None
        while True:
            try:
                awaited = go_on(what)
            except StopIteration as end:
                return end.value
            self._moment.waits()
            try:
                go_on, what = self._coro.send, (yield awaited)
            except BaseException as error:  # a cancellation, for one
                go_on, what = self._coro.throw, error


async def hold_all(database: AsyncDatabase[Any], size: int) -> None:
    """Let *size* units of work hold a connection each, at once; raises TimeoutError."""
    together = asyncio.Barrier(size)

    async def hold() -> None:
        async with database.begin() as session:
            await session.connection()
            await together.wait()

    async with asyncio.timeout(5):
        await asyncio.gather(*(hold() for _ in range(size)))
