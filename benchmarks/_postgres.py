"""An empty PostgreSQL database to measure on, and how many connections it has."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import psycopg
from psycopg import sql
from sqlalchemy import URL, make_url

from benchmarks._model import create_items


@contextmanager
def empty_database(url: str | None) -> Iterator[URL]:
    """Yield the URL of a database with one table, dropped at the end.

    It is made on the server of *url*; without one, on a server of our own.
    """
    with ExitStack() as stack:
        if url is None:
            from sessionscope.testing import PostgresServer

            url = stack.enter_context(PostgresServer()).url()
        server = make_url(url).set(drivername="postgresql+psycopg")
        name = f"sessionscope_bench_{os.getpid()}"
        quoted = sql.Identifier(name)
        _execute(server, sql.SQL("CREATE DATABASE {}").format(quoted))
        stack.callback(_execute, server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
        database = server.set(database=name)
        create_items(text(database))
        yield database


def text(url: URL) -> str:
    """Return *url* as a string that can be connected to."""
    return url.render_as_string(hide_password=False)


def conninfo(url: URL) -> str:
    """Return *url* as libpq reads it."""
    return text(url.set(drivername="postgresql"))


def through(url: URL, port: int) -> str:
    """Return *url* led through a proxy on *port* of this machine."""
    return text(url.set(host="127.0.0.1", port=port))


def named(url: str, application: str) -> str:
    """Return *url* with the name by which `Backends` counts its connections."""
    return text(make_url(url).update_query_dict({"application_name": application}))


def _execute(server: URL, command: sql.Composed) -> None:
    with psycopg.connect(conninfo(server), autocommit=True) as connection:
        connection.execute(command)


BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"


def idle_in_transaction(url: URL, application: str) -> int:
    """Return how many of the application's transactions are open with nothing to do."""
    with psycopg.connect(conninfo(url)) as connection:
        query = f"{BACKENDS} AND state = 'idle in transaction'"
        row = connection.execute(query, [application]).fetchone()
        return row[0] if row else 0


class Backends:
    """Samples how many server connections an application has, in a thread, while in a block."""

    INTERVAL = 0.05

    def __init__(self, url: URL, application: str) -> None:
        self._url = url
        self._application = application
        self._stop = threading.Event()
        self.most = 0

    def __enter__(self) -> Self:
        self._connection = psycopg.connect(conninfo(self._url), autocommit=True)
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _sample(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            row = self._connection.execute(BACKENDS, [self._application]).fetchone()
            self.most = max(self.most, row[0] if row else 0)
