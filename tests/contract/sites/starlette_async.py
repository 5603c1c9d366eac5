"""Starlette with `async def` endpoints, with_session and an AsyncDatabase."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sessionscope.integrations.starlette import install
from tests.contract.bodies import BODIES, AsyncDatabases, Body, Conflict, Kept


def build(databases: AsyncDatabases, kept: Kept) -> Starlette:
    @databases["main"].with_session()
    async def stream(session: AsyncSession, request: Request) -> Response:
        await session.execute(text("SELECT 1"))
        plain = session.sync_session
        return StreamingResponse(kept.rows_here(lambda: plain.execute(text("SELECT 1"))))

    async def hooked(request: Request) -> Response:
        return PlainTextResponse(str(request.path_params["name"] in kept.hooked).lower())

    async def release(request: Request) -> Response:
        return PlainTextResponse(kept.release())

    async def answer(request: Request, error: Exception) -> Response:
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


def route(body: Body, databases: AsyncDatabases, kept: Kept) -> Route:
    @databases[body.on].with_session(read_only=body.read_only)
    async def endpoint(session: AsyncSession, request: Request) -> Response:
        name = request.path_params["name"]
        return PlainTextResponse(await session.run_sync(body.do, name, kept))

    return Route(f"/{body.path}/{{name}}", endpoint)
