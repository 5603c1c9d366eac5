"""The web side: an endpoint declares a session and never ends it.

The session is committed and closed before the response is sent; an exception rolls it back.
"""

from collections.abc import Sequence
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sessionscope.integrations.fastapi import install, session_per_request
from sqlalchemy.ext.asyncio import AsyncSession

from . import crud, models, schemas
from .database import database

app = FastAPI()
install(app, database)

WriteSession = Annotated[AsyncSession, session_per_request(database)]
ReadSession = Annotated[AsyncSession, session_per_request(database, read_only=True)]


@app.get("/items/", response_model=list[schemas.ItemOut])
async def read_items(session: ReadSession) -> Sequence[models.Item]:
    """All items."""
    return await crud.list_items(session)


@app.get("/items/{item_id}", response_model=schemas.ItemOut)
async def read_item(item_id: schemas.Id, session: ReadSession) -> models.Item:
    """One item, or 404."""
    return await crud.get_item(session, item_id)


@app.post("/items/", status_code=201, response_model=schemas.ItemOut)
async def create_item(item: schemas.ItemIn, session: WriteSession) -> models.Item:
    """Add an item: 201 means committed; 409 if its name is taken."""
    return await crud.create_item(session, item.name)


# The exception has already rolled the session back when its handler runs.
@app.exception_handler(crud.NotFound)
async def not_found(_: Request, error: Exception) -> JSONResponse:
    """Answer 404."""
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.exception_handler(crud.NameTaken)
async def name_taken(_: Request, error: Exception) -> JSONResponse:
    """Answer 409."""
    return JSONResponse({"detail": str(error)}, status_code=409)


# It declares no session, and so answers however busy the database is.
@app.get("/health")
async def health() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}
