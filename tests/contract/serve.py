"""Serve one site on a socket that the parent has opened: `python -m tests.contract.serve`."""

import os
import socket
import sys
from importlib import import_module
from typing import Any

from sessionscope import AsyncDatabase, Database
from tests.contract.bodies import Kept

# As many as Starlette has for `def` endpoints.
THREADS = 40
# No one listens on this port, and a connection to it is refused at once.
DOWN = "postgresql+{driver}://user:password@127.0.0.1:1/down"


def app_of(module: str, url: str) -> Any:
    """Build the site's application: on a Database of each size, and on one that is down."""
    make: Any = Database
    driver = "psycopg"
    if module.endswith("_async"):
        make, driver = AsyncDatabase, "asyncpg"
    url = url.replace("+psycopg:", f"+{driver}:")
    databases = {
        "main": make(url, pool_timeout=30),
        "small": make(url, pool_size=1, max_overflow=0, pool_timeout=0.1),
        "down": make(DOWN.format(driver=driver)),
    }
    return import_module(f"tests.contract.sites.{module}").build(databases, Kept())


def wsgi() -> Any:
    """Build the application for gunicorn, which takes no arguments for it."""
    return app_of(os.environ["SITE"], os.environ["SITE_URL"])


def serve_with_uvicorn(app: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


def serve_with_waitress(app: Any, listening: socket.socket) -> None:
    import waitress

    waitress.serve(
        app,
        sockets=[listening],
        threads=THREADS,
        connection_limit=1000,
        backlog=2048,
        asyncore_use_poll=True,
        _quiet=True,
    )


if __name__ == "__main__":
    _, server, module, url, descriptor = sys.argv
    serve = {"uvicorn": serve_with_uvicorn, "waitress": serve_with_waitress}[server]
    serve(app_of(module, url), socket.socket(fileno=int(descriptor)))
