"""Ends a PostgreSQL server and removes its folder once the tests that use it are gone.

Run as a script of its own, so that it survives whatever kills them. It reads the
server's process id, one per line (0: none runs), from a pipe whose other end only
the tests hold.
"""

import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

# On an immediate shutdown the server kills its own laggards after five seconds.
_PATIENCE = 10.0


def watch(parent: int) -> int:
    """Return the last process id announced, as soon as *parent* is gone or says goodbye."""
    server, pending = 0, b""
    # A process that the tests forked holds the pipe open too, hence the second look.
    while os.getppid() == parent:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        received = os.read(0, 1024)
        if not received:
            break
        *announced, pending = (pending + received).split(b"\n")
        if announced:
            server = int(announced[-1])
    return server


def end(server: int, lock: Path) -> None:
    """Shut *server* down at once; its lock file goes last."""
    try:
        os.kill(server, signal.SIGQUIT)
        os.kill(server, signal.SIGCONT)
        deadline = time.monotonic() + _PATIENCE
        while lock.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(server, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if running := watch(parent=int(sys.argv[2])):
        end(running, folder / "data" / "postmaster.pid")
    shutil.rmtree(folder, ignore_errors=True)
