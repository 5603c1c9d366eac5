"""SQLAlchemy's own tests pass with our sessions and engines, but for those that are explained."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect, make_url, text

from tests.conftest import missing
from tests.faults import sqlalchemy_suite

SUITE = os.environ.get("SQLALCHEMY_SUITE", "short")

SHORT = ("test/orm/test_transaction.py",)
SYNC = (
    *SHORT,
    "test/engine/test_transaction.py",
    "test/orm/test_session.py",
    "test/orm/test_unitofwork.py",
    "test/orm/test_unitofworkv2.py",
    "test/orm/test_events.py",
)
ASYNC = ("test/ext/asyncio",)


@dataclass(frozen=True)
class Suite:
    """Which tests run, and through which driver."""

    drivername: str
    fixture: str
    paths: tuple[str, ...]

    @property
    def is_async(self) -> bool:
        return self.paths == ASYNC


SUITES = {
    "psycopg": Suite("postgresql+psycopg", "postgres_url", SYNC if SUITE == "all" else SHORT),
    "pysqlite": Suite("sqlite+pysqlite", "sqlite_url", SYNC),
    "pymysql": Suite("mysql+pymysql", "mysql_url", SYNC),
    "asyncpg": Suite("postgresql+asyncpg", "postgres_url", ASYNC),
    "psycopg_async": Suite("postgresql+psycopg_async", "postgres_url", ASYNC),
    "aiosqlite": Suite("sqlite+aiosqlite", "sqlite_url", ASYNC),
}
NAMES = list(SUITES) if SUITE == "all" else ["psycopg"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def suite(name: str) -> Suite:
    return SUITES[name]


@pytest.fixture
def suite_url(suite: Suite, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database as SQLAlchemy's tests want it, with its second schema."""
    given = make_url(request.getfixturevalue(suite.fixture))
    url = given.set(drivername=suite.drivername).render_as_string(hide_password=False)
    if given.get_backend_name() == "sqlite":
        yield url
        return
    engine = create_engine(given, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        schemas = inspect(connection).get_schema_names()  # on MySQL it is a database, beside ours
        if "test_schema" not in schemas:
            connection.execute(text("CREATE SCHEMA test_schema"))
        yield url
        if given.get_backend_name() == "mysql" and "test_schema" not in schemas:
            connection.execute(text("DROP SCHEMA test_schema"))
    engine.dispose()


@pytest.mark.timeout(1300)
def test_sqlalchemys_own_tests_pass(
    name: str, suite: Suite, suite_url: str, tmp_path: Path
) -> None:
    """What fails is in the list; what is in the list fails."""
    if not sqlalchemy_suite.is_the_version_of_the_list():
        pytest.skip("the list of explained failures is that of SQLAlchemy 2.1")
    try:
        sqlalchemy_suite.source()
    except sqlalchemy_suite.NotThere as error:
        missing(str(error))
    results = dict[str, str]()
    for path in suite.paths:  # in a process each: test_events.py takes all listeners away
        report = tmp_path / f"{path.replace('/', '-')}.xml"
        results |= sqlalchemy_suite.run(path, suite_url, report, is_async=suite.is_async)

    print(f"\n{name}: {dict(Counter(results.values()))}")
    expected = sqlalchemy_suite.expected(name)
    failed = {test for test, end in results.items() if end in ("failure", "error")}
    passed = {test for test, end in results.items() if end == "passed"}
    assert len(passed) > 100
    assert sorted(failed - expected.keys()) == []
    ran = {path.removesuffix(".py").replace("/", ".") for path in suite.paths}
    listed = {test for test in expected if any(test.startswith(part) for part in ran)}
    assert sorted(listed - failed) == [], "passes now: take it off the list"
