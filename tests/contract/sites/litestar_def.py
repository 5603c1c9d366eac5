"""Litestar with `def` handlers."""

from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.response import Stream
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope.integrations.litestar import install, session_per_request
from tests.contract.bodies import BODIES, Body, Conflict, Databases, Kept


def build(databases: Databases, kept: Kept) -> Litestar:
    @get("/stream/{name:str}", sync_to_thread=True)
    def stream(name: FromPath[str], session: NamedDependency[Session]) -> Stream:
        session.execute(text("SELECT 1"))
        return Stream(kept.rows_here(lambda: session.execute(text("SELECT 1"))))

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


def handler(body: Body, databases: Databases, kept: Kept) -> Any:
    session_of = session_per_request(databases[body.on], read_only=body.read_only)

    @get(f"/{body.path}/{{name:str}}", dependencies={"session": session_of}, sync_to_thread=True)
    def handle(name: FromPath[str], session: NamedDependency[Session]) -> str:
        return body.do(session, name, kept)

    return handle
