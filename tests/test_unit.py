"""A unit of work: commit at its normal end, rollback on any exception, always closed."""

import gc
import select as selecting
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Executable, delete, insert, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session

from sessionscope import Database, Unit, _guards, _overlap, _unit
from sessionscope.exc import ReadOnlyUnit, SessionEnded
from tests.models import Item, Note, names


def test_the_normal_end_commits(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="kept"))

    assert names(database) == ["kept"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_rolls_back_and_passes(
    database: Database, error: type[BaseException]
) -> None:
    with pytest.raises(error), database.begin() as session:
        session.add(Item(name="gone"))
        session.flush()
        raise error

    assert names(database) == []
    assert database.stats().in_use == 0


def test_the_session_is_a_plain_one_bound_to_the_engine(database: Database) -> None:
    with database.begin() as session:
        assert isinstance(session, Session)
        assert session.get_bind() is database.engine


def test_objects_stay_readable_after_the_end(database: Database) -> None:
    """The unit's own last commit does not expire what a function returns."""
    with database.begin() as session:
        item = Item(name="readable")
        session.add(item)

    assert item.name == "readable"
    assert item.id is not None


def test_a_commit_inside_the_unit_is_allowed_and_later_work_is_of_the_same_unit(
    database: Database,
) -> None:
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        session.add(Item(name="first"))
        session.commit()
        session.add(Item(name="second"))
        session.flush()
        raise ValueError("stop")

    assert names(database) == ["first"]


def test_a_rollback_inside_the_unit_undoes_and_the_unit_goes_on(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="undone"))
        session.rollback()
        session.add(Item(name="kept"))

    assert names(database) == ["kept"]


def test_an_inner_begin_block_of_the_session_works_as_in_sqlalchemy(database: Database) -> None:
    with database.begin() as session:
        with session.begin():
            session.add(Item(name="inner"))
        session.add(Item(name="outer"))

    assert sorted(names(database)) == ["inner", "outer"]


def test_closing_the_session_inside_the_unit_is_not_a_silent_rollback(database: Database) -> None:
    with pytest.raises(SessionEnded, match=r"session\.close\(\) was called inside .*test_unit"):
        with database.begin() as session:
            session.add(Item(name="lost"))
            session.flush()
            session.close()

    assert names(database) == []


def test_a_failed_commit_rolls_back_and_leaves_a_clean_connection(database: Database) -> None:
    """After a failed COMMIT, SQLite keeps the transaction open: the next unit must not get it."""
    if database.engine.dialect.name == "sqlite":
        with database.engine.connect() as connection:
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1

    with pytest.raises(sa_exc.IntegrityError), database.begin() as session:
        session.add(Note(item_id=404))
    with database.begin() as session:
        session.add(Item(name="next"))

    assert names(database) == ["next"]


def test_a_hand_made_session_leaves_a_clean_connection_too(database: Database) -> None:
    """close() without rollback() after a failed commit: SQLAlchemy alone would not roll back."""
    session = database.sessionmaker()
    session.add(Note(item_id=404))
    with pytest.raises(sa_exc.IntegrityError):
        session.commit()
    session.close()

    with database.begin() as session:
        session.add(Item(name="next"))
    assert names(database) == ["next"]


def test_a_lost_connection_does_not_hide_the_users_exception(postgres: Database) -> None:
    with pytest.raises(ValueError, match="mine"), postgres.begin() as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with postgres.engine.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        raise ValueError("mine")

    assert names(postgres) == []


def test_a_read_only_unit_sees_what_is_committed_and_loads_objects(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="there"))

    with database.begin(read_only=True) as session:
        item = session.scalars(select(Item)).one()
    assert item.name == "there"


def test_a_read_only_unit_refuses_a_flush_and_names_what_changed(database: Database) -> None:
    with pytest.raises(ReadOnlyUnit, match=r"changes of Item; nothing was sent"):
        with database.begin(read_only=True) as session:
            session.add(Item(name="refused"))

    assert names(database) == []


@pytest.mark.parametrize(
    "statement",
    [
        insert(Item).values(name="refused"),
        update(Item).values(name="refused"),
        delete(Item),
    ],
)
def test_a_read_only_unit_refuses_statements_before_they_are_sent(
    database: Database, statement: Executable
) -> None:
    with database.begin() as session:
        session.add(Item(name="safe"))

    with pytest.raises(ReadOnlyUnit), database.begin(read_only=True) as session:
        session.execute(statement)

    assert names(database) == ["safe"]


def test_a_read_only_unit_refuses_ddl(database: Database) -> None:
    with pytest.raises(ReadOnlyUnit), database.begin(read_only=True) as session:
        Note.__table__.drop(session.connection())  # type: ignore[attr-defined]  # it is a Table


def test_the_server_refuses_what_gets_through_to_it(database: Database) -> None:
    with pytest.raises(sa_exc.DBAPIError), database.begin(read_only=True) as session:
        session.execute(text("INSERT INTO item (name) VALUES ('text')"))
    with (
        pytest.raises(Exception, match=r"(?i)read.?only"),
        database.begin(read_only=True) as session,
    ):
        cursor = session.connection().connection.cursor()
        cursor.execute("INSERT INTO item (name) VALUES ('raw')")

    assert names(database) == []


def test_a_writing_unit_writes_after_a_read_only_one(database: Database) -> None:
    """The read-only switch is never left on a connection that writes."""
    for number in range(3):
        with database.begin(read_only=True) as session:
            session.scalars(select(Item)).all()
        with database.begin() as session:
            session.add(Item(name=f"item {number}"))

    assert len(names(database)) == 3


def test_a_repeatable_read_unit_is_a_snapshot(postgres: Database) -> None:
    with postgres.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert session.scalars(select(Item)).all() == []
        add = threading.Thread(target=_add, args=(postgres, "later"))
        add.start()
        add.join()
        assert session.scalars(select(Item)).all() == []

    assert names(postgres) == ["later"]


def test_a_read_only_snapshot_on_sqlite_is_one_too(sqlite: Database) -> None:
    with sqlite.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert session.scalars(select(Item)).all() == []
        add = threading.Thread(target=_add, args=(sqlite, "later"))
        add.start()
        add.join()
        assert session.scalars(select(Item)).all() == []

    assert names(sqlite) == ["later"]


def test_a_snapshot_is_read_only_as_well(postgres: Database) -> None:
    with pytest.raises(sa_exc.DBAPIError, match="read-only transaction"):
        with postgres.begin(read_only=True, isolation_level="SERIALIZABLE") as session:
            session.execute(text("INSERT INTO item (name) VALUES ('text')"))


@pytest.mark.parametrize("option", [{"yield_per": 10}, {"stream_results": True}])
def test_a_read_only_unit_streams_through_a_server_side_cursor(
    postgres: Database, option: dict[str, object]
) -> None:
    """PostgreSQL has cursors in transactions only: the unit begins one by itself."""
    with postgres.begin() as session:
        session.add_all([Item(name=str(number)) for number in range(100)])

    for _ in range(2):  # the same connection, streaming and plain in turn
        with postgres.begin(read_only=True) as session:
            result = session.scalars(select(Item.id).execution_options(**option))
            assert len(list(result)) == 100
        with postgres.begin(read_only=True) as session:
            assert session.scalar(text("SELECT count(*) FROM item")) == 100
            connection = session.connection().connection.driver_connection
            assert connection is not None
            assert connection.info.transaction_status == 0  # idle: autocommit again


def test_a_streaming_unit_is_still_read_only(postgres: Database) -> None:
    with pytest.raises(sa_exc.DBAPIError, match="read-only transaction"):
        with postgres.begin(read_only=True) as session:
            session.scalars(select(Item.id).execution_options(yield_per=10)).all()
            session.execute(text("INSERT INTO item (name) VALUES ('text')"))


def test_an_isolation_level_holds_for_one_unit_only(postgres: Database) -> None:
    show = text("SHOW transaction_isolation")
    with postgres.begin(isolation_level="SERIALIZABLE") as session:
        assert session.scalar(show) == "serializable"
    with postgres.begin() as session:
        assert session.scalar(show) == "read committed"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("read_only", [False, True])
def test_an_isolation_level_never_poisons_the_pooled_connection(
    database: Database, level: str, read_only: bool
) -> None:
    """SQLAlchemy's own option would switch sqlite3 back to its legacy mode."""
    with database.begin(isolation_level=level, read_only=read_only) as session:
        session.scalars(select(Item)).all()

    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        session.add(Item(name="gone"))
        session.flush()
        raise ValueError("stop")
    assert names(database) == []


def test_sqlite_stays_out_of_its_legacy_mode_after_an_isolation_level(sqlite: Database) -> None:
    with sqlite.begin(isolation_level="SERIALIZABLE") as session:
        session.scalars(select(Item)).all()

    with pytest.raises(ValueError, match="stop"), sqlite.begin() as session:
        session.execute(text("CREATE TABLE made (id INTEGER)"))
        raise ValueError("stop")
    with pytest.raises(sa_exc.DBAPIError), sqlite.begin(read_only=True) as session:
        session.execute(text("SELECT * FROM made"))


def test_autocommit_is_there_for_statements_that_refuse_a_transaction(database: Database) -> None:
    with database.begin(isolation_level="AUTOCOMMIT") as session:
        is_mysql = database.engine.dialect.name == "mysql"
        session.execute(text("OPTIMIZE TABLE item" if is_mysql else "VACUUM"))


def test_a_unit_step_by_step(database: Database) -> None:
    """What integrations do."""
    unit = Unit(database)
    unit.admit()
    assert not unit.needs_io
    unit.session.add(Item(name="stepwise"))
    assert unit.needs_io
    unit.commit()
    unit.close()
    unit.close()  # harmless

    assert names(database) == ["stepwise"]
    assert database.stats().in_use == 0


def test_a_unit_that_is_closed_without_commit_rolls_back(database: Database) -> None:
    unit = Unit(database)
    unit.admit()
    unit.session.add(Item(name="gone"))
    unit.session.flush()
    unit.close()

    assert names(database) == []
    assert database.stats().rolled_back >= 1


def test_a_unit_has_no_session_before_it_is_admitted(database: Database) -> None:
    with pytest.raises(sa_exc.InvalidRequestError, match=r"admit\(\)"):
        _ = Unit(database).session


def test_a_reading_unit_needs_no_io_to_end_and_a_streaming_one_does(postgres: Database) -> None:
    unit = Unit(postgres, read_only=True)
    unit.admit()
    unit.session.scalars(select(Item)).all()
    assert not unit.needs_io
    unit.session.scalars(select(Item).execution_options(yield_per=1)).all()
    assert unit.needs_io
    unit.commit()
    unit.close()


def _add(database: Database, name: str) -> None:
    with database.begin() as session:
        session.add(Item(name=name))


def test_a_unit_is_used_once(database: Database) -> None:
    unit = database.begin()
    with unit as session:
        session.add(Item(name="one"))
    with pytest.raises(sa_exc.InvalidRequestError, match="used once"), unit:
        pytest.fail("it was opened again")
    assert database.stats().in_use == 0


def test_an_abandoned_unit_gives_everything_back(database: Database) -> None:
    session = database.begin().__enter__()  # the unit itself is garbage now
    gc.collect()
    assert database.stats().in_use == 0
    with pytest.raises(SessionEnded):
        session.execute(text("SELECT 1"))
    with database.begin():
        pass


def test_an_interrupt_while_the_unit_opens_leaks_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_guards, "enter", interrupted)
        database.begin().__enter__()
    assert database.stats().in_use == 0
    with database.begin():
        pass


def test_discard_closes_the_connection_that_another_thread_uses(postgres: Database) -> None:
    """What the other thread still sends never reaches the connection's next user."""
    unit = Unit(postgres)
    unit.admit()
    session = unit.session
    session.execute(text("SELECT 1"))
    sleeping = ThreadPoolExecutor(1)
    going_on = sleeping.submit(session.execute, text("SELECT pg_sleep(60)"))
    with postgres.read_engine.connect() as observer:
        while not observer.scalar(
            text("SELECT count(*) FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep'")
        ):
            pass
    unit.discard()
    unit.close()

    assert going_on.exception(10) is not None
    with pytest.raises(SessionEnded):
        session.execute(text("SELECT 1"))
    with postgres.begin() as session:
        session.add(Item(name="next"))
    assert names(postgres) == ["next"]
    assert postgres.stats().in_use == 0
    sleeping.shutdown()


def _throw_away(unit: Unit[Session]) -> None:
    unit.session.invalidate()


@pytest.mark.parametrize("end", [Unit.discard, _throw_away])
def test_nothing_is_freed_that_another_thread_is_using(
    psycopg: Database, end: Callable[[Unit[Session]], None]
) -> None:
    """libpq's connections are no thread's own: to close one under its user ends the process."""
    unit = Unit(psycopg)
    unit.admit()
    driver: Any = unit.session.connection().connection.driver_connection
    descriptor = driver.fileno()
    with ThreadPoolExecutor(1) as thread:
        with driver.lock:  # as it is in each of the driver's calls
            discarding = thread.submit(end, unit)
            selecting.select([descriptor], [], [], 10)  # the call fails: its line is cut
            assert not driver.closed
        discarding.result(10)
    assert driver.closed
    unit.close()


def test_a_file_is_not_closed_under_a_thread_that_goes_on(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_unit, "_PATIENCE", 0.1)
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT count(*) FROM n"
    unit = Unit(sqlite)
    unit.admit()
    session = unit.session
    driver: Any = session.connection().connection.driver_connection
    with ThreadPoolExecutor(1) as thread:
        counting = thread.submit(session.execute, text(endless))
        while not _overlap.is_in_use(session):
            time.sleep(0.001)
        unit.close()
        with pytest.raises(sa_exc.OperationalError, match="interrupted"):
            counting.result(10)
    assert driver.execute("SELECT 1").fetchone() == (1,)


def test_refusing_a_second_entry_leaves_the_first_alone(database: Database) -> None:
    unit = database.begin()
    with unit as session:
        with pytest.raises(sa_exc.InvalidRequestError, match="used once"):
            unit.__enter__()
        session.add(Item(name="kept"))
    assert names(database) == ["kept"]


def test_closing_waits_for_a_thread_that_is_inside_the_session(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cancelled request leaves behind: the connection still comes back."""
    unit = Unit(database)
    unit.admit()
    unit.session.execute(text("SELECT 1"))
    reset = _overlap.reset
    attempts: list[int] = []

    def busy_twice(session: Session) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise sa_exc.IllegalStateChangeError("in use by another thread")
        reset(session)

    monkeypatch.setattr(_overlap, "reset", busy_twice)
    unit.close()

    assert len(attempts) == 3
    assert database.stats().in_use == 0
    assert names(database) == []


def test_closing_never_raises_even_after_an_overlap(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other thread has broken is thrown away with its connection."""
    unit = Unit(database)
    unit.admit()
    unit.session.add(Item(name="lost"))
    unit.session.flush()
    reset = _overlap.reset
    errors = [sa_exc.IllegalStateChangeError("in use"), ValueError("broken")]

    def broken(session: Session) -> None:
        if errors:
            raise errors.pop(0)
        reset(session)

    monkeypatch.setattr(_overlap, "reset", broken)
    unit.close()

    assert not errors
    assert database.stats().in_use == 0
    assert names(database) == []


def test_a_reading_unit_in_memory_ends_a_transaction() -> None:
    """Its connection is that of the units that write, too."""
    with Database("sqlite://") as memory:
        unit = Unit(memory, read_only=True)
        unit.admit()
        unit.session.execute(text("SELECT 1"))
        assert unit.needs_io
        unit.commit()
        unit.close()
