"""Serve one subject on a socket that the parent has opened: `python -m benchmarks._serve`."""

import argparse
import gc
import socket
from typing import Any

import uvicorn

from benchmarks._settings import Settings
from benchmarks._subjects import site

# As many as FastAPI has for `def` endpoints.
THREADS = 40


def _asgi(app: Any, listening: socket.socket) -> None:
    # One environment has a faster loop installed than another: all run on the standard one.
    config = uvicorn.Config(app, loop="asyncio", http="h11", log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


def _wsgi(app: Any, listening: socket.socket) -> None:
    import waitress

    # By default it takes 100 clients at most, and logs what waits for a thread.
    waitress.serve(
        app,
        sockets=[listening],
        threads=THREADS,
        connection_limit=1000,
        backlog=2048,
        asyncore_use_poll=True,
        _quiet=True,
    )


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("settings", type=Settings.loads)
    parser.add_argument("descriptor", type=int, help="the listening socket")
    arguments = parser.parse_args()
    made = site(arguments.name, arguments.settings)
    # A full collection of all that was imported stops a server for 0.1 s, now and then.
    gc.collect()
    gc.freeze()
    listening = socket.socket(fileno=arguments.descriptor)
    (_asgi if made.interface == "asgi" else _wsgi)(made.app, listening)


if __name__ == "__main__":
    _main()
