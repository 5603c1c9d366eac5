"""The business, with a session of the test's own."""

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app import crud

pytestmark = pytest.mark.anyio


async def test_items_are_listed_in_the_order_of_their_making(async_session: AsyncSession) -> None:
    for name in ("pear", "apple"):
        await crud.create_item(async_session, name)
    assert [item.name for item in await crud.list_items(async_session)] == ["pear", "apple"]


async def test_a_name_is_taken_once(async_session: AsyncSession) -> None:
    await crud.create_item(async_session, "pear")
    with pytest.raises(crud.NameTaken, match="'pear'"):
        await crud.create_item(async_session, "pear")


async def test_an_item_that_is_not_there_is_not_found(async_session: AsyncSession) -> None:
    with pytest.raises(crud.NotFound, match="no item 1"):
        await crud.get_item(async_session, 1)
