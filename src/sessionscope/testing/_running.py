"""The statement that is running on the connection of a sandbox, and how it is ended."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


class Running:
    """The one statement that is running on *real*, a connection that outlives it.

    *connect* opens another one to the same server.
    """

    def __init__(self, real: Any, connect: Callable[[], Any]) -> None:
        self._real = real
        self._connect = connect
        self._lock = threading.Lock()
        self._whose: object = None

    @contextmanager
    def of(self, whose: object) -> Generator[None]:
        """Say that the statement of the block is that of *whose*."""
        self._whose = whose
        try:
            yield
        finally:
            with self._lock:  # who is ending it does so before the next one begins
                self._whose = None

    def end(self, whose: object) -> None:
        """End the statement that is running if it is that of *whose*, from another thread."""
        with self._lock:
            if whose is not None and self._whose is whose:
                self._end()

    def _end(self) -> None:
        for name in ("cancel_safe", "cancel", "interrupt"):  # psycopg, psycopg2, sqlite3
            if hasattr(self._real, name):
                getattr(self._real, name)()
                return
        beside = self._connect()  # MySQL's protocol knows no other way
        try:
            beside.cursor().execute(f"KILL QUERY {self._real.thread_id()}")
        finally:
            beside.close()
