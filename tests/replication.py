"""A streaming standby of a PostgreSQL server, for tests of what a failover does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import psycopg
from sqlalchemy import make_url

from sessionscope.testing import PostgresServer
from sessionscope.testing._postgres import _Home

_PATIENCE = 30.0


class Standby(PostgresServer):
    """A copy of a running server that follows it, until it is promoted."""

    def __init__(self, primary: PostgresServer) -> None:
        super().__init__()
        self._primary = primary

    def start(self) -> None:
        if self._home is None:
            self._home = self._copy()
        super().start()

    def promote(self) -> None:
        """Make it a primary, on a timeline of its own."""
        assert self._home is not None
        assert self._home.spawn("pg_ctl", "promote", "--wait").wait(_PATIENCE) == 0

    def catch_up(self) -> None:
        """Wait until it has all that the primary has written so far."""
        written = ask(self._primary, "SELECT pg_current_wal_lsn()")
        until(self, f"SELECT pg_last_wal_replay_lsn() >= '{written}'")

    def stop_following(self) -> None:
        """Receive nothing more from the primary."""
        ask(self, "ALTER SYSTEM SET primary_conninfo = ''")
        ask(self, "SELECT pg_reload_conf()")
        until(self, "SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def _copy(self) -> _Home:
        home = _Home(self._package)
        home.log.touch()
        if os.geteuid() == 0:
            home._move_in("nobody")
        source = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres"]
        backup = home.spawn(
            "pg_basebackup", *source, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"
        )
        if backup.wait(_PATIENCE) != 0:
            raise RuntimeError(f"pg_basebackup failed:\n{home.log_tail()}")
        return home


@contextmanager
def primary_and_standby() -> Iterator[tuple[PostgresServer, Standby]]:
    """Two servers of their own: what is done to them reaches no other test."""
    with PostgresServer() as primary, Standby(primary) as standby:
        yield primary, standby


def demote(primary: PostgresServer) -> None:
    """Have a primary refuse all writes from now on; wait for those that are under way."""
    ask(primary, "ALTER SYSTEM SET default_transaction_read_only = on")
    ask(primary, "SELECT pg_reload_conf()")
    until(primary, "SHOW default_transaction_read_only", "on")
    until(primary, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_xid IS NOT NULL")


def switch_over(primary: PostgresServer, standby: Standby) -> None:
    """Make *standby* the primary, and leave the old one running, for reads alone."""
    demote(primary)
    standby.catch_up()
    standby.promote()


def of_both(url: str, *servers: PostgresServer, commas: bool = False) -> str:
    """The URL of a database for clients that look for the server that takes writes."""
    if commas:
        query = {
            "host": ",".join("127.0.0.1" for _ in servers),
            "port": ",".join(str(server.port) for server in servers),
        }
    else:
        query = {"host": tuple(f"127.0.0.1:{server.port}" for server in servers)}  # type: ignore[dict-item]  # a URL takes both
    shared = make_url(url)._replace(host=None, port=None)  # set() leaves what is None as it was
    both = shared.update_query_dict({**query, "target_session_attrs": "read-write"})
    return both.render_as_string(hide_password=False)


def ask(server: PostgresServer, query: str, database: str = "postgres") -> Any:
    """The first value that a server answers with, if any."""
    conninfo = server.url(database).replace("+psycopg", "")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def until(server: PostgresServer, query: str, wanted: object = True) -> None:
    """Wait until a server gives the wanted answer."""
    deadline = monotonic() + _PATIENCE
    while ask(server, query) != wanted:
        assert monotonic() < deadline, query
        sleep(0.01)
