"""What happens to servers in earnest: killed, stopped, restarted, full, out of connections.

Each test is one fault, what units of work make of it, and how soon after its end the
next one succeeds. With SERVER_FAULTS_ROUNDS each is done so often, and the figures are printed.
"""

import os
import signal
import statistics
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sessionscope.exc import (
    CommitUnknown,
    DatabaseUnavailable,
    DeadlineExceeded,
    SessionScopeError,
)
from sessionscope.testing import FaultProxy, PostgresServer
from sessionscope.testing._postgres import StopMode
from tests.conftest import missing
from tests.faults.breaking import (
    ask,
    backends,
    configure,
    dsn,
    kill_backend,
    kill_server,
    processes_of,
    send,
    stopped,
    terminate_all,
    until,
    waiting_for,
)
from tests.faults.callers import CALLERS, Caller, Later, caller

ROUNDS = int(os.environ.get("SERVER_FAULTS_ROUNDS", "0"))
# Seconds after a fault's end. The short form may run beside other tests, and only sees that a
# success comes without anybody's help; the promise is that of the long form.
FIRST_SUCCESS = 0.5 if ROUNDS else 5.0
# Seconds after a deadline until it is told, likewise.
TOLD = 0.2 if ROUNDS else 2.0

_recoveries: dict[str, list[float]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with all drivers; in the short form with one of them."""
    if "driver" in metafunc.fixturenames:
        drivers = list(CALLERS)
        one = len(metafunc.function.__name__) % len(drivers)
        metafunc.parametrize("driver", drivers if ROUNDS else [drivers[one]])


@pytest.fixture(autouse=True, params=range(ROUNDS or 1))
def number(request: pytest.FixtureRequest) -> int:
    """Each test is done so often."""
    return int(request.param)


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Print how soon the first success came after each fault, at the end."""
    yield
    for fault, seconds in _recoveries.items():
        middle, worst = statistics.median(seconds) * 1e3, max(seconds) * 1e3
        print(
            f"\nserver faults: {fault}: first success {middle:.0f} ms after its end (median), "
            f"{worst:.0f} ms at most, {len(seconds)} times",
            end="",
        )
    print()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that may be broken."""
    try:
        # What a crash loses must not have been written to the log by chance.
        server = PostgresServer(max_connections=30, wal_writer_delay="10s")
    except ModuleNotFoundError as error:
        missing(str(error))
    with server:
        yield server


@dataclass
class Stage:
    """A database with a table, and those who write into it by one driver."""

    server: PostgresServer
    url: str
    driver: str
    caller: Caller
    names: Iterator[str] = field(default_factory=lambda: (str(n) for n in range(1_000_000)))

    def stored(self) -> Counter[str]:
        """What is in the table, seen from beside."""
        return Counter(name for (name,) in ask(self.url, "SELECT name FROM entry"))

    def recovers(self, fault: str, since: float, within: float = FIRST_SUCCESS) -> None:
        """Wait for a success, and see that it comes soon after the fault's end."""
        self.caller.run(append(name := f"after {next(self.names)}"))
        _recoveries.setdefault(fault, []).append(monotonic() - since)
        assert monotonic() - since <= within
        assert self.stored()[name] == 1
        assert self.caller.stats().in_use == 0


def append(name: str, then: Callable[[Session], object] | None = None) -> Callable[[Session], None]:
    """A unit that stores *name*, and *then* does something before its commit."""

    def work(session: Session) -> None:
        session.execute(text("INSERT INTO entry (name) VALUES (:name)"), {"name": name})
        if then is not None:
            then(session)

    return work


ID = "SELECT pg_current_xact_id()::text::bigint"


def own_backend(session: Session) -> int:
    return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())


def first_time(harm: Callable[[int], object]) -> Callable[[Session], None]:
    """Do *harm* to the backend of the first session that comes, and then ask something of it."""
    done: list[int] = []

    def work(session: Session) -> None:
        if not done:
            done.append(own_backend(session))
            harm(done[0])
        session.execute(text("SELECT 1"))

    return work


@contextmanager
def stage_for(server: PostgresServer, name: str, **options: object) -> Iterator[Stage]:
    url = server.create_database()
    ask(url, "CREATE TABLE entry (id bigserial PRIMARY KEY, name text NOT NULL)")
    with caller(name, url, **options) as there:
        yield Stage(server, url, name, there)
    database = make_url(url).database
    assert database is not None
    server.start()
    server.drop_database(database)


@pytest.fixture
def stage(server: PostgresServer, driver: str) -> Iterator[Stage]:
    with stage_for(server, driver) as stage:
        yield stage


def terminate(stage: Stage) -> Callable[[int], object]:
    return lambda pid: ask(stage.url, f"SELECT pg_terminate_backend({pid}, 5000)")


def kill(stage: Stage) -> Callable[[int], object]:
    """The server ends all others for this, and recovers."""
    return lambda pid: kill_backend(stage.url, pid)


@pytest.mark.parametrize("how", [terminate, kill])
def test_a_backend_that_ends(stage: Stage, how: Callable[[Stage], Callable[[int], object]]) -> None:
    """run() does it again; begin() says so, and the next unit finds nothing amiss."""
    stage.caller.run(append("run", first_time(how(stage))))
    assert stage.caller.stats().retried >= 1
    with pytest.raises(DBAPIError) as error:
        stage.caller.once(append("once", first_time(how(stage))))
    ended = monotonic()
    assert not isinstance(error.value, SessionScopeError)
    stage.recovers(f"a backend is ended ({how.__name__})", ended)
    stored = stage.stored()
    assert (stored["run"], stored["once"]) == (1, 0)


def test_a_backend_that_stands_still_at_a_statement(stage: Stage) -> None:
    """SIGSTOP: the connection is alive, and nothing comes. The deadline tells."""
    halted: list[int] = []

    def halt(pid: int) -> None:
        halted.append(pid)
        send(signal.SIGSTOP, pid)

    began = monotonic()
    try:
        with pytest.raises(DeadlineExceeded):
            stage.caller.once(append("once", first_time(halt)), timeout=0.5)
        assert monotonic() - began <= 0.5 + TOLD
        stage.recovers("a backend stands still", monotonic())
    finally:
        send(signal.SIGCONT, *halted)
    stage.recovers("a backend goes on", monotonic())
    until(lambda: halted[0] not in backends(stage.url))
    assert stage.stored()["once"] == 0


def test_a_backend_that_stands_still_at_the_commit(stage: Stage) -> None:
    """COMMIT was sent, and there is no one to ask in time: it is unknown, and that is true."""
    halted: list[int] = []

    def halt(session: Session) -> None:
        halted.append(own_backend(session))
        send(signal.SIGSTOP, halted[-1])

    try:
        for call, name in ((stage.caller.once, "once"), (stage.caller.run, "run")):
            with pytest.raises(CommitUnknown):
                call(append(name, halt), timeout=0.5)
    finally:
        send(signal.SIGCONT, *halted)
    stage.recovers("a backend that was committing goes on", monotonic())
    until(lambda: not set(halted) & set(backends(stage.url)))
    assert max(stage.stored()[name] for name in ("once", "run")) <= 1


def test_without_a_deadline_a_backend_is_waited_for(stage: Stage) -> None:
    """It stands still at COMMIT, and then commits."""

    pids: list[int] = []

    def halt(session: Session) -> None:
        pids.append(own_backend(session))
        send(signal.SIGSTOP, pids[0])

    waiting = Later(lambda: stage.caller.run(append("run", halt)))
    try:
        until(lambda: pids)
        sleep(0.2)  # nothing tells that a driver has sent its COMMIT
        assert not waiting.is_done
    finally:
        send(signal.SIGCONT, *pids)
    waiting.result()
    assert stage.stored() == {"run": 1}


def test_a_server_that_stands_still(stage: Stage) -> None:
    """The kernel still takes connections for it; deadlines end what waits for them."""
    stage.caller.run(append("before"))
    with stopped(*processes_of(stage.server)):
        for call in (stage.caller.once, stage.caller.run):
            began = monotonic()
            with pytest.raises(DeadlineExceeded):
                call(append("during"), timeout=0.3)
            assert monotonic() - began <= 0.3 + TOLD
    stage.recovers("the server goes on", monotonic())
    assert stage.stored()["during"] == 0


@pytest.mark.parametrize("mode", ["fast", "immediate", "kill"])
def test_a_server_that_is_away_for_a_while(stage: Stage, mode: str) -> None:
    """begin() says so at once; run() waits, and does its work when the server is back."""
    stage.caller.run(append("before"))
    stop(stage.server, mode)
    with pytest.raises(DatabaseUnavailable):
        stage.caller.once(append("once"))
    waiting = Later(lambda: stage.caller.run(append("run")))
    sleep(0.5)  # so that its pauses have grown
    assert not waiting.is_done
    stage.server.start()
    back = monotonic()
    waiting.result()
    _recoveries.setdefault(f"one that waits for a server ({mode})", []).append(monotonic() - back)
    assert monotonic() - back <= FIRST_SUCCESS
    stage.recovers("a server is back", monotonic())
    stored = stage.stored()
    assert (stored["before"], stored["once"], stored["run"]) == (1, 0, 1)


def stop(server: PostgresServer, mode: str) -> None:
    if mode == "kill":
        kill_server(server)
    else:
        modes: dict[str, StopMode] = {"fast": "fast", "immediate": "immediate"}
        server.stop(modes[mode])


def test_an_id_that_is_given_out_again_after_a_crash(stage: Stage) -> None:
    """The transaction that has it now has committed; ours has not, and must not be called so."""
    ids: list[int] = []

    def crash(session: Session) -> None:
        if ids:  # run again: it was known that it had not committed
            return
        ids.append(int(session.execute(text(ID)).scalar_one()))
        stage.server.restart("immediate")
        while int(ask(stage.url, ID)[0][0]) <= ids[0]:
            pass

    with pytest.raises(CommitUnknown):
        stage.caller.run(append("lost", crash))
    stage.recovers("a crash", monotonic())
    assert stage.stored()["lost"] == 0


def test_a_commit_that_waits_for_a_standby_that_never_comes(stage: Stage) -> None:
    """COMMIT has happened here and nowhere else: no one may call that a success."""
    stage.caller.run(append("before"))
    with ghost(stage):
        began = monotonic()
        for call, name in ((stage.caller.once, "once"), (stage.caller.run, "run")):
            with pytest.raises(CommitUnknown):
                call(append(name), timeout=0.5)
        assert monotonic() - began <= 1.0 + 2 * TOLD
        with pytest.raises(DeadlineExceeded):  # before COMMIT was sent
            stage.caller.once(
                append("late", lambda session: session.execute(text("SELECT pg_sleep(30)"))),
                timeout=0.5,
            )
        assert stage.caller.once(own_backend, timeout=5, read_only=True) > 0
    stage.recovers("the standby is not waited for", monotonic())
    assert stage.stored()["late"] == 0


@pytest.mark.parametrize("how", ["its connection is cut", "its backend is ended"])
def test_what_a_standby_has_not_confirmed_is_not_resolved_as_done(stage: Stage, how: str) -> None:
    """The server would say "committed", which another one that takes over knows nothing of."""
    url = make_url(stage.url)
    assert url.host is not None
    assert url.port is not None
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(url.host, url.port))
        there = stack.enter_context(caller(stage.driver, proxy.through(stage.url)))
        there.run(append("before"))
        stack.enter_context(ghost(stage))
        waiting = Later(lambda: there.run(append("run"), timeout=2.0))
        until(lambda: waiting_for(stage.url, "SyncRep"))
        if how == "its connection is cut":
            proxy.cut()
        else:
            ask(
                stage.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE wait_event = 'SyncRep'",
            )
        with pytest.raises(CommitUnknown):
            waiting.result()
    stage.recovers("the standby is not waited for", monotonic())


def test_connections_that_are_never_answered(stage: Stage) -> None:
    """By a server that is gone. They are given up, and those who come then need not wait long."""
    url = make_url(stage.url)
    assert url.host is not None
    assert url.port is not None
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(url.host, url.port))
        there = proxy.through(stage.url)
        few = stack.enter_context(caller(stage.driver, there, pool_size=2, max_overflow=0))
        proxy.aim("hang", b"user", times=2)
        lost = [Later(lambda: few.run(append("lost"), timeout=0.5)) for _ in range(2)]
        for one in lost:
            with pytest.raises(DeadlineExceeded):
                one.result()
        assert proxy.hits == 2
        through = Stage(stage.server, stage.url, stage.driver, few)
        # libpq takes two seconds at least to give up.
        through.recovers("connections are never answered", monotonic(), FIRST_SUCCESS + 2)


@contextmanager
def ghost(stage: Stage) -> Iterator[None]:
    """Let every COMMIT wait for a standby that is not there."""
    configure(stage.url, "synchronous_standby_names", "ghost")
    try:
        yield
    finally:
        configure(stage.url, "synchronous_standby_names", "")
        until(lambda: not waiting_for(stage.url, "SyncRep"))


def test_a_server_that_takes_no_more_connections(stage: Stage) -> None:
    """run() waits for one; begin() names the mend."""
    with all_connections_taken(stage.server):
        with pytest.raises(DatabaseUnavailable, match="max_connections"):
            stage.caller.once(append("once"))
        waiting = Later(lambda: stage.caller.run(append("run")))
        sleep(0.3)
        assert not waiting.is_done
    freed = monotonic()
    waiting.result()
    assert monotonic() - freed <= FIRST_SUCCESS
    stage.recovers("connections are free again", monotonic())
    assert stage.stored()["run"] == 1
    assert stage.stored()["once"] == 0


@contextmanager
def all_connections_taken(server: PostgresServer) -> Iterator[None]:
    with ExitStack() as stack:
        with pytest.raises(psycopg.OperationalError, match="too many"):
            while True:
                stack.enter_context(psycopg.connect(dsn(server.url())))
        yield


def test_passwords_that_change_under_load(server: PostgresServer, driver: str) -> None:
    """Every connection is ended with each change; no unit of run() fails."""
    secrets = ["first"]
    with ExitStack() as stack:
        stack.enter_context(passwords_checked(server, "app"))
        login = {"credentials": lambda: ("app", secrets[0])}
        stage = stack.enter_context(stage_for(server, driver, **login))
        ask(stage.url, "ALTER ROLE app PASSWORD 'first'")
        ask(stage.url, "GRANT ALL ON entry, entry_id_seq TO app")
        enough = threading.Event()
        writing = Later(lambda: write(stage, enough))
        for password in ("second", "third", "fourth"):
            more = len(stage.stored()) + 10
            until(lambda more=more: len(stage.stored()) >= more)
            ask(stage.url, f"ALTER ROLE app PASSWORD '{password}'")
            secrets[0] = password
            terminate_all(stage.url)
        enough.set()
        names = writing.result()
        assert stage.stored() == Counter(names)
        assert stage.caller.once(current_user) == "app"
        secrets[0] = "wrong"
        terminate_all(stage.url)
        with pytest.raises(DatabaseUnavailable, match="Check the user"):
            stage.caller.run(current_user)


def write(stage: Stage, enough: threading.Event) -> list[str]:
    """Run units until it is enough; return what they have stored."""
    names: list[str] = []
    while not enough.is_set():
        stage.caller.run(append(name := str(len(names))))
        names.append(name)
    return names


@contextmanager
def passwords_checked(server: PostgresServer, user: str) -> Iterator[None]:
    """Make a role whose password is asked for, as those of the tests are not."""
    file = Path(ask(server.url(), "SHOW hba_file")[0][0])
    trusting = file.read_text()
    ask(server.url(), f"CREATE ROLE {user} LOGIN")
    try:
        file.write_text(f"host all {user} all scram-sha-256\n{trusting}")
        ask(server.url(), "SELECT pg_reload_conf()")
        yield
    finally:
        file.write_text(trusting)
        ask(server.url(), "SELECT pg_reload_conf()")
        ask(server.url(), f"DROP ROLE {user}")


def current_user(session: Session) -> str:
    return str(session.execute(text("SELECT current_user")).scalar_one())


def test_a_disk_that_is_full(stage: Stage) -> None:
    """The unit fails with the server's words, stores nothing, and is not run again."""
    with small_disk(stage) as fill:
        stage.caller.run(append("before"))
        fill()
        for call, name in ((stage.caller.run, "run"), (stage.caller.once, "once")):
            with pytest.raises(DBAPIError, match="No space left"):
                call(lambda session, name=name: session.execute(MANY, {"name": name}))  # type: ignore[misc]
        assert stage.caller.stats().retried == 0
        ask(stage.url, "DROP TABLE ballast")
        stage.recovers("there is room again", monotonic())
        assert set(stage.stored()) == {"before", "after 0"}


MANY = text("INSERT INTO entry (name) SELECT :name FROM generate_series(1, 1000000)")


@contextmanager
def small_disk(stage: Stage) -> Iterator[Callable[[], None]]:
    """Put the table on a disk of 24 MB, which the yielded function fills for the most part."""
    with TmpDisk(stage.server) as disk:
        ask(stage.url, f"CREATE TABLESPACE small LOCATION '{disk}'")
        try:
            ask(stage.url, "ALTER TABLE entry SET TABLESPACE small")
            yield lambda: fill(stage.url)
        finally:
            ask(stage.url, "DROP TABLE IF EXISTS entry, ballast")
            ask(stage.url, "CHECKPOINT")  # so that no file waits for its removal
            ask(stage.url, "DROP TABLESPACE small")


def fill(url: str) -> None:
    ask(url, "CREATE TABLE ballast (name text) TABLESPACE small")
    ask(url, "INSERT INTO ballast SELECT repeat('x', 1000) FROM generate_series(1, 12000)")


class TmpDisk:
    """A disk of 24 MB in memory that belongs to the server's user."""

    def __init__(self, server: PostgresServer) -> None:
        data = Path(ask(server.url(), "SHOW data_directory")[0][0])
        self.folder = data.parent / "disk"
        self.owner = data.stat().st_uid

    def __enter__(self) -> Path:
        self.folder.mkdir()
        options = f"size=24m,mode=700,uid={self.owner}"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            self.folder.rmdir()
            pytest.skip(f"mounting a small tmpfs is not allowed here: {mounted.stderr.strip()}")
        return self.folder

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)
        self.folder.rmdir()
