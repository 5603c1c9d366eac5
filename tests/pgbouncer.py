"""PgBouncer in transaction mode in front of a PostgreSQL server, for tests."""

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from sqlalchemy import URL

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_SETTINGS = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
max_client_conn = 500
ignore_startup_parameters = extra_float_digits
"""
_PATIENCE = 10.0


@contextmanager
def pgbouncer(server: URL) -> Iterator[URL]:
    """Run PgBouncer with three server sessions for all clients; yield the URL that leads there."""
    assert PROGRAM is not None
    port = _any_port()
    with TemporaryDirectory(prefix="sessionscope-pgbouncer-") as folder:
        settings = Path(folder, "pgbouncer.ini")
        settings.write_text(
            _SETTINGS.format(host=server.host, port=server.port, user=server.username, listen=port)
        )
        Path(folder).chmod(0o755)
        # It refuses to run as root.
        user = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None
        process = subprocess.Popen([PROGRAM, "-q", str(settings)], user=user)
        try:
            _wait_for(port, process)
            yield server.set(host="127.0.0.1", port=port)
        finally:
            process.terminate()
            process.wait()


def _any_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    until = monotonic() + _PATIENCE
    while monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            continue
        return
    raise RuntimeError("PgBouncer did not start")
