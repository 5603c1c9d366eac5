"""What a test pays for its sandbox, and whether any test sees or leaves another one's rows.

The tests are a project of their own, run by pytest in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from sqlalchemy import URL, func, insert, select

from benchmarks._model import Item
from benchmarks._postgres import empty_database, text
from benchmarks._report import Figure, Report, Spread, Table
from sessionscope import Database
from sessionscope.testing import sandbox

ROOT = Path(__file__).parent.parent
THREADS, STATEMENTS = 16, 100
# The first tests pay for imports, and for the connection.
WARM_UP = 20

CONFTEST = """
import json, os, time
import pytest
from benchmarks._model import Item
from sqlalchemy import func, select
from sessionscope import AsyncDatabase, Database

URL = os.environ["BENCHMARK_URL"]
times = {{}}

@pytest.fixture(scope="session")
def sessionscope_database(request):
    is_worker = hasattr(request.config, "workerinput")
    url = request.getfixturevalue("postgres_url") if is_worker else URL
    with Database(url) as database:
        yield database
        with database.begin() as session:
            left = session.scalar(select(func.count()).select_from(Item))
        with open(f"left-{{os.getpid()}}.json", "w") as file:
            json.dump(left, file)

@pytest.fixture(scope="session")
def sessionscope_async_database():
    return AsyncDatabase(URL.replace("+psycopg:", "+asyncpg:"))

@pytest.fixture(scope="session")
def postgres_template():
    def fill(url):
        with Database(url) as database:
            Item.metadata.create_all(database.engine)
    return fill

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    started = time.perf_counter()
    outcome = yield
    times.setdefault(item.originalname, []).append(time.perf_counter() - started)
    return outcome

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        with open("times.json", "w") as file:
            json.dump(times, file)
"""

COSTS = """
import pytest
from benchmarks._model import Item

@pytest.mark.parametrize("number", range({tests}))
def test_empty(number):
    pass

@pytest.mark.parametrize("number", range({tests}))
def test_sandbox(number, database):
    pass

@pytest.mark.parametrize("number", range({tests}))
def test_session(number, session):
    pass

@pytest.mark.parametrize("number", range({tests}))
def test_insert(number, session):
    session.add(Item(name="pear"))
    session.commit()

@pytest.mark.asyncio
@pytest.mark.parametrize("number", range({tests}))
async def test_async_empty(number):
    pass

@pytest.mark.asyncio
@pytest.mark.parametrize("number", range({tests}))
async def test_async_sandbox(number, async_database):
    pass
"""

RANDOM = """
import random
import pytest
from benchmarks._model import Item
from sqlalchemy import func, select

@pytest.mark.parametrize("number", range({tests}))
def test_number(number, session, database):
    chance = random.Random(number)
    assert session.scalar(select(func.count()).select_from(Item)) == 0
    for unit in range(chance.randint(0, 3)):
        try:
            with database.begin() as each:
                each.add(Item(name=f"item {{chance.randint(0, 4)}}"))
                each.flush()
                if chance.random() < 0.3:
                    raise LookupError
        except Exception:
            pass
    for _ in range(chance.randint(0, 2)):
        session.add(Item(name=f"own {{chance.random()}}"))
        chance.choice([session.flush, session.commit, session.rollback])()
"""

WORDS = {
    "test_sandbox": ("an empty test in a sandbox", "test_empty"),
    "test_session": ("with a session that is not used", "test_empty"),
    "test_insert": ("with a session, INSERT and commit", "test_empty"),
    "test_async_sandbox": (
        "asyncpg, with an event loop and a connection per test",
        "test_async_empty",
    ),
}


def run(*, url: str | None, short: bool) -> Report:
    """Run pytest on many small tests, and threads on one connection."""
    report = Report("sandbox: what a test pays, and what it leaves")
    with empty_database(url) as database:
        _costs(report, database, tests=60 if short else 400)
        _random(report, database, tests=40 if short else 1000)
        _threads(report, database)
    return report


def _costs(report: Report, database: URL, *, tests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio_options = ("-o", "asyncio_default_fixture_loop_scope=function")
        _pytest(Path(folder), COSTS.format(tests=tests), database, *asyncio_options)
        times = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    spreads = {name: _middle(seconds[WARM_UP:]) for name, seconds in times.items()}
    table = Table("Milliseconds of a test, with pytest's own", ["test", "median", "quartiles"])
    for name, (words, empty) in WORDS.items():
        spread, without = spreads[name], spreads[empty]
        target = 5.0 if empty == "test_empty" else None
        cost = spread.median - without.median
        report.figures.append(Figure(f"cost of a test: {words}", cost, "ms", at_most=target))
    for name, spread in spreads.items():
        between = f"{spread.low:.2f}-{spread.high:.2f}"
        table.rows.append([name, f"{spread.median:.2f}", between])
    report.tables.append(table)


def _middle(seconds: list[float]) -> Spread:
    """Return the median and the quartiles, in milliseconds."""
    ordered = sorted(each * 1e3 for each in seconds)
    quarter = len(ordered) // 4
    return Spread(ordered[len(ordered) // 2], ordered[quarter], ordered[-quarter - 1])


def _random(report: Report, database: URL, *, tests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        said = _pytest(
            Path(folder), RANDOM.format(tests=tests), database, "-n", "4", "-p", "no:asyncio"
        )
        left = [json.loads(path.read_text()) for path in Path(folder).glob("left-*.json")]
    passed = tests if f"{tests} passed" in said else 0
    name = "random tests on one PostgreSQL, 4 workers"
    seen = Figure(f"{name}: without another one's rows", passed, "tests", at_least=tests)
    report.figures.extend([seen, Figure(f"{name}: rows left", sum(left), "rows", at_most=0)])


def _threads(report: Report, url: URL) -> None:
    errors: list[BaseException] = []
    with Database(text(url)) as database, sandbox(database):
        threads = [
            threading.Thread(target=_statements, args=(database, number, errors))
            for number in range(THREADS)
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
    name = f"{THREADS} threads x {STATEMENTS} statements on one connection: errors"
    note = f"in {seconds:.1f} s"
    report.figures.append(Figure(name, len(errors), "errors", at_most=0, note=note))


def _statements(database: Database, number: int, errors: list[BaseException]) -> None:
    try:
        for unit in range(STATEMENTS // 10):
            with database.begin() as session:
                session.execute(insert(Item).values(name=f"{number}-{unit}"))
                for _ in range(9):
                    session.scalar(select(func.count()).select_from(Item))
                if unit % 2:
                    session.rollback()
    except BaseException as error:  # what is measured
        errors.append(error)


def _pytest(folder: Path, tests: str, database: URL, *options: str) -> str:
    """Run *tests* in *folder* and return what pytest says."""
    (folder / "conftest.py").write_text(CONFTEST.format(), encoding="utf-8")
    (folder / "test_it.py").write_text(tests, encoding="utf-8")
    path = ":".join([str(ROOT), str(ROOT / "src"), *filter(None, sys.path)])
    plugins = (
        "-p",
        "sessionscope.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
    )
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *options],
        cwd=folder,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "BENCHMARK_URL": text(database)},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode not in (0, 1):
        raise RuntimeError(finished.stdout + finished.stderr)
    return finished.stdout
