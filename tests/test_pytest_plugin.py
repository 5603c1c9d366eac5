"""The pytest plugin: a user's project, with each way to run its tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from sessionscope.testing import PostgresServer
from tests.plugin import PLUGIN

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent

APPLICATION = """
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sessionscope import AsyncDatabase, Database

URL = {url!r}

class Base(DeclarativeBase):
    pass

class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

database = Database(URL)
async_database = AsyncDatabase({async_url!r})
"""

CONFTEST = """
import pytest
import application

@pytest.fixture(scope="session")
def sessionscope_database():
    application.Base.metadata.create_all(application.database.engine)
    yield application.database
    application.database.dispose()

@pytest.fixture(scope="session")
def sessionscope_async_database(sessionscope_database):
    return application.async_database
"""

TESTS = """
import pytest
from application import Item, database as real
from sqlalchemy import select

@pytest.mark.parametrize("attempt", [1, 2])
def test_rows_are_the_tests_own(database, session, attempt):
    assert database is real
    session.add(Item(name="pear"))
    session.commit()
    with database.begin(read_only=True) as reader:
        assert reader.scalars(select(Item.name)).all() == ["pear"]
"""

ASYNC_TESTS = """
import asyncio
import pytest
from application import Item
from sqlalchemy import select

{marks}

@pytest.mark.parametrize("attempt", [1, 2])
async def test_rows_are_the_tests_own(async_database, async_session, attempt):
    async_session.add(Item(name="pear"))
    await async_session.flush()

    async def read():
        async with async_database.begin() as session:
            return (await session.scalars(select(Item.name))).all()

    assert await asyncio.gather(read(), read()) == [["pear"], ["pear"]]
    await async_session.commit()

@pytest.fixture
def prepared(request):
    return request.getfixturevalue("async_session")

async def test_the_session_of_a_fixture_is_the_tests(prepared, async_session):
    assert prepared is async_session
"""


@pytest.fixture(params=["sqlite", "postgres"])
def project(request: pytest.FixtureRequest, pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with an application, of which nothing is loaded before pytest starts."""
    if request.param == "sqlite":
        url = f"sqlite:///{pytester.path / 'application.db'}"
        async_url = url.replace("sqlite:", "sqlite+aiosqlite:")
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.create_database()
        async_url = url.replace("+psycopg:", "+asyncpg:")
    application = APPLICATION.format(url=url, async_url=async_url)
    pytester.makepyfile(application=application)
    pytester.makeconftest(CONFTEST)
    return pytester


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the project's tests as its user would, in an interpreter of its own."""
    project.makepyprojecttoml("[tool.pytest.ini_options]\npythonpath = '.'\n")
    plugin = (*PLUGIN, "-p", "no:cacheprovider", "-W", "error")
    return project.runpytest_subprocess(*plugin, *options)


def test_each_test_has_its_rows_to_itself(project: pytest.Pytester) -> None:
    project.makepyfile(test_items=TESTS)
    run(project, "-p", "no:asyncio").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("marks", "options"),
    [
        ("pytestmark = pytest.mark.asyncio", ["-o", "asyncio_mode=strict"]),
        ("", ["-o", "asyncio_mode=auto"]),
        ("pytestmark = pytest.mark.asyncio", ["-o", "asyncio_mode=strict", "-p", "no:anyio"]),
    ],
    ids=["strict", "auto", "without anyio"],
)
def test_pytest_asyncio_runs_the_asynchronous_fixtures(
    project: pytest.Pytester, marks: str, options: list[str]
) -> None:
    project.makepyfile(test_items=ASYNC_TESTS.format(marks=marks))
    scope = ["-o", "asyncio_default_fixture_loop_scope=function"]
    run(project, *options, *scope).assert_outcomes(passed=3)


@pytest.mark.parametrize("options", [["-p", "no:asyncio"], []], ids=["alone", "beside asyncio"])
def test_anyio_runs_the_asynchronous_fixtures(project: pytest.Pytester, options: list[str]) -> None:
    backend = "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    marks = f"pytestmark = pytest.mark.anyio\n\n{backend}"
    project.makepyfile(test_items=ASYNC_TESTS.format(marks=marks))
    scope = ["-o", "asyncio_default_fixture_loop_scope=function"] if not options else []
    run(project, *options, *scope).assert_outcomes(passed=3)


@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_a_test_on_trio_is_told_what_to_write(project: pytest.Pytester) -> None:
    """anyio runs each test on both by default; trio itself need not be there for this one."""
    project.makepyfile(
        """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        def anyio_backend_name():
            return "trio"

        @pytest.mark.anyio
        async def test_it(async_session):
            pass
        """
    )
    result = run(project, "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*runs on asyncio*", "*def anyio_backend():*"])


@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_a_commit_that_escapes_fails_the_guilty_test_by_name(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_items="""
        import pytest
        from sqlalchemy import text

        def test_innocent(session):
            session.execute(text("SELECT 1"))

        def test_guilty(session):
            with pytest.raises(Exception):
                session.execute(text("COMMIT"))
        """
    )
    result = run(project, "-p", "no:asyncio")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_guilty*", "*SandboxError: 'COMMIT' at *test_items.py:9 *"]
    )


@pytest.mark.parametrize(
    ("test", "name"),
    [
        ("def test_it(session): pass", "database"),
        ("@pytest.mark.anyio\nasync def test_it(async_session): pass", "async_database"),
    ],
)
def test_a_fixture_without_a_database_says_what_to_write(
    pytester: pytest.Pytester, test: str, name: str
) -> None:
    backend = "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
    pytester.makepyfile(f"import pytest\n\n{backend}\n{test}")
    result = run(pytester, "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [f"*def sessionscope_{name}():*", f"*return my_application.{name}*"]
    )


PARAMETRIZED = """
import pytest
import application
from sessionscope.testing import async_sandbox, sandbox

application.Base.metadata.create_all(application.database.engine)

@pytest.fixture(scope="session", params=["one", "other"])
def sessionscope_database(request):
    yield application.database
    application.database.dispose()

@pytest.fixture(scope="session", params=["one", "other"])
def sessionscope_async_database(request):
    return application.async_database

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""

PARAMETRIZED_NEARER = """
@pytest.fixture(params=["one", "other"])
def database(request, sessionscope_database):
    with sandbox(sessionscope_database):
        yield sessionscope_database

@pytest.fixture(params=["one", "other"])
async def async_database(request, anyio_backend, sessionscope_async_database):
    async with async_sandbox(sessionscope_async_database):
        yield sessionscope_async_database
    await sessionscope_async_database.dispose()
"""

TESTS_OF_SESSIONS_ALONE = """
import pytest
from application import Item
from sqlalchemy import select

def test_it(session):
    session.add(Item(name="pear"))
    session.commit()

@pytest.mark.anyio
async def test_async(async_session):
    assert (await async_session.scalars(select(Item))).all() == []
"""


@pytest.mark.parametrize(("nearer", "each"), [("", 2), (PARAMETRIZED_NEARER, 4)])
@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_a_database_with_parameters_runs_the_tests_of_its_sessions_with_each(
    project: pytest.Pytester, nearer: str, each: int
) -> None:
    """Also those that ask for a session alone, with the fixture beneath it, or both, overridden."""
    project.makeconftest(PARAMETRIZED + nearer)
    project.makepyfile(test_items=TESTS_OF_SESSIONS_ALONE)
    run(project, "-p", "no:asyncio").assert_outcomes(passed=2 * each)


@pytest.mark.parametrize(
    ("returned", "named"), [("database.engine", "Engine"), ("None", "None"), ("URL", "str")]
)
@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_a_fixture_that_returns_no_database_is_named(
    project: pytest.Pytester, returned: str, named: str
) -> None:
    project.makeconftest(
        f"""
        import pytest
        from application import URL, database

        @pytest.fixture(scope="session")
        def sessionscope_database():
            return {returned}
        """
    )
    project.makepyfile("def test_it(session): pass")
    result = run(project, "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*fixture sessionscope_database *and not *{named}*"])


@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_an_asynchronous_fixture_in_a_plain_test_says_so(project: pytest.Pytester) -> None:
    project.makepyfile("def test_it(async_session): pass")
    result = run(project, "-p", "no:asyncio")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*async_session need a test that is run on an event loop*"])


def test_pytest_starts_without_sqlalchemy_where_no_fixture_is_used(
    pytester: pytest.Pytester,
) -> None:
    """The entry point is loaded in every project of the environment."""
    pytester.makepyfile(test_it="def test_it(): pass")
    script = f"""
import sys
import pytest
status = pytest.main(["--co", "-q", *{PLUGIN}, "-p", "no:cacheprovider",
                      "-p", "no:anyio", "-p", "no:asyncio", "-p", "no:hypothesispytest"])
heavy = {{"sqlalchemy", "sessionscope._database", "sessionscope.testing._stack"}}
loaded = heavy & {{*sys.modules}}
sys.exit(f"{{loaded}} {{status}}" if loaded or status else 0)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=pytester.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "1 test collected" in finished.stdout


def test_the_wheel_registers_the_plugin() -> None:
    """As an entry point, and the name in it exists."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\nsessionscope = "sessionscope.pytest_plugin"\n' in text
    assert (ROOT / "src" / "sessionscope" / "pytest_plugin.py").exists()


MANY = """
import random
import pytest
from application import Item
from sqlalchemy import func, select

@pytest.mark.parametrize("number", range(200))
def test_number(number, session, database):
    chance = random.Random(number)
    assert session.scalar(select(func.count()).select_from(Item)) == 0
    for unit in range(chance.randint(0, 3)):
        try:
            with database.begin() as each:
                each.add(Item(name=f"item {chance.randint(0, 4)}"))
                each.flush()
                if chance.random() < 0.3:
                    raise LookupError
        except Exception:
            pass
    for _ in range(chance.randint(0, 2)):
        session.add(Item(name=f"own {chance.random()}"))
        chance.choice([session.flush, session.commit, session.rollback])()
"""


def test_random_tests_on_four_workers_see_and_leave_no_row(
    pytester: pytest.Pytester,
) -> None:
    """On one PostgreSQL, with a database for each worker, copied from a template."""
    pytester.makepyfile(application=APPLICATION.format(url="", async_url="").split("database =")[0])
    pytester.makepyfile(test_many=MANY)
    pytester.makeconftest(
        """
        import pytest
        from application import Base, Item
        from sqlalchemy import create_engine, func, select
        from sessionscope import Database

        def note(name, value):
            with open(name, "a") as file:
                print(value, file=file)

        @pytest.fixture(scope="session")
        def postgres_template():
            def fill(url):
                note("filled", "filled")
                engine = create_engine(url)
                Base.metadata.create_all(engine)
                engine.dispose()
            return fill

        @pytest.fixture(scope="session")
        def sessionscope_database(postgres_url):
            note("urls", postgres_url)
            with Database(postgres_url) as database:
                yield database
                with database.begin() as session:
                    left = session.scalar(select(func.count()).select_from(Item))
                    note("left", left)
        """
    )
    run(pytester, "-p", "no:asyncio", "-n", "4", "-q").assert_outcomes(passed=200)
    lines = {
        name: (pytester.path / name).read_text().split() for name in ("filled", "urls", "left")
    }
    assert lines["filled"] == ["filled"]
    assert len(set(lines["urls"])) == 4
    assert len({url.rpartition("/")[0] for url in lines["urls"]}) == 1, "one server"
    assert lines["left"] == ["0"] * 4


@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_four_workers_on_one_sqlite_file_wait_for_each_other(project: pytest.Pytester) -> None:
    """Not what the guide advises, and right: also tests that read before they write."""
    project.makeconftest(
        """
        import pytest
        from application import database

        @pytest.fixture(scope="session")
        def sessionscope_database():
            yield database
            database.dispose()
        """
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from application import *; Base.metadata.create_all(database.engine)",
        ],
        cwd=project.path,
        check=True,
    )
    project.makepyfile(test_many=MANY.replace("range(200)", "range(40)"))
    run(project, "-p", "no:asyncio", "-n", "4", "-q").assert_outcomes(passed=40)
