"""Demotion: whether a server that refuses to write is a primary no more.

It says the same to who has asked for it, by a READ ONLY transaction or by a setting of the
session. Only if it refuses everybody do the other connections lead to the wrong server, too.
"""

from contextlib import suppress

from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect

from sessionscope._retry import code_of, sqlstate_of

# The SQLSTATE read_only_sql_transaction.
_READ_ONLY_TRANSACTION = "25006"
# ER_OPTION_PREVENTS_STATEMENT, whose text names the option in every language, and
# ER_READ_ONLY_MODE. The option is --read-only, --super-read-only or --innodb-read-only.
_OPTION_PREVENTS, _READ_ONLY_MODE = 1290, 1836
_OPTION = "read-only"

# Whether the server is a standby, or was told to refuse by those who run it.
_REFUSES = (
    "SELECT pg_is_in_recovery() OR EXISTS (SELECT FROM pg_settings "
    "WHERE name = 'default_transaction_read_only' AND setting = 'on' "
    "AND source IN ('configuration file', 'command line'))"
)


def may_be_demoted(error: BaseException | None) -> bool:
    """Return whether the driver's *error* is that of a server that refuses to write."""
    if sqlstate_of(error) == _READ_ONLY_TRANSACTION:
        return True
    code = code_of(error)
    return code == _READ_ONLY_MODE or (code == _OPTION_PREVENTS and _OPTION in str(error))


def is_demoted(dialect: Dialect, connection: DBAPIConnection) -> bool:
    """Return whether a server with such an error refuses everybody.

    PostgreSQL is asked, outside of a transaction (a round trip); MySQL's error has said it.
    """
    if dialect.name in ("mysql", "mariadb"):
        return True
    with suppress(dialect.loaded_dbapi.Error):
        cursor = connection.cursor()
        cursor.execute(_REFUSES)
        row = cursor.fetchone()
        cursor.close()
        connection.rollback()
        return bool(row and row[0])
    return False
