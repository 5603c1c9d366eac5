"""The web side: an endpoint declares a session and never ends it."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from sqlalchemy.orm import Session

from sessionscope import after_commit
from sessionscope.integrations.fastapi import install, session_per_request

from . import crud, models, page, schemas
from .async_orders import router
from .database import async_database, database

log = logging.getLogger("shop")

app = FastAPI(title="The shop")
install(app, database, async_database)
app.include_router(router)

WriteSession = Annotated[Session, session_per_request(database)]
ReadSession = Annotated[Session, session_per_request(database, read_only=True)]


@app.get("/items/", response_model=list[schemas.ItemOut])
def read_items(session: ReadSession) -> Sequence[models.Item]:
    """Everything on the shelves."""
    return crud.list_items(session)


@app.get("/users/{user_id}", response_model=schemas.UserOut)
def read_user(user_id: schemas.Id, session: ReadSession) -> models.User:
    """One user."""
    return crud.get_user(session, user_id)


@app.post("/orders", status_code=201, response_model=schemas.OrderOut)
def create_order(order: schemas.OrderIn, session: WriteSession) -> models.Order:
    """Sell the items: all of them, or none and 409."""
    placed = crud.place_order(session, order.user_id, order.items)
    after_commit(session, log.info, "order %d is committed: tell the customer", placed.id)
    return placed


@app.get("/orders/{order_id}", response_model=schemas.OrderOut)
def read_order(order_id: schemas.Id, session: ReadSession) -> models.Order:
    """One order with its lines."""
    return crud.get_order(session, order_id)


# The exception has already rolled the session back when its handler runs.
@app.exception_handler(crud.NotFound)
async def not_found(_: Request, error: Exception) -> JSONResponse:
    """Answer 404."""
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.exception_handler(crud.OutOfStock)
async def out_of_stock(_: Request, error: Exception) -> JSONResponse:
    """Answer 409."""
    return JSONResponse({"detail": str(error)}, status_code=409)


# These declare no session and need no thread: they answer however busy the shop is.
@app.get("/health")
async def health() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@app.get("/stats")
async def stats() -> dict[str, Any]:
    """What the sessions of this process are doing."""
    return asdict(database.stats())


@app.get("/", response_class=HTMLResponse, include_in_schema=False)
async def start(request: Request) -> str:
    """Show the start page."""
    return page.render(database.engine, app.openapi(), str(request.base_url))
