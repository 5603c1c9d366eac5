"""Litestar with `async def` handlers and an AsyncDatabase."""

from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.response import Stream
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from sessionscope.integrations.litestar import install, session_per_request
from tests.contract.bodies import BODIES, AsyncDatabases, Body, Conflict, Kept


def build(databases: AsyncDatabases, kept: Kept) -> Litestar:
    @get("/stream/{name:str}")
    async def stream(name: FromPath[str], session: NamedDependency[AsyncSession]) -> Stream:
        await session.execute(text("SELECT 1"))
        plain = session.sync_session
        return Stream(kept.rows_here(lambda: plain.execute(text("SELECT 1"))))

    @get("/hooked/{name:str}")
    async def hooked(name: FromPath[str]) -> bool:
        return name in kept.hooked

    @get("/release/{name:str}")
    async def release(name: FromPath[str]) -> str:
        return kept.release()

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[str]:
        return Response("conflict", status_code=409)

    return Litestar(
        [*(handler(body, databases, kept) for body in BODIES), stream, hooked, release],
        dependencies={"session": session_per_request(databases["main"])},
        exception_handlers={Conflict: answer},
        on_app_init=[install(*databases.values())],
    )


def handler(body: Body, databases: AsyncDatabases, kept: Kept) -> Any:
    session_of = session_per_request(databases[body.on], read_only=body.read_only)

    @get(f"/{body.path}/{{name:str}}", dependencies={"session": session_of})
    async def handle(name: FromPath[str], session: NamedDependency[AsyncSession]) -> str:
        return await session.run_sync(body.do, name, kept)

    return handle
