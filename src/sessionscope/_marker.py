"""Marker: a row that is committed with a unit of work, so that a lost COMMIT can be looked up.

MySQL and MariaDB do not tell what became of a transaction. Who asks writes the same
row, marked as not done: that waits for the lock of a session that may still commit, and
forbids, once written, that it ever does. So an answer is for good, also after a failover to
a server which the transaction has not reached yet.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from sessionscope._identity import Verdict
from sessionscope._retry import code_of

# Keys in a connection's info of the server that it leads to, and of the row that it wrote last.
_SERVER = "sessionscope.server"
_LAST = "sessionscope.marker"

_WHICH_SERVER = "SELECT CONCAT_WS('/', @@hostname, @@port, @@server_id)"
# ER_LOCK_WAIT_TIMEOUT
_STILL_LOCKED = 1205
# The first row of a connection, and each later one in its place.
_FIRST = "INSERT INTO {} (unit) VALUES ('{}')"
_NEXT = "UPDATE {} SET unit = '{}' WHERE unit = '{}'"
# What whoever asks puts in the place of a row that is missing, once its session lets it.
_FORBID = "INSERT INTO {} (unit, done) VALUES ('{}', FALSE) ON DUPLICATE KEY UPDATE done = done"
_DONE = "SELECT done FROM {} WHERE unit = '{}'"
# Rows of connections that were closed since; a lost COMMIT is looked up within seconds.
_SWEEP = "DELETE FROM {} WHERE at < NOW() - INTERVAL 1 DAY"


@dataclass(slots=True)
class Marker:
    """The row of one transaction, and the session that has written it."""

    table: str
    unit: str
    server: str
    backend: int

    is_known = True

    def find_out(self, connection: Connection, *, end: bool) -> Verdict | None:
        """Return whether the row was committed; ``None`` while its session holds it.

        The connection, which gets settings of its own for that, is not used again.
        """
        try:
            connection.exec_driver_sql("SET SESSION TRANSACTION READ WRITE")
            connection.exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 1")
            connection.exec_driver_sql(_FORBID.format(self.table, self.unit))
            done = connection.exec_driver_sql(_DONE.format(self.table, self.unit)).scalar_one()
            return "committed" if done else "aborted"
        except DBAPIError as error:
            if code_of(error.orig) == _STILL_LOCKED and end:
                self._end_session(connection)
            return None
        finally:
            connection.invalidate()

    def _end_session(self, connection: Connection) -> None:
        connection.rollback()  # of nothing: in autocommit mode SQLAlchemy begins one, too
        # Elsewhere its number is another session's.
        if connection.exec_driver_sql(_WHICH_SERVER).scalar() == self.server:
            with suppress(DBAPIError):  # it has ended in this very moment
                connection.exec_driver_sql(f"KILL {self.backend}")


def leave_marker(proxied: PoolProxiedConnection, table: str) -> Marker:
    """Write the row of a transaction that is about to commit (a round trip).

    It takes the place of the row that the connection has left before.
    """
    info, unit = proxied.info, uuid4().hex
    driver: Any = proxied.driver_connection
    cursor = proxied.cursor()
    try:
        if _SERVER not in info:
            cursor.execute(_WHICH_SERVER)
            row: Any = cursor.fetchone()
            info[_SERVER] = row[0]
        last, info[_LAST] = info.get(_LAST), unit
        if last is not None:
            cursor.execute(_NEXT.format(table, unit, last))
        if last is None or not cursor.rowcount:
            cursor.execute(_FIRST.format(table, unit))
    finally:
        cursor.close()
    return Marker(table, unit, info[_SERVER], driver.thread_id())


def sweep_markers(engine: Engine, table: str) -> None:
    """Remove the rows that no one can ask for any more, with each new connection."""

    def connected(dbapi_connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        # The table may not be there yet: this connection may be the one that creates it.
        with suppress(engine.dialect.loaded_dbapi.Error):
            cursor = dbapi_connection.cursor()
            cursor.execute(_SWEEP.format(table))
            cursor.close()
        dbapi_connection.commit()

    event.listen(engine, "connect", connected)
