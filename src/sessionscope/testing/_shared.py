"""One PostgreSQL server for all processes of a test run, and a database for each."""

import fcntl
import itertools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sqlalchemy import create_engine, make_url, text

from sessionscope.testing._postgres import PostgresServer

_TEMPLATE = "sessionscope_template"
_numbers = itertools.count(1)


@contextmanager
def shared_postgres(folder: Path, fill: Callable[[str], object] | None = None) -> Generator[str]:
    """Yield the URL of a database of this process's own, on a server shared through *folder*.

    The first process that comes starts the server, calls *fill* with the URL of a database,
    in which it may create tables and rows, and at its end waits for the others before it stops
    the server. Each process gets a copy of that database, in some 50 ms. *fill* must close its
    connections. POSIX systems only; needs psycopg.
    """
    share = _Share(folder)
    try:
        with share.entrance():
            if not share.address.exists():
                share.start(fill)
            share.enter()
            url = _copy(share.address.read_text(encoding="utf-8"))
        yield url
    finally:
        share.leave()


class _Share:
    """The folder's files: who starts the server, who uses it, and where it listens."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "postgres.url"
        self._entrance = folder / "postgres.lock"
        self._users: IO[bytes] = (folder / "postgres.users").open("ab")
        self._server: PostgresServer | None = None

    @contextmanager
    def entrance(self, how: int = fcntl.LOCK_EX) -> Generator[None]:
        """Let one process at a time in."""
        with self._entrance.open("ab") as file:
            fcntl.flock(file, how)
            yield

    def start(self, fill: Callable[[str], object] | None) -> None:
        """Start the server for all, with the database that is copied."""
        self._server = PostgresServer()
        self._server.start()
        url = self._server.create_database(_TEMPLATE)
        if fill is not None:
            fill(url)
        self.address.write_text(self._server.url(), encoding="utf-8")

    def enter(self) -> None:
        """Be a user of the server until :meth:`leave`."""
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Use the server no more; who has started it stops it once no one does."""
        try:
            if self._server is not None:
                self._wait_until_alone()
                self._server.close()
        finally:
            self._users.close()

    def _wait_until_alone(self) -> None:
        while True:
            fcntl.flock(self._users, fcntl.LOCK_EX)
            try:
                # Not waited for: who is in the entrance waits for the lock just taken.
                with self.entrance(fcntl.LOCK_EX | fcntl.LOCK_NB):
                    self.address.unlink(missing_ok=True)
                    return
            except BlockingIOError:
                fcntl.flock(self._users, fcntl.LOCK_UN)


def _copy(server: str) -> str:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}"))
    finally:
        engine.dispose()
    return make_url(server).set(database=name).render_as_string(hide_password=False)
