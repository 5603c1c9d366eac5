"""The asynchronous fixtures for tests that anyio's plugin runs."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from sessionscope.testing._async_fixtures import database_in_sandbox, session_of


@pytest.fixture
async def sessionscope_anyio_database(sessionscope_async_database: Any) -> AsyncGenerator[Any]:
    """What ``async_database`` is in such a test."""
    async with database_in_sandbox(sessionscope_async_database) as database:
        yield database


@pytest.fixture
async def sessionscope_anyio_session(async_database: Any) -> AsyncGenerator[Any]:
    """What ``async_session`` is in such a test."""
    async with session_of(async_database) as session:
        yield session
