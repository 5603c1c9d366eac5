"""The web side, request by request."""

import pytest
from httpx2 import AsyncClient
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.models import Item

pytestmark = pytest.mark.anyio


async def test_what_was_answered_is_stored(
    client: AsyncClient, async_session: AsyncSession
) -> None:
    answer = await client.post("/items/", json={"name": "pear"})
    assert answer.status_code == 201
    assert (await async_session.scalars(select(Item.name))).all() == ["pear"]
    assert (await client.get("/items/")).json() == [answer.json()]
    assert (await client.get(f"/items/{answer.json()['id']}")).json() == answer.json()


async def test_a_name_that_is_taken_is_409_and_stores_nothing(client: AsyncClient) -> None:
    await client.post("/items/", json={"name": "pear"})
    answer = await client.post("/items/", json={"name": "pear"})
    assert (answer.status_code, answer.json()["detail"]) == (409, "there is an item 'pear' already")
    assert [item["name"] for item in (await client.get("/items/")).json()] == ["pear"]


async def test_an_item_that_is_not_there_is_404(client: AsyncClient) -> None:
    answer = await client.get("/items/1")
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no item 1")


async def test_what_fits_no_column_is_422(client: AsyncClient) -> None:
    for name in ("", "x" * 101, "pe\0ar"):
        assert (await client.post("/items/", json={"name": name})).status_code == 422
    assert (await client.get(f"/items/{10**30}")).status_code == 422


async def test_the_health_needs_no_database(client: AsyncClient) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
