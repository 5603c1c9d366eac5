"""The guides' code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin import PLUGIN

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "how-to" / "test-with-sandbox.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)[^\n]*\n(.*?)```", GUIDE, re.DOTALL))
WRITTEN = "postgresql+psycopg://user:password@host/dbname"
# The guide's tests of its FastAPI application: five, one and one.
SYNC = ("test_items.py", "test_items_overridden.py", "test_hooks.py")
APPLICATION = ("database.py", "models.py", "deps.py", "main.py", "async_main.py")
OTHER_DATABASES = ("conftest_memory.py", "conftest_postgres.py", "conftest_files.py")
UNITTESTS = ("test_unittest", "test_unittest_async")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The guide's files in a folder, with a database that cannot be reached."""
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    return tmp_path


def use(project: Path, url: str) -> None:
    """Let the guide's application have a database that is there."""
    written = {"database.py": url, "async_main.py": url.replace("sqlite:", "sqlite+aiosqlite:")}
    for name, its_url in written.items():
        assert WRITTEN in BLOCKS[name]
        (project / name).write_text(BLOCKS[name].replace(WRITTEN, its_url), encoding="utf-8")


def run(project: Path, *command: str) -> str:
    """Run a module as the user would, with warnings as errors."""
    path = ":".join([str(ROOT / "src"), *(path for path in sys.path if path)])
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", *command],
        cwd=project,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def run_pytest(project: Path, *arguments: str) -> str:
    plugins = (*PLUGIN, "-p", "no:asyncio", "-p", "no:cacheprovider")
    return run(project, "pytest", "-q", *plugins, *arguments)


def test_the_guide_has_all_its_files() -> None:
    """And each of them is run below."""
    assert len(BLOCKS) == GUIDE.count("```python")
    tests = {*SYNC, "test_async_main.py", *(f"{name}.py" for name in UNITTESTS)}
    written = {*APPLICATION, "conftest.py", "conftest_async_memory.py", *OTHER_DATABASES}
    assert set(BLOCKS) == {*written, *tests, "with_server.py"}


@pytest.mark.parametrize("kind", ["sqlite_url", "postgres_url"])
def test_the_tests_of_the_guide_pass_and_leave_nothing(
    project: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    use(project, str(request.getfixturevalue(kind)))
    assert "8 passed" in run_pytest(project, *SYNC, "test_async_main.py")
    (project / "left.py").write_text(
        "from database import database; from models import *; from sqlmodel import select\n"
        "with database.begin(read_only=True) as session:\n"
        "    print(session.exec(select(User)).all(), session.exec(select(Item)).all())\n"
        "database.dispose()\n",
        encoding="utf-8",
    )
    assert run(project, "left") == "[] []\n"


@pytest.mark.parametrize(
    ("other", "workers"),
    [
        *((other, "0") for other in OTHER_DATABASES[:2]),
        ("conftest_memory.py", "2"),
        ("conftest_files.py", "2"),
    ],
)
def test_another_database_stands_in_for_one_that_cannot_be_reached(
    project: Path, other: str, workers: str
) -> None:
    client = BLOCKS["conftest.py"].partition("@pytest.fixture\ndef client")
    imports = "from fastapi.testclient import TestClient\nfrom main import app\n\n\n"
    whole = BLOCKS[other] + "\n\n" + imports + "".join(client[1:])
    (project / "conftest.py").write_text(whole, encoding="utf-8")
    assert "7 passed" in run_pytest(project, "-n", workers, *SYNC)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_databases_in_memory_stand_in_for_both_kinds(project: Path, workers: str) -> None:
    """Neither the application's Database nor its AsyncDatabase can be reached."""
    _, head, client = BLOCKS["conftest.py"].partition("@pytest.fixture\ndef client")
    imports = "from fastapi.testclient import TestClient\nfrom main import app"
    parts = BLOCKS["conftest_memory.py"], BLOCKS["conftest_async_memory.py"], imports, head + client
    (project / "conftest.py").write_text("\n\n".join(parts), encoding="utf-8")
    assert "8 passed" in run_pytest(project, "-n", workers, *SYNC, "test_async_main.py")


@pytest.mark.parametrize("module", UNITTESTS)
def test_the_unittests_of_the_guide_pass(project: Path, module: str) -> None:
    """On a database in memory, as they say; the application's cannot be reached."""
    assert "OK" in run(project, "unittest", module)


def test_the_server_of_the_guide_runs(project: Path) -> None:
    assert run(project, "with_server") == ""
