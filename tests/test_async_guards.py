"""What is refused on event loops: use after the end, a second unit in the same task."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import NestedUnit, SessionEnded
from tests.async_drivers import names, on_one_of_each_kind, on_postgres, on_uvloop_too
from tests.models import Item

pytestmark = pytest.mark.anyio


async def iterate(session: AsyncSession) -> None:
    await session.stream_scalars(select(Item))


async def add(session: AsyncSession) -> None:
    session.add(Item(name="late"))


@on_one_of_each_kind
async def test_a_session_that_has_ended_refuses_everything_that_would_reopen_it(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        await session.execute(text("SELECT 1"))

    uses: list[Callable[[AsyncSession], Awaitable[object]]] = [
        lambda session: session.execute(text("SELECT 1")),
        lambda session: session.get(Item, 1),
        lambda session: session.connection(),
        lambda session: session.commit(),
        iterate,
        add,
    ]
    for use in uses:
        with pytest.raises(SessionEnded, match=r"test_async_guards\.py:\d+") as caught:
            await use(session)
        assert "async with database.begin() as session" in str(caught.value)
        assert isinstance(caught.value, sa_exc.InvalidRequestError)
    assert async_database.stats().in_use == 0
    assert await names(async_database) == []


@on_postgres
async def test_an_ended_session_never_used_refuses_too_and_closes_again(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        pass
    with pytest.raises(SessionEnded):
        await session.execute(text("SELECT 1"))
    await session.rollback()
    await session.close()
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
@on_uvloop_too
async def test_a_second_unit_in_the_same_task_is_refused_at_once(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin():
        with pytest.raises(NestedUnit, match=r"test_async_guards\.py:\d+") as caught:
            async with async_database.begin():
                pytest.fail("the second unit was opened")
    assert "Pass the session on" in str(caught.value)
    assert async_database.stats().longest_wait == 0  # a refusal, not a wait


@on_postgres
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
async def test_read_only_units_count_as_well(
    async_database: AsyncDatabase, outer: bool, inner: bool
) -> None:
    async with async_database.begin(read_only=outer):
        with pytest.raises(NestedUnit):
            await async_database.begin(read_only=inner).__aenter__()


@on_postgres
async def test_every_way_to_open_a_unit_is_refused(async_database: AsyncDatabase) -> None:
    @async_database.with_session()
    async def entry_point(session: AsyncSession) -> None:
        pytest.fail("it ran")

    async with async_database.begin():
        for open_another in (
            entry_point,
            lambda: async_database.run(add),
            lambda: async_database.run(lambda session: session.close()),
            async_database.ping,
        ):
            with pytest.raises(NestedUnit):
                await open_another()


@on_postgres
@on_uvloop_too
async def test_a_new_task_is_a_flow_of_its_own(async_database: AsyncDatabase) -> None:
    """One unit per task is the right code."""

    async def work() -> int:
        async with async_database.begin() as session:
            return int(await session.scalar(text("SELECT 1")) or 0)

    async with async_database.begin(), asyncio.TaskGroup() as group:
        tasks = [group.create_task(work()) for _ in range(3)]
    assert [task.result() for task in tasks] == [1, 1, 1]


@on_postgres
async def test_one_unit_after_the_other_is_fine(async_database: AsyncDatabase) -> None:
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin():
            raise ValueError("stop")
    for read_only in (False, True, False):
        async with async_database.begin(read_only=read_only) as session:
            await session.execute(text("SELECT 1"))


@on_postgres
async def test_another_database_is_another_matter(
    async_database: AsyncDatabase, sqlite: Database
) -> None:
    async with AsyncDatabase("sqlite+aiosqlite://") as other, async_database.begin() as one:
        async with other.begin() as two:
            with sqlite.begin() as three:
                assert len({id(one), id(two), id(three)}) == 3
