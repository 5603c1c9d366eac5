"""FastAPI with `def` endpoints."""

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope.integrations.fastapi import install, session_per_request
from tests.contract.bodies import BODIES, Body, Conflict, Databases, Kept


def build(databases: Databases, kept: Kept) -> FastAPI:
    app = FastAPI()
    install(app, *databases.values())

    @app.exception_handler(Conflict)
    def answer(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("conflict", 409)

    for body in BODIES:
        add(app, body, session_per_request(databases[body.on], read_only=body.read_only), kept)

    @app.get("/stream/{name}")
    def stream(
        name: str, session: Annotated[Session, session_per_request(databases["main"])]
    ) -> StreamingResponse:
        session.execute(text("SELECT 1"))
        return StreamingResponse(kept.rows_here(lambda: session.execute(text("SELECT 1"))))

    @app.get("/hooked/{name}")
    async def hooked(name: str) -> bool:
        return name in kept.hooked

    @app.get("/release/{name}")
    async def release(name: str) -> str:
        return kept.release()

    return app


def add(app: FastAPI, body: Body, dependency: Any, kept: Kept) -> None:
    @app.get(f"/{body.path}/{{name}}")
    def endpoint(name: str, session: Annotated[Session, dependency]) -> str:
        return body.do(session, name, kept)
