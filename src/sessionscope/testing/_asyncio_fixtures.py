"""The asynchronous fixtures for tests that pytest-asyncio runs, in strict mode too."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest_asyncio

from sessionscope.testing._async_fixtures import database_in_sandbox, session_of


@pytest_asyncio.fixture
async def sessionscope_asyncio_database(sessionscope_async_database: Any) -> AsyncGenerator[Any]:
    """What ``async_database`` is in such a test."""
    async with database_in_sandbox(sessionscope_async_database) as database:
        yield database


@pytest_asyncio.fixture
async def sessionscope_asyncio_session(async_database: Any) -> AsyncGenerator[Any]:
    """What ``async_session`` is in such a test."""
    async with session_of(async_database) as session:
        yield session
