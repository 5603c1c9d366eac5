"""Bad input: one clear error that names the mend and tells no secret."""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session
from sqlalchemy.pool import SingletonThreadPool

from sessionscope import Database
from sessionscope.exc import ConfigurationError, DatabaseUnavailable, PoolBusy, SessionScopeError
from sessionscope.testing import PostgresServer

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        (f"postgres://user:{SECRET}@host/db", "write 'postgresql://'"),
        (f"postgresql://user:{SECRET}@host:port/db", "a port must be a number"),
        (f"user:{SECRET}@host/db", "sqlite:///file.db"),
        ("", "sqlite:///file.db"),
        ("   ", "sqlite:///file.db"),
        (f"nosuch://user:{SECRET}@host/db", "'nosuch' is not known"),
        (f"postgresql+nosuch://user:{SECRET}@host/db", "'postgresql+nosuch' is not known"),
        (f"postgresql+asyncpg://user:{SECRET}@host/db", "'postgresql+psycopg://'"),
        ("sqlite+aiosqlite:///x.db", "'sqlite://'"),
        (f"mysql+asyncmy://user:{SECRET}@host/db", "'mysql+pymysql://'"),
        (f"postgresql+pg8000://user:{SECRET}@host/db", "pip install pg8000"),
        (f"sqlite://user:{SECRET}@host/x.db", "sqlite:///relative/path"),
        (None, "must be a string"),
        (42, "must be a string"),
    ],
)
def test_a_wrong_url(url: Any, mend: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    assert mend in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception_only(caught.value))


def test_a_missing_driver_names_the_line_that_installs_it() -> None:
    """In an interpreter where psycopg cannot be imported."""
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from sessionscope import Database\n"
        "Database.from_env()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "DATABASE_URL": f"postgresql://user:{SECRET}@host/db",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert 'pip install "sessionscope[postgresql]"' in last
    assert SECRET not in run.stderr


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({"pool_size": -1}, "pool_size=-1 must be a whole number, 0 or more"),
        ({"pool_size": "5"}, "pool_size='5'"),
        ({"pool_size": True}, "pool_size=True"),
        ({"max_overflow": 1.5}, "max_overflow=1.5"),
        ({"max_overflow": -2}, "max_overflow=-2"),
        ({"pool_timeout": -1}, "pool_timeout=-1 must be a number of seconds"),
        ({"pool_timeout": float("nan")}, "pool_timeout=nan"),
        ({"pool_timeout": None}, "pool_timeout=None"),
        ({"max_waiting": -1}, "max_waiting=-1"),
        ({"isolation_level": "serializable"}, "write one of AUTOCOMMIT"),
        ({"isolation_level": "AUTOCOMMIT"}, 'begin(isolation_level="AUTOCOMMIT")'),
        ({"engine_options": {"poolclass": SingletonThreadPool}}, "write NullPool for no pool"),
        ({"session_class": int}, "not a subclass of sqlalchemy.orm.Session"),
        ({"session_class": Session()}, "not a subclass of sqlalchemy.orm.Session"),
        ({"engine_options": {"pool_size": 3}}, "write Database(..., pool_size=...)"),
        ({"engine_options": {"nonsense": 1}}, "nonsense"),
        ({"session_options": {"bind": None}}, "binds its sessions itself"),
        ({"session_options": {"class_": Session}}, "session_class"),
        ({"session_options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], mend: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database("sqlite://", **options)
    assert mend in str(caught.value)
    assert isinstance(caught.value, sa_exc.ArgumentError)


def test_an_unknown_option_is_a_type_error_as_everywhere_in_python() -> None:
    with pytest.raises(TypeError, match="pool_sise"):
        Database("sqlite://", pool_sise=3)  # type: ignore[call-arg]


def test_a_wrong_isolation_level_of_a_unit(database: Database) -> None:
    with pytest.raises(ConfigurationError, match="SERIALIZABLE"):
        database.begin(isolation_level="serialisable")
    assert database.stats().begun == database.stats().committed + database.stats().rolled_back


def test_huge_timeouts_are_no_overflow() -> None:
    with Database("sqlite://", pool_timeout=1e12) as database, database.begin() as session:
        assert session is not None


@pytest.mark.parametrize("open_unit", [Database.ping, lambda database: database.run(list_tables)])
def test_a_server_that_does_not_listen(open_unit: Callable[[Database], object]) -> None:
    with Database(f"postgresql://user:{SECRET}@127.0.0.1:1/db") as database:
        with pytest.raises(DatabaseUnavailable, match="Is the server running") as caught:
            open_unit(database)
        assert database.stats().in_use == 0
    assert isinstance(caught.value, sa_exc.OperationalError)
    assert isinstance(caught.value, SessionScopeError)
    assert "127.0.0.1:1" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_host_that_does_not_exist() -> None:
    with Database(f"postgresql://user:{SECRET}@no-such-host.invalid/db") as database:
        with pytest.raises(DatabaseUnavailable, match="name of the host") as caught:
            database.ping()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_database_that_does_not_exist(postgres_server: PostgresServer) -> None:
    with Database(postgres_server.url("nowhere")) as database:
        with pytest.raises(DatabaseUnavailable, match=r'"nowhere" does not exist.*Create it'):
            database.ping()


def test_a_wrong_password(world_readable: Path) -> None:
    rules = world_readable / "pg_hba.conf"
    rules.write_text(
        "host all postgres 127.0.0.1/32 trust\nhost all app 127.0.0.1/32 scram-sha-256\n"
    )
    rules.chmod(0o644)
    with PostgresServer(hba_file=str(rules)) as server:
        with Database(server.url()) as admin, admin.begin() as session:
            session.execute(text("CREATE ROLE app LOGIN PASSWORD 'right'"))
        url = URL.create("postgresql", "app", SECRET, "127.0.0.1", server.port, "postgres")
        with Database(url) as database:
            with pytest.raises(DatabaseUnavailable, match="Check the user and the password") as e:
                database.ping()
    assert SECRET not in "".join(traceback.format_exception(e.value))


@pytest.fixture
def world_readable() -> Iterator[Path]:
    """A folder that the server may read even when the tests run as root."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_repr_and_errors_hide_the_password() -> None:
    url = f"postgresql://user:{SECRET}@127.0.0.1:1/db?sslpassword={SECRET}"
    database = Database(url)
    assert SECRET not in repr(database)
    with pytest.raises(DatabaseUnavailable) as caught:
        database.ping()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "sqlalche.me" not in str(caught.value)
    assert repr(database).startswith("Database('postgresql+psycopg://user:***@127.0.0.1:1/db")


def test_postgresql_means_psycopg_3() -> None:
    assert Database("postgresql://host/db").engine.url.drivername == "postgresql+psycopg"


def test_from_env_reads_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    with Database.from_env() as database:
        database.ping()
    monkeypatch.setenv("OTHER_URL", "postgresql://host/db")
    assert "host" in repr(Database.from_env("OTHER_URL", pool_size=1))


def test_from_env_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(ConfigurationError, match="DATABASE_URL is not set"):
        Database.from_env()
    with Database.from_env(default="sqlite://") as database:
        database.ping()
    monkeypatch.setenv("DATABASE_URL", "  ")
    with pytest.raises(ConfigurationError, match="DATABASE_URL is not set"):
        Database.from_env()


def list_tables(session: Session) -> None:
    session.connection()


def test_errors_survive_a_process_boundary() -> None:
    """As the result of a task in another process does."""
    for error in (PoolBusy("busy"), DatabaseUnavailable("down", OSError("refused"))):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.retry_after) == (type(error), str(error), 1.0)
