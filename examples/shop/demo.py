"""What ``make demo`` runs: the shop with its first goods, on http://127.0.0.1:8000.

``PORT`` and ``DATABASE_URL`` are read from the environment.
"""

import logging
import os
import socket
from contextlib import suppress

import uvicorn

from . import page
from .console import one_line_errors, stop
from .database import database
from .main import app
from .seed import create_and_fill

HOST = "127.0.0.1"


def port_wanted() -> int:
    """Return the environment's PORT; 0 takes any free one."""
    text = os.environ.get("PORT") or "8000"
    if not (text.isdecimal() and int(text) <= 65535):
        raise stop(f"PORT={text!r} is no port number: write PORT=8001 make demo")
    return int(text)


def listen(port: int) -> socket.socket:
    """Return a socket that listens on *port*; whoever calls early waits in its backlog."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        mend = f"choose another one: PORT={port + 1 if 1024 <= port < 65535 else 8001} make demo"
        raise stop(f"port {port} cannot be used ({reason}), {mend}") from None


def welcome(address: str) -> str:
    """Return what the terminal shows."""
    return "\n".join(
        [
            f"The shop is open: {address}  ({page.kind(database.engine)}; Ctrl-C closes it)",
            "Try, in another terminal:",
            *(f"  {line}" for line in page.curl_lines(address)),
        ]
    )


def main() -> None:
    """Take the port first, then touch the database, then serve."""
    with listen(port_wanted()) as door:
        create_and_fill(database)
        print(welcome(f"http://{HOST}:{door.getsockname()[1]}/"), flush=True)
        logging.basicConfig(format="%(levelname)s:     %(message)s")
        logging.getLogger("shop").setLevel(logging.INFO)
        serve(door)


def serve(door: socket.socket) -> None:
    """Serve until Ctrl-C, which is how a demo ends."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[door])
    print("\nThe shop is closed.")


if __name__ == "__main__":
    with one_line_errors():
        main()
