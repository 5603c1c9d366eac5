"""The web side in `async def`, side by side with `main.py`: other sessions, the same functions."""

import logging
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope import after_commit
from sessionscope.integrations.fastapi import session_per_request

from . import crud, models, schemas
from .database import async_database

log = logging.getLogger("shop")

router = APIRouter(prefix="/async")

WriteSession = Annotated[AsyncSession, session_per_request(async_database)]
ReadSession = Annotated[AsyncSession, session_per_request(async_database, read_only=True)]


@router.get("/items/", response_model=list[schemas.ItemOut])
async def read_items(session: ReadSession) -> Sequence[models.Item]:
    """Everything on the shelves."""
    return await session.run_sync(crud.list_items)


@router.post("/orders", status_code=201, response_model=schemas.OrderOut)
async def create_order(order: schemas.OrderIn, session: WriteSession) -> models.Order:
    """Sell the items: all of them, or none and 409."""
    placed = await session.run_sync(crud.place_order, order.user_id, order.items)
    after_commit(session, tell_the_customer, placed.id)
    return placed


@router.get("/orders/{order_id}", response_model=schemas.OrderOut)
async def read_order(order_id: schemas.Id, session: ReadSession) -> models.Order:
    """One order with its lines."""
    return await session.run_sync(crud.get_order, order_id)


async def tell_the_customer(order_id: int) -> None:
    """What would be a mail; a hook may be `async def` as well."""
    log.info("order %d is committed: tell the customer", order_id)
