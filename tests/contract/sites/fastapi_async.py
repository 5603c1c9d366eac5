"""FastAPI with `async def` endpoints and an AsyncDatabase."""

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope.integrations.fastapi import install, session_per_request
from tests.contract.bodies import BODIES, AsyncDatabases, Body, Conflict, Kept


def build(databases: AsyncDatabases, kept: Kept) -> FastAPI:
    app = FastAPI()
    install(app, *databases.values())

    @app.exception_handler(Conflict)
    async def answer(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("conflict", 409)

    for body in BODIES:
        add(app, body, session_per_request(databases[body.on], read_only=body.read_only), kept)

    @app.get("/stream/{name}")
    async def stream(
        name: str, session: Annotated[AsyncSession, session_per_request(databases["main"])]
    ) -> StreamingResponse:
        await session.execute(text("SELECT 1"))
        plain = session.sync_session
        return StreamingResponse(kept.rows_here(lambda: plain.execute(text("SELECT 1"))))

    @app.get("/hooked/{name}")
    async def hooked(name: str) -> bool:
        return name in kept.hooked

    @app.get("/release/{name}")
    async def release(name: str) -> str:
        return kept.release()

    return app


def add(app: FastAPI, body: Body, dependency: Any, kept: Kept) -> None:
    @app.get(f"/{body.path}/{{name}}")
    async def endpoint(name: str, session: Annotated[AsyncSession, dependency]) -> str:
        return await session.run_sync(body.do, name, kept)
