"""One way to call both kinds of Database, for tests of what is alike in both."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sqlalchemy import make_url
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.events import Stats

R = TypeVar("R")
Work = Callable[[Session], R]

# The name of a caller, and the driver of its URL.
CALLERS = {"psycopg": "psycopg", "psycopg-async": "psycopg", "asyncpg": "asyncpg"}
_PATIENCE = 60.0


class Caller(Protocol):
    """Runs functions of a plain Session as units of work; each waits for its end."""

    def run(self, work: Work[R], timeout: float | None = None) -> R:
        """As run() does, or with_session() with a *timeout*."""
        ...

    def once(self, work: Work[R], timeout: float | None = None, *, read_only: bool = False) -> R:
        """In a block of begin()."""
        ...

    def stats(self) -> Stats:
        """Those of the Database."""
        ...


class _Sync:
    def __init__(self, database: Database) -> None:
        self.database = database
        self.stats = database.stats

    def run(self, work: Work[R], timeout: float | None = None) -> R:
        return self.database.with_session(timeout=timeout)(work)()

    def once(self, work: Work[R], timeout: float | None = None, *, read_only: bool = False) -> R:
        with self.database.begin(timeout=timeout, read_only=read_only) as session:
            return work(session)


class _Async:
    def __init__(self, database: AsyncDatabase, loop: asyncio.AbstractEventLoop) -> None:
        self.database = database
        self.loop = loop
        self.stats = database.stats

    def run(self, work: Work[R], timeout: float | None = None) -> R:
        return self.wait_for(self.database.with_session(timeout=timeout)(work)())

    def once(self, work: Work[R], timeout: float | None = None, *, read_only: bool = False) -> R:
        async def block() -> R:
            async with self.database.begin(timeout=timeout, read_only=read_only) as session:
                return await session.run_sync(work)

        return self.wait_for(block())

    def wait_for(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(_PATIENCE)


@contextmanager
def caller(name: str, url: str, **options: Any) -> Iterator[Caller]:
    """The caller of that *name*, on its own Database."""
    driver = f"postgresql+{CALLERS[name]}"
    url = make_url(url).set(drivername=driver).render_as_string(hide_password=False)
    if name == "psycopg":
        with Database(url, **options) as database:
            yield _Sync(database)
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    there = _Async(AsyncDatabase(url, **options), loop)
    try:
        yield there
    finally:
        there.wait_for(there.database.dispose())
        there.wait_for(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Later(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._raised: BaseException | None = None
        self._returned: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._returned = self._call()
        except BaseException as error:
            self._raised = error

    @property
    def is_done(self) -> bool:
        return not self.is_alive()

    def result(self) -> Any:
        """What it returns, or raise what it raises."""
        self.join(_PATIENCE)
        assert self.is_done, "it does not end"
        if self._raised is not None:
            raise self._raised
        return self._returned
