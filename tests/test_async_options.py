"""What AsyncDatabase refuses when it is made, with the line to write instead."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import sessionscope
from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError

SOURCE = Path(sessionscope.__file__).parent.parent


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("sqlite:///x.db", "use Database, or write 'sqlite+aiosqlite://' in its place"),
        ("postgresql+psycopg2://u@h/d", "use Database, or write 'postgresql+asyncpg://'"),
        ("mysql+pymysql://u@h/d", "use Database, or write 'mysql+asyncmy://'"),
    ],
)
def test_a_synchronous_driver_is_refused_with_the_class_to_use(url: str, mend: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AsyncDatabase(url)
    assert "is a synchronous driver, and this is AsyncDatabase" in str(caught.value)
    assert mend in str(caught.value)


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("sqlite+aiosqlite:///x.db", "use AsyncDatabase, or write 'sqlite://' in its place"),
        ("postgresql+asyncpg://u@h/d", "use AsyncDatabase, or write 'postgresql+psycopg://'"),
        ("mysql+asyncmy://u@h/d", "use AsyncDatabase, or write 'mysql+pymysql://'"),
    ],
)
def test_an_asynchronous_driver_is_refused_by_the_other(url: str, mend: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Database(url)
    assert "is an asynchronous driver, and this is Database" in str(caught.value)
    assert mend in str(caught.value)


def test_psycopg_and_the_bare_name_serve_both() -> None:
    for url in ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"):
        assert Database(url).engine.dialect.is_async is False
        assert AsyncDatabase(url).engine.dialect.is_async is True


OF_ANOTHER_KIND: list[Any] = [Session, object, AsyncSession(), "AsyncSession", None]


@pytest.mark.parametrize("session_class", OF_ANOTHER_KIND)
def test_a_session_class_of_another_kind_is_refused(session_class: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a subclass of sqlalchemy\.ext\.asyncio"):
        AsyncDatabase("sqlite+aiosqlite://", session_class=session_class)
    if session_class is not Session:
        return
    with pytest.raises(ConfigurationError, match=r"is not a subclass of sqlalchemy\.orm\.Session"):
        Database("sqlite://", session_class=AsyncSession)  # type: ignore[type-var]  # the mistake


@pytest.mark.parametrize("name", ["commit", "rollback", "close", "flush"])
def test_a_method_that_no_unit_would_call_is_warned_of(name: str) -> None:
    """A unit ends the synchronous session inside of the asynchronous one."""

    async def overridden(self: AsyncSession) -> None: ...

    session_class = type("Audited", (AsyncSession,), {name: overridden})
    with pytest.warns(RuntimeWarning, match=rf"Audited\.{name}\(\) is not called") as caught:
        AsyncDatabase("sqlite+aiosqlite://", session_class=session_class)
    (warning,) = caught
    assert warning.filename == __file__
    assert "sync_session_class" in str(warning.message)


def test_a_class_that_overrides_something_else_is_fine() -> None:
    class Counted(AsyncSession):
        async def execute(self, *args: Any, **kwargs: Any) -> Any:
            return await super().execute(*args, **kwargs)

    AsyncDatabase("sqlite+aiosqlite://", session_class=Counted)


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({"pool_size": -1}, "pool_size=-1"),
        ({"session_options": {"nonsense": 1}}, "session_options has an unknown option"),
        ({"session_options": {"bind": None}}, "binds its sessions itself"),
        ({"engine_options": {"nonsense": 1}}, "refused the URL or an option"),
        ({"isolation_level": "AUTOCOMMIT"}, "leaves nothing to roll back"),
        ({"isolation_level": "read committed"}, "is unknown: write one of"),
    ],
)
def test_the_options_are_checked_as_those_of_database(options: dict[str, Any], mend: str) -> None:
    for make, url in ((Database, "sqlite://"), (AsyncDatabase, "sqlite+aiosqlite://")):
        with pytest.raises(ConfigurationError, match=mend):
            make(url, **options)


def test_no_password_is_shown() -> None:
    database = AsyncDatabase("postgresql+asyncpg://user:hunter2@host/db")
    assert "hunter2" not in f"{database!r} {database.stats()}"


def in_a_fresh_interpreter(without: str, script: str) -> str:
    """Return what *script* prints where the module *without* cannot be imported."""
    code = f"import sys\nsys.modules[{without!r}] = None\n{textwrap.dedent(script)}"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=SOURCE, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("driver", "url", "line"),
    [
        ("asyncpg", "postgresql+asyncpg://u@h/d", "pip install asyncpg"),
        ("aiosqlite", "sqlite+aiosqlite://", "pip install aiosqlite"),
        ("asyncmy", "mysql+asyncmy://u@h/d", "pip install asyncmy"),
        ("psycopg", "postgresql://u@h/d", 'pip install "sessionscope[postgresql]"'),
    ],
)
def test_a_missing_driver_is_named_with_the_line_that_installs_it(
    driver: str, url: str, line: str
) -> None:
    script = f"""
        from sessionscope import AsyncDatabase
        from sessionscope.exc import ConfigurationError
        try:
            AsyncDatabase({url!r})
        except ConfigurationError as error:
            print(error)
    """
    message = in_a_fresh_interpreter(driver, script)
    assert f"(no module {driver!r})" in message
    assert line in message


def test_a_missing_greenlet_is_named_with_the_line_that_installs_it() -> None:
    """SQLAlchemy 2.1 brings none; its asyncio half cannot be imported without it."""
    script = """
        try:
            from sessionscope import AsyncDatabase
            AsyncDatabase("sqlite+aiosqlite://")
        except Exception as error:
            print(type(error).__name__, error)
    """
    message = in_a_fresh_interpreter("greenlet", script)
    assert message.startswith("ImportError")
    assert "greenlet" in message
    assert "pip install sqlalchemy[asyncio]" in message


def test_a_database_needs_no_greenlet() -> None:
    script = """
        from sqlalchemy import text
        from sessionscope import Database
        with Database("sqlite://") as database, database.begin() as session:
            print(session.scalar(text("SELECT 1")))
    """
    assert in_a_fresh_interpreter("greenlet", script) == "1\n"


def test_asyncpgs_connections_are_of_one_class_however_many_there_are() -> None:
    """SQLAlchemy 2.0 gives a listener the arguments again that it has changed before."""
    dialect: Any = AsyncDatabase("postgresql+asyncpg://u@h/d").engine.dialect
    arguments: dict[str, Any] = {}
    classes: set[type[Any]] = set()
    for _ in range(3):
        for connecting in dialect.dispatch.do_connect:
            connecting(dialect, None, [], arguments)
        classes.add(arguments["connection_class"])
    assert len(classes) == 1
