"""The command: exit codes, formats, options, settings, and whatever lies in the folder."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft4Validator

from sessionscope import _cli
from sessionscope.check import Config
from sessionscope.check._config import UNUSED_NOQA_PAGE
from sessionscope.check._registry import RULES

LEAK = """
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

SessionLocal = sessionmaker(create_engine("postgresql+psycopg://localhost/shop"))


def leak():
    db = SessionLocal()
    return db.execute("SELECT 1")
"""
INFO = """
import time
from sqlalchemy.orm import Session


def wait(db: Session):
    db.execute("SELECT 1")
    time.sleep(1)
"""
TABLE = "[tool.sessionscope.check]\n"
SCHEMA = Path(__file__).parent / "sarif-2.1.0-rtm.5.json"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in the working directory: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = _cli.main(arguments)
        except SystemExit as leave:  # argparse
            code = int(leave.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_clean_is_zero_and_findings_are_one(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text("x = 1\n")
    assert command("check", ".") == (0, "No findings in 1 file.\n", "")
    (folder / "app.py").write_text(LEAK)
    code, out, _ = command("check", ".")
    assert code == 1
    assert out.startswith("app.py:9:10: SES102 `db` is never closed")
    assert "    app.py:9: `db` is made here\n" in out
    assert out.endswith("1 finding in 1 file.\n")


def test_what_is_told_for_information_does_not_fail_the_run(folder: Path, command: Command) -> None:
    """Unless it was asked for by name."""
    (folder / "app.py").write_text(INFO)
    code, out, _ = command("check", ".")
    assert (code, "SES401 (info)" in out) == (0, True)
    assert command("check", "--select", "SES401", ".")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "--select", "SES999", "."),
        ("check", "--confidence", "great", "."),
        ("check", "nowhere.py"),
        ("check", "--providers", "nowhere.py"),
        ("check", "--unsafe-fixes", "."),
        ("explain", "SES999"),
        ("nothing",),
        (),
    ],
)
def test_what_makes_no_sense_is_two(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out or err


def test_an_empty_tree_is_not_called_clean(command: Command) -> None:
    code, out, _ = command("check", ".")
    assert (code, out) == (0, "Nothing was checked: no Python file was found.\n")


@pytest.mark.parametrize("option", ["--statistics", "--format=json", "--providers", "--fix"])
def test_an_empty_tree_is_told_with_every_option(command: Command, option: str) -> None:
    code, out, err = command("check", option, ".")
    assert code == 0
    assert (out + err).count("Nothing was checked: no Python file was found.\n") == 1


@pytest.mark.parametrize("option", ["--statistics", "--format=github", "--providers"])
def test_files_that_cannot_be_parsed_are_not_called_checked(
    folder: Path, command: Command, option: str
) -> None:
    """Where there are no others, nothing was checked, and that is not clean."""
    (folder / "broken.py").write_text("def f(:\n")
    for _ in range(2):  # the second time from the cache
        code, out, err = command("check", option, ".")
        assert code == 2
        assert "Nothing was checked: no file could be read.\n" in out + err
        assert "No findings" not in out


@pytest.mark.parametrize("source", [LEAK, "x = 1\n"])
def test_fixes_without_libcst_are_refused_in_one_line(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The exit code is 2, whatever is found; the findings are told all the same."""
    (folder / "app.py").write_text(source)
    monkeypatch.setitem(sys.modules, "libcst", None)
    found = command("check", ".")[1]
    code, out, err = command("check", "--fix", ".")
    assert (code, out) == (2, found)
    assert err == "sessionscope: --fix needs LibCST: pip install 'sessionscope[codemod]'\n"
    assert (folder / "app.py").read_text() == source


def test_files_of_any_kind_are_one_line_each(folder: Path, command: Command) -> None:
    """What cannot be parsed is reported, stops nothing, and makes the exit code 2."""
    (folder / "app.py").write_text(LEAK)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "python2.py").write_text("print 'hello'\n")
    (folder / "null.py").write_bytes(b"x = 1\0\n")
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (folder / "bad_bytes.py").write_bytes(b"name = '\xff\xfe'\n")
    (folder / "unknown.py").write_bytes(b"# coding: martian\nx = 1\n")
    (folder / "bom.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (folder / "utf16.py").write_bytes("x = 1\n".encode("utf-16"))
    (folder / "empty.py").write_bytes(b"")
    (folder / "deep.py").write_text("x = " + "(" * 3000 + ")" * 3000)
    (folder / "chained.py").write_text("x = 1" + " + 1" * 20000)
    code, out, err = command("check", ".")
    lines = out.splitlines()
    assert (code, err) == (2, "")
    assert [line.partition(":")[0] for line in lines if "parsed" in line or "deep" in line] == [
        "bad_bytes.py",
        "broken.py",
        "chained.py",
        "deep.py",
        "null.py",
        "python2.py",
        "unknown.py",
        "utf16.py",
    ]
    assert any("SES102" in line for line in lines)


def test_a_generated_file_of_ten_megabytes_is_checked(folder: Path, command: Command) -> None:
    (folder / "generated.py").write_text(
        "DATABASE = {\n" + '    "key": "value",\n' * 500_000 + "}\n"
    )
    assert command("check", ".")[:2] == (0, "No findings in 1 file.\n")


def test_a_working_directory_that_is_a_package_is_checked(folder: Path, command: Command) -> None:
    """With an ``__init__.py`` of its own, and imports of what is not there."""
    (folder / "__init__.py").write_text("")
    (folder / "database.py").write_text(LEAK)
    (folder / "views.py").write_text(
        "import elsewhere.settings\nfrom database import SessionLocal\n"
        "async def read():\n    elsewhere.settings.load(session)\n"
        "    with SessionLocal() as db:\n        return db.execute('SELECT 1')\n"
    )
    code, out, _ = command("check", ".")
    assert code == 1
    assert "database.py:9:10: SES102" in out
    assert "views.py:6:16: SES205" in out


def test_links_in_circles_are_not_followed(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(LEAK)
    (folder / "self").symlink_to(folder, target_is_directory=True)
    (folder / "again.py").symlink_to(folder / "app.py")
    (folder / "dangling.py").symlink_to(folder / "nowhere.py")
    (folder / "circle.py").symlink_to(folder / "circle.py")
    code, out, _ = command("check", ".")
    assert code == 2
    assert out.count("SES102") == 1
    assert "app.py:9:10: SES102" in out
    assert "dangling.py:1: No such file or directory\n" in out
    assert "circle.py:1: Too many levels of symbolic links\n" in out
    assert command("check", "circle.py")[0] == 2  # by its name


def test_what_cannot_be_checked_is_told_with_the_providers(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(LEAK)
    (folder / "broken.py").write_text("def f(:\n")
    code, out, err = command("check", "--providers", ".", "nowhere.py")
    assert code == 2
    assert "app.py:8: owner leak\n" in out
    assert [line.partition(":")[0] for line in err.splitlines()] == ["nowhere.py", "broken.py"]


def test_what_is_no_file_is_not_waited_for(folder: Path, command: Command) -> None:
    """A pipe called ``x.py`` would never end, nor one behind a link."""
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    (folder / "link.py").symlink_to(folder / "pipe.py")
    assert command("check", ".")[:2] == (0, "Nothing was checked: no Python file was found.\n")


def test_a_pipe_a_device_or_a_socket_by_its_name_is_one_line(
    folder: Path, command: Command
) -> None:
    (folder / "app.py").write_text(LEAK)
    os.mkfifo(folder / "pipe.py")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.py")
        code, out, _ = command("check", "pipe.py", "socket.py", "/dev/zero", "app.py")
    assert code == 2
    assert "SES102" in out
    assert [line for line in out.splitlines() if "neither" in line] == [
        f"{name}:1: is neither a file nor a folder"
        for name in ("pipe.py", "socket.py", "/dev/zero")
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_what_may_not_be_read_is_reported(folder: Path, command: Command) -> None:
    (folder / "closed").mkdir(mode=0)
    (folder / "secret.py").write_text("x = 1\n")
    (folder / "secret.py").chmod(0)
    code, out, _ = command("check", ".")
    assert code == 2
    assert "closed:1: Permission denied\n" in out
    assert "secret.py:1: Permission denied\n" in out


def test_folders_of_other_people_are_left_out(folder: Path, command: Command) -> None:
    for name in ("node_modules", ".hidden", "environment", "build"):
        (folder / name).mkdir()
        (folder / name / "app.py").write_text(LEAK)
    (folder / "environment" / "pyvenv.cfg").write_text("")
    assert command("check", ".")[1].startswith("Nothing was checked")


def test_json_is_the_documented_list(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(LEAK)
    code, out, _ = command("check", "--format", "json", ".")
    (finding,) = json.loads(out)
    message = finding.pop("message")
    assert code == 1
    assert "QueuePool" in message
    assert finding == {
        "path": "app.py",
        "line": 9,
        "column": 10,
        "end_line": 9,
        "code": "SES102",
        "name": "session-not-closed",
        "confidence": "high",
        "evidence": [
            {"path": "app.py", "line": 9, "text": "`db` is made here"},
            {
                "path": "app.py",
                "line": 10,
                "text": "and still open when the function is left here",
            },
        ],
        "fix": {"applicability": "unsafe"},
    }


def test_paths_are_relative_to_the_working_directory(folder: Path, command: Command) -> None:
    (folder / "src").mkdir()
    (folder / "src" / "app.py").write_text(LEAK)
    _, out, _ = command("check", "--format", "json", str(folder / "src"))
    assert [finding["path"] for finding in json.loads(out)] == ["src/app.py"]


def sarif(command: Command, *arguments: str) -> dict[str, Any]:
    _, out, _ = command("check", "--format", "sarif", *arguments)
    document: dict[str, Any] = json.loads(out)
    Draft4Validator(json.loads(SCHEMA.read_text())).validate(document)
    return document


def test_sarif_is_valid_and_carries_everything(folder: Path, command: Command) -> None:
    (folder / "a b.py").write_text(LEAK + "\n# noqa: SES105\n")
    (folder / "info.py").write_text(INFO)
    (folder / "broken.py").write_text("def f(:\n")
    (run,) = sarif(command, ".")["runs"]
    results = run["results"]
    assert [r["ruleId"] for r in results] == ["SES102", "SES100", "SES401"]
    assert [r["level"] for r in results] == ["error", "error", "note"]
    place = results[0]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "a%20b.py"
    assert place["region"] == {"startLine": 9, "startColumn": 10, "endLine": 9}
    (invocation,) = run["invocations"]
    assert invocation["executionSuccessful"] is False
    assert len(invocation["toolExecutionNotifications"]) == 1


def test_sarif_of_nothing_is_valid(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text("x = 1\n")
    assert sarif(command, ".")["runs"][0]["results"] == []


def test_github_annotations_are_one_escaped_line_each(folder: Path, command: Command) -> None:
    (folder / "a,b.py").write_text(LEAK)
    (folder / "info.py").write_text(INFO)
    _, out, _ = command("check", "--format", "github", ".")
    error, notice = out.splitlines()
    assert error.startswith("::error file=a%2Cb.py,line=9,endLine=9,col=10,title=SES102 ")
    assert notice.startswith("::notice file=info.py,line=8,")


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_the_name_of_a_file_may_be_no_text(folder: Path, command: Command) -> None:
    Path(os.fsdecode(bytes(folder) + b"/app\xff.py")).write_text(LEAK)
    location = sarif(command, ".")["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "app%FF.py"


def test_a_terminal_without_unicode_stops_nothing(folder: Path) -> None:
    (folder / "é.py").write_text(LEAK)
    for arguments in (["check", "."], ["check", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "sessionscope", *arguments],
            env={
                "PYTHONPATH": str(Path(_cli.__file__).parents[1]),
                "PYTHONIOENCODING": "ascii",
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == (0 if "--help" in arguments else 1)


def test_statistics_count_per_rule(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(LEAK + LEAK.replace("leak", "second"))
    _, out, _ = command("check", "--statistics", ".")
    assert out == "     2  SES102  session-not-closed\n2 findings in 1 file.\n"


def test_providers_tell_what_is_believed(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(
        LEAK + "\ndef get_db():\n    with SessionLocal() as db:\n        yield db\n"
        "\ndef crud(db=get_db):\n    pass\n"
    )
    assert command("check", "--providers", ".")[1].splitlines() == [
        "app.py:5: sync factory SessionLocal",
        "app.py:8: owner leak",
        "app.py:12: sync provider (generator) get_db",
    ]


def test_the_settings_of_pyproject_apply(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(LEAK)
    settings = folder / "pyproject.toml"
    settings.write_text("[tool.sessionscope.check]\nignore = ['SES102']\n")
    assert command("check", ".")[0] == 0
    settings.write_text("[tool.sessionscope.check]\nexclude = ['app.py']\n")
    assert command("check", ".")[1].startswith("Nothing was checked")
    settings.write_text("[tool.sessionscope.check.per-file-ignores]\n'app.py' = ['SES1']\n")
    assert command("check", ".")[0] == 0
    settings.write_text("[tool.sessionscope.check]\nselect = ['SES2']\n")
    assert command("check", ".")[0] == 0
    assert command("check", "--select", "SES102", ".")[0] == 1


def test_a_family_leaves_out_the_rules_that_are_opt_in() -> None:
    assert "SES106" in Config(select=("SES106",)).codes()
    assert "SES106" in Config(select=("ALL",)).codes()
    assert "SES106" in Config(select=("SES1", "SES106")).codes()
    family = [code for code in RULES if code.startswith("SES1") and code != "SES106"]
    assert Config(select=("SES1",)).codes() == family
    assert "SES106" not in Config().codes()


def test_the_settings_are_those_of_the_path_not_of_the_working_directory(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest pyproject.toml above the path that has any; patterns are relative to it."""
    (folder / "pyproject.toml").write_text(f"{TABLE}ignore = ['SES1']\n")
    shop = folder / "shop"
    (shop / "app" / "jobs").mkdir(parents=True)
    (shop / "app" / "jobs" / "leak.py").write_text(LEAK)
    (shop / "app" / "leak.py").write_text(LEAK)
    assert command("check", "shop")[0] == 0
    (shop / "pyproject.toml").write_text("[project]\nname = 'shop'\n")
    assert command("check", "shop")[0] == 0
    (shop / "pyproject.toml").write_text(
        f"{TABLE}exclude = ['app/jobs']\nper-file-ignores = {{'app/leak.py' = ['SES105']}}\n"
    )
    assert command("check", "shop")[1].endswith("1 finding in 1 file.\n")
    assert command("check", "shop/app/leak.py")[0] == 1
    monkeypatch.chdir(shop / "app")
    code, out, err = command("check", ".")
    assert (code, err) == (1, "")
    assert out.startswith("leak.py:9:10: SES102")
    (shop / "pyproject.toml").write_text(
        f"{TABLE}per-file-ignores = {{'app/leak.py' = ['SES102'], 'app/jobs' = ['SES102']}}\n"
    )
    assert command("check", ".")[0] == 0


def test_projects_are_checked_each_by_itself_and_that_is_told(
    folder: Path, command: Command
) -> None:
    """What one ignores fails in the other, nothing is found twice, and JSON stays JSON."""
    for name, ignored in (("bank", "SES102"), ("shop", "SES105")):
        (folder / name).mkdir()
        (folder / name / "pyproject.toml").write_text(f"{TABLE}ignore = ['{ignored}']\n")
        (folder / name / "leak.py").write_text(LEAK)
    (folder / "script.py").write_text(LEAK)
    code, out, err = command("check", "--format", "json", ".", "bank", "shop")
    assert code == 1
    assert [finding["path"] for finding in json.loads(out)] == ["script.py", "shop/leak.py"]
    assert err == (
        "sessionscope: 3 projects, each checked by itself, with the settings of "
        "bank/pyproject.toml, shop/pyproject.toml, the defaults\n"
    )
    code, out, err = command("check", "--ignore", "SES1", "bank", "shop")
    assert (code, out) == (0, "No findings in 2 files.\n")
    _, out, _ = command("check", "--providers", "bank", "shop")
    assert [line.partition(":")[0] for line in out.splitlines() if "owner" in line] == [
        "bank/leak.py",
        "shop/leak.py",
    ]
    assert command("check", "bank") == (0, "No findings in 1 file.\n", "")


def test_two_paths_of_one_project_are_checked_together(folder: Path, command: Command) -> None:
    (folder / "pyproject.toml").write_text(TABLE)
    (folder / "app").mkdir()
    (folder / "database.py").write_text(LEAK)
    (folder / "app" / "views.py").write_text(
        "from database import SessionLocal\n"
        "async def read():\n    with SessionLocal() as db:\n        return db.execute('SELECT 1')\n"
    )
    code, out, err = command("check", "--select", "SES205", "app", "database.py")
    assert (code, err) == (1, "")
    assert out.startswith("app/views.py:4:16: SES205")


@pytest.mark.parametrize(
    "settings",
    [
        "colour = 'red'",
        "folder = 'app'",
        "ignore = 'SES102'",
        "ignore = ['SES999']",
        "confidence = 'great'",
        "x =",
        "exclude = ['']",
        "exclude = ['/']",
        "blocking-calls = ['']",
        "per-file-ignores = ['SES102']",
        "per-file-ignores = {'' = ['SES102']}",
        "per-file-ignores = {'app.py' = ['SES999']}",
    ],
)
def test_settings_that_mean_nothing_are_refused(
    folder: Path, command: Command, settings: str
) -> None:
    (folder / "app.py").write_text(LEAK)
    (folder / "pyproject.toml").write_text(f"[tool.sessionscope.check]\n{settings}\n")
    code, _, err = command("check", ".")
    assert code == 2
    assert err.startswith(f"sessionscope: {folder / 'pyproject.toml'}: ")


def test_the_settings_of_the_guide_are_known(folder: Path, command: Command) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "check-sources.md").read_text()
    shown = guide.partition("```toml\n")[2].partition("```")[0]
    assert [line.split(" = ")[0] for line in shown.splitlines()[1:]] == [
        field.name.replace("_", "-") for field in fields(Config) if field.name != "folder"
    ]
    (folder / "pyproject.toml").write_text(shown)
    (folder / "app.py").write_text(LEAK)
    assert command("check", ".")[0] == 1


def test_confidence_is_how_sure_a_finding_must_be(folder: Path, command: Command) -> None:
    (folder / "app.py").write_text(
        LEAK.replace("    return db.execute", "    db.execute") + "    db.close()\n"
    )
    assert command("check", ".")[0] == 1
    assert command("check", "--confidence", "high", ".")[0] == 0


def test_a_noqa_stays_in_use_where_a_run_is_stricter(folder: Path, command: Command) -> None:
    """Deleted on the word of ``--confidence high``, it would be missed by the next run."""
    (folder / "app.py").write_text(
        LEAK.replace("    return db.execute", "    db.execute").replace(
            "db = SessionLocal()", "db = SessionLocal()  # noqa: SES102"
        )
        + "    db.close()\n"
    )
    assert command("check", ".")[:2] == (0, "No findings in 1 file.\n")
    assert command("check", "--confidence", "high", ".")[:2] == (0, "No findings in 1 file.\n")


def test_a_blanket_noqa_suppresses_and_an_unused_one_is_found(
    folder: Path, command: Command
) -> None:
    line = "db = SessionLocal()"
    (folder / "app.py").write_text(LEAK.replace(line, f"{line}  # noqa"))
    assert command("check", ".")[0] == 0
    (folder / "app.py").write_text(LEAK.replace(line, f"{line}  # noqa: E501, SES102"))
    assert command("check", ".")[0] == 0
    (folder / "app.py").write_text(
        LEAK.replace(line, f"{line}  # noqa: SES102, SES105") + 'text = "# noqa: SES102"\n'
    )
    code, out, _ = command("check", ".")
    assert code == 1
    assert out.startswith("app.py:9:26: SES100 `# noqa: SES105` suppresses nothing here")
    assert out.endswith("1 finding in 1 file.\n")
    assert command("check", "--ignore", "SES100", ".")[0] == 0


def test_the_cache_answers_until_a_file_changes(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "app.py").write_text(LEAK)
    first = command("check", ".")
    monkeypatch.setattr("sessionscope.check._run.run", None)  # the cache alone can answer
    assert command("check", ".") == first
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    (folder / "app.py").write_text("x = 1\n")
    assert command("check", ".")[0] == 0


@pytest.mark.parametrize(
    "spoilt",
    [
        "{",
        "[]",
        "{}",
        '{"findings": ["a"], "problems": [], "files": 1, "lines": 1}',
        '{"findings": [{"path": "a"}], "problems": [], "files": 1, "lines": 1}',
        '{"findings": [], "problems": ["a"], "files": 1, "lines": 1}',
        "[" * 200_000,
        "\0",
    ],
)
def test_a_spoilt_or_forbidden_cache_is_done_without(
    folder: Path, command: Command, spoilt: str
) -> None:
    (folder / "app.py").write_text(LEAK)
    command("check", ".")
    (entry,) = (folder / ".sessionscope_cache").glob("*.json")
    entry.write_text(spoilt)
    assert command("check", ".")[0] == 1
    (folder / "other").mkdir()
    assert not list((folder / "other").glob("*"))
    assert command("check", "--no-cache", ".")[0] == 1


def test_a_cache_that_cannot_be_written_changes_nothing(folder: Path, command: Command) -> None:
    (folder / ".sessionscope_cache").write_text("a file is in the way")
    (folder / "app.py").write_text(LEAK)
    assert command("check", ".")[0] == 1


def test_rules_lists_and_explain_shows_the_page(command: Command) -> None:
    code, out, _ = command("rules")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(RULES)
    code, out, _ = command("explain", "ses105")
    assert code == 0
    assert out.startswith("# SES105 provider-driven-by-hand\n")
    assert "## Use instead" in out
    assert command("explain", "SES100")[:2] == (0, f"{UNUSED_NOQA_PAGE}\n")


@pytest.mark.parametrize("arguments", ["check app.py", "rules", "explain SES101"])
def test_the_checker_loads_nothing_but_the_standard_library(folder: Path, arguments: str) -> None:
    """Neither SQLAlchemy, nor LibCST, nor a framework: in a fresh interpreter."""
    (folder / "app.py").write_text(LEAK)
    done = fresh(arguments)
    loaded = {name.partition(".")[0] for name in eval(done.stderr)}
    assert loaded - sys.stdlib_module_names - {"__main__"} == {"sessionscope"}
    assert "sessionscope._unit" not in eval(done.stderr)


def test_a_run_from_the_cache_loads_no_rule(folder: Path) -> None:
    """Nor the walk: the time of such a run is that of its imports."""
    (folder / "app.py").write_text(LEAK)
    first, done = fresh("check app.py"), fresh("check app.py")
    assert done.stdout == first.stdout
    loaded = eval(done.stderr)
    assert "sessionscope.check._cache" in loaded
    heavy = {"_walk", "_model", "_run", "_rules", "_sarif"}
    assert not {f"sessionscope.check.{name}" for name in heavy} & set(loaded)
    assert "importlib.metadata" not in loaded


def fresh(arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an interpreter of its own, which tells what it has loaded."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(_cli.__file__).parents[1])!r})\n"
        "from sessionscope._cli import main\n"
        f"main({arguments.split()!r})\n"
        "print(sorted(sys.modules), file=sys.stderr)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True)
