"""Starlette with `def` endpoints and with_session."""

from sqlalchemy import text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sessionscope.integrations.starlette import install
from tests.contract.bodies import BODIES, Body, Conflict, Databases, Kept


def build(databases: Databases, kept: Kept) -> Starlette:
    @databases["main"].with_session()
    def stream(session: Session, request: Request) -> Response:
        session.execute(text("SELECT 1"))
        return StreamingResponse(kept.rows_here(lambda: session.execute(text("SELECT 1"))))

    async def hooked(request: Request) -> Response:
        return PlainTextResponse(str(request.path_params["name"] in kept.hooked).lower())

    async def release(request: Request) -> Response:
        return PlainTextResponse(kept.release())

    def answer(request: Request, error: Exception) -> Response:
        return PlainTextResponse("conflict", 409)

    app = Starlette(
        routes=[
            *(route(body, databases, kept) for body in BODIES),
            Route("/stream/{name}", stream),
            Route("/hooked/{name}", hooked),
            Route("/release/{name}", release),
        ],
        exception_handlers={Conflict: answer},
    )
    install(app, *databases.values())
    return app


def route(body: Body, databases: Databases, kept: Kept) -> Route:
    @databases[body.on].with_session(read_only=body.read_only)
    def endpoint(session: Session, request: Request) -> Response:
        return PlainTextResponse(body.do(session, request.path_params["name"], kept))

    return Route(f"/{body.path}/{{name}}", endpoint)
