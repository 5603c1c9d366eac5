"""What is done to a PostgreSQL server and to its backends, from beside."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psycopg
from sqlalchemy import make_url

from sessionscope.testing import PostgresServer

_PATIENCE = 30.0


def dsn(url: str) -> str:
    """The *url* as libpq takes it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def ask(url: str, statement: str) -> list[tuple[Any, ...]]:
    """What the server answers over a connection of its own; nothing for what has no rows."""
    with psycopg.connect(dsn(url), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description is not None else []


def backends(url: str) -> list[int]:
    """The process ids of those who serve this database's clients."""
    return [
        pid
        for (pid,) in ask(
            url,
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY pid",
        )
    ]


def waiting_for(url: str, event: str) -> int:
    """How many of this database's backends wait for *event*."""
    ((count,),) = ask(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        f"AND wait_event = '{event}'",
    )
    return int(count)


def send(number: signal.Signals, *processes: int) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """Let processes stand still meanwhile."""
    send(signal.SIGSTOP, *processes)
    try:
        yield
    finally:
        send(signal.SIGCONT, *processes)


def processes_of(server: PostgresServer) -> list[int]:
    """The server's own process first, then all of its children."""
    assert server.pid is not None
    return [server.pid, *_children_of(server.pid)]


def _children_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            # The name of the program, in brackets, may hold blanks.
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[1]) == parent:
                found.append(int(folder.name))
    return found


def kill_server(server: PostgresServer) -> None:
    """SIGKILL the server's first process, and wait until its orphans have noticed."""
    first, *children = processes_of(server)
    send(signal.SIGKILL, first)
    server.stop()
    until(lambda: not any(_is_there(child) for child in children))


def _is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Any, patience: float = _PATIENCE) -> float:
    """Wait until *condition* is true; return the seconds that it took."""
    began = monotonic()
    while not condition():
        assert monotonic() - began < patience, "it never came true"
        sleep(0.002)
    return monotonic() - began


def answers(url: str) -> bool:
    """Whether the server takes a connection and answers a question."""
    with suppress(psycopg.OperationalError):
        return ask(url, "SELECT 1") == [(1,)]
    return False


def configure(url: str, name: str, value: str) -> None:
    """Change a setting of the whole server, and wait until it is seen."""
    with psycopg.connect(dsn(url), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        connection.execute("SELECT pg_reload_conf()")
    until(lambda: ask(url, f"SHOW {name}") == [(value,)])


def kill_backend(url: str, process: int) -> None:
    """SIGKILL a backend, and wait until the server, which ends all others then, is back."""
    with psycopg.connect(dsn(url), autocommit=True) as another:
        send(signal.SIGKILL, process)
        until(lambda: _is_broken(another))
    until(lambda: answers(url))


def _is_broken(connection: psycopg.Connection[Any]) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def terminate_all(url: str) -> int:
    """End all other connections to this database; return how many there were."""
    ended = ask(
        url,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend'",
    )
    return len(ended)
