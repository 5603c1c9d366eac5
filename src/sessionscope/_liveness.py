"""Liveness: dead connections are replaced at checkout, without a ping per checkout."""

import asyncio
import select
from collections.abc import Callable
from time import monotonic
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from sessionscope._backends import descriptor, transport_of
from sessionscope._doom import SERVER_STATUS_IN_TRANS, ping

# A server, proxy or firewall may drop a connection without a word; one that was
# idle for longer than this many seconds is pinged before it is used again.
PING_AFTER_IDLE = 30.0

_PQTRANS_IDLE = 0

_RETURNED_AT = "sessionscope.returned_at"
_POLLER = "sessionscope.poller"
_LOOP = "sessionscope.loop"


def keep_alive(engine: Engine) -> None:
    """Replace dead connections at checkout without a round trip.

    A closed connection makes its socket readable, which poll() sees at once. A
    readable socket may as well hold a notice or a TLS ticket, so only then, and
    after PING_AFTER_IDLE seconds, is the driver asked to ping.
    """

    is_async = engine.dialect.is_async

    def connected(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info[_POLLER] = _poller(record.driver_connection)
        record.info[_LOOP] = asyncio._get_running_loop() if is_async else None

    def returned(dbapi_connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED_AT] = monotonic()

    def checked_out(
        dbapi_connection: DBAPIConnection,
        record: ConnectionPoolEntry,
        proxy: PoolProxiedConnection,
    ) -> None:
        returned_at = record.info.get(_RETURNED_AT)
        if returned_at is None:  # it has just been opened
            return
        if is_async and record.info[_LOOP] is not asyncio._get_running_loop():
            raise sa_exc.DisconnectionError("it belongs to another event loop")
        if _is_in_transaction(record.driver_connection):
            raise sa_exc.DisconnectionError("it was given back with a transaction open")
        if monotonic() - returned_at > PING_AFTER_IDLE or record.info[_POLLER]():
            _ping(engine, dbapi_connection)

    event.listen(engine, "connect", connected)
    event.listen(engine, "checkin", returned)
    event.listen(engine, "checkout", checked_out)


def _is_in_transaction(driver_connection: Any) -> bool:
    """Return whether the driver knows of a transaction that was begun after the last one's end."""
    libpq = getattr(driver_connection, "pgconn", None)
    if libpq is None:  # psycopg2 puts it elsewhere
        libpq = getattr(driver_connection, "info", None)
    if libpq is not None:
        return bool(libpq.transaction_status != _PQTRANS_IDLE)
    if hasattr(driver_connection, "is_in_transaction"):  # asyncpg
        return bool(driver_connection.is_in_transaction())
    return bool(getattr(driver_connection, "server_status", 0) & SERVER_STATUS_IN_TRANS)


def _poller(driver_connection: Any) -> Callable[[], object]:
    """Return a function that tells whether the connection's socket is readable."""
    socket = descriptor(driver_connection)
    if socket is None:  # the ping after a pause remains
        return bool
    if not hasattr(select, "poll"):
        return lambda: select.select([socket], [], [], 0)[0]
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    if (transport := transport_of(driver_connection)) is not None:
        # A loop closes the socket at its end, whose number may be another connection's by now.
        return lambda: transport.is_closing() or poll.poll(0)
    return lambda: poll.poll(0)


def _ping(engine: Engine, dbapi_connection: DBAPIConnection) -> None:
    dialect = engine.dialect
    try:
        ping(dialect, dbapi_connection)
    except dialect.loaded_dbapi.Error as error:
        # The pool then closes this connection and opens another in its place.
        raise sa_exc.DisconnectionError(f"the connection was lost while idle: {error}") from error
