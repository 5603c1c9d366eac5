"""The sandboxes without a plugin: unittest, plain asyncio, and what their loops need."""

import asyncio
import unittest

import pytest

from sessionscope import AsyncDatabase, Database
from sessionscope.testing import async_sandbox, sandbox
from tests import async_drivers
from tests.models import Item, names

on_one_of_each = pytest.mark.parametrize("url", ["sqlite-file", "postgres"], indirect=True)
through_each = pytest.mark.parametrize(
    "async_url", ["psycopg", "asyncpg", "aiosqlite-file", "asyncmy"], indirect=True
)


def succeeds(case: type[unittest.TestCase]) -> None:
    """Run a case as unittest would, and raise what it found."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert [text for _, text in (*result.errors, *result.failures)] == []
    assert result.testsRun == 2


@on_one_of_each
def test_each_test_of_a_case_has_its_rows_to_itself(database: Database) -> None:
    class Case(unittest.TestCase):
        def setUp(self) -> None:
            self.enterContext(sandbox(database))
            self.session = self.enterContext(database.sessionmaker())

        def check(self) -> None:
            self.session.add(Item(name="pear"))
            self.session.commit()
            assert names(database) == ["pear"]

        test_one = check
        test_two = check

    succeeds(Case)
    assert names(database) == []


@through_each
def test_each_test_of_an_asynchronous_case_has_its_rows_to_itself(async_url: str) -> None:
    """Each runs on an event loop of its own, and so does the application's one Database."""
    database = AsyncDatabase(async_url)

    class Case(unittest.IsolatedAsyncioTestCase):
        async def asyncSetUp(self) -> None:
            # Last of all: a connection belongs to the loop that opened it.
            self.addAsyncCleanup(database.dispose)
            await async_drivers.create_tables(database)
            await self.enterAsyncContext(async_sandbox(database))
            self.session = await self.enterAsyncContext(database.sessionmaker())

        async def check(self) -> None:
            self.session.add(Item(name="pear"))
            await self.session.commit()

            async def read() -> list[str]:
                return await async_drivers.names(database)

            assert list(await asyncio.gather(read(), read())) == [["pear"], ["pear"]]

        test_one = check
        test_two = check

    succeeds(Case)


@through_each
def test_asyncio_run_after_asyncio_run(async_url: str) -> None:
    """As in a script, or in a test that is a plain function."""
    database = AsyncDatabase(async_url)

    async def main() -> list[str]:
        await async_drivers.create_tables(database)
        async with async_sandbox(database):
            before = await async_drivers.names(database)
            async with database.begin() as session:
                session.add(Item(name="pear"))
            within = await async_drivers.names(database)
        await database.dispose()
        return [*before, *within]

    for _ in range(2):
        assert asyncio.run(main()) == ["pear"]


@on_one_of_each
def test_a_coroutine_may_use_a_synchronous_sandbox(database: Database) -> None:
    """Units of a Database, in a test whose application has some `async def` in it."""

    async def main() -> list[str]:
        def add() -> None:
            with database.begin() as session:
                session.add(Item(name="pear"))

        with sandbox(database):
            await asyncio.to_thread(add)
            return names(database)

    assert asyncio.run(main()) == ["pear"]
    assert names(database) == []
