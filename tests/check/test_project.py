"""What one file alone does not tell: imports, aliases, callers, versions."""

from collections.abc import Callable
from pathlib import Path

import fastapi
import pytest

from sessionscope.check import Config, Finding, check_paths, check_source
from sessionscope.check._versions import Version, fastapi_version

Tree = Callable[..., list[Finding]]

DATABASE = """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

engine = create_engine("postgresql+psycopg://localhost/shop")
SessionLocal = sessionmaker(engine)

def get_db():
    with SessionLocal() as db:
        yield db
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write files (``a__b`` is ``a/b.py``), check their folder, return the findings."""

    def check(*, only: str = "", **files: str) -> list[Finding]:
        for name, source in files.items():
            path = tmp_path / f"{name.replace('___', '/').replace('INIT', '__init__')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return check_paths([tmp_path], Config(select=(only,) if only else ()))

    return check


ASYNC_USE = """
async def read():
    with {name}() as session:
        return session.execute("SELECT 1")
"""


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"app___database": DATABASE}, "from app.database import SessionLocal"),
        ({"app___database": DATABASE}, "from .database import SessionLocal"),
        ({"app___database": DATABASE, "app___INIT": ""}, "from app.database import SessionLocal"),
        (
            {
                "app___db___session": DATABASE,
                "app___db___INIT": "from .session import SessionLocal",
            },
            "from app.db import SessionLocal",
        ),
        (
            {"app___db___session": DATABASE, "app___db___INIT": "from app.db.session import *"},
            "from .db import SessionLocal",
        ),
        ({"app___database": DATABASE}, "from app.database import SessionLocal as Local"),
        ({"app___database": DATABASE}, "from app import database"),
        ({"app___database": DATABASE}, "import app.database"),
        ({"app___database": DATABASE}, "from . import database as base"),
    ],
)
def test_a_factory_is_known_wherever_it_is_imported(
    tree: Tree, files: dict[str, str], line: str
) -> None:
    name = {
        "from app import database": "database.SessionLocal",
        "import app.database": "app.database.SessionLocal",
        "from . import database as base": "base.SessionLocal",
        "from app.database import SessionLocal as Local": "Local",
    }.get(line, "SessionLocal")
    findings = tree(**files, app___views=line + ASYNC_USE.format(name=name))
    assert [(f.code, Path(f.path).name) for f in findings] == [("SES205", "views.py")]


def test_a_file_called_as_a_library_is_not_that_library(tree: Tree) -> None:
    """A project's own ``celery.py`` beside ``from celery import Celery`` is common."""
    findings = tree(
        app___celery="from celery import Celery\napp = Celery('shop')\n",
        app___tasks="from sqlalchemy import create_engine\n"
        "from celery import shared_task\n"
        "@shared_task\ndef work():\n    engine = create_engine('sqlite:///shop.db')\n",
        only="SES101",
    )
    assert [f.code for f in findings] == ["SES101"]


def test_an_annotation_is_followed_through_an_alias_of_another_file(tree: Tree) -> None:
    findings = tree(
        app___database=DATABASE,
        app___deps="from typing import Annotated\nfrom fastapi import Depends\n"
        "from sqlalchemy.orm import Session\nfrom .database import get_db\n"
        "SessionDep = Annotated[Session, Depends(get_db)]\n",
        app___views="from .deps import SessionDep\n"
        "async def read(db: SessionDep):\n    return db.get(1, 1)\n",
    )
    assert [f.code for f in findings] == ["SES205"]


def test_an_untyped_parameter_is_what_its_callers_pass(tree: Tree) -> None:
    """The name alone is no evidence; the call is."""
    source = "async def load(db):\n    return db.execute('SELECT 1')\n"
    assert tree(app___crud=source) == []
    findings = tree(
        app___crud=source,
        app___database=DATABASE,
        app___main="from .crud import load\nfrom .database import SessionLocal\n"
        "async def main():\n    with SessionLocal() as session:\n        await load(session)\n",
    )
    assert [(f.code, Path(f.path).name) for f in findings] == [("SES205", "crud.py")]


def test_a_session_kept_by_a_class_is_known_in_its_subclasses(tree: Tree) -> None:
    findings = tree(
        app___base="from sqlalchemy.orm import Session\n"
        "class Base:\n    def __init__(self, session: Session):\n        self.session = session\n",
        app___users="from .base import Base\n"
        "class Users(Base):\n    async def all(self):\n        return self.session.query(1)\n",
    )
    assert [(f.code, Path(f.path).name) for f in findings] == [("SES205", "users.py")]


def test_a_factory_set_by_a_function_through_global_is_known(tree: Tree) -> None:
    findings = tree(
        app___database="from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import sessionmaker\nSession = None\n"
        "def init(url):\n    global Session\n    Session = sessionmaker(create_engine(url))\n",
        app___views="from . import database\n"
        "def read():\n    session = database.Session()\n    return session.execute('SELECT 1')\n",
    )
    assert [f.code for f in findings] == ["SES102"]


def test_what_a_module_makes_when_it_is_first_asked_is_known(tree: Tree) -> None:
    """``__getattr__`` of a module with one ``return``."""
    findings = tree(
        app___database=DATABASE + "\ndef __getattr__(name):\n    return SessionLocal\n",
        app___views="from .database import Maker\n"
        "def read():\n    session = Maker()\n    return session.execute('SELECT 1')\n",
    )
    assert [f.code for f in findings] == ["SES102"]


def test_circular_imports_end(tree: Tree) -> None:
    assert tree(a="from b import x", b="from a import x", c="from a import x\nx.session()\n") == []


def test_tests_and_migrations_are_left_alone(tree: Tree) -> None:
    leak = DATABASE + "\ndef leak():\n    db = SessionLocal()\n    db.execute('SELECT 1')\n"
    assert tree(tests___helpers=leak, test_it=leak, alembic___versions___one=leak) == []
    assert [f.code for f in tree(app=leak)] == ["SES102"]


def test_a_script_owns_what_ends_with_it(tree: Tree) -> None:
    script = (
        DATABASE + "session = SessionLocal()\n\ndef main():\n    db = SessionLocal()\n"
        "    db.execute('SELECT 1')\n\nif __name__ == '__main__':\n    main()\n"
    )
    assert tree(script=script) == []
    assert {f.code for f in tree(app="import script\n")} == {"SES102", "SES201"}


COMMITS_LATE = DATABASE.replace("yield db", "yield db\n        db.commit()") + (
    "from fastapi import Depends, FastAPI\napp = FastAPI()\n"
    "@app.post('/')\ndef write(db=Depends(get_db)):\n    db.add(1)\n"
)


@pytest.mark.parametrize(
    ("requirements", "codes"),
    [
        ("fastapi==0.105.0\n", ["SES206"]),
        ("fastapi==0.110.1\n", []),
        ("fastapi[all]==0.117.0\n", []),
        ("fastapi~=0.118.0\n", ["SES206"]),
        ("fastapi<0.118\n", []),
        ("uvicorn==1.0\nfastapi==0.121.0\n", ["SES206"]),
    ],
)
def test_the_version_of_fastapi_decides_when_a_commit_is_late(
    tree: Tree, tmp_path: Path, requirements: str, codes: list[str]
) -> None:
    (tmp_path / "requirements.txt").write_text(requirements)
    assert [f.code for f in tree(app=COMMITS_LATE, only="SES206")] == codes


def test_a_lock_file_comes_before_requirements(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("fastapi==0.121.0\n")
    (tmp_path / "uv.lock").write_text('[[package]]\nname = "fastapi"\nversion = "0.110.0"\n')
    assert tree(app=COMMITS_LATE, only="SES206") == []


@pytest.mark.parametrize(
    ("project", "version"),
    [
        ('dependencies = ["sqlalchemy", "fastapi==0.110.0"]\n', (0, 110, 0)),
        ('dependencies = [\n    "fastapi[standard]~=0.117.1",\n]\n', (0, 117, 1)),
        ('fastapi = "^0.110.0"\n', (0, 110, 0)),
        ('fastapi = {version = "0.105.0", extras = ["all"]}\n', (0, 105, 0)),
        ('fastapi = ">=0.100,<0.118"\n', (0, 117)),
        ('dependencies = ["fastapi>=0.100,<0.106", "sqlalchemy<3"]\n', (0, 105)),
    ],
)
def test_the_project_names_its_version_of_fastapi(
    tmp_path: Path, project: str, version: tuple[int, ...]
) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}")
    assert fastapi_version(tmp_path) == Version(version)


@pytest.mark.parametrize(
    "line", ["fastapi-users<13", 'x = ["fastapi", "sqlalchemy<3"]', "fastapi; python_version<'4'"]
)
def test_what_is_said_of_others_is_not_said_of_fastapi(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.txt").write_text(f"{line}\n")
    installed = fastapi_version(tmp_path)
    assert str(installed) == fastapi.__version__
    assert installed is not None
    assert not installed.is_named


HANDS_OVER = DATABASE + (
    "from fastapi import BackgroundTasks, Depends, FastAPI\napp = FastAPI()\n"
    "@app.post('/session')\n"
    "def hand(tasks: BackgroundTasks, db=Depends(get_db)):\n    tasks.add_task(print, db)\n"
    "@app.post('/object')\n"
    "def order(tasks: BackgroundTasks, db=Depends(get_db)):\n"
    "    row = db.get(Order, 1)\n    tasks.add_task(print, row)\n"
)


@pytest.mark.parametrize(
    ("version", "text", "objects"),
    [
        ("0.105.0", "which FastAPI 0.105.0 ends after the task: its connection is missing", 0),
        ("0.106.0", "which ends first: DetachedInstanceError", 1),
        ("0.117.1", "which ends first: DetachedInstanceError", 1),
        ("0.118.0", "which FastAPI 0.118.0 ends after the task: its connection is missing", 0),
    ],
)
def test_the_version_of_fastapi_decides_what_a_background_task_finds(
    tree: Tree, tmp_path: Path, version: str, text: str, objects: int
) -> None:
    """A session that is open, or one that has ended; only the latter's objects are in danger."""
    (tmp_path / "requirements.txt").write_text(f"fastapi=={version}\n")
    session, *others = tree(app=HANDS_OVER, only="SES202")
    assert text in session.message
    assert [("`row`" in other.message) for other in others] == [True] * objects
    (tmp_path / "app.py").unlink()
    scoped = HANDS_OVER.replace("(get_db)", "(get_db, scope='function')")
    session, *others = tree(app=scoped, only="SES202")
    assert "which ends first: DetachedInstanceError" in session.message
    assert len(others) == 1


def test_where_no_version_of_fastapi_is_named_both_ends_are_told(tree: Tree) -> None:
    """The one that is installed here need not be that of the project."""
    config = Config(select=("SES202",))
    for findings in (tree(app=HANDS_OVER, only="SES202"), check_source(HANDS_OVER, config=config)):
        message = findings[0].message
        assert "which ends first (DetachedInstanceError, or" in message
        assert "or after the task: then its connection is missing" in message


def test_a_thread_waits_for_nobody_whatever_the_version(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("fastapi==0.118.0\n")
    (finding,) = tree(
        app=DATABASE
        + "from threading import Thread\nfrom fastapi import Depends\n"
        + "def hand(db=Depends(get_db)):\n    Thread(target=print, args=(db,)).start()\n",
        only="SES202",
    )
    assert "which does not wait for it: DetachedInstanceError" in finding.message


CRUD = """
from .database import SessionLocal

def get_user(user_id: int):
    db = SessionLocal()
    user = db.query(User).filter(User.id == user_id).first()
    db.close()
    return user
"""
ENDPOINT = "from fastapi import FastAPI\napp = FastAPI()\n@app.get('/')\ndef read():\n    {}\n"


@pytest.mark.parametrize(
    ("main", "confidences"),
    [
        ("", ["medium"]),  # its callers are somewhere else
        ("from . import crud, database\n" + ENDPOINT.format("return crud.get_user(1)"), ["high"]),
        (ENDPOINT.format("from .database import SessionLocal"), []),
        ("from . import crud\n" + ENDPOINT.format("return crud.get_user(1)"), ["medium"]),
    ],
    ids=["no application", "called", "never called", "called where nothing is recorded"],
)
def test_a_function_that_opens_its_own_session_is_found_where_it_may_be_called(
    tree: Tree, main: str, confidences: list[str]
) -> None:
    """The last application holds nothing to judge: that it has an entry point is not known."""
    findings = tree(app___database=DATABASE, app___crud=CRUD, app___main=main, only="SES106")
    assert [finding.confidence for finding in findings] == confidences


def test_what_nobody_calls_is_shown_on_request(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        DATABASE + CRUD.replace("from .database import SessionLocal", "") + ENDPOINT.format("...")
    )
    config = Config(select=("SES106",), confidence="low")
    assert [finding.confidence for finding in check_paths([tmp_path], config)] == ["low"]
    assert check_paths([tmp_path], Config(select=("SES106",))) == []


def test_a_call_in_a_file_with_nothing_to_judge_may_be_one(tree: Tree) -> None:
    """Its imports alone are recorded."""
    findings = tree(
        app___database=DATABASE,
        app___crud=CRUD,
        app___service="from .crud import get_user\ndef work():\n    return get_user(1)\n",
        app___main=ENDPOINT.format("from .database import SessionLocal"),
        only="SES106",
    )
    assert [finding.confidence for finding in findings] == ["medium"]


def test_the_same_url_in_two_files_is_two_pools(tree: Tree) -> None:
    url = "from app.settings import settings\nfrom sqlalchemy import create_engine\n"
    findings = tree(
        app___settings="settings = object()\n",
        app___database=url + "engine = create_engine(settings.url)\n",
        app___reports=url + "engine = create_engine(settings.url)\n",
        app___main="from . import database, reports\n",
    )
    assert [(f.code, Path(f.path).name) for f in findings] == [("SES301", "reports.py")]
    assert [Path(step.path).name for step in findings[0].evidence] == ["database.py", "reports.py"]


def test_configured_factories_and_providers_are_believed(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from company import new_session, session_provider\n"
        "def leak():\n    db = new_session()\n    db.execute('SELECT 1')\n"
        "def by_hand():\n    db = next(session_provider())\n    db.execute('SELECT 1')\n"
    )
    assert check_paths([tmp_path]) == []
    config = Config(factories=("company.new_session",), providers=("company.session_provider",))
    assert [f.code for f in check_paths([tmp_path], config)] == ["SES102", "SES105"]


def test_a_configured_call_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from company import ask\nfrom sqlalchemy.orm import Session\n"
        "def work(db: Session):\n    db.execute('SELECT 1')\n    ask()\n    db.commit()\n"
    )
    assert check_paths([tmp_path]) == []
    config = Config(blocking_calls=("company.ask",))
    assert [f.code for f in check_paths([tmp_path], config)] == ["SES401"]
