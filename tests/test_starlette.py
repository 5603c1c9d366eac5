"""Starlette: with_session on endpoints, and what install() adds to the app."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from sessionscope import Database
from sessionscope.exc import ConfigurationError, PoolBusy, SessionEnded
from sessionscope.integrations.starlette import install
from tests.models import Item, Note, names


def test_an_endpoint_commits_and_its_background_task_has_no_session(database: Database) -> None:
    seen: list[object] = []

    def look(session: Session) -> None:
        seen.append(database.stats().in_use)
        with pytest.raises(SessionEnded):
            session.execute(text("SELECT 1"))
        seen.append(names(database))

    @database.with_session()
    def create(session: Session, request: Request) -> Response:
        session.add(Item(name=request.path_params["name"]))
        return PlainTextResponse("created", background=BackgroundTask(look, session))

    app = Starlette(routes=[Route("/{name}", create, methods=["POST"])])
    assert TestClient(app).post("/pear").text == "created"
    assert seen == [0, ["pear"]]


def test_a_method_of_an_endpoint_class_is_an_entry_point_too(database: Database) -> None:
    class Items(HTTPEndpoint):
        @database.with_session()
        def post(self, session: Session, request: Request) -> Response:
            session.add(Item(name=request.url.path[1:]))
            return RedirectResponse("/", 303)

    app = Starlette(routes=[Route("/{name}", Items)])
    assert TestClient(app, follow_redirects=False).post("/pear").status_code == 303
    assert names(database) == ["pear"]


def test_a_failed_commit_reaches_the_apps_own_handler(database: Database) -> None:
    @database.with_session()
    def create(session: Session, request: Request) -> Response:
        session.add(Note(item_id=404))
        return PlainTextResponse("created")

    def conflict(request: Request, error: Exception) -> Response:
        return PlainTextResponse("conflict", 409)

    app = Starlette(
        routes=[Route("/", create)], exception_handlers={sa_exc.IntegrityError: conflict}
    )
    assert TestClient(app).get("/").text == "conflict"


async def busy(request: Request) -> Response:
    raise PoolBusy("busy")


def test_overload_is_503_unless_the_app_answers_it_or_is_mounted(sqlite: Database) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("mine", 429)

    inner = Starlette(
        routes=[Route("/", busy)], exception_handlers={sa_exc.SQLAlchemyError: handle}
    )
    app = Starlette(routes=[Route("/", busy), Mount("/inner", inner)])
    install(inner, sqlite)
    install(app, sqlite)
    with TestClient(app) as client:
        refused = client.get("/")
        assert (refused.status_code, refused.json()["code"]) == (503, "pool_busy")
        assert client.get("/inner/").status_code == 429


def test_overload_closes_a_websocket_instead_of_failing(sqlite: Database) -> None:
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        raise PoolBusy("busy")

    app = Starlette(routes=[WebSocketRoute("/ws", chat)])
    install(app, sqlite)
    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        with pytest.raises(WebSocketDisconnect) as caught:
            websocket.receive_text()
    assert caught.value.code == 1013


def test_start_and_end(caplog: pytest.LogCaptureFixture, sqlite: Database) -> None:
    """A database that is down is a warning; the user's lifespan runs inside; two apps in a row."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, int]]:
        await asyncio.to_thread(sqlite.ping)
        yield {"answer": 42}
        await asyncio.to_thread(sqlite.ping)

    async def read(request: Request) -> Response:
        return PlainTextResponse(str(request.state.answer))

    app = Starlette(routes=[Route("/", read)], lifespan=lifespan)
    install(app, sqlite, Database("postgresql://user:s3cr3t@127.0.0.1:1/db"))
    with caplog.at_level(logging.WARNING, "sessionscope"):
        for _ in range(2):
            with TestClient(app) as client:
                assert client.get("/").text == "42"
            assert sqlite.stats().idle == 0
    assert "does not answer at start-up" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_wrong_arguments_name_the_line_to_write(sqlite: Database) -> None:
    with pytest.raises(ConfigurationError, match=r"write install\(app, database\)"):
        install(Starlette())
    with pytest.raises(ConfigurationError, match=r"write install\(app, database\)"):
        install(Starlette(), sqlite.engine)  # type: ignore[arg-type]  # on purpose
