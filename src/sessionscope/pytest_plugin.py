"""The pytest plugin: fixtures that keep each test's rows to itself.

Loaded by pytest at its start, in every project: SQLAlchemy is not, before a fixture is used.
Override ``sessionscope_database`` (or ``sessionscope_async_database``) to name your Database.
"""

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from sessionscope import testing  # names alone: it loads what is asked of it

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from sessionscope import AsyncDatabase, Database

__all__ = [
    "async_database",
    "async_session",
    "database",
    "postgres_template",
    "postgres_url",
    "pytest_configure",
    "session",
    "sessionscope_async_database",
    "sessionscope_database",
]


def pytest_configure(config: pytest.Config) -> None:
    """Add the asynchronous fixtures for the plugins that are there to run them."""
    for name in ("asyncio", "anyio"):
        if config.pluginmanager.hasplugin(name):
            config.pluginmanager.import_plugin(f"sessionscope.testing._{name}_fixtures")


@pytest.fixture(scope="session")
def sessionscope_database() -> "Database":
    """Override this one to name your Database."""
    raise pytest.UsageError(_NAME_IT.format(name="database"))


@pytest.fixture(scope="session")
def sessionscope_async_database() -> "AsyncDatabase":
    """Override this one to name your AsyncDatabase."""
    raise pytest.UsageError(_NAME_IT.format(name="async_database"))


@pytest.fixture
def database(sessionscope_database: "Database") -> "Generator[Database]":
    """Your Database in a sandbox: whatever the test writes through it is rolled back."""
    with testing.sandbox(sessionscope_database):
        yield sessionscope_database


@pytest.fixture
def session(database: "Database[Session]") -> "Generator[Session]":
    """A session of the sandbox that is the test's own, to prepare rows and to look at them."""
    with database.sessionmaker() as session:
        yield session


# What is got by name below is also asked for here: only so can it have parameters.
@pytest.fixture
def async_database(
    request: pytest.FixtureRequest, sessionscope_async_database: "AsyncDatabase"
) -> "AsyncDatabase":
    """Your AsyncDatabase in a sandbox, on the event loop of the test."""
    found: AsyncDatabase = request.getfixturevalue(f"sessionscope_{_runner(request)}_database")
    return found


@pytest.fixture
def async_session(request: pytest.FixtureRequest, async_database: "AsyncDatabase") -> Any:
    """An AsyncSession of the sandbox that is the test's own."""
    return request.getfixturevalue(f"sessionscope_{_runner(request)}_session")


@pytest.fixture(scope="session")
def postgres_template() -> Callable[[str], object] | None:
    """Override this one to return a function that creates the tables at the URL it is given.

    It is called once per run; each process of pytest-xdist gets a copy of that database.
    """
    return None


@pytest.fixture(scope="session")
def postgres_url(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_template: Callable[[str], object] | None,
) -> Generator[str]:
    """The URL of a database on a real PostgreSQL, this process's own for the whole run."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # pytest-xdist's workers have a folder each
        folder = folder.parent
    with testing.shared_postgres(folder, postgres_template) as url:
        yield url


def _runner(request: pytest.FixtureRequest) -> str:
    """Return which plugin runs the test that asks."""
    if "anyio_backend" in request.fixturenames:
        if request.getfixturevalue("anyio_backend_name") != "asyncio":
            raise pytest.UsageError(_ON_ASYNCIO)
        return "anyio"
    if request.node.get_closest_marker("asyncio") is not None:
        return "asyncio"
    raise pytest.UsageError(
        "async_database and async_session need a test that is run on an event loop: mark an "
        "`async def` with @pytest.mark.asyncio (pytest-asyncio) or @pytest.mark.anyio (anyio)"
    )


_ON_ASYNCIO = """an AsyncDatabase runs on asyncio. Write into conftest.py:

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""

_NAME_IT = """the fixture sessionscope_{name} is not defined. Write into conftest.py:

    @pytest.fixture(scope="session")
    def sessionscope_{name}():
        return my_application.{name}
"""
