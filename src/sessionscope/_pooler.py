"""Behind PgBouncer in transaction mode, where each transaction may have another server session.

Nothing may be left in a session for the next transaction: no prepared statement that is
found by its name, and no setting, which another client would come upon
(https://www.pgbouncer.org/features.html).
"""

from typing import Any
from uuid import uuid4

from sqlalchemy import URL


def without_a_session(url: URL) -> dict[str, Any]:
    """Return the arguments for the driver's connect() that keep sessions as they are."""
    driver = url.get_driver_name()
    if driver == "psycopg":
        return {"prepare_threshold": None}
    if driver == "asyncpg":
        return {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            # Two clients of one server session must not give one name to two statements.
            "prepared_statement_name_func": lambda: f"sessionscope_{uuid4().hex}",
        }
    return {}


# What a read-only unit has instead of autocommit mode and a setting of its session: a transaction
# that says so itself. asyncpg needs one anyway, to run a statement where it has prepared it.
READ_ONLY = {"postgresql_readonly": True}
