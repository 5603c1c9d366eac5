"""What an application of an event loop does with its databases when it starts and stops."""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

from sessionscope import Stats, exc
from sessionscope.integrations._request_units import start

_DRAIN_SECONDS = 10.0
_log = logging.getLogger("sessionscope")


class Database(Protocol):
    """A Database or an AsyncDatabase, which only those import who have greenlet."""

    def stats(self) -> Stats: ...
    def limit_waiting_threads(self, threads: Callable[[], int | None], /) -> None: ...


def check_databases(databases: Sequence[object], usage: str) -> None:
    """Raise ConfigurationError, which names *usage*, unless there are databases and all are."""
    if not databases:
        raise exc.ConfigurationError(f"install() needs a Database: write {usage}")
    for database in databases:
        check_database(database, usage)


def check_database(database: object, usage: str) -> None:
    """Raise ConfigurationError, which names *usage*, unless it is one of ours."""
    if not hasattr(database, "limit_waiting_threads"):
        raise exc.ConfigurationError(
            f"{type(database).__name__} is not a Database or an AsyncDatabase of sessionscope: "
            f"write {usage}"
        )


@asynccontextmanager
async def lifespan(databases: Sequence[Any]) -> AsyncGenerator[None]:
    """Warn if a database does not answer; in the end, drain them all."""
    for database in databases:
        await _warn_if_unavailable(database)
    try:
        yield
    finally:
        await asyncio.gather(*(_call(each.drain, _DRAIN_SECONDS) for each in databases))


async def _warn_if_unavailable(database: Any) -> None:
    try:
        await _call(database.ping)
    except (exc.DatabaseUnavailable, exc.PoolBusy) as error:
        _log.warning("%r does not answer at start-up: %s", database, error)


async def _call(method: Callable[..., Any], *args: Any) -> Any:
    """Call a method of an AsyncDatabase here, and one of a Database in a thread."""
    if inspect.iscoroutinefunction(method):
        return await method(*args)
    # asyncio's own threads are few: one would wait here until another's ten seconds are over.
    return await start(partial(method, *args))
