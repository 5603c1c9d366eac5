"""What databases do not agree on: how a transaction begins, and what ends it unasked."""

from collections.abc import Callable
from typing import Any

from sessionscope.testing._errors import SandboxError

# Runs a statement on the driver's connection and returns its rows, if it has any.
Send = Callable[[str], list[Any]]

_WRITES_NOTHING = {
    *("DESC", "DESCRIBE", "EXPLAIN", "PRAGMA", "SELECT", "SHOW", "TABLE", "VALUES"),
    *("RELEASE", "ROLLBACK", "SAVEPOINT"),
}
_ENDS = {"ABORT", "COMMIT", "END", "PREPARE", "ROLLBACK"}
# MySQL commits before each of them, whatever comes of it
# (https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html).
_MYSQL_ENDS = {
    *("ALTER", "ANALYZE", "BEGIN", "CREATE", "DROP", "FLUSH", "GRANT", "INSTALL", "LOCK"),
    *("OPTIMIZE", "RENAME", "REPAIR", "RESET", "REVOKE", "SET", "START", "TRUNCATE", "XA"),
}

_SQLITE_BUSY = 5
# How a transaction is made read-only, and how that ends, if not with its savepoint.
_READ_ONLY = {
    "postgresql": ("SET TRANSACTION READ ONLY", None),
    "sqlite": ("PRAGMA query_only = 1", "PRAGMA query_only = 0"),
}


class Dialect:
    """One database's ways, as far as a sandbox needs them."""

    def __init__(self, name: str, send: Send) -> None:
        self.name = "mysql" if name == "mariadb" else name
        self._send = send
        self._dangling: frozenset[tuple[Any, ...]] = frozenset()
        self._checks_foreign_keys = False
        self._patience = 0  # in milliseconds

    def begin(self) -> None:
        """Begin the transaction around everything; most drivers do it by themselves.

        Raises SandboxError if another one writes to the SQLite file.
        """
        if self.name == "sqlite":
            self._begin_to_write()
            self._patience = self._send("PRAGMA busy_timeout")[0][0]
            self._checks_foreign_keys = bool(self._send("PRAGMA foreign_keys")[0][0])
            self._dangling = self._dangling_rows()
        if self.name == "mysql":
            self._send("START TRANSACTION")

    def end(self) -> None:
        """Undo what was set on the connection meanwhile, and no rollback undoes."""
        if self.name == "sqlite":
            self.end_read_only()  # of who has not ended
            self._send(f"PRAGMA busy_timeout = {self._patience}")  # a deadline shortens it

    @property
    def refuses_writes(self) -> bool:
        """Whether :meth:`make_read_only` is more than a wish."""
        return self.name in _READ_ONLY

    def make_read_only(self) -> None:
        """Refuse writes from here on, where the database can, in the savepoint just made."""
        if self.refuses_writes:
            self._send(_READ_ONLY[self.name][0])

    def end_read_only(self) -> None:
        """Allow writes again, after that savepoint has ended."""
        switch = _READ_ONLY.get(self.name, (None, None))[1]
        if switch is not None:
            self._send(switch)

    def check_constraints(self) -> None:
        """Raise for the deferred constraints what COMMIT would raise."""
        if self.name == "postgresql":
            # In a savepoint of its own: the constraints are deferred again afterwards. It ends
            # with that of the transaction, which is released next.
            self._send("SAVEPOINT sessionscope_check")
            self._send("SET CONSTRAINTS ALL IMMEDIATE")
            self._send("ROLLBACK TO SAVEPOINT sessionscope_check")

    def has_dangling_reference(self) -> bool:
        """Return whether there is a new row whose foreign key leads nowhere, on SQLite."""
        return not self._dangling_rows() <= self._dangling

    def may_write(self, statement: str) -> bool:
        """Return whether *statement* may change rows, as far as its first word tells."""
        return _first_words(statement)[0] not in _WRITES_NOTHING

    def may_end_the_transaction(self, statement: str) -> bool:
        """Return whether *statement* is one that may commit or roll back everything."""
        first, second = _first_words(statement)
        if (first, second) == ("ROLLBACK", "TO"):
            return False
        return first in _ENDS or (self.name == "mysql" and first in _MYSQL_ENDS)

    def _begin_to_write(self) -> None:
        # At once: who has read before may not wait for a writer any more.
        try:
            self._send("BEGIN IMMEDIATE")
        except Exception as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != _SQLITE_BUSY:
                raise
            file = self._send("PRAGMA database_list")[0][2]
            raise SandboxError(_LOCKED.format(file=file)) from error

    def _dangling_rows(self) -> frozenset[tuple[Any, ...]]:
        if not self._checks_foreign_keys:
            return frozenset()
        return frozenset(tuple(row) for row in self._send("PRAGMA foreign_key_check"))


def _first_words(statement: str) -> tuple[str, str]:
    first, second, *_ = [*statement.lstrip(" \t\r\n(").split(None, 2), "", ""]
    return first.rstrip(";").upper(), second.rstrip(";").upper()


_LOCKED = (
    "The SQLite file {file} is locked: another process, or another connection of this one, writes "
    "to it. It has one writer at a time, and a sandbox is one from its beginning to its end. Give "
    'each worker of pytest-xdist a file of its own, Database(f"sqlite:///{{worker_id}}.db"), or '
    'put a database in memory in its place: sandbox(database, bind=Database("sqlite://").engine)'
)
