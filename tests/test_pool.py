"""Both engines: one bound over their connections, dead ones replaced, no ping per checkout."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.pool import NullPool, QueuePool

from sessionscope import Database, _liveness
from sessionscope._backends import Backends
from sessionscope._signal import Signal
from sessionscope.exc import PoolBusy
from sessionscope.testing import PostgresServer
from tests.forks import answer_of_a_child
from tests.models import Item, create_tables, names

BACKENDS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)


@pytest.fixture
def small(postgres_url: str) -> Iterator[Database]:
    """A Database with room for two connections."""
    with Database(postgres_url, pool_size=2, max_overflow=0, pool_timeout=0.2) as database:
        yield create_tables(database)


def backends(observer: Database) -> int:
    with observer.read_engine.connect() as connection:
        return int(connection.scalar(BACKENDS) or 0)


def test_nothing_is_connected_before_the_first_statement(postgres_url: str) -> None:
    with Database(postgres_url) as database:
        with database.begin():
            assert database.stats().idle == 0
        assert database.stats().idle == 0


def test_both_engines_together_keep_the_bound(postgres_url: str) -> None:
    """At the bound, an idle connection of the other engine makes room."""
    with (
        Database(postgres_url) as observer,
        Database(postgres_url, pool_size=3, max_overflow=1) as database,
    ):
        before = backends(observer)
        most = 0
        for round_ in range(6):
            barrier = threading.Barrier(5)

            def work(read_only: bool, barrier: threading.Barrier = barrier) -> None:
                with database.begin(read_only=read_only) as session:
                    session.execute(text("SELECT 1"))
                    barrier.wait(10)
                    barrier.wait(10)

            with ThreadPoolExecutor(4) as threads:
                futures = [threads.submit(work, round_ % 2 == 0) for _ in range(4)]
                barrier.wait(10)
                most = max(most, backends(observer) - before)
                barrier.wait(10)
                for future in futures:
                    future.result(10)
        assert most == 4
        assert backends(observer) - before <= 4


def test_a_plain_connection_waits_for_the_bound_and_gets_a_clear_error(small: Database) -> None:
    """Users of .engine share the bound; they are not admitted, they wait in the pool."""
    with small.engine.connect(), small.engine.connect():
        with pytest.raises(
            sa_exc.TimeoutError,
            match="All 2 connections are in use, by units of work or by users of .engine",
        ):
            small.read_engine.connect()


def test_a_plain_connection_gets_the_place_that_the_other_engine_gives_back(
    small: Database,
) -> None:
    first, second = small.engine.connect(), small.engine.connect()
    waiting = threading.Event()
    signal = small.read_engine.pool.backends.signal  # type: ignore[attr-defined]  # what it waits for
    original = signal.wait

    def wait(seen: int, timeout: float) -> bool:
        waiting.set()
        return bool(original(seen, 10))

    signal.wait = wait
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(small.read_engine.connect)
        assert waiting.wait(10)
        first.close()
        connection = reader.result(10)
        connection.close()
    second.close()


class SlowlyClosed:
    """A pool with idle connections, which the server has not closed when their close() returns."""

    def __init__(self) -> None:
        self.closing = 0

    def close_one_idle(self) -> bool:
        self.closing += 1
        return self.closing <= 5  # it is empty then


def test_one_idle_connection_is_closed_for_one_checkout() -> None:
    """However long the server takes: the checkout waits for that one."""
    pool = SlowlyClosed()
    backends = Backends(2, lambda: 0, lambda: [pool], Signal())
    backends.take(0)
    backends.take(0)
    with pytest.raises(PoolBusy):
        backends.take(0.01)
    assert pool.closing == 1
    backends.give_back()
    backends.take(0)


def test_a_place_that_somebody_else_took_costs_another_idle_connection() -> None:
    class Stolen(SlowlyClosed):
        def close_one_idle(self) -> bool:
            counted.give_back()
            if not self.closing:
                counted.take(0)
            return super().close_one_idle()

    pool = Stolen()
    counted = Backends(1, lambda: 0, lambda: [pool], Signal())
    counted.take(0)
    counted.take(0)
    assert pool.closing == 2


def test_a_forked_child_does_not_count_what_it_inherited(postgres_url: str) -> None:
    """Once its pool is emptied, as SQLAlchemy has it, all connections are its own."""
    with Database(postgres_url, pool_size=1, max_overflow=0, pool_timeout=0.1) as database:

        def in_child() -> object:
            database.engine.dispose(close=False)
            with database.begin() as session:
                return session.scalar(text("SELECT 'served'"))

        with database.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            assert answer_of_a_child(in_child) == "served"


def test_dispose_keeps_the_bound_and_the_database_usable(small: Database) -> None:
    for _ in range(2):
        small.dispose()
        with small.engine.connect(), small.read_engine.connect():
            with pytest.raises(sa_exc.TimeoutError):
                small.engine.connect()


def test_a_killed_connection_is_replaced_without_an_error(
    postgres: Database, postgres_server: PostgresServer
) -> None:
    """The end of the connection is readable on its socket: no ping is needed to see it."""
    pids = set()
    for read_only in (False, True):
        with postgres.begin(read_only=read_only) as session:
            pids.add(session.scalar(text("SELECT pg_backend_pid()")))
    with Database(postgres_server.url()) as other, other.begin() as session:
        for pid in pids:
            session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    for read_only in (False, True):
        with postgres.begin(read_only=read_only) as session:
            assert session.scalar(text("SELECT pg_backend_pid()")) not in pids


def test_a_server_that_was_restarted_is_reconnected_to() -> None:
    with PostgresServer() as server, Database(server.create_database()) as database:
        with database.begin() as session:
            session.execute(text("SELECT 1"))
        server.restart()
        with database.begin() as session:
            assert session.scalar(text("SELECT 1")) == 1


def test_no_ping_is_sent_while_a_connection_is_in_regular_use(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pings = count_pings(postgres, monkeypatch)
    for _ in range(5):
        with postgres.begin() as session:
            session.execute(text("SELECT 1"))
    assert pings == []


def test_a_connection_that_was_idle_for_long_is_pinged_once(
    postgres: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pings = count_pings(postgres, monkeypatch)
    with postgres.begin() as session:
        session.execute(text("SELECT 1"))
    monkeypatch.setattr(_liveness, "PING_AFTER_IDLE", -1.0)
    with postgres.begin() as session:
        session.execute(text("SELECT 1"))
    assert len(pings) == 1


def test_a_notice_that_arrives_while_idle_does_not_cost_the_connection(
    postgres: Database,
) -> None:
    """A readable socket is only suspicious: the driver reads what it holds."""
    with postgres.begin() as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        session.execute(text("LISTEN something"))
    with postgres.read_engine.connect() as other:
        other.execute(text("SELECT 1"))
    with Database(postgres.engine.url) as other_database, other_database.begin() as session:
        session.execute(text("NOTIFY something"))

    for _ in range(2):
        with postgres.begin() as session:
            assert session.scalar(text("SELECT pg_backend_pid()")) == pid


def count_pings(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    pings: list[object] = []
    for engine in (database.engine, database.read_engine):
        ping = engine.dialect.do_ping

        def counted(connection: object, ping: object = ping) -> bool:
            pings.append(connection)
            return bool(ping(connection))  # type: ignore[operator]

        monkeypatch.setattr(engine.dialect, "do_ping", counted)
    return pings


def test_an_unlimited_pool_has_no_gate(postgres_url: str) -> None:
    kinds: list[dict[str, Any]] = [
        {"max_overflow": -1},
        {"pool_size": 0},
        {"engine_options": {"poolclass": NullPool}},
    ]
    for options in kinds:
        with Database(postgres_url, pool_timeout=0, **options) as database:
            assert database.stats().limit is None
            with ThreadPoolExecutor(20) as threads:
                barrier = threading.Barrier(20)

                def work(
                    database: Database = database, barrier: threading.Barrier = barrier
                ) -> None:
                    with database.begin() as session:
                        session.execute(text("SELECT 1"))
                        barrier.wait(10)

                for future in [threads.submit(work) for _ in range(20)]:
                    future.result(20)


def test_listeners_of_the_sessionmaker_see_both_kinds_of_unit(database: Database) -> None:
    seen = []

    @event.listens_for(database.sessionmaker, "after_begin")
    def after_begin(*_: object) -> None:
        seen.append("begin")

    for read_only in (False, True):
        with database.begin(read_only=read_only) as session:
            session.scalars(select(Item)).all()
    event.remove(database.sessionmaker, "after_begin", after_begin)
    assert seen == ["begin", "begin"]


def test_connections_are_kept_while_as_many_units_run(postgres_url: str) -> None:
    """SQLAlchemy's pool closes what is returned beyond pool_size, and opens it anew at once."""
    with Database(postgres_url, pool_size=1, max_overflow=3) as database:
        opened = []
        event.listen(database.engine, "connect", lambda *_: opened.append(1))
        barrier = threading.Barrier(4)

        def work() -> None:
            for _ in range(5):
                with database.begin() as session:
                    session.execute(text("SELECT 1"))
                    barrier.wait(10)  # all hold a connection
                    session.commit()  # and give it back while the units go on
                    barrier.wait(10)

        with ThreadPoolExecutor(4) as threads:
            for future in [threads.submit(work) for _ in range(4)]:
                future.result(30)
        assert len(opened) == 4
        for _ in range(4):
            database.ping()
            with database.begin() as session:
                session.execute(text("SELECT 1"))
        assert database.stats().idle <= 2  # no more than pool_size of each engine afterwards


def test_pre_ping_of_the_users_own_still_reconnects(postgres_server: PostgresServer) -> None:
    """Every application that is ported sets it; it costs a round trip, and works."""
    url = postgres_server.create_database()
    with Database(url, engine_options={"pool_pre_ping": True}) as database:
        with database.begin() as session:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
        with Database(url) as other, other.begin() as session:
            session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with database.begin() as session:
            assert session.scalar(text("SELECT 1")) == 1


def test_the_users_own_queue_pool_is_ours(postgres_url: str) -> None:
    options = {"poolclass": QueuePool}
    with Database(postgres_url, pool_size=1, max_overflow=0, engine_options=options) as database:
        for read_only in (False, True):
            with database.begin(read_only=read_only) as session:
                session.execute(text("SELECT 1"))
        assert database.stats().idle == 1


def test_dispose_during_units_keeps_the_bound(
    small: Database, postgres_server: PostgresServer
) -> None:
    """What is in use of the old pool counts, and is closed when it comes back."""
    in_use = small.engine.connect()
    in_use.execute(text("SELECT 1"))
    small.dispose()
    with small.engine.connect(), pytest.raises(PoolBusy):
        small.engine.connect()
    in_use.close()
    with small.engine.connect(), small.engine.connect() as second:
        assert second.scalar(BACKENDS) == 1


def test_an_admitted_unit_that_finds_no_connection_gets_pool_busy(small: Database) -> None:
    with small.engine.connect(), small.engine.connect(), small.begin() as session:
        with pytest.raises(PoolBusy, match="users of .engine"):
            session.execute(text("SELECT 1"))


def test_a_place_whose_connect_failed_is_free_again(small: Database) -> None:
    small.dispose()

    @event.listens_for(small.engine, "do_connect")
    def fail(*_: object) -> None:
        raise ValueError("no connection")

    for _ in range(5):
        with pytest.raises(ValueError, match="no connection"):
            small.engine.connect()
    event.remove(small.engine, "do_connect", fail)
    with small.engine.connect(), small.engine.connect():
        pass


@pytest.mark.parametrize("url", ["postgres", "psycopg2", "mysql"], indirect=True)
def test_a_connection_that_comes_back_with_a_transaction_is_replaced(database: Database) -> None:
    """A thread may go on using the driver's connection after its unit has ended."""
    with database.begin() as session:
        driver_connection = session.connection().connection.driver_connection
    assert driver_connection is not None
    driver_connection.cursor().execute("INSERT INTO item (name) VALUES ('zombie')")

    with database.begin() as session:
        session.add(Item(name="next"))
        assert session.connection().connection.driver_connection is not driver_connection
    assert names(database) == ["next"]


def test_a_two_phase_sessionmaker_reads_as_well(postgres_url: str) -> None:
    with Database(postgres_url, session_options={"twophase": True}) as database:
        database.ping()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize(("given", "expected"), [("", [5, None]), ("?connect_timeout=3", [3, 3])])
def test_a_deadline_limits_connecting(
    postgres_url: str,
    driver: str,
    given: str,
    expected: list[int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver gives up soon after it; without one, it is as the user has said."""
    seen: list[int | None] = []

    def connecting(*args: Any, **kwargs: Any) -> Any:
        seconds = kwargs.get("connect_timeout")
        seen.append(None if seconds is None else int(seconds))
        return connect(*args, **kwargs)

    with Database(f"{postgres_url.replace('+psycopg', f'+{driver}')}{given}") as database:
        module: Any = database.engine.dialect.loaded_dbapi
        connect = module.connect
        monkeypatch.setattr(module, "connect", connecting)
        for timeout in (5, None):
            with database.begin(timeout=timeout) as session:
                session.execute(text("SELECT 1"))
            database.dispose()
    assert seen == expected
