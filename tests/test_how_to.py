"""The code of the pages in docs/how-to runs, as their reader would run it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.documents import loaded
from tests.plugin import PLUGIN
from tests.test_readme import BLOCKS, MODELS, ROOT, SHARED, run

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
NAME = re.compile(r"# (\w+\.py)\n")

DATABASE = """
from sqlalchemy import make_url

from sessionscope import AsyncDatabase, Database

database = Database({url!r})
async_database = AsyncDatabase(make_url({url!r}).set(drivername={driver!r}))
"""
# What each page's reader has, as the guide to the sandbox says.
CONFTEST = """
import pytest

import database as application


@pytest.fixture(scope="session")
def sessionscope_database():
    return application.database


@pytest.fixture(scope="session")
def sessionscope_async_database():
    return application.async_database


@pytest.fixture
def anyio_backend():
    return "asyncio"
"""
# How many tests each page shows.
TESTS = {
    "celery": 1,
    "commands": 2,
    "flask": 1,
    "jobs": 3,
    "litestar": 2,
    "starlette": 2,
    "taskiq": 1,
}
# What each page's reader does next, and what is printed then.
USES = {
    "starlette": """
from starlette.testclient import TestClient
import main, async_main
with TestClient(main.app) as client:
    print(client.post("/items/pear").json(), client.get("/items").json())
with TestClient(async_main.app) as client:
    print(client.post("/items/plum").json())
print(main.database.stats().in_use)
---
{'id': 1, 'name': 'pear'} ['pear']
{'id': 2, 'name': 'plum'}
0
""",
    "flask": """
from main import app
client = app.test_client()
print(client.post("/items/pear").json, client.get("/items").json)
---
{'id': 1, 'name': 'pear'} ['pear']
""",
    "litestar": """
from litestar.testing import TestClient
import main, async_main
with TestClient(main.app) as client:
    print(client.post("/items/pear").json(), client.get("/items").json())
with TestClient(async_main.app) as client:
    print(client.post("/items/plum").json())
---
{'id': 1, 'name': 'pear'} ['pear']
{'id': 2, 'name': 'plum'}
""",
    "celery": """
from tasks import add_item, app, count_items
app.conf.task_always_eager = True
app.conf.task_store_eager_result = False
print(add_item.delay("pear").get(), count_items.delay().get())
---
1 1
""",
    "taskiq": """
import asyncio
from tasks import add_item, async_database, broker, count_items
async def main():
    await broker.startup()
    print((await (await add_item.kiq("pear")).wait_result()).return_value)
    print((await (await count_items.kiq()).wait_result()).return_value)
    await broker.shutdown()
    await async_database.dispose()
asyncio.run(main())
---
1
1
""",
    "jobs": """
import dramatiq
from datetime import datetime
from threading import Event
import actors, crud, schedule, threads
from apscheduler.events import EVENT_JOB_EXECUTED
broker = dramatiq.get_broker()
worker = dramatiq.Worker(broker)
worker.start()
actors.add_item.send("apple")
broker.join("default")
worker.stop()
done = Event()
schedule.scheduler.add_listener(lambda event: done.set(), EVENT_JOB_EXECUTED)
schedule.scheduler.start()
schedule.scheduler.modify_job("restock", next_run_time=datetime.now().astimezone())
assert done.wait(10)
schedule.scheduler.shutdown()
print(len(threads.add_all(["fig", "lime"])))
print(sorted(item.name for item in actors.database.run(crud.get_items)))
---
2
['apple', 'fig', 'lime', 'pear']
""",
    "commands": """
from click.testing import CliRunner
from typer.testing import CliRunner as TyperRunner
import click_commands, typer_commands
print(CliRunner().invoke(click_commands.add, ["pear"]).output, end="")
print(TyperRunner().invoke(typer_commands.app, ["add", "plum", "--shout"]).output, end="")
import script, notebook
print(TyperRunner().invoke(typer_commands.app, ["show"]).output.split())
print(len(notebook.items))
---
added pear
added PLUM
['pear', 'PLUM', 'pear', 'apple', 'plum', 'pear']
6
""",
}


OF_TESTS = ("test_", "conftest")


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def project(tmp_path: Path, url: str) -> Path:
    """A folder with what the pages share, on a database that exists."""
    driver = "postgresql+psycopg" if url.startswith("postgresql") else "sqlite+aiosqlite"
    files = {
        "conftest.py": CONFTEST,
        "crud.py": BLOCKS["crud.py"],
        "database.py": DATABASE.format(url=url, driver=driver),
        "models.py": MODELS,
        "pytest.ini": "[pytest]\npythonpath = .\n",
    }
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    run(
        tmp_path,
        "from database import database; from models import Base\n"
        "Base.metadata.create_all(database.engine)",
    )
    return tmp_path


def write(page: str, project: Path) -> set[str]:
    """Write the files of a page into the project, and return the names of their modules."""
    names: set[str] = set()
    for block in blocks(ROOT / "docs" / "how-to" / f"{page}.md"):
        named = NAME.match(block)
        assert named is not None, f"no file name in the first line of: {block}"
        (project / named[1]).write_text(block, encoding="utf-8")
        names.add(named[1].removesuffix(".py"))
    return names


def test_every_page_that_is_used_shows_its_tests() -> None:
    pages = {page.stem for page in PAGES}
    assert set(USES) == set(TESTS) <= pages


@pytest.mark.parametrize("page", USES)
@pytest.mark.parametrize("url", SHARED, indirect=True)
def test_the_code_of_a_page_works(page: str, project: Path) -> None:
    names = write(page, project)
    use, _, printed = USES[page].partition("---\n")
    assert run(project, use) == printed
    assert {name for name in names if not name.startswith(OF_TESTS)} <= loaded(project)


@pytest.mark.parametrize("page", [*TESTS, "test-with-sandbox"])
def test_a_page_with_an_async_database_says_what_that_needs(page: str) -> None:
    """SQLAlchemy 2.1 installs greenlet only if asked for; the fixtures have names of their own."""
    path = ROOT / "docs" / "how-to" / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    if any("async_database" in block for block in blocks(path) if "def test_" in block):
        assert re.search(r'pip install "\.\[[^]]*\basyncio\b', text)
        assert "test-with-sandbox.md#async-def" in text or page == "test-with-sandbox"


# What a module needs beside the package that is named like it.
NEEDS = {
    "database": "psycopg",
    "litestar.testing": "httpx2",
    "fastapi.testclient": "httpx2",
    "starlette.testclient": "httpx2",
}


@pytest.mark.parametrize("page", [*TESTS, "test-with-sandbox"])
def test_the_install_line_of_a_page_has_all_that_its_code_imports(page: str) -> None:
    """Into a fresh environment, from a clone; the database is the README's, on PostgreSQL."""
    path = ROOT / "docs" / "how-to" / f"{page}.md"
    line = re.search(r'pip install "\.\[([^]]*)\]"(.*)', path.read_text(encoding="utf-8"))
    assert line is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(each for e in line[1].split(",") for each in extras[e])]
    installed = {
        re.split(r"[^\w-]", each.strip('"`.'))[0].lower() for each in [*required, *line[2].split()]
    }
    files = {named[1].removesuffix(".py") for b in blocks(path) if (named := NAME.match(b))}
    own = {*files, "crud", "models", "sessionscope"}
    needed = {NEEDS.get(module, module.partition(".")[0]) for module in imports_of(page)}
    assert needed - own - sys.stdlib_module_names <= installed


def imports_of(page: str) -> set[str]:
    """Return the modules that the code of a page imports."""
    modules = set[str]()
    for block in blocks(ROOT / "docs" / "how-to" / f"{page}.md"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("page", TESTS)
@pytest.mark.parametrize("url", SHARED, indirect=True)
def test_the_tests_of_a_page_pass_and_leave_nothing(page: str, project: Path) -> None:
    names = write(page, project)
    pytest_of_the_reader = (
        "import pytest, sys\n"
        f"sys.exit(pytest.main(['-q', *{PLUGIN}, '-p', 'no:asyncio', '-p', 'no:cacheprovider']))"
    )
    assert f"{TESTS[page]} passed" in run(project, pytest_of_the_reader)
    assert {name for name in names if name.startswith(OF_TESTS)} <= loaded(project)
    left = (
        "import crud; from database import database\n"
        "print(database.run(crud.get_items)); database.dispose()"
    )
    assert run(project, left) == "[]\n"
