"""Verified commit: COMMIT is sent only if the database can still carry it out.

PostgreSQL answers COMMIT with ROLLBACK, and no error, once a statement of the
transaction has failed; MySQL rolls back by itself at a deadlock, SQLite when the disk
is full or at ON CONFLICT ROLLBACK. A program that swallowed the error would believe
that it has committed. An error alone proves nothing (a savepoint may have been rolled back),
so the driver is asked (see _doom).
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import Dialect, ExceptionContext
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, StaticPool

from sessionscope._demotion import is_demoted, may_be_demoted
from sessionscope._doom import (
    IN_FAILED_TRANSACTION,
    LOST,
    SUSPECT,
    WAS_OPEN,
    commits_by_itself,
    doom_check,
    has_lost_transaction,
)
from sessionscope._guards import Scope
from sessionscope._identity import IDENTITY, Identity, ask_late, is_of_another
from sessionscope._marker import Marker, leave_marker
from sessionscope._places import describe
from sessionscope._retry import mark, sqlstate_of
from sessionscope._watch import UNIT
from sessionscope.exc import CommitUnknown, DatabaseUnavailable, TransactionDoomed

_COMMITTING = "sessionscope.committing"
# Of the error of a server that refuses to write, which may be the wrong one.
_REFUSED = "sessionscope.refused"
# What the next user of a connection must not find in its info.
_OF_ONE_USER = (UNIT, SUSPECT, LOST, WAS_OPEN, IDENTITY, _COMMITTING, _REFUSED)

# active_sql_transaction: after a query, no SET TRANSACTION is allowed any more.
_AFTER_A_QUERY = "25001"

# What psycopg says where libpq has not noticed yet that the server is gone (psycopg/waiting.py).
_SOCKET_CLOSED = "connection socket closed"

# What failed earlier in the transaction: the statement and the error.
_Suspect = tuple[str | None, BaseException]


def verify_commits(
    engine: Engine,
    database: str,
    renew: Callable[[PoolProxiedConnection], None],
    outcome_table: str | None,
) -> None:
    """Make COMMIT on *engine* raise TransactionDoomed where it would not commit.

    *renew* replaces all connections as old as the given one, whose server is a primary no more.
    With each unit that may run again a row of *outcome_table* is committed.
    """
    dialect = engine.dialect
    is_doomed = doom_check(dialect.name, dialect.driver)
    send_commit = dialect.do_commit
    send_begin = dialect.do_begin
    to_savepoint = dialect.do_rollback_to_savepoint

    def do_commit(proxied: PoolProxiedConnection) -> None:
        info = proxied.info
        scope: Scope | None = info.get(UNIT)
        error = scope.why if scope is not None else None
        if error is None and is_doomed(proxied):
            error = _doomed(info)
        if error is not None:
            # Raising alone would give the open transaction back to the pool.
            dialect.do_rollback(proxied)
            raise error
        if scope is None or scope.on_begin is None:
            send(proxied)
        else:
            _send_in_time(scope, proxied, outcome_table, send)
        if scope is not None:
            scope.has_committed = True

    def send(proxied: PoolProxiedConnection) -> None:
        proxied.info[_COMMITTING] = True
        # Not through the proxy, which looks its methods up the slow way.
        send_commit(proxied.dbapi_connection)  # type: ignore[arg-type]  # it is connected
        del proxied.info[_COMMITTING]

    def do_begin(proxied: PoolProxiedConnection) -> None:
        send_begin(proxied)
        proxied.info.pop(LOST, None)
        proxied.info.pop(WAS_OPEN, None)

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        to_savepoint(connection, name)
        # What failed inside of the savepoint is undone, and not to blame for what fails later.
        connection.connection.info.pop(SUSPECT, None)

    # Any listener on an Engine makes each Connection build a dispatcher for every
    # event that it passes, which costs a read unit a third of its instructions.
    dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]  # as a subclass would
    if dialect.name in ("mysql", "mariadb"):
        dialect.do_begin = do_begin  # type: ignore[method-assign, assignment]  # likewise
    dialect.do_rollback_to_savepoint = do_rollback_to_savepoint  # type: ignore[method-assign]  # likewise
    _renew_if_demoted(dialect, renew)
    _listen(engine, database)


def _renew_if_demoted(dialect: Dialect, renew: Callable[[PoolProxiedConnection], None]) -> None:
    """Call *renew* after the rollback of a transaction that a primary of before has refused."""
    send_rollback = dialect.do_rollback

    def do_rollback(proxied: PoolProxiedConnection) -> None:
        send_rollback(proxied)
        error: DBAPIError | None = _info(proxied).pop(_REFUSED, None)
        # Not before: PostgreSQL answers no question in a failed transaction.
        if error is not None and _leads_astray(dialect, proxied):
            error.connection_invalidated = True
            renew(proxied)

    dialect.do_rollback = do_rollback  # type: ignore[method-assign, assignment]  # as a subclass would


def _listen(engine: Engine, database: str) -> None:
    """Note what fails on *engine*, and leave nothing of one user to the next."""
    kept = isinstance(engine.pool, StaticPool)  # the connection of a database in memory
    # SQLAlchemy's adapter leaves a statement open whose rows could not be fetched, and then no
    # later COMMIT works. To open a file anew costs little.
    may_be_stuck = engine.dialect.name == "sqlite" and engine.dialect.is_async

    def failed(context: ExceptionContext) -> BaseException | None:
        note = _unavailable if _is_connecting(context.connection) else _note_failure
        error = note(context, database)
        for each in (error, context.sqlalchemy_exception):
            if each is not None:
                mark(each, database)
        return error

    def returned(dbapi_connection: object, record: ConnectionPoolEntry) -> None:
        info = record.info
        scope: Scope | None = info.get(UNIT)
        # A cancellation that is late would hit its next user.
        is_cut = scope is not None and scope.timer is not None and scope.timer.release(info)
        if (is_cut or (may_be_stuck and SUSPECT in info)) and not kept:
            record.invalidate()
        for key in _OF_ONE_USER:
            if key in info:  # a third of the price of pop()
                del info[key]

    event.listen(engine, "handle_error", failed)
    event.listen(engine, "checkin", returned)


def _send_in_time(
    scope: Scope,
    proxied: PoolProxiedConnection,
    outcome_table: str | None,
    send: Callable[[PoolProxiedConnection], None],
) -> None:
    """Send the COMMIT of a unit that has a deadline, or may run again."""
    timer = scope.timer
    if scope.is_split:  # what it did over another engine may be committed by now
        scope.has_committed = True

    def commit() -> None:
        scope.identity = _identify(scope, proxied, outcome_table)
        if timer is not None:  # from here on the deadline waits for the outcome
            timer.start_commit()
        send(proxied)
        if timer is not None:
            timer.confirm()

    if timer is None:
        commit()
    else:
        timer.call("commit", commit, (), {})


def _identify(
    scope: Scope, proxied: PoolProxiedConnection, outcome_table: str | None
) -> Identity | Marker | None:
    """Return what the outcome of a transaction that is about to commit can be asked by."""
    identity: Identity | None = proxied.info.get(IDENTITY)
    if identity is not None and is_of_another(identity, proxied):
        return None
    if identity is not None and identity.xid is None:
        ask_late(identity, proxied)
    if outcome_table is not None and scope.may_run_again and not scope.read_only:
        return leave_marker(proxied, outcome_table)
    return identity


def _info(proxied: PoolProxiedConnection) -> dict[Any, Any]:
    try:
        return proxied.info
    except NotImplementedError:  # SQLAlchemy looks the server over, with a connection of no pool
        return {}


def _leads_astray(dialect: Dialect, proxied: PoolProxiedConnection) -> bool:
    connection = proxied.dbapi_connection
    return connection is not None and is_demoted(dialect, connection)


def note_commits(engine: Engine) -> None:
    """Note what MySQL commits by itself in the middle of a unit, which then may not run again.

    Before other listeners, which may end the chain.
    """
    if engine.dialect.name not in ("mysql", "mariadb"):
        return

    def executing(cursor: Any, statement: str, *parameters_and_context: Any) -> None:
        context: DefaultExecutionContext = parameters_and_context[-1]
        proxied = context.root_connection.connection
        scope: Scope | None = _info(proxied).get(UNIT)
        if scope is not None and commits_by_itself(statement, proxied):
            scope.has_committed = True

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        event.listen(engine, name, executing)


def is_committing(connection: Connection) -> bool:
    """Return whether COMMIT was sent on *connection*, and its answer has not come."""
    if connection.closed or connection.invalidated:
        return False
    return _COMMITTING in connection.info


def _doomed(info: dict[Any, Any]) -> TransactionDoomed:
    """Return the error for a transaction that cannot commit, with what is known of why."""
    suspect: _Suspect | None = info.get(SUSPECT)
    scope: Scope | None = info.get(UNIT)
    opened_at = f" (unit of work opened at {describe(scope.opened_at)})" if scope else ""
    begin = "async with" if scope is not None and scope.is_async else "with"
    error = TransactionDoomed(
        f"This transaction cannot commit{opened_at}: {_what_failed(suspect)} "
        "Let the error leave the unit of work, or run what may fail in a savepoint and catch the "
        f"error outside of it: {begin} session.begin_nested(): ..."
    )
    if suspect is not None:
        error.__cause__ = suspect[1]
    return error


def _what_failed(suspect: _Suspect | None) -> str:
    if suspect is None:
        return (
            "it has ended in the database already, undone by an error that was swallowed, or "
            "ended by COMMIT or ROLLBACK sent as text, or by executescript()."
        )
    statement, error = suspect
    what = f" running {' '.join(statement.split())[:80]!r}" if statement else ""
    return f"{type(error).__name__}{what} was raised earlier and swallowed. Nothing was written."


def _note_failure(context: ExceptionContext, database: str) -> BaseException | None:
    """Remember a statement's failure as a suspicion; say what a COMMIT's failure means."""
    connection = context.connection
    assert connection is not None
    error = context.sqlalchemy_exception or context.original_exception
    if connection.closed or connection.invalidated:
        return None
    info = connection.connection.info
    orig = context.original_exception
    if str(orig) == _SOCKET_CLOSED:
        context.is_disconnect = True
    scope: Scope | None = info.get(UNIT)
    if scope is not None and scope.why is not None and isinstance(orig, Exception):
        return scope.why
    if sqlstate_of(orig) == IN_FAILED_TRANSACTION and SUSPECT in info:
        return _doomed(info)
    was_commit = context.statement is None and info.pop(_COMMITTING, False)
    if was_commit and scope is not None and scope.read_only:
        was_commit = False  # of a unit that has written nothing, whose hooks wait for it
    if was_commit and context.is_disconnect and isinstance(orig, Exception):
        unknown = CommitUnknown(
            f"{_how_lost(scope, database)}: the database may have committed, or not. Look before "
            "you try again"
        )
        unknown.lost = error
        return unknown
    if scope is not None and not scope.read_only and may_be_demoted(orig):
        info[_REFUSED] = error
    info[SUSPECT] = (context.statement, error)
    if scope is not None and _has_ended_by_text(context, info):
        scope.has_committed = True
    if sqlstate_of(orig) == _AFTER_A_QUERY and info.get(IDENTITY) is not None:
        _add_note_on_setting(error, context.statement)
    if has_lost_transaction(context):
        info[LOST] = True
        _refuse_further_statements(connection)
    return _unwritable(context) if connection.dialect.name == "sqlite" else None


def _how_lost(scope: Scope | None, database: str) -> str:
    timer = scope.timer if scope is not None else None
    if timer is None or not timer.cut:
        return f"The connection to {database} was lost during COMMIT"
    return (
        f"{database} had not answered COMMIT when the {timer.deadline.seconds:g} s of the unit of "
        "work were over (timeout), and the connection was cut"
    )


def _has_ended_by_text(context: ExceptionContext, info: dict[Any, Any]) -> bool:
    identity: Identity | None = info.get(IDENTITY)
    if identity is None or context.statement is None or context.is_disconnect:
        return False
    assert context.connection is not None
    return is_of_another(identity, context.connection.connection)


def _add_note_on_setting(error: BaseException, statement: str | None) -> None:
    if statement is not None and statement.lstrip()[:3].upper() == "SET":  # VACUUM has it, too
        error.add_note(
            "sessionscope: a unit that may run again asks for its transaction's id together with "
            "BEGIN. Write with_session(isolation_level=...) in place of SET TRANSACTION, or "
            "attempts=1."
        )


def _refuse_further_statements(connection: Connection) -> None:
    """Refuse what would now run outside of the transaction and be written at once."""
    lost = connection.get_transaction()

    def refuse(connection: Connection, *_: object) -> None:
        if connection.get_transaction() is lost:
            raise _doomed(connection.connection.info)

    event.listen(connection, "before_cursor_execute", refuse)


def _is_connecting(connection: Connection | None) -> bool:
    """Return whether there is no connection yet, or SQLAlchemy looks a new server over on it."""
    if connection is None:
        return True
    if connection.closed or connection.invalidated:
        return False
    try:
        connection.connection.info  # noqa: B018
    except NotImplementedError:  # it is that of no pool
        return True
    return False


def _unavailable(context: ExceptionContext, database: str) -> BaseException | None:
    error = context.sqlalchemy_exception
    # asyncpg's refusals at connect, of a password for one, are of no special kind; that no host
    # has the target_session_attrs of the URL is an InternalError.
    kinds = OperationalError, InterfaceError, InternalError
    is_ours = isinstance(error, kinds) or type(error) is DBAPIError
    if context.is_pre_ping or not is_ours:
        return None
    orig = context.original_exception
    is_lost = context.is_disconnect or str(orig) == _SOCKET_CLOSED
    if context.connection is not None and not is_lost:
        return None  # the server is there, and refuses a question
    # libpq breaks its messages into lines; MySQL's drivers put a code before theirs.
    text = " ".join(str(orig.args[-1] if orig.args else orig).split())
    mend = next((mend for part, mend in _MENDS.items() if part in text), "")
    told = text if not mend or text.endswith("?") else f"{text}. {mend}"  # libpq asks by itself
    unavailable = DatabaseUnavailable(f"No connection to {database}: {told}", orig)
    unavailable.is_transient = mend not in _SETTINGS
    return unavailable


_FEWER = (
    "Lower pool_size + max_overflow times the number of processes, or raise the server's "
    "max_connections."
)
_USER = "Check the user and the password in the database URL."
_PASSWORD = "Put the password into the database URL."  # noqa: S105  # it is a sentence
_NAME = "Create it, or correct its name in the database URL."
_FILE = "Check that the folder exists and may be written to."
# What no later attempt changes.
_SETTINGS = {_USER, _PASSWORD, _NAME, _FILE}
_MENDS = {
    "password authentication failed": _USER,
    "no password supplied": _PASSWORD,
    "Access denied for user": _USER,
    "Unknown database": _NAME,
    "does not exist": _NAME,
    "Connection refused": "Is the server running, and are host and port right?",
    "resolve host": "Check the name of the host in the database URL.",
    "Name or service not known": "Check the name of the host in the database URL.",
    "oo many": _FEWER,
    "remaining connection slots": _FEWER,
    "unable to open database file": _FILE,
}


def _unwritable(context: ExceptionContext) -> BaseException | None:
    """Name the mend when a database file turns out not to be writable."""
    orig = context.original_exception
    if "readonly database" not in str(orig) or not isinstance(
        context.sqlalchemy_exception, DBAPIError
    ):
        return None
    assert context.connection is not None
    cursor = context.connection.connection.cursor()
    cursor.execute("PRAGMA query_only")  # aiosqlite's cursor is not what execute() returns
    query_only = cursor.fetchone()
    if query_only and query_only[0]:  # it refuses because we told it to
        context.sqlalchemy_exception.add_note("The unit of work is read-only, not the file.")
        return None
    return DatabaseUnavailable(
        f"The database file cannot be written ({orig}): check the permissions of the file and of "
        "its folder, or open the unit with begin(read_only=True)",
        orig,
    )
