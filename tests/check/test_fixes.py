"""Fixes: the file still parses, the finding is gone, and nothing else has changed."""

import ast
import difflib
from pathlib import Path

import pytest

from sessionscope import _cli
from sessionscope.check import Config, check_source
from sessionscope.check._fix import mend
from sessionscope.check._registry import RULES

FIXTURES = Path(__file__).parent / "fixtures"
FIXABLE = {code: rule for code, rule in RULES.items() if rule.fix}
# What each fix may add to a line, and may take away.
MARKS = {
    "SES101": ("engine = ", "Engine", "factory = ", "pass"),
    "SES102": ("with ", ".close()"),
    "SES105": ("with ",),
    "SES103": ("try:", "finally:", "    "),
    "SES107": ("pass", ".close()"),
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
        "@app.get('/')\ndef read(db=Depends(get_session)): ...\n"
    )
    assert _cli.main(["check", "--select", "SES206", "--fix", "--unsafe-fixes", "."]) == 0
    assert 'Depends(get_session, scope="function")' in views.read_text()


def test_a_file_that_libcst_cannot_read_stays_as_it_is() -> None:
    (finding,) = check_source(CLOSES, "app.py")
    assert mend(b"def f(:\n", "app.py", finding) == b"def f(:\n"
