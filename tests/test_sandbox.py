"""A sandbox: everything that a Database hands out is rolled back with the test."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from sessionscope import AsyncDatabase, Database, _overlap, after_commit
from sessionscope.exc import (
    ConfigurationError,
    DeadlineExceeded,
    IdleInTransactionWarning,
    NestedUnit,
    PoolBusy,
    ReadOnlyUnit,
    SessionLeakWarning,
    TransactionDoomed,
)
from sessionscope.testing import SandboxError, _running, _turns, sandbox
from sessionscope.testing._turns import PATIENCE
from tests.models import Base, Item, Note, create_tables, names

on_one_server = pytest.mark.parametrize("url", ["postgres"], indirect=True)
where_ddl_rolls_back = pytest.mark.parametrize("url", ["postgres", "sqlite-memory"], indirect=True)
where_constraints_wait = pytest.mark.parametrize(
    "url", ["postgres", "psycopg2", "sqlite-file", "sqlite-memory"], indirect=True
)


@pytest.fixture
def boxed(database: Database) -> Iterator[Database]:
    """A Database in a sandbox, of which nothing must be left."""
    with sandbox(database):
        yield database
    assert names(database) == []


def test_a_committed_unit_is_seen_by_all_and_gone_afterwards(database: Database) -> None:
    with sandbox(database):
        with database.begin() as session:
            session.add(Item(name="pear"))
        assert names(database) == ["pear"]
    assert names(database) == []


def test_every_door_of_the_database_leads_into_the_sandbox(boxed: Database) -> None:
    """Units, sessions of the sessionmaker and of one's own, connections, raw ones as well."""
    with boxed.begin() as session:
        session.add(Item(name="unit"))
    with boxed.sessionmaker.begin() as session:
        session.add(Item(name="sessionmaker"))
    with sessionmaker(boxed.engine).begin() as session:
        session.add(Item(name="sessionmaker of one's own"))
    with boxed.engine.begin() as connection:
        connection.execute(insert(Item).values(name="Core"))
    with boxed.begin(isolation_level="SERIALIZABLE") as session:
        session.add(Item(name="view"))
    boxed.run(lambda session: session.add(Item(name="run")))
    raw = boxed.engine.raw_connection()
    raw.cursor().execute("INSERT INTO item (name) VALUES ('raw')")
    raw.commit()
    raw.close()
    with boxed.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(insert(Item).values(name="autocommit"))
    assert len(names(boxed)) == 8


def test_a_unit_that_fails_undoes_its_own_work_alone(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    with pytest.raises(ZeroDivisionError), boxed.begin() as session:
        session.add(Item(name="plum"))
        session.flush()
        _ = 1 / 0
    assert names(boxed) == ["pear"]


def test_an_error_of_the_database_leaves_the_sandbox_alive(boxed: Database) -> None:
    """On PostgreSQL it aborts the transaction, of which a savepoint is all that is lost."""
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    with pytest.raises(IntegrityError), boxed.begin() as session:
        session.add(Item(name="pear"))
    with boxed.begin() as session:
        session.add(Item(name="plum"))
    assert sorted(names(boxed)) == ["pear", "plum"]


@on_one_server
def test_a_swallowed_error_still_dooms(boxed: Database) -> None:
    with pytest.raises(TransactionDoomed), boxed.begin() as session:
        session.add(Item(name="pear"))
        session.flush()
        with pytest.raises(Exception, match="no_such_table"):
            session.execute(text("SELECT * FROM no_such_table"))
    assert names(boxed) == []


def test_a_savepoint_of_the_application_works_inside(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add(Item(name="pear"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Item(name="pear"))
        with session.begin_nested():
            session.add(Item(name="plum"))
    assert sorted(names(boxed)) == ["pear", "plum"]


def test_hooks_run_after_a_commit_and_not_after_a_rollback(boxed: Database) -> None:
    ran: list[str] = []
    with boxed.begin() as session:
        session.add(Item(name="pear"))
        after_commit(session, ran.append, "committed")
        session.commit()
        after_commit(session, ran.append, "rolled back")
        session.add(Item(name="plum"))
        session.rollback()
    assert ran == ["committed"]


def test_read_only_units_see_what_is_not_committed_and_refuse_to_write(boxed: Database) -> None:
    with boxed.sessionmaker() as own:
        own.add(Item(name="pear"))
        own.flush()
        assert names(boxed) == ["pear"]
        with pytest.raises(ReadOnlyUnit), boxed.begin(read_only=True) as session:
            session.add(Item(name="plum"))
        with pytest.raises(ReadOnlyUnit), boxed.begin(read_only=True) as session:
            session.execute(insert(Item).values(name="plum"))
        with boxed.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
            assert session.scalar(select(func.count()).select_from(Item)) == 1


def test_what_a_read_only_unit_writes_as_text_is_not_there_afterwards(boxed: Database) -> None:
    """PostgreSQL and SQLite refuse it; MySQL has no switch inside of a transaction."""
    may_write = boxed.engine.dialect.name == "mysql"
    with boxed.begin(read_only=True) as session:
        with nullcontext() if may_write else pytest.raises(DBAPIError):
            session.execute(text("INSERT INTO item (name) VALUES ('pear')"))
        assert session.scalar(select(1)) == 1, "a statement that fails ends no unit of its kind"
    with boxed.begin() as session:
        session.add(Item(name="plum"))
    assert names(boxed) == ["plum"]


def test_a_stream_of_a_read_only_unit_works(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add_all([Item(name=str(n)) for n in range(25)])
    with boxed.begin(read_only=True) as session:
        streamed = session.scalars(select(Item).execution_options(yield_per=10))
        assert len(list(streamed)) == 25


@pytest.mark.parametrize("url", ["postgres", "psycopg2", "sqlite-file"], indirect=True)
@pytest.mark.parametrize("read_only", [True, False])
def test_a_stream_goes_on_while_others_write(boxed: Database, read_only: bool) -> None:
    """Its cursor is the database's, and would end with the savepoint of one that has read."""
    with boxed.begin() as session:
        session.add_all([Item(name=str(n)) for n in range(25)])
    with boxed.begin(read_only=read_only) as session:
        streamed = iter(session.scalars(select(Item.id).execution_options(yield_per=10)))
        seen = [next(streamed)]
        with boxed.sessionmaker.begin() as own:
            own.add(Item(name="another"))
        seen.extend(streamed)
    assert len(seen) >= 25
    with boxed.begin(read_only=True) as session, pytest.raises((DBAPIError, ReadOnlyUnit)):
        session.execute(text("DELETE FROM item"))


@pytest.mark.parametrize("url", ["postgres", "psycopg2", "mysql"], indirect=True)
def test_an_independent_unit_commits_inside_of_another_one(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add(Item(name="outer"))
        session.flush()
        with boxed.begin(independent=True) as inner:
            inner.add(Item(name="inner"))
    with boxed.begin(read_only=True) as reader:
        reader.scalar(select(1))
        with boxed.begin(independent=True) as writer:
            writer.add(Item(name="beside a reader"))
    assert len(names(boxed)) == 3


@on_one_server
def test_it_is_said_that_an_independent_unit_was_undone_with_its_outer_one(
    boxed: Database,
) -> None:
    with pytest.raises(ZeroDivisionError), boxed.begin() as session:
        session.add(Item(name="outer"))
        session.flush()
        with boxed.begin(independent=True) as inner:
            inner.add(Item(name="inner"))
        _ = 1 / 0
    with pytest.warns(RuntimeWarning, match=r"has committed was undone .*test_sandbox\.py"):
        assert names(boxed) == []


@on_one_server
def test_a_second_unit_in_the_same_flow_is_refused_as_in_production(boxed: Database) -> None:
    with boxed.begin(), pytest.raises(NestedUnit), boxed.begin():
        pass


def test_the_tests_own_session_and_units_work_side_by_side(boxed: Database) -> None:
    """It flushes, they commit; it reads on, rolls back to see more, and commits."""
    with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        own.commit()
        assert own.scalar(select(func.count()).select_from(Item)) == 1
        with boxed.begin() as session:
            session.add(Item(name="unit"))
        own.rollback()
        assert own.scalar(select(func.count()).select_from(Item)) == 2
        own.add(Item(name="flushed"))
        own.flush()
        with boxed.begin() as session:
            session.add(Item(name="another unit"))
        own.commit()
    assert len(names(boxed)) == 4


def test_a_session_that_is_used_inside_of_another_ones_block_keeps_its_work(
    boxed: Database,
) -> None:
    with boxed.sessionmaker() as own:
        own.scalars(select(Item)).all()
        with boxed.begin() as session:
            session.add(Item(name="unit"))
            session.flush()
            own.add(Item(name="own"))
            own.commit()
    assert sorted(names(boxed)) == ["own", "unit"]


def test_a_rollback_undoes_what_was_begun_inside_and_says_so(boxed: Database) -> None:
    with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        own.flush()
        with pytest.raises(TransactionDoomed, match=r"undone by the rollback.*test_sandbox\.py"):
            with boxed.begin() as session:
                session.add(Item(name="unit"))
                session.flush()
                own.rollback()
    assert names(boxed) == []


def test_a_savepoint_that_ends_leaves_what_was_begun_inside(boxed: Database) -> None:
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        with own.begin_nested():
            own.add(Item(name="own"))
            own.flush()
            other.add(Item(name="other"))
            other.flush()
        other.commit()
        own.commit()
    assert sorted(names(boxed)) == ["other", "own"]


def test_a_savepoint_that_is_rolled_back_undoes_what_was_begun_inside(boxed: Database) -> None:
    """That one has a savepoint too, to which SQLAlchemy gives the same name."""
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        own.add(Item(name="kept"))
        own.flush()
        savepoint = own.begin_nested()
        own.add(Item(name="own"))
        own.flush()
        with pytest.raises(TransactionDoomed, match=r"undone by the rollback.*test_sandbox\.py"):
            with other.begin_nested():
                other.add(Item(name="other"))
                other.flush()
                savepoint.rollback()
        other.rollback()
        own.commit()
    assert names(boxed) == ["kept"]


def test_it_is_said_that_a_unit_was_undone_with_a_savepoint(boxed: Database) -> None:
    """A savepoint of the unit's own, of the same name, does not take the other one's place."""
    with boxed.sessionmaker() as own:
        savepoint = own.begin_nested()
        own.add(Item(name="own"))
        own.flush()
        with boxed.begin() as session, session.begin_nested():
            session.add(Item(name="unit"))
        savepoint.rollback()
        with pytest.warns(RuntimeWarning, match=r"has committed was undone .*test_sandbox\.py"):
            assert own.scalars(select(Item)).all() == []


def test_a_rollback_dooms_another_one_that_has_written_since(boxed: Database) -> None:
    """It began before, and would have lost one of its two rows in silence."""
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "first")
        flush(other, "other")
        flush(own, "second")
        other.rollback()
        with pytest.raises(TransactionDoomed, match=_WHERE_AND_WHAT):
            own.commit()
    assert names(boxed) == []


def test_a_savepoint_that_is_rolled_back_dooms_another_one_that_has_written_since(
    boxed: Database,
) -> None:
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "own")
        flush(other, "first")
        savepoint = own.begin_nested()
        flush(own, "in the savepoint")
        flush(other, "second")
        savepoint.rollback()
        with pytest.raises(TransactionDoomed, match=_WHERE_AND_WHAT):
            other.commit()
        other.rollback()
        own.commit()
    assert names(boxed) == ["own"]


def test_who_was_undone_may_roll_back_out_of_a_savepoint(boxed: Database) -> None:
    """Which is gone; the rollback is the mend, and must not fail for that."""
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "own")
        flush(other, "other")
        own.begin_nested()
        flush(own, "in the savepoint")
        other.rollback()
        own.rollback()
        flush(own, "again")
        own.commit()
    assert names(boxed) == ["again"]


def test_it_is_said_that_a_commit_was_undone_by_one_that_had_begun_later(boxed: Database) -> None:
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "first")
        flush(other, "other")
        flush(own, "second")
        own.commit()
        other.rollback()
        with pytest.warns(RuntimeWarning, match=r"has committed was undone .*test_sandbox\.py"):
            assert names(boxed) == ["first"]


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_savepoint_is_still_there_when_another_transaction_has_ended(
    boxed: Database, is_kept: bool
) -> None:
    """That began before the savepoint was made, and is beneath it."""
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "own")
        flush(other, "other")
        savepoint = own.begin_nested()
        flush(own, "in the savepoint")
        other.commit()
        (savepoint.commit if is_kept else savepoint.rollback)()
        own.commit()
    assert sorted(names(boxed)) == [*["in the savepoint"] * is_kept, "other", "own"]


def test_a_savepoint_that_ends_leaves_one_that_another_has_made_since(boxed: Database) -> None:
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "own")
        flush(other, "other")
        savepoint = own.begin_nested()
        flush(own, "in the savepoint")
        another = other.begin_nested()
        flush(other, "undone")
        savepoint.commit()
        another.rollback()
        other.commit()
        own.commit()
    assert sorted(names(boxed)) == ["in the savepoint", "other", "own"]


def test_what_a_raw_cursor_has_written_is_rolled_back_though_its_session_has_read_since(
    boxed: Database,
) -> None:
    with boxed.sessionmaker() as own:
        cursor = own.connection().connection.cursor()
        cursor.execute("INSERT INTO item (name) VALUES ('pear')")
        cursor.close()
        own.scalar(select(1))
        assert names(boxed) == ["pear"]
        own.rollback()
    assert names(boxed) == []


def test_it_is_said_that_the_commit_of_what_a_raw_cursor_has_written_was_undone(
    boxed: Database,
) -> None:
    with boxed.sessionmaker() as own, boxed.sessionmaker() as other:
        flush(own, "own")
        other.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('pear')")
        other.commit()
        own.rollback()
        with pytest.warns(RuntimeWarning, match=r"has committed was undone .*test_sandbox\.py"):
            assert names(boxed) == []


def flush(session: Session, name: str) -> None:
    session.add(Item(name=name))
    session.flush()


# Both places, and the line to write instead.
_WHERE_AND_WHAT = (
    r"begun at .*test_sandbox\.py:\d+ \(flush\).* by the rollback of .*"
    r"test_sandbox\.py:\d+ \(flush\).*session\.commit\(\)"
)


def test_a_savepoint_may_be_sent_as_text(boxed: Database) -> None:
    with boxed.begin() as session:
        session.execute(text("SAVEPOINT by_hand;"))
        session.execute(insert(Item).values(name="undone"))
        session.execute(text("ROLLBACK TO by_hand"))
        session.execute(insert(Item).values(name="kept"))
        session.execute(text("RELEASE SAVEPOINT by_hand"))
    assert names(boxed) == ["kept"]


def test_the_tests_own_failed_session_stops_no_one_and_stays_failed(boxed: Database) -> None:
    """On PostgreSQL its transaction is aborted; the next unit goes on nevertheless."""
    with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        own.flush()
        with pytest.raises(IntegrityError):
            own.execute(insert(Item).values(name="own"))
        with boxed.begin() as session:
            session.add(Item(name="unit"))
        if boxed.engine.dialect.name == "postgresql":
            with pytest.raises(TransactionDoomed, match="failed earlier"):
                own.scalars(select(Item)).all()
            own.rollback()
            assert names(boxed) == ["unit"]
        else:
            own.commit()
            assert sorted(names(boxed)) == ["own", "unit"]


@where_constraints_wait
def test_a_deferred_constraint_fails_the_commit_as_in_production(boxed: Database) -> None:
    with pytest.raises(IntegrityError), boxed.begin() as session:
        session.add(Note(item_id=1))
    with boxed.begin() as session:
        session.add(Note(id=1, item_id=1))
        session.flush()
        session.add(Item(id=1, name="pear"))
    with boxed.begin() as session:
        session.add(Note(id=2, item_id=2))
        session.flush()
        session.add(Item(id=2, name="plum"))
    assert len(names(boxed)) == 2


@where_constraints_wait
def test_a_deferred_constraint_is_checked_at_the_end(database: Database) -> None:
    with pytest.raises(IntegrityError), database.sessionmaker() as own:
        with sandbox(database):
            own.add(Note(item_id=1))
            own.flush()
    assert names(database) == []


@pytest.mark.parametrize("statement", ["COMMIT", "commit;", "ROLLBACK"])
def test_a_statement_that_ends_the_transaction_is_named_at_once(
    database: Database, statement: str
) -> None:
    with pytest.raises(SandboxError, match=rf"'{statement}' at .*test_sandbox\.py:\d+"):
        with sandbox(database), database.begin() as session:
            session.scalar(select(1))
            session.execute(text(statement))


def test_it_fails_the_test_even_if_the_error_is_swallowed(database: Database) -> None:
    with pytest.raises(SandboxError, match="'COMMIT' at"), sandbox(database):
        with pytest.raises(SandboxError), database.begin() as session:
            session.execute(text("COMMIT"))
        with pytest.raises(SandboxError), database.begin() as session:
            session.add(Item(name="pear"))
    assert names(database) == []


def test_a_commit_behind_sqlalchemys_back_fails_the_test(database: Database) -> None:
    """By way of the driver's own connection, which no one can see."""
    with pytest.raises(SandboxError, match="did not see has ended"), sandbox(database):
        with database.engine.connect() as connection:
            driver_connection = connection.connection.driver_connection
            assert driver_connection is not None
            driver_connection.cursor().execute("COMMIT")


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
def test_ddl_on_mysql_is_a_commit_that_escapes(database: Database) -> None:
    with pytest.raises(SandboxError, match="create tables before the sandbox"):
        with sandbox(database), database.engine.begin() as connection:
            connection.execute(text("CREATE TABLE escapes (id INT)"))


@where_ddl_rolls_back
def test_tables_made_inside_are_rolled_back(url: str) -> None:
    with Database(url) as database:
        with sandbox(database):
            create_tables(database)
            with database.begin() as session:
                session.add(Item(name="pear"))
        with pytest.raises(Exception, match="item"):
            names(database)


def test_a_failing_test_keeps_its_error_and_notes_the_rest(database: Database) -> None:
    with pytest.raises(ZeroDivisionError) as caught, sandbox(database):
        with pytest.raises(SandboxError), database.begin() as session:
            session.execute(text("COMMIT"))
        _ = 1 / 0
    assert "SandboxError: 'COMMIT' at" in caught.value.__notes__[0]


def test_the_engines_are_their_own_again_afterwards(database: Database) -> None:
    pools = database.engine.pool, database.read_engine.pool
    attributes = set(vars(database.engine.dialect))
    executes = vars(database.engine.dialect).get("do_execute")  # the Database's, if it needs one
    with sandbox(database):
        database.ping()
    assert (database.engine.pool, database.read_engine.pool) == pools
    assert attributes <= set(vars(database.engine.dialect))
    assert vars(database.engine.dialect).get("do_execute") is executes
    with database.begin() as session:
        session.add(Item(name="stays"))
    assert names(database) == ["stays"]


def test_dispose_and_drain_do_not_end_it(boxed: Database) -> None:
    """As at the end of a TestClient's block."""
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    assert boxed.drain(1.0)
    boxed.dispose()
    boxed.engine.dispose()
    assert names(boxed) == ["pear"]


def test_stats_count_as_without_it(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    with pytest.raises(ZeroDivisionError), boxed.begin():
        _ = 1 / 0
    assert (boxed.stats().committed, boxed.stats().rolled_back) == (1, 1)
    assert boxed.stats().in_use == 0


def test_a_session_that_outlives_it_says_so(database: Database) -> None:
    with database.sessionmaker() as own:
        with sandbox(database):
            own.add(Item(name="pear"))
            own.flush()
        with pytest.raises(SandboxError, match="has ended: close the session"):
            own.scalars(select(Item)).all()
    assert names(database) == []


def test_a_reading_connection_that_outlives_it_leaves_the_next_one_writing(
    database: Database,
) -> None:
    with sandbox(database):
        reading = database.read_engine.connect()
        reading.scalar(select(1))
    reading.close()
    with sandbox(database), database.begin() as session:
        session.add(Item(name="pear"))
    assert names(database) == []


@pytest.mark.parametrize("url", ["sqlite-file", "sqlite-memory"], indirect=True)
def test_a_deadline_inside_does_not_shorten_what_later_ones_wait_for_a_lock(
    database: Database,
) -> None:
    patience = []
    for _ in range(2):
        with database.engine.connect() as connection:
            patience.append(connection.scalar(text("PRAGMA busy_timeout")))
        with sandbox(database), database.begin(timeout=2) as session:
            session.add(Item(name="pear"))
    assert patience == [5000, 5000]


def test_one_inside_of_another_is_refused(boxed: Database) -> None:
    with pytest.raises(ConfigurationError, match="in a sandbox already"), sandbox(boxed):
        pass


def test_an_async_database_needs_the_other_one() -> None:
    with pytest.raises(ConfigurationError, match="async_sandbox"):
        with sandbox(AsyncDatabase("sqlite+aiosqlite://")):
            pass


def test_a_database_in_memory_takes_the_place_of_one_that_cannot_be_reached() -> None:
    """The seed's section 3: what is tested knows nothing of it."""
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with Database("sqlite://") as memory:
        create_tables(memory)
        with sandbox(database, bind=memory.engine):
            assert database.engine.dialect.name == "sqlite"
            with database.begin() as session:
                session.add(Item(name="pear"))
            with database.begin(isolation_level="REPEATABLE READ") as session:
                session.add(Item(name="plum"))
            with database.begin(independent=True) as session:
                session.add(Item(name="fig"))
            assert len(names(database)) == 3
            with pytest.raises(ReadOnlyUnit), database.begin(read_only=True) as session:
                session.add(Item(name="plum"))
            with pytest.raises(OperationalError), database.begin(read_only=True) as session:
                session.execute(text("DELETE FROM item"))
        assert names(memory) == []
    assert database.engine.dialect.name == "postgresql"
    with database.begin(isolation_level="REPEATABLE READ") as session:
        assert session.get_bind().dialect.name == "postgresql"


def test_sqlites_default_mode_leaks_no_row() -> None:
    """It begins before INSERT alone, commits at DDL, and so lets savepoints escape."""
    plain = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    Base.metadata.create_all(plain)
    with Database("sqlite://") as database, sandbox(database, bind=plain):
        with database.sessionmaker() as session, session.begin():
            with session.begin_nested():
                session.add(Item(name="pear"))
            session.execute(text("CREATE TABLE other (id INTEGER)"))
        assert names(database) == ["pear"]
    with plain.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Item)) == 0
    plain.dispose()


def test_an_engine_of_the_other_colour_is_refused() -> None:
    bind = AsyncDatabase("sqlite+aiosqlite://").engine.sync_engine
    with pytest.raises(ConfigurationError, match="other colour"):
        with sandbox(Database("sqlite://"), bind=bind):
            pass


@on_one_server
def test_16_threads_with_100_statements_each_share_the_connection(boxed: Database) -> None:
    """While the test's own session has written and not committed, and half of the units fail."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for unit in range(10):
                with boxed.begin() as session:
                    session.execute(insert(Item).values(name=f"{number}-{unit}"))
                    for _ in range(8):
                        session.scalars(select(Item.name)).first()
                    session.execute(text("SELECT 1"))
                    if unit % 2:
                        session.rollback()
        except BaseException as error:
            errors.append(error)

    with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        own.flush()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        own.commit()
    expected = {f"{number}-{unit}" for number in range(16) for unit in range(0, 10, 2)}
    assert set(names(boxed)) == expected | {"own"}


def test_the_tests_own_session_may_wait_for_what_it_has_started(
    boxed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds up no one meanwhile; a unit of the application's would in production."""
    monkeypatch.setattr(_overlap, "IDLE_SECONDS", -1.0)

    @boxed.with_session()
    def work(session: Session) -> None:
        flush(session, "unit")
        flush(session, "another")

    with boxed.sessionmaker() as own:
        flush(own, "own")
        with pytest.warns(IdleInTransactionWarning):
            work()
        own.commit()


@on_one_server
def test_who_waits_for_its_turn_is_not_idle(
    boxed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute by the clock of the guard, in the middle of a unit."""
    has_written, waits = threading.Event(), threading.Event()
    time = [0.0]
    wait = _turns._ThreadWaiter.wait

    def wait_a_minute(waiter: Any) -> None:
        time[0] += 60.0
        waits.set()
        wait(waiter)

    def hold() -> None:
        with boxed.engine.begin() as connection:
            connection.execute(insert(Item).values(name="held"))
            has_written.set()
            waits.wait()

    def work() -> None:
        has_written.wait()
        with boxed.begin() as session:
            flush(session, "waited")
            flush(session, "went on")

    monkeypatch.setattr(_overlap, "monotonic", lambda: time[0])
    monkeypatch.setattr(_turns._ThreadWaiter, "wait", wait_a_minute)
    with ThreadPoolExecutor(2) as threads:
        for done in (threads.submit(hold), threads.submit(work)):
            done.result()
    assert time[0] >= 60.0
    assert sorted(names(boxed)) == ["held", "waited", "went on"]


def test_whoever_has_read_only_holds_up_no_one(boxed: Database) -> None:
    """A reader in another thread, in its unit all the while, and a writer in this one."""
    has_read, may_end = threading.Event(), threading.Event()
    seen: list[int | None] = []

    def read() -> None:
        with boxed.sessionmaker() as session:
            seen.append(session.scalar(select(func.count()).select_from(Item)))
            has_read.set()
            may_end.wait()
            seen.append(session.scalar(select(func.count()).select_from(Item)))

    thread = threading.Thread(target=read)
    thread.start()
    has_read.wait()
    with boxed.sessionmaker.begin() as session:
        session.add(Item(name="pear"))
    may_end.set()
    thread.join()
    assert seen == [0, 1]


@on_one_server
def test_two_that_wait_for_each_other_are_told_where(
    boxed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has written and waits for the test, which wants to write."""
    monkeypatch.setattr("sessionscope.testing._turns.PATIENCE", 0.1)
    has_written, may_end = threading.Event(), threading.Event()

    def write() -> None:
        with boxed.begin() as session:
            session.add(Item(name="pear"))
            session.flush()
            has_written.set()
            may_end.wait()

    thread = threading.Thread(target=write)
    thread.start()
    has_written.wait()
    try:
        with pytest.raises(
            PoolBusy, match=r"begun at .*test_sandbox\.py:\d+ .*write.*postgres_url"
        ):
            with boxed.begin() as session:
                session.add(Item(name="plum"))
    finally:
        may_end.set()
        thread.join()
    assert names(boxed) == ["pear"]


@on_one_server
def test_a_thread_that_the_unit_awaits_is_part_of_it(boxed: Database) -> None:
    """One of its own transactions in a thread that got its context, as FastAPI's do."""

    async def main() -> None:
        def write() -> None:
            with boxed.engine.begin() as connection:
                connection.execute(insert(Item).values(name="in the thread"))

        with boxed.begin() as session:
            await asyncio.to_thread(session.execute, insert(Item).values(name="outside"))
            await asyncio.to_thread(write)

    thread = threading.Thread(target=asyncio.run, args=(main(),))  # not the test's own thread
    thread.start()
    thread.join()
    assert sorted(names(boxed)) == ["in the thread", "outside"]


@pytest.mark.parametrize("url", ["sqlite-memory", "sqlite-file"], indirect=True)
def test_a_session_that_is_collected_inside_does_not_wait_for_its_own_thread(
    boxed: Database,
) -> None:
    """The garbage collector finds one while this thread has the turn, inside of a statement."""
    with boxed.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.create_function("collect", 0, gc.collect)

    leak(boxed)
    began = monotonic()
    with pytest.warns(SessionLeakWarning, match="test_sandbox"), boxed.engine.connect() as other:
        other.execute(text("SELECT collect()"))
    assert monotonic() - began < PATIENCE / 2
    assert names(boxed) == []


def test_a_session_that_is_collected_while_another_thread_is_interrupted_waits_for_no_one(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread that ends a statement would wait for the end of that statement."""
    runs = threading.Event()
    interrupt = _running.Running._end

    def collect_first(running: Any) -> None:
        gc.collect()
        interrupt(running)

    def run(connection: Connection) -> None:
        with pytest.raises(OperationalError, match="interrupted"):
            connection.execute(text(_SLEEPS["sqlite"].replace("SELECT 1", "SELECT tell()")))

    monkeypatch.setattr(_running.Running, "_end", collect_first)
    with sandbox(sqlite), sqlite.engine.connect() as connection, ThreadPoolExecutor(1) as threads:
        stand_in: Any = connection.connection.driver_connection
        stand_in.create_function("tell", 0, runs.set)
        gc.disable()  # not before it is asked to
        try:
            leak(sqlite)
            running = threads.submit(run, connection)
            runs.wait()
            began = monotonic()
            with pytest.warns(SessionLeakWarning):
                stand_in.cancel_safe()
            assert monotonic() - began < PATIENCE / 2
            running.result()
        finally:
            gc.enable()
    assert names(sqlite) == []


def test_who_waits_for_a_session_that_it_collects_itself_goes_on(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector comes between its place in the line and the waiting, and passes nothing on."""
    wait = _turns._ThreadWaiter.wait

    def collect_first(waiter: Any) -> None:
        gc.collect()
        wait(waiter)

    monkeypatch.setattr(_turns._ThreadWaiter, "wait", collect_first)
    gc.disable()  # not before
    try:
        with sandbox(sqlite), ThreadPoolExecutor(1) as threads:
            threads.submit(leak, sqlite).result()
            began = monotonic()
            with pytest.warns(SessionLeakWarning):
                assert names(sqlite) == []
            assert monotonic() - began < PATIENCE / 2
    finally:
        gc.enable()


def leak(database: Database) -> None:
    """Leave a session that has written to the garbage collector."""
    session = database.sessionmaker()
    session.info["itself"] = session
    flush(session, "leaked")


@pytest.mark.parametrize("url", ["sqlite-file"], indirect=True)
def test_a_file_that_another_process_writes_to_is_named_with_the_mend(url: str) -> None:
    with Database(url) as other, Database(url, pool_timeout=0.1) as database:
        create_tables(other)
        with other.begin() as session:
            session.add(Item(name="pear"))
            session.flush()
            with pytest.raises(SandboxError, match=r"test\.db is locked.*worker_id.*bind="):
                with sandbox(database):
                    pass
        with sandbox(database):
            assert names(database) == ["pear"]


@pytest.mark.parametrize("url", ["sqlite-file"], indirect=True)
def test_sandboxes_on_one_file_wait_for_each_other(url: str) -> None:
    """As those of several processes do: also if they have read before they write."""
    with Database(url) as one, Database(url) as other:
        create_tables(one)
        is_open, has_tried = threading.Event(), threading.Event()

        def write_first() -> None:
            with sandbox(one):
                with one.begin() as session:
                    session.add(Item(name="pear"))
                is_open.set()
                has_tried.wait(0.2)  # the other one can only be seen to wait

        def write_second() -> None:
            is_open.wait()
            with sandbox(other):
                has_tried.set()
                assert names(other) == []
                with other.begin() as session:
                    session.add(Item(name="pear"))

        with ThreadPoolExecutor(2) as threads:
            for done in (threads.submit(write_first), threads.submit(write_second)):
                done.result()
        assert names(one) == []


@pytest.mark.parametrize("wrong", [None, "sqlite://", create_engine("sqlite://")])
def test_what_is_no_database_is_refused_with_the_mend(wrong: Any) -> None:
    given: Any = wrong
    kind = "None" if wrong is None else type(wrong).__name__
    with pytest.raises(ConfigurationError, match=f"fixture sessionscope_database .*{kind}.*bind="):
        with sandbox(given):
            pass


def test_a_database_given_as_bind_is_refused_with_the_mend() -> None:
    memory: Any = Database("sqlite://")
    with pytest.raises(ConfigurationError, match=r"write bind=other_database\.engine"):
        with sandbox(Database("sqlite://"), bind=memory):
            pass


_FAILS = {
    "postgresql": "DO $$ BEGIN RAISE serialization_failure; END $$",
    "mysql": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock'",
}


@pytest.mark.parametrize("url", ["postgres", "psycopg2", "mysql"], indirect=True)
def test_a_unit_runs_again_once_its_savepoint_is_rolled_back(boxed: Database) -> None:
    """As in production: from the beginning, with a fresh session, and without its hooks."""
    attempts: list[Session] = []
    ran: list[int] = []

    def add(session: Session) -> None:
        attempts.append(session)
        assert names_in(session) == ["before"]
        session.add(Item(name="pear"))
        session.flush()
        after_commit(session, ran.append, len(attempts))
        if len(attempts) < 3:
            session.execute(text(_FAILS[boxed.engine.dialect.name]))

    with boxed.begin() as session:
        session.add(Item(name="before"))
    boxed.run(add)
    assert len(set(attempts)) == 3
    assert ran == [3]
    assert sorted(names(boxed)) == ["before", "pear"]
    assert boxed.stats().retried == 2


@pytest.mark.parametrize("url", ["postgres", "mysql"], indirect=True)
def test_a_unit_that_runs_again_leaves_the_tests_own_rows_alone(boxed: Database) -> None:
    """They were flushed and not committed, by the session around it."""
    attempts: list[None] = []

    @boxed.with_session(attempts=2)
    def add(session: Session) -> None:
        attempts.append(None)
        session.add(Item(name="pear"))
        session.flush()
        session.execute(text(_FAILS[boxed.engine.dialect.name]))

    with boxed.sessionmaker() as own:
        own.add(Item(name="own"))
        own.flush()
        with pytest.raises(OperationalError):
            add()
        assert names_in(own) == ["own"]
        own.commit()
    assert len(attempts) == 2
    assert names(boxed) == ["own"]


def names_in(session: Session) -> list[str]:
    return sorted(session.scalars(select(Item.name)))


_SLEEPS = {
    "postgresql": "SELECT pg_sleep(30)",
    "mysql": "DO SLEEP(30)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n",
}


def test_a_deadline_ends_its_unit_and_not_the_sandbox(boxed: Database) -> None:
    """In production it ends the connection as well; here that is everyone's."""
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    for _ in range(3):
        with pytest.raises(DeadlineExceeded), boxed.begin(timeout=0.1) as session:
            session.add(Item(name="plum"))
            session.flush()
            session.execute(text(_SLEEPS[boxed.engine.dialect.name]))
        with boxed.begin(read_only=True) as session:
            assert names_in(session) == ["pear"]


@on_one_server
def test_a_deadline_that_is_over_elsewhere_leaves_the_statement_of_others_alone(
    boxed: Database,
) -> None:
    """Of its own flow, on the same connection."""
    with pytest.raises(DeadlineExceeded), boxed.begin(timeout=0.05) as session:
        session.execute(text("SELECT 1"))
        with boxed.engine.connect() as other:
            assert other.scalar(text("SELECT 1 FROM pg_sleep(0.2)")) == 1
        session.execute(text("SELECT 1"))
    assert names(boxed) == []


@pytest.mark.parametrize("url", ["postgres", "mysql"], indirect=True)
def test_a_connection_that_is_lost_is_told_as_that(database: Database, url: str) -> None:
    """A unit is not run again on it, and the next sandbox has another one."""
    ask, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT CONNECTION_ID()", "KILL {}"),
    }[database.engine.dialect.name]
    attempts: list[None] = []

    def add(session: Session) -> None:
        attempts.append(None)
        session.add(Item(name="pear"))
        session.flush()

    with pytest.raises(SandboxError, match="connection of the sandbox was lost"):
        with sandbox(database):
            with database.engine.connect() as connection:
                backend = connection.scalar(text(ask))
            beside = create_engine(url, isolation_level="AUTOCOMMIT")
            with beside.connect() as connection:
                connection.execute(text(kill.format(backend)))
            beside.dispose()
            with pytest.raises(SandboxError, match="connection of the sandbox was lost"):
                database.run(add)
    assert len(attempts) == 1
    with sandbox(database):
        database.run(add)
    assert names(database) == []


@pytest.mark.parametrize("url", ["postgres", "sqlite-file"], indirect=True)
def test_a_forked_child_is_told_that_it_is_not_in_it(boxed: Database) -> None:
    with boxed.begin() as session:
        session.add(Item(name="pear"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            names(boxed)
        except SandboxError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as told:
        assert "was forked from one with a sandbox" in told.read()
    assert names(boxed) == ["pear"]


def test_one_on_the_engine_of_another_is_refused(boxed: Database) -> None:
    other = Database("sqlite://")
    with pytest.raises(ConfigurationError, match="in a sandbox already"):
        with sandbox(other, bind=boxed.engine):
            pass


def test_one_that_is_left_open_when_the_interpreter_ends_stores_nothing(sqlite: Database) -> None:
    script = f"""
from sessionscope import Database
from sessionscope.testing import sandbox
from tests.models import Item

database = Database({sqlite.engine.url.render_as_string()!r})
box = sandbox(database)
box.__enter__()
session = database.sessionmaker()
session.add(Item(name="pear"))
session.commit()
print("written")
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "written\n", "")
    assert names(sqlite) == []
