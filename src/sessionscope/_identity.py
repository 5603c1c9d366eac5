"""Identity: what a transaction is called by its server, so that its outcome can be asked for.

And what else travels to the server together with BEGIN, for no round trip more: the
limit of time for each of its statements. PostgreSQL answers a lost COMMIT with
``pg_xact_status()``, which needs the transaction's id; an id that is
fetched with COMMIT is lost with it, so it is asked for at the beginning.
"""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from sessionscope._guards import Scope

# Of libpq: the command has returned rows; the connection is idle, or in a failed transaction.
_PGRES_TUPLES_OK, _PQTRANS_IDLE, _PQTRANS_INERROR = 2, 0, 3
# Of psycopg2: it has sent BEGIN, and neither COMMIT nor ROLLBACK (extensions.STATUS_BEGIN).
_BEGUN = 2

# Keys in a connection's info: the Identity of its transaction, the server that it leads to, and
# the limit in milliseconds that it has by itself: its role's, its database's, or its options'.
IDENTITY = "sessionscope.identity"
_SERVER = "sessionscope.server"
_OWN = "sessionscope.statement_timeout"
# In milliseconds, as which PostgreSQL takes a number without a unit.
_UNITS = {"": 1, "ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_SAYS_ID = "sessionscope transaction "

# An id means something on its server and timeline only: after a failover another
# transaction may have it. After a crash, too: ids that the log on disk does not mention are given
# out again. A crash is known by the server's statistics, which it resets. On a standby there is
# none to be had.
# The timeline is that of the log: that of the last checkpoint is behind after a promotion.
_WHICH_SERVER = (
    "SELECT CASE WHEN NOT pg_is_in_recovery() AND to_regproc('pg_current_xact_id') IS NOT NULL "
    "AND EXISTS (SELECT FROM pg_language "
    "WHERE lanname = 'plpgsql' AND has_language_privilege(oid, 'USAGE')) "
    "THEN system_identifier || '/' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) "
    "|| ' ' || extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time()) END "
    "FROM pg_control_system()"
)
_LIMIT = "SET LOCAL statement_timeout = {}"
# Not a SELECT, after which no SET TRANSACTION is allowed any more.
_OWN_LIMIT = "SHOW statement_timeout"
_ID = "SELECT pg_current_xact_id()"
_ID_SO_FAR = "SELECT pg_current_xact_id_if_assigned()"
# asyncpg drops the rows of a simple query, and hands on what the server reports.
_TELL_ID = f"DO $$BEGIN RAISE INFO '{_SAYS_ID}%', pg_current_xact_id(); END$$"
# Since a crash, the id is another transaction's if it has been given out again. Ours has not
# committed unless that one has: what has committed is in the log. One in progress is waited for:
# it is ours if the statistics were reset by hand.
_OUTCOME = """\
SELECT CASE
    WHEN server = '{server}' THEN pg_xact_status('{xid}'::xid8)
    WHEN split_part(server, ' ', 1) <> split_part('{server}', ' ', 1) THEN 'unknowable'
    WHEN EXISTS (SELECT FROM pg_stat_activity WHERE backend_xid = '{xid}'::xid8::xid)
    THEN 'in progress'
    WHEN '{xid}'::xid8 >= pg_snapshot_xmax(pg_current_snapshot()) THEN 'aborted'
    WHEN pg_xact_status('{xid}'::xid8) = 'aborted' THEN 'aborted'
    ELSE 'unknowable' END
FROM ({which_server}) AS here(server) WHERE server IS NOT NULL"""
# Its session may still be there, waiting for a client that is gone. One that waits for a standby
# has committed here, and its end would have it called done before the standby has it.
_END_BACKEND = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = {} "
    "AND backend_xid = '{}'::xid8::xid AND wait_event IS DISTINCT FROM 'SyncRep'"
)
# A commit of its own, which waits for the same standbys as the one before it, where there are any.
_WAIT_FOR_STANDBYS = (
    "SELECT pg_logical_emit_message(true, 'sessionscope', '') "
    "WHERE current_setting('synchronous_standby_names') <> ''"
)


# What became of a transaction; the last one: nobody is left who could say.
Verdict = Literal["committed", "aborted", "unknowable"]


@dataclass(slots=True)
class Identity:
    """A transaction of PostgreSQL: its server, timeline and crash, its backend, its 64-bit id."""

    server: str
    backend: int
    xid: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether the server has given it an id, which it does to what writes."""
        return self.xid is not None

    def find_out(self, connection: Connection, *, end: bool) -> Verdict | None:
        """Return what its server says of it; ``None``: nothing yet. *end* its session, if need be.

        The answer of another server or timeline, or of one that has crashed since, counts for
        little: there, the same id may be another transaction's. What standbys have to confirm has
        committed once they have.
        """
        query = _OUTCOME.format(server=self.server, xid=self.xid, which_server=_WHICH_SERVER)
        status = connection.exec_driver_sql(query).scalar()  # none from a standby
        if status == "in progress" and end:
            connection.exec_driver_sql(_END_BACKEND.format(self.backend, self.xid))
        elif status == "committed":
            connection.exec_driver_sql(_WAIT_FOR_STANDBYS)
            connection.commit()
        return status if status in ("committed", "aborted", "unknowable") else None


# Sends BEGIN for a unit and a limit in milliseconds, or has the driver send that with its own.
_Begin = Callable[[Scope, PoolProxiedConnection, int | None], None]


def begin(scope: Scope, connection: Connection) -> None:
    """Begin the transaction of a unit that has a deadline, or may run again.

    Where nothing can be sent with BEGIN, or that fails, the driver begins as ever. For a
    savepoint, whose transaction has begun, nothing is sent.
    """
    timer = scope.timer
    if timer is not None:
        timer.use(connection)
    send = _BEGINS.get((connection.dialect.name, connection.dialect.driver))
    if send is None or scope.autocommit:
        return
    limit = None if timer is None else max(1, int(timer.deadline.for_server * 1000))
    try:
        send(scope, connection.connection, limit)
    except BaseException:
        connection.invalidate()  # what it was sent may still be answered
        raise


def _with_libpq(scope: Scope, proxied: PoolProxiedConnection, limit: int | None) -> None:
    driver: Any = proxied.driver_connection
    libpq = driver.pgconn
    if driver.autocommit or _status(libpq) != _PQTRANS_IDLE:
        return
    send = _send_async if scope.is_async else _send
    info = proxied.info
    identity = info[IDENTITY] = _identity(
        scope, proxied, libpq.backend_pid, lambda: _value(send(driver, _WHICH_SERVER))
    )
    driver._begin_statement = b""  # psycopg keeps there what it begins with by itself
    commands = [_begin_like(driver), *([_ID] if identity else ())]
    if limit is not None:
        limit = int(min(limit, info.get(_OWN, limit)))
        commands[1:1] = _OWN_LIMIT, _LIMIT.format(limit)
    results = send(driver, "; ".join(commands))
    if _status(libpq) == _PQTRANS_INERROR:
        send(driver, "ROLLBACK")
        return
    if limit is not None and len(results) == len(commands):
        own = info[_OWN] = _milliseconds(_value(results[1:2]) or "")
        if own < limit:  # this connection was not asked before, or it was changed
            send(driver, _LIMIT.format(int(own)))
    if identity is not None and (xid := _value(results)):
        identity.xid = int(xid)


def _with_psycopg2(scope: Scope, proxied: PoolProxiedConnection, limit: int | None) -> None:
    """Note the server; the id is asked for before COMMIT, as nothing can ride with BEGIN."""
    driver: Any = proxied.driver_connection
    if driver.autocommit or driver.info.transaction_status != _PQTRANS_IDLE:
        return

    def ask() -> str | None:
        # What only speaks PostgreSQL's protocol has no such functions; if the connection is
        # lost, the next statement says so.
        with suppress(Exception):
            driver.autocommit = True
            try:
                return _fetch_value(driver, _WHICH_SERVER)
            finally:
                driver.autocommit = False
        return None

    proxied.info[IDENTITY] = _identity(scope, proxied, driver.info.backend_pid, ask)


def is_of_another(identity: Identity, proxied: PoolProxiedConnection) -> bool:
    """Return whether COMMIT or ROLLBACK sent as text has ended the transaction with that id."""
    driver: Any = proxied.driver_connection
    if _is_psycopg2(driver):  # which does not notice, and begins no other one
        return bool(driver.status == _BEGUN and driver.info.transaction_status == _PQTRANS_IDLE)
    if identity.xid is None:
        return False
    if hasattr(driver, "riders"):  # asyncpg's
        return not driver.is_in_transaction()
    return bool(getattr(driver, "_begin_statement", b""))


def ask_late(identity: Identity, proxied: PoolProxiedConnection) -> None:
    """Ask for the id of a transaction that is about to commit, if it has one (a round trip)."""
    if _is_psycopg2(proxied.driver_connection):
        xid = _fetch_value(proxied.driver_connection, _ID_SO_FAR)
        identity.xid = int(xid) if xid else None


def _is_psycopg2(driver: Any) -> bool:
    return hasattr(driver, "set_session")


def _fetch_value(driver: Any, query: str) -> str | None:
    with driver.cursor() as cursor:
        cursor.execute(query)
        row = cursor.fetchone()
    return str(row[0]) if row and row[0] is not None else None


def _identity(
    scope: Scope, proxied: PoolProxiedConnection, backend: int, ask: Callable[[], str | None]
) -> Identity | None:
    """Return what is known of the transaction before it begins; a server is asked once."""
    if not scope.may_run_again or scope.read_only:  # nothing of it is ever committed
        return None
    info = proxied.info
    if _SERVER not in info:
        info[_SERVER] = ask()
    return Identity(info[_SERVER], backend) if info[_SERVER] else None


def _milliseconds(setting: str) -> float:
    """Return what a setting like ``5s`` is; one that is off, or not known, is without end."""
    match = re.fullmatch(r"(\d+)([a-z]*)", setting)
    return int(match[1]) * _UNITS.get(match[2], 0) or inf if match else inf


def _status(libpq: Any) -> int:
    return int(libpq.transaction_status)


def _begin_like(driver: Any) -> str:
    """Return the BEGIN that psycopg would send."""
    parts = ["BEGIN"]
    if driver.isolation_level is not None:
        parts.append(f"ISOLATION LEVEL {driver.isolation_level.name.replace('_', ' ')}")
    if driver.read_only is not None:
        parts.append("READ ONLY" if driver.read_only else "READ WRITE")
    if driver.deferrable is not None:
        parts.append("DEFERRABLE" if driver.deferrable else "NOT DEFERRABLE")
    return " ".join(parts)


def _send(driver: Any, command: str) -> list[Any]:
    """Return the results of *command*; where the connection is lost, the next statement says so."""
    # As psycopg's own execute() does, which would send a BEGIN of its own before this one.
    with suppress(sys.modules["psycopg"].Error), driver.lock:
        driver.pgconn.send_query(command.encode())
        results: list[Any] = driver.wait(_results(driver))
        return results
    return []


def _send_async(driver: Any, command: str) -> list[Any]:
    with suppress(sys.modules["psycopg"].Error):
        driver.pgconn.send_query(command.encode())
        results: list[Any] = await_only(driver.wait(_results(driver)))
        return results
    return []


def _results(driver: Any) -> Any:
    return sys.modules["psycopg.generators"].execute(driver.pgconn)


def _value(results: list[Any]) -> str | None:
    """Return the first value of the last result, if that has one."""
    if not results or results[-1].status != _PGRES_TUPLES_OK or not results[-1].ntuples:
        return None
    value: bytes | None = results[-1].get_value(0, 0)
    return None if value is None else value.decode()


def _with_asyncpg(scope: Scope, proxied: PoolProxiedConnection, limit: int | None) -> None:
    driver: Any = proxied.driver_connection
    if not hasattr(driver, "riders") or driver.is_in_transaction():
        return
    info = proxied.info
    identity = info[IDENTITY] = _identity(
        scope, proxied, driver.get_server_pid(), lambda: await_only(_fetch(driver, _WHICH_SERVER))
    )
    riders = [_TELL_ID] if identity else []
    if limit is not None:
        if _OWN not in info:  # asyncpg drops what would come with BEGIN
            info[_OWN] = _milliseconds(await_only(_fetch(driver, _OWN_LIMIT)) or "")
        riders.insert(0, _LIMIT.format(int(min(limit, info[_OWN]))))
    driver.riders = "; ".join(riders)
    driver.identity = identity
    driver.scope = scope


async def _fetch(driver: Any, query: str) -> str | None:
    with suppress(Exception):  # what only speaks PostgreSQL's protocol has no such functions
        value: str | None = await driver.fetchval(query)
        return value
    return None


def let_ride(engine: Engine) -> None:
    """Let connections of asyncpg send with their BEGIN what a unit has for it."""
    if engine.dialect.driver != "asyncpg":
        return
    classes: dict[type[Any], type[Any]] = {}

    def connecting(dialect: object, record: object, args: object, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("connection_class", sys.modules["asyncpg"].Connection)
        if hasattr(given, "riders"):  # SQLAlchemy 2.0 keeps what was set for the last connection
            return
        if given not in classes:
            classes[given] = _with_riders(given)
        kwargs["connection_class"] = classes[given]

    event.listen(engine, "do_connect", connecting)


def _with_riders(connection_class: type[Any]) -> type[Any]:
    """Return a class of connections whose BEGIN takes along what a unit has for it."""
    parent: Any = connection_class

    class Connection(parent):  # type: ignore[misc]  # asyncpg's, or the user's
        riders = ""
        scope: Scope | None = None
        identity: Identity | None = None

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
            scope, self.scope = self.scope, None
            if scope is not None and not scope.ended and query.startswith("BEGIN"):
                query = f"{query} {self.riders}"
                if self.identity is not None:
                    self.add_log_listener(_hear)
            status: str = await parent.execute(self, query, *args, timeout=timeout)
            return status

    return Connection


def _hear(connection: Any, message: Any) -> None:
    if message.message.startswith(_SAYS_ID) and connection.identity is not None:
        connection.identity.xid = int(message.message.removeprefix(_SAYS_ID))


_BEGINS: dict[tuple[str, str], _Begin] = {
    ("postgresql", "psycopg"): _with_libpq,
    ("postgresql", "psycopg_async"): _with_libpq,
    ("postgresql", "psycopg2"): _with_psycopg2,
    ("postgresql", "asyncpg"): _with_asyncpg,
}
