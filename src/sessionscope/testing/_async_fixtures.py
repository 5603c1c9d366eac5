"""What the asynchronous fixtures do, whichever plugin runs them."""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from sessionscope import testing


@asynccontextmanager
async def database_in_sandbox(database: Any) -> AsyncGenerator[Any]:
    """Yield *database* in a sandbox, and close its connection in the end."""
    async with testing.async_sandbox(database):
        yield database
    # It belongs to this event loop, and the next test may have another one.
    await database.dispose()


def session_of(database: Any) -> AbstractAsyncContextManager[Any]:
    """Return a session that is the test's own."""
    session: AbstractAsyncContextManager[Any] = database.sessionmaker()
    return session
