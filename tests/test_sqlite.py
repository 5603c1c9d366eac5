"""SQLite as a server would use it."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text

from sessionscope import Database
from sessionscope.exc import PoolBusy
from tests.models import Item, create_tables, names


def test_a_file_uses_wal_foreign_keys_and_a_busy_timeout(sqlite: Database) -> None:
    with sqlite.begin() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
        assert session.scalar(text("PRAGMA busy_timeout")) == 5000


def test_a_writing_unit_takes_the_write_lock_at_its_start(
    sqlite: Database, sqlite_url: str
) -> None:
    """BEGIN IMMEDIATE: to wait later, after a read, is what SQLite cannot do."""
    with sqlite.begin() as session:
        session.execute(text("SELECT 1"))
        other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        other.close()


def test_a_read_only_unit_takes_no_lock_and_is_not_held_up(sqlite: Database) -> None:
    with sqlite.begin() as session:
        session.add(Item(name="uncommitted"))
        session.flush()
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(names, sqlite).result(10) == []


def test_writers_of_one_file_queue_instead_of_failing(sqlite: Database) -> None:
    def increment() -> None:
        with sqlite.begin() as session:
            item = session.get_one(Item, 1)
            item.name = str(int(item.name) + 1)

    with sqlite.begin() as session:
        session.add(Item(id=1, name="0"))
    with ThreadPoolExecutor(20) as threads:
        for future in [threads.submit(increment) for _ in range(100)]:
            future.result(60)

    assert names(sqlite) == ["100"]


def test_a_locked_database_is_an_operational_error_and_leaves_nothing_open(
    sqlite_url: str,
) -> None:
    with Database(sqlite_url, pool_timeout=0.05) as database:
        create_tables(database)
        other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sa_exc.OperationalError, match="locked"), database.begin() as session:
            session.add(Item(name="refused"))
        other.execute("ROLLBACK")
        other.close()

        with database.begin() as session:
            session.add(Item(name="next"))
        assert names(database) == ["next"]


def test_who_waits_too_long_for_another_writer_is_told_that_a_file_has_one(
    sqlite_url: str,
) -> None:
    with Database(sqlite_url, pool_timeout=0.05) as database, ThreadPoolExecutor(1) as threads:
        with database.begin(), pytest.raises(PoolBusy) as refused:
            threads.submit(database.begin().__enter__).result(10)
        assert "has one writer at a time" in str(refused.value)
        assert "pool_size" not in str(refused.value)


def test_savepoints_are_real(database: Database) -> None:
    """The driver's legacy mode begins no transaction before SAVEPOINT."""
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        with session.begin_nested():
            session.add(Item(name="inner"))
        raise ValueError("stop")
    assert names(database) == []


@pytest.mark.parametrize("url", ["sqlite-file", "sqlite-memory", "postgres"], indirect=True)
def test_ddl_is_rolled_back(database: Database) -> None:
    """MySQL alone commits at every DDL statement."""
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        session.execute(text("CREATE TABLE made (id INTEGER)"))
        raise ValueError("stop")
    with database.begin() as session:
        session.execute(text("CREATE TABLE made (id INTEGER)"))


def test_memory_is_one_database_for_all_threads() -> None:
    with Database("sqlite://") as database:
        create_tables(database)

        def add(number: int) -> None:
            with database.begin() as session:
                session.add(Item(name=f"item {number}"))

        with ThreadPoolExecutor(16) as threads:
            for future in [threads.submit(add, number) for number in range(100)]:
                future.result(30)
        assert len(names(database)) == 100


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:x?mode=memory&cache=shared&uri=true",
    ],
)
@pytest.mark.filterwarnings("ignore:Selection of the:sqlalchemy.exc.SADeprecationWarning")
def test_every_spelling_of_memory_keeps_its_rows(url: str) -> None:
    with Database(url) as database:
        create_tables(database)
        with database.begin() as session:
            session.add(Item(name="kept"))
        assert names(database) == ["kept"]
        assert database.stats().limit == 1


def test_a_reader_in_memory_never_sees_what_is_not_committed() -> None:
    with Database("sqlite://") as database:
        create_tables(database)
        seen: list[list[str]] = []
        written, reading = threading.Event(), threading.Event()

        def read() -> None:
            written.wait(10)
            reading.set()
            seen.append(names(database))

        reader = threading.Thread(target=read)
        reader.start()
        with pytest.raises(ValueError, match="stop"), database.begin() as session:
            session.add(Item(name="uncommitted"))
            session.flush()
            written.set()
            reading.wait(10)
            raise ValueError("stop")
        reader.join(10)
    assert seen == [[]]


def test_a_read_only_file_can_be_read_and_names_the_mend_on_a_write(
    sqlite: Database, sqlite_url: str
) -> None:
    with sqlite.begin() as session:
        session.add(Item(name="there"))
    path = sqlite_url.removeprefix("sqlite:///")
    with Database(f"sqlite:///file:{path}?mode=ro&uri=true") as database:
        assert names(database) == ["there"]
        with pytest.raises(sa_exc.OperationalError, match="check the permissions of the file"):
            with database.begin() as session:
                session.add(Item(name="refused"))
        assert names(database) == ["there"]


def test_a_missing_folder_names_the_mend(tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path / 'missing' / 'x.db'}") as database:
        with pytest.raises(sa_exc.OperationalError, match="Check that the folder exists"):
            database.ping()


def test_sqlalchemys_own_isolation_option_does_not_poison_the_pool(sqlite: Database) -> None:
    with sqlite.begin() as session:
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.scalars(select(Item)).all()
    with sqlite.begin() as session:
        driver_connection = session.connection().connection.driver_connection
        assert driver_connection is not None
        assert driver_connection.isolation_level is None
    with pytest.raises(ValueError, match="stop"), sqlite.begin() as session:
        session.execute(text("CREATE TABLE made (id INTEGER)"))
        raise ValueError("stop")
    with sqlite.begin() as session:
        session.execute(text("CREATE TABLE made (id INTEGER)"))


def test_a_rollback_fixture_leaks_no_row(sqlite: Database) -> None:
    """The well-known test recipe: an outer transaction that is rolled back."""
    with sqlite.engine.connect() as connection:
        outer = connection.begin()
        with sqlite.sessionmaker(
            bind=connection, join_transaction_mode="create_savepoint"
        ) as session:
            session.add(Item(name="leaked"))
            session.commit()
        outer.rollback()
    assert names(sqlite) == []


def test_a_plain_connection_in_memory_waits_for_the_unit_and_never_mixes_with_it() -> None:
    """On a shared connection its end would roll the unit back, without a word."""
    with Database("sqlite://", pool_timeout=0.05) as database:
        create_tables(database)
        with database.begin() as session:
            session.add(Item(name="one"))
            session.flush()
            with pytest.raises(PoolBusy):
                database.engine.connect()
            session.add(Item(name="two"))
        assert names(database) == ["one", "two"]


def test_the_users_own_busy_timeout_wins(sqlite_url: str) -> None:
    options = {"connect_args": {"timeout": 30}}
    with Database(sqlite_url, engine_options=options) as database, database.begin() as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 30000
