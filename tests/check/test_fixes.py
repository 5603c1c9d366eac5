"""Fixes: the file still parses, the finding is gone, and nothing else has changed."""

import ast
import difflib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sessionscope import _cli
from sessionscope.check import Config, Finding, check_source
from sessionscope.check._fix import mend
from sessionscope.check._fix_imports import with_import
from sessionscope.check._registry import RULES

FIXTURES = Path(__file__).parent / "fixtures"
FIXABLE = {code: rule for code, rule in RULES.items() if rule.fix}
# What each fix may add to a line, and may take away.
MARKS = {
    "SES101": ("engine = ", "Engine", "factory = ", "pass"),
    "SES102": ("with ", ".close()"),
    "SES105": ("with ",),
    "SES103": ("try:", "finally:", "    "),
    "SES107": ("pass", ".close()", "try:", "finally:", "    "),
    "SES205": ("async ",),
    "SES206": ('scope="function"',),
    "SES304": ("poolclass=StaticPool", "import StaticPool"),
    "SES402": (".rollback()",),
}


def fixture(code: str) -> str:
    return (FIXTURES / f"{code}.py").read_text()


def test_every_fix_is_listed_here() -> None:
    assert set(MARKS) == set(FIXABLE)


@pytest.mark.parametrize("code", FIXABLE)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_each_fix_mends_its_finding_and_changes_nothing_else(code: str, newline: str) -> None:
    """One finding after the other; the lines that differ are those of the fix alone."""
    config = Config(select=(code,))
    source = fixture(code).replace("\n", newline)
    findings = [f for f in check_source(source, "app.py", config) if f.fix]
    assert len(findings) >= 3
    for finding in findings:
        mended = mend(source.encode(), "app.py", finding).decode()
        ast.parse(mended)
        left = check_source(mended, "app.py", config)
        assert finding.evidence[-1].text not in {f.evidence[-1].text for f in left} or len(
            left
        ) < len(check_source(source, "app.py", config))
        for line in difflib.ndiff(source.splitlines(True), mended.splitlines(True)):
            if line[0] in "+-":
                assert any(mark in line for mark in MARKS[code]) or line[2:].strip() in source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SWALLOWED = """\
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

SessionLocal = sessionmaker()


def save(session: Session, rows):
    {around}
        try:
            session.add(rows)
            session.flush()
        except IntegrityError:
            pass
        session.commit()
"""


@pytest.mark.parametrize(
    ("around", "fix"),
    [
        ("if rows:", "unsafe"),
        ("for row in rows:", None),
        ("for row in rows:\n        session = SessionLocal()", "unsafe"),
    ],
)
def test_no_rollback_is_written_where_it_would_lose_the_rows_of_earlier_turns(
    around: str, fix: str | None
) -> None:
    source = SWALLOWED.format(around=around)
    (finding,) = check_source(source, "app.py", Config(select=("SES402",)))
    assert finding.fix == fix


PROVIDER = """\
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

SessionLocal = sessionmaker( create_engine( "sqlite:///shop.db" ) )   # our layout



def get_db():
    db = SessionLocal()
    yield db   # odd spaces
    db.close()
x = [1,
     2]
"""


def test_a_safe_fix_is_made_by_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "app.py"
    file.write_text(PROVIDER)
    assert _cli.main(["check", "--fix", "."]) == 0
    assert capsys.readouterr().err == "Fixed 1 finding.\n"
    assert file.read_text() == PROVIDER.replace(
        "    yield db   # odd spaces\n    db.close()\n",
        "    try:\n        yield db   # odd spaces\n    finally:\n        db.close()\n",
    )


def test_the_import_that_a_fix_needs_is_added_once(folder: Path) -> None:
    source = (
        '"""Tests."""\n\nfrom sqlalchemy import create_engine\n\n'
        + 'a = create_engine("sqlite://", connect_args={"check_same_thread": False})\n' * 2
    )
    file = folder / "app.py"
    file.write_text(source)
    assert _cli.main(["check", "--fix", "."]) == 0
    mended = file.read_text()
    assert mended.count("from sqlalchemy.pool import StaticPool\n") == 1
    assert mended.count(", poolclass=StaticPool)\n") == 2
    compile(mended, "app.py", "exec")


def test_what_could_not_be_checked_is_told_after_a_fix_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "app.py").write_text(PROVIDER)
    assert _cli.main(["check", "--fix", "app.py", "nowhere.py"]) == 2
    assert "nowhere.py:1: no such file or folder\n" in capsys.readouterr().out


CLOSES = """\
from sqlalchemy.orm import Session


def create(session: Session):
    session.commit()
    session.close()
"""


def test_an_unsafe_fix_is_made_only_on_request(folder: Path) -> None:
    file = folder / "app.py"
    file.write_text(CLOSES)
    assert _cli.main(["check", "--fix", "."]) == 1
    assert file.read_text() == CLOSES
    assert _cli.main(["check", "--fix", "--unsafe-fixes", "."]) == 0
    assert file.read_text() == CLOSES.replace("    session.close()\n", "")


def test_a_fix_in_another_file_than_the_finding_is_made_there(folder: Path) -> None:
    """SES206 is found at the commit and mended at each ``Depends``."""
    (folder / "database.py").write_text(
        PROVIDER.replace("    yield db   # odd spaces\n    db.close()\n", "")
        + "\ndef get_session():\n    with SessionLocal() as db:\n        yield db\n"
        "        db.commit()\n"
    )
    views = folder / "views.py"
    views.write_text(
        "from fastapi import Depends, FastAPI\nfrom database import get_session\napp = FastAPI()\n"
        "@app.post('/')\ndef write(db=Depends(get_session)):\n    db.add(1)\n"
    )
    assert _cli.main(["check", "--select", "SES206", "--fix", "--unsafe-fixes", "."]) == 0
    assert 'Depends(get_session, scope="function")' in views.read_text()


def test_a_file_that_libcst_cannot_read_stays_as_it_is() -> None:
    (finding,) = check_source(CLOSES, "app.py")
    assert mend(b"def f(:\n", "app.py", finding) == b"def f(:\n"


HEAD = """\
from fastapi import FastAPI
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

SessionLocal = sessionmaker(create_engine("postgresql://localhost"))
app = FastAPI()
"""


def mended(source: str, code: str) -> str:
    """Return *source* without its findings of *code*, as --fix --unsafe-fixes leaves it."""
    file = Path("app.py")
    file.write_text(source)
    _cli.main(["check", "--no-cache", "--select", code, "--fix", "--unsafe-fixes", "app.py"])
    compile(file.read_text(), "app.py", "exec")
    return file.read_text()


def test_the_import_stands_above_what_uses_it(folder: Path) -> None:
    """Modules import further down, too, and a docstring stays the first statement."""
    source = (
        '"""Doc."""\nfrom sqlalchemy import create_engine\n'
        'engine = create_engine("sqlite://")\nfrom fastapi import FastAPI\napp = FastAPI()\n'
    )
    namespace: dict[str, object] = {}
    exec(mended(source, "SES304"), namespace)
    assert namespace["__doc__"] == "Doc."
    assert type(namespace["engine"].pool).__name__ == "StaticPool"  # type: ignore[attr-defined]


BY_HAND = """

def get_db():
    with SessionLocal() as session:
        yield session


def count() -> int:
    session = next(get_db())
    return session.scalar("SELECT 1")
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "import os\nfrom pathlib import Path\n\nfrom database import SessionLocal\n",
            (
                "import os\nfrom contextlib import contextmanager\nfrom pathlib import Path\n\n"
                "from database import SessionLocal\n"
            ),
        ),
        (
            '"""Doc."""\n\nfrom .database import SessionLocal\n',
            (
                '"""Doc."""\n\nfrom contextlib import contextmanager\n\n'
                "from .database import SessionLocal\n"
            ),
        ),
        (
            '"""Doc."""\n\n__version__ = "1"\n\nimport os\nimport sqlalchemy\n',
            (
                '"""Doc."""\n\n__version__ = "1"\n\nimport os\n'
                "from contextlib import contextmanager\n\nimport sqlalchemy\n"
            ),
        ),
        (
            "from __future__ import annotations\n",
            "from __future__ import annotations\n\nfrom contextlib import contextmanager\n",
        ),
    ],
)
def test_the_import_stands_in_order_among_the_imports(before: str, after: str) -> None:
    assert with_import((before + BY_HAND).encode(), "contextmanager").decode() == after + BY_HAND


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            (
                "    # all of it\n    try:\n        db.commit()\n        return 1\n"
                "    finally:\n        db.close()\n"
            ),
            "    # all of it\n    db.commit()\n    return 1\n",
        ),
        (
            (
                "    try:\n        db.commit()\n    except ValueError:\n        db.rollback()\n"
                "        raise\n    finally:\n        db.close()\n"
            ),
            (
                "    try:\n        db.commit()\n    except ValueError:\n        db.rollback()\n"
                "        raise\n"
            ),
        ),
        (
            "    try:\n        db.commit()\n    finally:\n        db.close()\n        log()\n",
            "    try:\n        db.commit()\n    finally:\n        log()\n",
        ),
    ],
)
def test_a_finally_that_only_closed_goes_with_the_close(
    folder: Path, before: str, after: str
) -> None:
    """What was tried stands for itself then, at the indentation around it."""
    head = f"{HEAD}\ndef create(db: Session):\n"
    assert mended(head + before, "SES107") == head + after


@pytest.mark.parametrize(
    "line", ["from pools import StaticPool", "import pools as StaticPool", "StaticPool = None"]
)
def test_a_name_that_means_something_else_is_not_used(folder: Path, line: str) -> None:
    source = f'{HEAD}{line}\nengine = create_engine("sqlite://")\n'
    assert mended(source, "SES304") == source


def test_an_import_under_another_name_is_no_import(folder: Path) -> None:
    source = f'{HEAD}from sqlalchemy import StaticPool as SP\nengine = create_engine("sqlite://")\n'
    assert "from sqlalchemy.pool import StaticPool\n" in mended(source, "SES304")


def test_an_argument_in_a_line_of_its_own_stands_like_the_others(folder: Path) -> None:
    source = f'{HEAD}engine = create_engine(\n    "sqlite://",  # for now\n)\n'
    assert mended(source, "SES304").endswith(
        'engine = create_engine(\n    "sqlite://",  # for now\n    poolclass=StaticPool,\n)\n'
    )


def test_the_block_ends_where_the_session_was_closed(folder: Path) -> None:
    """What comes after must not hold the connection; comments stay."""
    source = f"""{HEAD}
def count():
    db = SessionLocal()  # ours
    n = db.scalar("SELECT 1")
    db.close()
    # may take long
    send(n)
"""
    assert mended(source, "SES102").endswith("""
    with SessionLocal() as db:  # ours
        n = db.scalar("SELECT 1")
    # may take long
    send(n)
""")


def test_two_engines_of_one_name_are_not_both_moved_up(folder: Path) -> None:
    """The second would take the place of the first, with another database behind it."""
    route = """
@app.get("/{0}")
def {0}():
    engine = create_engine("postgresql://localhost/{0}")
    with Session(engine) as session:
        return session.scalar("SELECT 1")
"""
    after = mended(HEAD + route.format("a") + route.format("b"), "SES101")
    assert after.count("\nengine = ") == 1
    assert after.count("\n    engine = ") == 1


@pytest.mark.parametrize(
    "body", ["if name:\n        return db.close()\n    db.commit()", "x = db.close()\n    print(x)"]
)
def test_a_close_that_does_more_than_to_close_stays(folder: Path, body: str) -> None:
    source = f"{HEAD}\ndef create(db: Session, name: str):\n    db.add(name)\n    {body}\n"
    assert mended(source, "SES107") == source


def test_what_needs_the_event_loop_stays_async(folder: Path) -> None:
    source = f"""{HEAD}
import asyncio
@app.get("/")
async def read(db: Session):
    asyncio.create_task(log())
    return db.scalar("SELECT 1")
"""
    assert mended(source, "SES205") == source


def test_a_file_that_is_gone_when_its_fix_is_made_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("app.py", "other.py"):
        (folder / name).write_text(PROVIDER)
    meanwhile(monkeypatch, (folder / "app.py").unlink)
    assert _cli.main(["check", "--fix", "."]) == 2
    told = capsys.readouterr()
    assert "app.py:1: cannot be mended: No such file or directory\n" in told.out
    assert told.err == "Fixed 1 finding.\n"  # the other one
    assert "finally" in (folder / "other.py").read_text()


def test_a_file_that_has_changed_since_it_was_checked_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a fix for what it was, nor by one for a place that has moved."""
    file = folder / "app.py"
    file.write_text(PROVIDER)
    meanwhile(monkeypatch, lambda: file.write_text(PROVIDER + "y = 3\n"))
    assert _cli.main(["check", "--fix", "."]) == 2
    told = capsys.readouterr()
    assert file.read_text() == PROVIDER + "y = 3\n"
    assert "app.py:1: has changed since it was checked and is not mended" in told.out
    assert told.err == "Fixed 0 findings.\n"
    assert left_in(folder) == ["app.py"]


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(folder: Path) -> None:
    """The limit stands for it: the system refuses to write more than a part of the file."""
    file = folder / "app.py"
    source = PROVIDER + "# filler\n" * 1000
    file.write_text(source)
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(source) // 2},) * 2)\n"
        "from sessionscope._cli import main\n"
        "raise SystemExit(main(['check', '--no-cache', '--fix', 'app.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],  # or what Python compiles would be cut off, too
        env={"PYTHONPATH": str(Path(_cli.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "app.py:1: cannot be mended: File too large\n" in done.stdout
    assert file.read_text() == source
    assert left_in(folder) == ["app.py"]


def test_a_process_that_is_stopped_while_it_writes_leaves_the_file_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written, and nothing has come to its place yet."""
    file = folder / "app.py"
    file.write_text(PROVIDER)
    monkeypatch.setattr(os, "fsync", stop)
    assert _cli.main(["check", "--fix", "app.py"]) == 130
    assert file.read_text() == PROVIDER
    assert left_in(folder) == ["app.py"]


def stop(_: int) -> None:
    raise KeyboardInterrupt


def test_a_mended_file_keeps_its_mode_and_a_link_stays_a_link(folder: Path) -> None:
    (folder / "real").mkdir()
    file = folder / "real" / "database.py"
    file.write_text(PROVIDER)
    file.chmod(0o750)
    link = folder / "app.py"
    link.symlink_to(Path("real") / "database.py")
    assert _cli.main(["check", "--fix", "app.py"]) == 0
    assert link.readlink() == Path("real") / "database.py"
    assert "finally" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o750
    assert left_in(folder / "real") == ["database.py"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everything")
def test_a_file_that_may_not_be_written_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although its folder would let us put another file in its place."""
    file = folder / "app.py"
    file.write_text(PROVIDER)
    file.chmod(0o444)
    assert _cli.main(["check", "--fix", "app.py"]) == 2
    assert "app.py:1: cannot be mended: Permission denied\n" in capsys.readouterr().out
    assert file.read_text() == PROVIDER


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let *act* happen once, after the check and before the first file is written."""
    acts = [act]

    def mend_after(source: bytes, path: str, finding: Finding) -> bytes:
        while acts:
            acts.pop()()
        return mend(source, path, finding)

    monkeypatch.setattr("sessionscope.check._fix.mend", mend_after)


def left_in(folder: Path) -> list[str]:
    """Return what lies in *folder*, but for the cache."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".sessionscope_cache")
