"""MySQL and MariaDB: what differs from PostgreSQL, on a real server."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy import make_url, select, text
from sqlalchemy.orm import Session

from benchmarks.proxy import Proxy
from sessionscope import Database, Unit, _doom
from sessionscope.exc import CommitUnknown, DatabaseUnavailable, TransactionDoomed
from tests.models import Item, names

DEADLOCK = 1213


@pytest.fixture
def stocked(mysql: Database) -> Database:
    """Two items to lock."""
    with mysql.begin() as session:
        session.add_all([Item(id=1, name="one"), Item(id=2, name="two")])
    return mysql


def lock(session: Session, item_id: int) -> None:
    session.execute(text("SELECT id FROM item WHERE id = :id FOR UPDATE"), {"id": item_id})


@contextmanager
def a_rival_that_wins(database: Database) -> Iterator[Callable[[Session], None]]:
    """A transaction that holds item 2 and wants item 1, and what makes another the victim.

    The victim is the one that has changed fewer rows.
    """
    with database.engine.connect() as rival, ThreadPoolExecutor(1) as thread:
        rival.execute(text("UPDATE item SET name = 'rival' WHERE id = 2"))
        rival.execute(text("INSERT INTO item VALUES (90, 'a'), (91, 'b'), (92, 'c'), (93, 'd')"))

        def collide(session: Session) -> None:
            """Deadlock with the rival, with item 1 locked by *session*; swallow the error."""
            waiting = threading.Event()

            def want_item_1() -> None:
                waiting.set()
                rival.execute(text("UPDATE item SET name = 'late' WHERE id = 1"))

            future = thread.submit(want_item_1)
            waiting.wait(5)
            with pytest.raises(sa_exc.OperationalError) as caught:
                lock(session, 2)
            assert caught.value.orig is not None
            assert caught.value.orig.args[0] == DEADLOCK
            future.result(5)

        yield collide
        rival.rollback()


def test_a_swallowed_deadlock_refuses_the_next_statement(stocked: Database) -> None:
    """The server has rolled back everything: what follows would be stored alone."""
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed, match="OperationalError running 'SELECT id"):
            with stocked.begin() as session:
                session.add(Item(id=3, name="lost"))
                session.flush()
                lock(session, 1)
                collide(session)
                session.add(Item(id=4, name="alone"))
    assert names(stocked) == ["one", "two"]


def test_a_swallowed_deadlock_dooms_the_commit(stocked: Database) -> None:
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed) as caught, stocked.begin() as session:
            session.add(Item(id=3, name="lost"))
            session.flush()
            lock(session, 1)
            collide(session)
    assert "Nothing was written" in str(caught.value)
    assert isinstance(caught.value.__cause__, sa_exc.OperationalError)
    assert names(stocked) == ["one", "two"]


def test_a_deadlock_that_lost_locks_alone_dooms_as_well(stocked: Database) -> None:
    """What was read FOR UPDATE may have changed by now."""
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed), stocked.begin() as session:
            lock(session, 1)
            collide(session)
            session.execute(text("UPDATE item SET name = 'stale' WHERE id = 1"))
    assert names(stocked) == ["one", "two"]


def test_a_deadlock_inside_a_savepoint_dooms_the_transaction(stocked: Database) -> None:
    """InnoDB has thrown the savepoint away with everything else."""
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed), stocked.begin() as session:
            session.add(Item(id=3, name="lost"))
            session.flush()
            lock(session, 1)
            with session.begin_nested():
                collide(session)
    assert names(stocked) == ["one", "two"]


def test_a_driver_that_hides_the_status_is_believed_by_the_errors_code(
    stocked: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mysqlclient, for one, does not show the server's status."""
    monkeypatch.setattr(_doom, "_mysql_status", lambda proxied: None)
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed), stocked.begin() as session:
            lock(session, 1)
            collide(session)
    assert names(stocked) == ["one", "two"]


def test_after_a_rollback_the_same_unit_may_go_on(stocked: Database) -> None:
    with a_rival_that_wins(stocked) as collide, stocked.begin() as session:
        lock(session, 1)
        collide(session)
        session.rollback()
        session.add(Item(id=3, name="again"))
        session.commit()
        session.add(Item(id=4, name="and again"))
    assert names(stocked) == ["again", "and again", "one", "two"]


def test_the_connection_of_a_deadlock_is_as_good_as_new(stocked: Database) -> None:
    with a_rival_that_wins(stocked) as collide:
        with pytest.raises(TransactionDoomed), stocked.begin() as session:
            lock(session, 1)
            collide(session)
    for number in (3, 4):
        with stocked.begin() as session:
            session.add(Item(name=f"item {number}"))
    assert len(names(stocked)) == 4


def test_a_lock_wait_timeout_undoes_its_statement_only(stocked: Database) -> None:
    with stocked.engine.connect() as holder:
        holder.execute(text("UPDATE item SET name = 'held' WHERE id = 1"))
        with stocked.begin() as session:
            session.add(Item(id=3, name="kept"))
            session.flush()
            session.execute(text("SET innodb_lock_wait_timeout = 0"))
            with pytest.raises(sa_exc.OperationalError, match="1205"):
                lock(session, 1)
        holder.rollback()
    assert names(stocked) == ["kept", "one", "two"]


def test_a_caught_integrity_error_commits(stocked: Database) -> None:
    with stocked.begin() as session:
        session.add(Item(id=3, name="kept"))
        session.flush()
        with pytest.raises(sa_exc.IntegrityError):
            session.execute(text("INSERT INTO item VALUES (1, 'again')"))
    assert names(stocked) == ["kept", "one", "two"]


def test_a_failed_ddl_statement_has_committed_and_lost_nothing(stocked: Database) -> None:
    with stocked.begin() as session:
        session.execute(text("INSERT INTO item VALUES (3, 'kept')"))
        with pytest.raises(sa_exc.OperationalError):
            session.execute(text("CREATE TABLE item (id INTEGER)"))
        session.execute(text("INSERT INTO item VALUES (4, 'kept too')"))
    assert names(stocked) == ["kept", "kept too", "one", "two"]


def thread_id(session: Session) -> int:
    return int(session.scalars(text("SELECT CONNECTION_ID()")).one())


def kill(database: Database, thread_id: int) -> None:
    """End a connection, and wait until the server has."""
    with database.read_engine.connect() as other:
        other.execute(text(f"KILL {thread_id}"))
        gone = text(f"SELECT id FROM information_schema.processlist WHERE id = {thread_id}")
        while other.scalar(gone) is not None:
            pass


def test_a_connection_lost_during_commit_is_an_unknown_outcome(mysql: Database) -> None:
    with pytest.raises(CommitUnknown, match="lost during COMMIT"), mysql.begin() as session:
        session.add(Item(name="who knows"))
        session.flush()
        kill(mysql, thread_id(session))
    assert names(mysql) == []


def test_a_killed_connection_is_replaced_without_an_error(mysql: Database) -> None:
    """The server says why before it hangs up, so the socket is readable."""
    with mysql.begin() as session:
        killed = thread_id(session)
    kill(mysql, killed)
    with mysql.begin() as session:
        assert thread_id(session) != killed


@pytest.mark.parametrize("isolation_level", [None, "REPEATABLE READ"])
def test_the_server_refuses_text_that_writes(mysql: Database, isolation_level: str | None) -> None:
    with pytest.raises(sa_exc.DBAPIError, match="READ ONLY transaction"):
        with mysql.begin(read_only=True, isolation_level=isolation_level) as session:
            session.execute(text("INSERT INTO item (name) VALUES ('refused')"))
    assert names(mysql) == []


def test_a_snapshot_unit_sees_one_state(mysql: Database) -> None:
    count = text("SELECT count(*) FROM item")
    with mysql.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert session.scalar(count) == 0
        with ThreadPoolExecutor(1) as thread:
            thread.submit(add_one, mysql).result(10)
        assert session.scalar(count) == 0
    assert names(mysql) == ["one"]


def add_one(database: Database) -> None:
    with database.begin() as session:
        session.add(Item(name="one"))


def test_a_read_only_unit_streams(mysql: Database) -> None:
    with mysql.begin() as session:
        session.add_all([Item(name=str(number)) for number in range(100)])
    with mysql.begin(read_only=True) as session:
        result = session.scalars(select(Item.id).execution_options(yield_per=10))
        assert len(list(result)) == 100


def test_waited_round_trips(mysql: Database, mysql_url: str) -> None:
    """One for a read; INSERT, COMMIT and the pool's ROLLBACK for a write."""
    url = make_url(mysql_url)
    with Proxy("127.0.0.1", url.port or 3306) as proxy:
        distant = url.set(host="127.0.0.1", port=proxy.port)
        with Database(distant) as database:

            def read() -> None:
                with database.begin(read_only=True) as session:
                    session.scalars(select(Item)).all()

            def write() -> None:
                with database.begin() as session:
                    session.add(Item(name=f"item {proxy.waited()}"))

            for work, trips in ((read, 1), (write, 3)):
                work()
                before = proxy.waited()
                work()
                assert proxy.waited() - before == trips


def test_discard_ends_the_statement_that_another_thread_runs(mysql: Database) -> None:
    unit = Unit(mysql)
    unit.admit()
    is_asleep = text(
        "SELECT 1 FROM information_schema.processlist "
        f"WHERE id = {thread_id(unit.session)} AND state <> ''"
    )

    def sleep() -> None:
        with pytest.raises(sa_exc.SQLAlchemyError):
            unit.session.execute(text("SELECT SLEEP(60)"))

    with ThreadPoolExecutor(1) as thread, mysql.read_engine.connect() as other:
        future = thread.submit(sleep)
        while other.scalar(is_asleep) is None:
            pass
        unit.discard()
        future.result(5)
        unit.close()
        assert other.scalar(is_asleep) is None


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ("nobody:wrong@127.0.0.1", "Check the user and the password"),
        ("root@127.0.0.1", "Unknown database 'nowhere'. Create it"),
        ("root@127.0.0.1:1", "Is the server running"),
    ],
)
@pytest.mark.usefixtures("mysql_server")
def test_what_prevents_a_connection_is_named_with_its_mend(server: str, message: str) -> None:
    with Database(f"mysql+pymysql://{server}/nowhere") as database:
        with pytest.raises(DatabaseUnavailable, match=message) as caught:
            database.ping()
    assert "wrong" not in str(caught.value)


PROCEDURE = "CREATE PROCEDURE store() BEGIN INSERT INTO item (name) VALUES ('fig'); COMMIT; END"
SAYS_DEADLOCK = text(
    "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'"
)


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(
    ("statement", "calls"),
    [
        ("CREATE TABLE other (id INT)", 1),
        ("/* why */ -- and\n create index by_name ON item (name)", 1),
        ("TRUNCATE TABLE note", 1),
        ("CALL store()", 1),
        ("CREATE TEMPORARY TABLE IF NOT EXISTS other (id INT)", 2),
        ("UPDATE item SET name = 'lime' WHERE id = 0", 2),
    ],
)
def test_what_mysql_commits_by_itself_is_not_run_again(
    mysql: Database, statement: str, calls: int, timeout: float | None
) -> None:
    """The first half of the unit is there to stay, and would be applied twice."""
    with mysql.engine.begin() as connection:
        connection.exec_driver_sql(PROCEDURE)
    called = 0

    @mysql.with_session(timeout=timeout)
    def work(session: Session) -> None:
        nonlocal called
        called += 1
        session.execute(text("INSERT INTO item (name) VALUES ('pear')"))
        session.execute(text(statement))
        session.execute(text("SELECT 1"))
        if called == 1:
            session.execute(SAYS_DEADLOCK)

    if calls == 1:
        with pytest.raises(sa_exc.OperationalError, match="1213"):
            work()
    else:
        work()
    assert called == calls
    assert names(mysql).count("pear") == 1
