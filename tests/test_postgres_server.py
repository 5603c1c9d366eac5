"""PostgresServer: a real server that starts anywhere and leaves nothing behind."""

import os
import pwd
import select
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

import sessionscope
from sessionscope.testing import PostgresServer, _postgres


def connect(url: str) -> psycopg.Connection:
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def ask(url: str, question: LiteralString) -> Any:
    with connect(url) as connection:
        row = connection.execute(question).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop, with a setting of its own."""
    with PostgresServer(max_connections=23, jit=False) as server:
        yield server


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_each_database_is_new_empty_and_utf8(postgres_server: PostgresServer) -> None:
    """Names are unique by default, and the encoding does not follow the user's locale."""
    first, second = postgres_server.create_database(), postgres_server.create_database()
    assert first != second
    assert ask(second, "SHOW server_encoding") == "UTF8"
    assert ask(second, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


def test_a_database_can_be_a_copy_of_another(postgres_server: PostgresServer) -> None:
    """A template that was filled once gives each test its own filled database."""
    template = postgres_server.create_database("a template")
    with connect(template) as connection:
        connection.execute("CREATE TABLE stock AS SELECT 7 AS amount")
    copy = postgres_server.create_database('odd "name"/?', template="a template")
    assert ask(copy, "SELECT amount FROM stock") == 7


def test_a_database_in_use_can_be_dropped(postgres_server: PostgresServer) -> None:
    """A test that leaks its connections does not keep its database alive."""
    url = postgres_server.create_database("in_use")
    with connect(url) as connection:
        postgres_server.drop_database("in_use")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    postgres_server.drop_database("in_use")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connect(url)


def test_a_failing_statement_is_an_error_with_the_servers_words(
    postgres_server: PostgresServer,
) -> None:
    """Nothing goes on with a database that could not be made."""
    with pytest.raises(RuntimeError, match='template database "nowhere" does not exist'):
        postgres_server.create_database(template="nowhere")


def test_settings_reach_the_server(own_server: PostgresServer) -> None:
    """Keyword arguments are settings of the server; booleans are on and off."""
    assert ask(own_server.url(), "SHOW max_connections") == "23"
    assert ask(own_server.url(), "SHOW jit") == "off"


def test_it_listens_on_loopback_alone(own_server: PostgresServer) -> None:
    """No other machine can reach a server that trusts everybody."""
    assert ask(own_server.url(), "SHOW listen_addresses") == "127.0.0.1"
    assert ask(own_server.url(), "SHOW unix_socket_directories") == ""


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_keeps_port_and_data_and_cuts_connections(
    own_server: PostgresServer, mode: _postgres.StopMode
) -> None:
    """URLs that were handed out stay valid; who was connected notices."""
    url = own_server.create_database()
    with connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
        own_server.restart(mode)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert ask(url, "SELECT one FROM kept") == 1


def test_stop_is_final_until_start(own_server: PostgresServer) -> None:
    """Both may be called twice."""
    own_server.stop()
    own_server.stop()
    assert own_server.pid is None
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(own_server.url())
    own_server.start()
    pid = own_server.pid
    own_server.start()
    assert own_server.pid == pid
    assert "ready to accept connections" in own_server.log_tail()


def test_a_port_that_another_process_took_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a port and its use anybody may come first."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        guesses = iter([other.getsockname()[1], _postgres._any_port()])
        monkeypatch.setattr(_postgres, "_any_port", lambda: next(guesses))
        with PostgresServer() as server:
            assert server.port != other.getsockname()[1]
            assert ask(server.url(), "SELECT 1") == 1
            assert "could not bind" in server.log_tail()


def test_a_wrong_setting_is_an_error_with_the_servers_words(temporary: Path) -> None:
    """A server that cannot start is not tried again, and leaves nothing behind."""
    with pytest.raises(RuntimeError, match='unrecognized configuration parameter "nonsense"'):
        PostgresServer(nonsense=1).__enter__()
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_when_the_block_fails(temporary: Path) -> None:
    """The folder goes with the server."""
    with pytest.raises(KeyError), PostgresServer() as server:
        assert len(list(temporary.iterdir())) == 1
        raise KeyError
    assert list(temporary.iterdir()) == []
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(server.url())


@pytest.mark.parametrize(
    "fork",
    [
        pytest.param("", id="no-child"),
        pytest.param("os.fork() or (os.closerange(1, 3), sys.stdin.read())", id="child-lives-on"),
        pytest.param("os.fork() and os.wait() or sys.exit()", id="child-left-the-block"),
    ],
)
def test_nothing_is_left_when_the_tests_are_killed(temporary: Path, fork: str) -> None:
    """A watchdog sees to it, whatever the children of the tests did.

    The watchdog holds the script's stderr, so the end of stderr is the end of the watchdog.
    """
    script = f"""
        import os, sys
        from sessionscope.testing import PostgresServer
        with PostgresServer() as server:
            {fork}
            print(server.url(), flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(sessionscope.__file__).parents[1],
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as tests:
        assert tests.stdout is not None
        assert tests.stderr is not None
        url = tests.stdout.readline().decode().strip()
        assert ask(url, "SELECT 1") == 1
        tests.kill()
        assert select.select([tests.stderr], [], [], 30)[0], "the watchdog still waits"
        assert tests.stderr.read() == b""
    assert list(temporary.iterdir()) == []
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(url)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root cannot run PostgreSQL itself")
def test_root_runs_it_as_nobody(postgres_server: PostgresServer) -> None:
    """PostgreSQL refuses to be root."""
    folder = ask(postgres_server.url(), "SHOW data_directory")
    assert Path(folder).stat().st_uid == pwd.getpwnam("nobody").pw_uid


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The extra is optional, the way to get it is not a riddle."""
    monkeypatch.setattr(_postgres, "find_spec", lambda name: util.find_spec(f"{name}_missing"))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sessionscope\[testing\]"'):
        PostgresServer()
