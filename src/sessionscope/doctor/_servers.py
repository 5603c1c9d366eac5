"""What a server says of itself, asked over one connection of the writing engine."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from sessionscope.doctor._line import Line, line
from sessionscope.doctor._pool import Room
from sessionscope.doctor._versions import server_version

# Seconds by which clocks may differ: more confuses expiry dates and the order of what happened.
_CLOCK = 1.0
_QUESTIONS = 9


@dataclass(frozen=True)
class Server:
    """What was found out about a server."""

    lines: list[Line]
    room: Room | None = None
    """Where connections are counted at all."""


def examine(connection: Connection) -> Server:
    """Ask the server of *connection*."""
    ask = _EXAMINE.get(connection.dialect.name)
    if ask is None:
        return Server([line("server", connection.dialect.name, note=True, mend="It is not known")])
    return ask(connection)


def _postgresql(connection: Connection) -> Server:
    settings = dict(_rows(connection, "SELECT name, setting FROM pg_settings"))
    reserved = sum(
        int(settings.get(name, 0))
        for name in ("superuser_reserved_connections", "reserved_connections")
    )
    others = _value(
        connection,
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' "
        "AND application_name IS DISTINCT FROM current_setting('application_name') "
        "AND pid <> pg_backend_pid()",
    )
    lines = [
        _server(connection, "PostgreSQL"),
        server_version("postgresql", settings["server_version"]),
        _role(read_only=_value(connection, "SELECT pg_is_in_recovery()")),
        line("isolation", settings["default_transaction_isolation"]),
        _clock(connection, "SELECT extract(epoch FROM clock_timestamp())"),
        _tls(connection, _value(connection, _POSTGRESQL_TLS)),
        line(
            "durability",
            f"fsync {settings['fsync']}, synchronous_commit {settings['synchronous_commit']}",
            bad=settings["fsync"] == "off",
            note=settings["synchronous_commit"] == "off",
            mend="A crash of the server may undo what it has confirmed: turn it on",
        ),
        line(
            "idle units",
            f"idle_in_transaction_session_timeout {settings['idle_in_transaction_session_timeout']}"
            " ms",
            note=settings["idle_in_transaction_session_timeout"] == "0",
            mend="A client that hangs in a transaction keeps its locks for ever: "
            "ALTER ROLE ... SET idle_in_transaction_session_timeout = '60s'",
        ),
    ]
    return Server(lines, Room(int(settings["max_connections"]) - reserved, int(others)))


_POSTGRESQL_TLS = (
    "SELECT CASE WHEN ssl THEN version END FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
)


def _mysql(connection: Connection) -> Server:
    variables = dict(_rows(connection, "SHOW VARIABLES"))
    status = dict(_rows(connection, "SHOW STATUS"))
    is_mariadb = "MariaDB" in variables["version"]
    isolation = variables.get("transaction_isolation") or variables["tx_isolation"]
    cipher = status.get("Ssl_version") or None
    lines = [
        _server(connection, "MariaDB" if is_mariadb else "MySQL"),
        server_version("mariadb" if is_mariadb else "mysql", variables["version"]),
        _role(read_only=variables["read_only"] != "OFF"),
        line("isolation", isolation),
        _clock(connection, "SELECT UNIX_TIMESTAMP(NOW(6))"),
        _tls(connection, cipher),
        line(
            "durability",
            f"innodb_flush_log_at_trx_commit {variables['innodb_flush_log_at_trx_commit']}",
            note=variables["innodb_flush_log_at_trx_commit"] != "1",
            mend="A crash of the server may undo what it has confirmed: set it to 1",
        ),
        line(
            "strictness",
            f"sql_mode {variables['sql_mode']}",
            bad="STRICT_" not in variables["sql_mode"],
            mend="Values that do not fit are cut off without an error: add STRICT_TRANS_TABLES",
        ),
        line(
            "engine",
            f"default_storage_engine {variables['default_storage_engine']}",
            bad=variables["default_storage_engine"] != "InnoDB",
            mend="Other engines than InnoDB do not roll back",
        ),
    ]
    # One more than max_connections is reserved for an administrator.
    most, others = int(variables["max_connections"]), int(status["Threads_connected"]) - 1
    return Server(lines, Room(most, max(0, others)))


def _sqlite(connection: Connection) -> Server:
    pragmas = {
        name: _value(connection, f"PRAGMA {name}")
        for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
    }
    in_memory = pragmas["journal_mode"] == "memory"
    lines = [
        _server(connection, "SQLite"),
        server_version("sqlite", str(_value(connection, "SELECT sqlite_version()"))),
        line(
            "pragmas",
            ", ".join(f"{name} {value}" for name, value in pragmas.items()),
            bad=not pragmas["foreign_keys"] or not (in_memory or pragmas["journal_mode"] == "wal"),
            mend="A Database sets foreign_keys and WAL on its connections: look for a listener or "
            "a file system that undoes it (WAL works on no network drive)",
        ),
    ]
    if in_memory:
        lines.append(line("storage", "in memory", note=True, mend="It ends with the process"))
    return Server(lines)


_EXAMINE: dict[str, Callable[[Connection], Server]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mariadb": _mysql,
    "sqlite": _sqlite,
}


def _server(connection: Connection, name: str) -> Line:
    times = list(_times(connection))
    return line(
        "server",
        f"{name} over {connection.dialect.driver}, {statistics.median(times) * 1e3:.2f} ms per "
        "round trip",
    )


def _times(connection: Connection) -> Iterator[float]:
    for _ in range(_QUESTIONS):
        started = time.perf_counter()
        _value(connection, "SELECT 1")
        yield time.perf_counter() - started


def _role(*, read_only: bool) -> Line:
    return line(
        "role",
        "a server that only reads" if read_only else "a server that writes",
        bad=read_only,
        mend="Units that write will fail: point the URL to the primary (for libpq, several hosts "
        "and target_session_attrs=read-write)",
    )


def _clock(connection: Connection, query: str) -> Line:
    before = time.time()
    there = float(_value(connection, query))
    after = time.time()
    behind = max(0.0, before - there, there - after)
    return line(
        "clock",
        f"{behind:.3f} s apart",
        note=behind > _CLOCK,
        mend="Run a time service (NTP) on both machines",
    )


def _tls(connection: Connection, version: str | None) -> Line:
    host = connection.engine.url.host
    is_near = host is None or host in ("localhost", "127.0.0.1", "::1") or host.startswith("/")
    return line(
        "encryption",
        version or ("none, on this machine" if is_near else "none"),
        bad=version is None and not is_near,
        mend="Passwords and rows cross the network in the clear: sslmode=verify-full for psycopg, "
        "ssl= for asyncpg, ssl_ca= for MySQL's drivers",
    )


def _rows(connection: Connection, query: str) -> list[Any]:
    return [tuple(row) for row in connection.execute(text(query))]


def _value(connection: Connection, query: str) -> Any:
    return connection.execute(text(query)).scalar()
