"""What reaches the apps of the tests: clients, disconnects and cancellations."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from sessionscope import AsyncDatabase, Database
from sessionscope.integrations.fastapi import install


class ItemOut(BaseModel):
    model_config = {"from_attributes": True}

    id: int
    name: str


class Refused(Exception):
    """An error of the user's, for which the app has a handler."""


def app_of(*databases: AsyncDatabase[Any] | Database[Any]) -> FastAPI:
    """A new app on these databases."""
    app = FastAPI()
    install(app, *databases)
    return app


async def send_nothing(message: Any) -> None:
    """Take a part of the answer; as on a real server, the request's task may wait here."""
    await asyncio.sleep(0)


async def disconnected() -> dict[str, str]:
    return {"type": "http.disconnect"}


def scope(path: str = "/") -> dict[str, Any]:
    """What a server would say of a GET request."""
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
    }


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that sees what a real one would: a 500, not the exception."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://test", timeout=60
    ) as client:
        yield client


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a real server, to which a client's connection can be lost."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        url = "http://{}:{}".format(*listening.getsockname())
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


async def cancel_by_asyncio(app: FastAPI, when: Awaitable[object]) -> None:
    """Cancel the task of a request, twice, when it has come so far."""
    task = asyncio.create_task(app(scope(), disconnected, send_nothing))
    await when
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_by_timeout(app: FastAPI, when: Awaitable[object]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as deadline, asyncio.TaskGroup() as group:

            async def expire() -> None:
                await when
                deadline.reschedule(0)

            group.create_task(expire())
            await app(scope(), disconnected, send_nothing)


async def cancel_by_anyio(app: FastAPI, when: Awaitable[object]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(app, scope(), disconnected, send_nothing)
        await when
        group.cancel_scope.cancel()


cancelled_each_way = pytest.mark.parametrize(
    "cancel", [cancel_by_asyncio, cancel_by_timeout, cancel_by_anyio]
)
Cancel = Callable[[FastAPI, Awaitable[object]], Awaitable[None]]


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until it holds; a test that waits in vain times out."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def drained(*databases: AsyncDatabase | Database) -> bool:
    """Whether every unit ends by itself: a clean-up may go on after its request."""
    return all(
        [
            await each.drain(10)
            if isinstance(each, AsyncDatabase)
            else await asyncio.to_thread(each.drain, 10)
            for each in databases
        ]
    )
