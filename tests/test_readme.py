"""The README's code runs, and its promises name tests that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)[^\n]*\n(.*?)```", README, re.DOTALL))

# The kinds of database that two processes can share.
SHARED = ["sqlite-file", "postgres"]

MODELS = BLOCKS["models.py"]


@pytest.fixture
def project(tmp_path: Path, url: str) -> Path:
    """The README's files in a folder, on a database that exists."""
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    database = tmp_path / "database.py"
    written = "postgresql+psycopg://user:password@host/dbname"
    assert written in database.read_text(encoding="utf-8")
    database.write_text(BLOCKS["database.py"].replace(written, url), encoding="utf-8")
    run(
        tmp_path,
        "from database import database; from models import Base\n"
        "Base.metadata.create_all(database.engine)",
    )
    return tmp_path


def run(project: Path, code: str) -> str:
    """Run *code* as the user would, in an interpreter of its own with warnings as errors."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=project,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{':'.join(path for path in sys.path if path)}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_example_has_all_its_files() -> None:
    assert set(BLOCKS) == {
        "database.py",
        "crud.py",
        "main.py",
        "models.py",
        "schemas.py",
        "anywhere.py",
        "async_anywhere.py",
        "test_main.py",
    }


@pytest.mark.parametrize("url", SHARED, indirect=True)
def test_the_web_application_of_the_readme_works(project: Path) -> None:
    printed = run(
        project,
        "from fastapi.testclient import TestClient\n"
        "from main import app\n"
        "with TestClient(app) as client:\n"
        "    print(client.post('/items/pear').json())\n"
        "    print(client.get('/items/').json())\n",
    )
    assert printed.splitlines() == ["{'id': 1, 'name': 'pear'}", "[{'id': 1, 'name': 'pear'}]"]


@pytest.mark.parametrize("url", SHARED, indirect=True)
def test_the_script_of_the_readme_works(project: Path) -> None:
    assert run(project, "import anywhere").splitlines() == ["stored pear", "1 items: pear"]


@pytest.mark.parametrize("url", SHARED, indirect=True)
def test_the_async_script_of_the_readme_works(project: Path, url: str) -> None:
    if url.startswith("sqlite"):
        assert '`AsyncDatabase("sqlite+aiosqlite:///app.db")`' in README, "it says what to write"
        script = project / "async_anywhere.py"
        other = url.replace("sqlite:", "sqlite+aiosqlite:")
        code = BLOCKS[script.name].replace("database.engine.url", repr(other))
        script.write_text(code, encoding="utf-8")
    assert run(project, "import async_anywhere") == "plum\n"


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_the_test_of_the_readme_works_and_leaves_the_real_database_alone(project: Path) -> None:
    printed = run(
        project,
        "from test_main import test_create_item, test_database\n"
        "from models import Item\n"
        "from database import database\n"
        "test_create_item()\n"
        "for each in (database, test_database):\n"
        "    with each.begin(read_only=True) as session:\n"
        "        print(session.query(Item).count())\n",
    )
    assert printed.splitlines() == ["0", "1"]


def test_every_promise_names_a_test_that_exists() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    promised = set(re.findall(r"`(test_\w+)`", README))
    assert len(promised) >= 10
    assert [name for name in promised if f"def {name}(" not in tests] == []
