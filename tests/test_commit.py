"""Verified commit: commit() returning means that the database confirmed it."""

import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import Database
from sessionscope.exc import CommitUnknown, TransactionDoomed
from tests.models import Item, names

A_STATEMENT_THAT_FAILS = text("SELECT * FROM no_such_table")


def swallow(session: Session, statement: str) -> None:
    try:
        session.execute(text(statement))
    except sa_exc.DBAPIError:
        pass
    else:
        pytest.fail(f"{statement} was to fail")


def test_a_swallowed_error_never_commits_silently(postgres: Database) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK after an error; we raise instead."""
    with pytest.raises(TransactionDoomed) as caught, postgres.begin() as session:
        session.add(Item(name="lost"))
        session.flush()
        swallow(session, "SELECT * FROM no_such_table")

    message = str(caught.value)
    assert "ProgrammingError running 'SELECT * FROM no_such_table'" in message
    assert f"{__file__}:" in message
    assert "begin_nested()" in message
    assert isinstance(caught.value, sa_exc.PendingRollbackError)
    assert isinstance(caught.value.__cause__, sa_exc.ProgrammingError)
    assert names(postgres) == []


def test_the_connection_of_a_doomed_transaction_is_clean(postgres: Database) -> None:
    with pytest.raises(TransactionDoomed), postgres.begin() as session:
        swallow(session, "SELECT * FROM no_such_table")

    with postgres.begin() as session:
        session.add(Item(name="next"))
    assert names(postgres) == ["next"]
    assert postgres.stats().idle == 2


def test_an_error_of_a_raw_cursor_dooms_as_well(postgres: Database) -> None:
    """SQLAlchemy never sees it; the driver's own status tells."""
    with pytest.raises(TransactionDoomed), postgres.begin() as session:
        cursor = session.connection().connection.cursor()
        with pytest.raises(Exception, match="no_such_table"):
            cursor.execute("SELECT * FROM no_such_table")


def test_a_swallowed_flush_error_dooms(database: Database) -> None:
    """SQLAlchemy has rolled back; the error names the unit and the mend."""
    with database.begin() as session:
        session.add(Item(id=1, name="first"))

    with pytest.raises(TransactionDoomed, match="a flush failed earlier"):
        with database.begin() as session:
            session.add(Item(id=1, name="again"))
            with pytest.raises(sa_exc.IntegrityError):
                session.flush()

    assert names(database) == ["first"]


def test_a_commit_in_the_middle_is_verified_too(postgres: Database) -> None:
    with postgres.begin() as session:
        session.add(Item(name="lost"))
        session.flush()
        swallow(session, "SELECT * FROM no_such_table")
        with pytest.raises(TransactionDoomed):
            session.commit()
        session.rollback()
        session.add(Item(name="kept"))

    assert names(postgres) == ["kept"]


def test_a_plain_session_of_the_sessionmaker_is_verified_too(postgres: Database) -> None:
    with postgres.sessionmaker() as session:
        session.add(Item(name="lost"))
        session.flush()
        swallow(session, "SELECT * FROM no_such_table")
        with pytest.raises(TransactionDoomed):
            session.commit()

    assert names(postgres) == []


def in_a_savepoint(session: Session) -> None:
    with pytest.raises(sa_exc.DBAPIError), session.begin_nested():
        session.execute(A_STATEMENT_THAT_FAILS)


def in_a_savepoint_of_text_sql(session: Session) -> None:
    session.execute(text("SAVEPOINT mine"))
    swallow(session, "SELECT * FROM no_such_table")
    session.execute(text("ROLLBACK TO SAVEPOINT mine"))


def in_a_savepoint_of_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        session.add(Item(name="nested"))
        in_a_savepoint(session)


def a_flush_in_a_savepoint(session: Session) -> None:
    session.add(Item(id=1001, name="one"))
    session.flush()
    with pytest.raises(sa_exc.IntegrityError), session.begin_nested():
        session.add(Item(name="one"))


def on_the_client_side(session: Session) -> None:
    """The driver cannot adapt the value: nothing was sent."""
    with pytest.raises((sa_exc.DBAPIError, TypeError)):
        session.execute(text("SELECT :value"), {"value": {}})


def then_rolled_back(session: Session) -> None:
    swallow(session, "SELECT * FROM no_such_table")
    session.rollback()


@pytest.mark.parametrize(
    "legal",
    [
        in_a_savepoint,
        in_a_savepoint_of_text_sql,
        in_a_savepoint_of_a_savepoint,
        a_flush_in_a_savepoint,
        on_the_client_side,
        then_rolled_back,
    ],
)
def test_a_legal_pattern_is_no_false_alarm(
    database: Database, legal: Callable[[Session], None]
) -> None:
    with database.begin() as session:
        session.execute(text("SELECT 1"))
        legal(session)
        session.add(Item(name="kept"))

    assert "kept" in names(database)


def test_a_caught_integrity_error_on_sqlite_commits(sqlite: Database) -> None:
    """SQLite rolls back the statement only, not the transaction."""
    with sqlite.begin() as session:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        swallow(session, "INSERT INTO item (id, name) VALUES (1, 'again')")

    assert names(sqlite) == ["one"]


def test_on_conflict_rollback_refuses_the_next_statement(sqlite: Database) -> None:
    """SQLite has ended the transaction: what follows would be written at once."""
    with pytest.raises(TransactionDoomed, match="IntegrityError"), sqlite.begin() as session:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        swallow(session, "INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")
        session.execute(text("INSERT INTO item (id, name) VALUES (2, 'two')"))

    assert names(sqlite) == []


def test_on_conflict_rollback_dooms_the_commit(sqlite: Database) -> None:
    with pytest.raises(TransactionDoomed, match="IntegrityError"), sqlite.begin() as session:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        swallow(session, "INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")

    assert names(sqlite) == []


def test_on_conflict_rollback_on_a_raw_cursor_dooms_the_commit(sqlite: Database) -> None:
    with pytest.raises(TransactionDoomed), sqlite.begin() as session:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        cursor = session.connection().connection.cursor()
        with pytest.raises(sqlite3.IntegrityError):
            cursor.execute("INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")

    assert names(sqlite) == []


def test_after_a_rollback_the_same_unit_may_go_on(sqlite: Database) -> None:
    with sqlite.begin() as session:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'one')"))
        swallow(session, "INSERT OR ROLLBACK INTO item (id, name) VALUES (1, 'again')")
        session.rollback()
        session.execute(text("INSERT INTO item (id, name) VALUES (2, 'two')"))

    assert names(sqlite) == ["two"]


@contextmanager
def files_can_grow_no_more(size: int) -> Iterator[None]:
    """What a full disk is to SQLite: a write fails, and it rolls back by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(session: Session, size: int) -> None:
    """Write until the database file and its log cannot grow, and swallow the error."""
    session.execute(text("PRAGMA cache_size = 2"))
    with files_can_grow_no_more(size), pytest.raises(sa_exc.OperationalError):
        for number in range(1000):
            session.execute(
                text(f"INSERT INTO item (name) VALUES ({number} || hex(randomblob(3000)))")
            )


def test_a_full_disk_refuses_the_next_statement(sqlite: Database) -> None:
    with pytest.raises(TransactionDoomed, match="OperationalError"), sqlite.begin() as session:
        session.execute(text("INSERT INTO item (name) VALUES ('lost')"))
        fill(session, 200_000)
        session.execute(text("INSERT INTO item (name) VALUES ('later')"))

    assert names(sqlite) == []


def test_a_full_disk_dooms_the_commit(sqlite: Database) -> None:
    """sqlite3's own commit() would say nothing."""
    with pytest.raises(TransactionDoomed, match="OperationalError"), sqlite.begin() as session:
        session.execute(text("INSERT INTO item (name) VALUES ('lost')"))
        fill(session, 200_000)

    assert names(sqlite) == []


def test_a_connection_lost_during_commit_is_an_unknown_outcome(postgres: Database) -> None:
    with postgres.engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON item "
                "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()"
            )
        )

    with pytest.raises(CommitUnknown, match="lost during COMMIT"), postgres.begin() as session:
        session.add(Item(name="who knows"))

    assert names(postgres) == []  # this server died before it had committed


def test_a_connection_lost_before_commit_is_a_plain_failure(postgres: Database) -> None:
    with pytest.raises(sa_exc.OperationalError), postgres.begin() as session:
        session.add(Item(name="lost"))
        session.flush()
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert names(postgres) == []


def test_no_parameter_appears_in_an_error(postgres: Database) -> None:
    with pytest.raises(TransactionDoomed) as caught, postgres.begin() as session:
        with pytest.raises(sa_exc.DataError):
            session.execute(text("SELECT CAST(:secret AS integer)"), {"secret": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_no_parameter_appears_in_a_statements_own_error(psycopg: Database) -> None:
    """psycopg2 and pymysql write parameters into the SQL, which the server may quote."""
    with pytest.raises(sa_exc.DBAPIError) as plain, psycopg.begin() as session:
        session.execute(
            text("SELECT * FROM no_such_table WHERE a = :secret"), {"secret": "hunter2"}
        )
    assert "hunter2" not in str(plain.value)


def test_the_next_statement_on_postgresql_says_what_really_failed(postgres: Database) -> None:
    """The server's own words are that the transaction is aborted, and not why."""
    with pytest.raises(TransactionDoomed, match="no_such_table"), postgres.begin() as session:
        swallow(session, "SELECT * FROM no_such_table")
        session.execute(text("SELECT 1"))


def test_a_flush_at_commit_says_so_too(postgres: Database) -> None:
    with pytest.raises(TransactionDoomed, match="no_such_table"), postgres.begin() as session:
        swallow(session, "SELECT * FROM no_such_table")
        session.add(Item(name="pending"))


def test_a_transaction_that_text_sql_has_ended_is_not_said_to_be_lost(sqlite: Database) -> None:
    with pytest.raises(TransactionDoomed, match="COMMIT or ROLLBACK sent as text") as caught:
        with sqlite.begin() as session:
            session.execute(text("INSERT INTO item (name) VALUES ('stored')"))
            session.execute(text("COMMIT"))
    assert "Nothing was written" not in str(caught.value)


def test_an_interrupt_during_commit_is_an_interrupt(
    psycopg: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt), psycopg.begin() as session:
        session.add(Item(name="who knows"))
        session.flush()
        driver_connection = session.connection().connection.driver_connection

        def commit() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(driver_connection, "commit", commit)


def test_an_error_that_its_savepoint_undid_is_not_blamed(postgres: Database) -> None:
    with pytest.raises(TransactionDoomed) as caught, postgres.begin() as session:
        in_a_savepoint(session)
        with pytest.raises(Exception, match="something_else"):
            session.connection().connection.cursor().execute("SELECT something_else")
    assert "no_such_table" not in str(caught.value)


def test_a_swallowed_loss_of_the_connection_is_called_that(postgres: Database) -> None:
    with pytest.raises(TransactionDoomed, match="its connection was lost"):
        with postgres.begin() as session:
            session.add(Item(name="lost"))
            session.flush()
            swallow(session, "SELECT pg_terminate_backend(pg_backend_pid())")

    assert names(postgres) == []


def test_the_connection_of_a_refused_commit_is_usable_at_once(postgres: Database) -> None:
    with postgres.sessionmaker() as session:
        swallow(session, "SELECT * FROM no_such_table")
        with pytest.raises(TransactionDoomed):
            session.commit()
    with postgres.sessionmaker() as session:
        assert session.scalar(text("SELECT 1")) == 1
