"""The command init: what it writes works as it was written, and it overwrites nothing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from socket import create_server

import pytest

import sessionscope
from sessionscope._cli import main
from tests.plugin import PLUGIN

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sessionscope.__file__).parent
TEMPLATES = PACKAGE / "_templates"
GUIDE = ROOT / "docs" / "how-to" / "start-with-init.md"
KINDS = ["sync", "async"]
NOBODY = "postgresql://nobody:secret@127.0.0.1:1/nothing"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of project in turn."""
    return str(request.param)


@pytest.fixture
def project(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A project that was written a moment ago."""
    folder = tmp_path / "project"
    assert main(["init", str(folder), f"--{kind}"]) == 0
    capsys.readouterr()
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the files below *folder*, but for those of a cache of ruff's or Python's."""
    caches = {".ruff_cache", "__pycache__"}
    paths = [p for p in folder.rglob("*") if p.is_file() and not caches & {*p.parts}]
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in paths}


def run(
    folder: Path, *command: str, database_url: str | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python as the user would in the project's environment, and look at the exit code."""
    kept = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    given = {} if database_url is None else {"DATABASE_URL": database_url}
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**kept, **given, "PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished


def run_pytest(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run the project's tests, on an application whose own database cannot be reached."""
    plugins = (*PLUGIN, "-p", "no:asyncio", "-p", "no:cacheprovider")
    command = ("-m", "pytest", "-q", *plugins, *arguments)
    return run(folder, *command, database_url=NOBODY, code=code).stdout


def url_for(kind: str, url: str) -> str:
    """Return *url* with the driver of that kind of project; psycopg is both."""
    return url.replace("sqlite:", "sqlite+aiosqlite:") if kind == "async" else url


# What is written.


def test_its_own_tests_pass_on_sqlite_and_postgresql(project: Path) -> None:
    """The database of the application is never touched by them."""
    printed = run_pytest(project, "-vv")
    assert re.search(r"\b18 passed", printed), printed
    assert printed.count("[sqlite") == printed.count("[postgresql") == 9
    assert not (project / "app.db").exists()


USE = """
import sys
from alembic.config import main as alembic
from fastapi.testclient import TestClient
for command in sys.argv[1:]:
    alembic(["--config", {ini!r}, *command.split()])
from app.main import app
with TestClient(app) as client:
    print(client.post("/items/", json={{"name": "pear"}}).json())
    print(client.get("/items/").json(), client.get("/health").json())
"""
USED = "{'id': 1, 'name': 'pear'}\n[{'id': 1, 'name': 'pear'}] {'status': 'ok'}\n"


@pytest.mark.parametrize("url", ["sqlite-file", "postgres"], indirect=True)
def test_alembic_and_the_application_use_the_same_database(
    project: Path, kind: str, url: str
) -> None:
    """What goes up comes down, and leaves nothing to be migrated."""
    commands = ("upgrade head", "downgrade base", "upgrade head", "check")
    use = USE.format(ini="alembic.ini")
    printed = run(project, "-c", use, *commands, database_url=url_for(kind, url)).stdout
    assert printed == f"No new upgrade operations detected.\n{USED}"
    assert not (project / "app.db").exists()


def test_without_a_url_the_database_is_beside_the_application(
    project: Path, tmp_path: Path
) -> None:
    """Wherever the command is given."""
    use = USE.format(ini=str(project / "alembic.ini"))
    assert run(tmp_path, "-c", use, "upgrade head").stdout == USED
    assert (project / "app.db").is_file()


def test_the_sql_can_be_printed_without_a_database(project: Path) -> None:
    """For those who are not let near the server."""
    command = ("-m", "alembic", "upgrade", "head", "--sql")
    assert "CREATE TABLE items" in run(project, *command, database_url=NOBODY).stdout


PARTS = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    parts = op.create_table(
        "parts", sa.Column("item_id", sa.Integer, sa.ForeignKey("items.id", ondelete="CASCADE"))
    )
    op.execute("INSERT INTO items (id, name) VALUES (1, 'pear')")
    op.bulk_insert(parts, [{"item_id": 1}])
"""
LONGER = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0003", "0002"
def upgrade():
    with op.batch_alter_table("items") as batch:
        batch.alter_column("name", type_=sa.String(200))
"""
ORPHANS = """
from alembic import op
revision, down_revision = "0004", "0003"
def upgrade():
    op.execute("DELETE FROM items")
"""


def test_changing_a_table_of_sqlite_keeps_what_refers_to_it(
    project: Path, kind: str, sqlite_url: str
) -> None:
    """Dropping the old table would delete those rows; and a migration leaves no orphans."""
    for name, text in {"0002": PARTS, "0003": LONGER, "0004": ORPHANS}.items():
        (project / "migrations" / "versions" / f"{name}.py").write_text(text, "utf-8")
    url = url_for(kind, sqlite_url)
    alembic = ("-m", "alembic", "upgrade")
    run(project, *alembic, "0003", database_url=url)
    failed = run(project, *alembic, "head", database_url=url, code=1)
    assert "these rows would refer to rows that are not there: [('parts', 1" in failed.stderr
    count = (
        "from sessionscope import Database; import sqlalchemy as sa, sys\n"
        "with Database(sys.argv[1]).begin(read_only=True) as session:\n"
        "    print(*session.scalars(sa.text('SELECT item_id FROM parts')))\n"
        "    print(*session.scalars(sa.text('SELECT name FROM items')))\n"
    )
    assert run(project, "-c", count, sqlite_url).stdout == "1\npear\n"


def test_models_that_no_migration_makes_fail_the_tests(project: Path) -> None:
    """The first thing that a user changes."""
    models = project / "app" / "models.py"
    models.write_text(models.read_text("utf-8") + "    price: Mapped[int]\n", "utf-8")
    printed = run_pytest(project, "-k", "agree", code=1)
    assert "add_column" in printed
    assert "2 failed" in printed


def test_the_checker_finds_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every rule, at any confidence."""
    options = ["--no-cache", "--confidence", "low"]
    assert main(["check", *options, str(project)]) == 0
    assert capsys.readouterr().out.startswith("No findings in 12 files")


LINTED = pytest.mark.skipif(
    not (find_spec("ruff") and find_spec("mypy")), reason="is run by `make lint`"
)


@LINTED
def test_its_style_and_types_are_clean(project: Path) -> None:
    """As its own settings have it."""
    run(project, "-m", "ruff", "check", ".")
    run(project, "-m", "ruff", "format", "--check", ".")
    run(project, "-m", "mypy", "--cache-dir", os.devnull)


@LINTED
def test_the_style_of_a_migration_that_alembic_writes_is_clean(project: Path) -> None:
    """And it makes what the models have."""
    models = project / "app" / "models.py"
    models.write_text(models.read_text("utf-8") + "    price: Mapped[int | None]\n", "utf-8")
    commands = ["upgrade head", "revision --autogenerate -m Prices", "upgrade head", "check"]
    use = f"from alembic.config import main\nfor each in {commands}: main(each.split())"
    assert "No new upgrade operations detected." in run(project, "-c", use).stdout
    run(project, "-m", "ruff", "check", ".")
    run(project, "-m", "ruff", "format", "--check", ".")
    assert "add_column" in "".join(contents(project / "migrations").values())


def test_the_kinds_of_project_differ_where_they_must() -> None:
    """The files of `--async` lie over those of `--sync`: one that is the same is not there."""
    sync, asynchronous = contents(TEMPLATES / "sync"), contents(TEMPLATES / "async")
    assert [name for name in asynchronous if asynchronous[name] == sync[name]] == []
    settings = [tomllib.loads(each["pyproject.toml"]) for each in (sync, asynchronous)]
    dependencies = [set(each["project"].pop("dependencies")) for each in settings]
    assert settings[0] == settings[1]
    assert dependencies[1] - dependencies[0] == {
        "aiosqlite>=0.20",
        "sessionscope[asyncio,fastapi,postgresql]",
    }


def test_the_guide_shows_what_is_written() -> None:
    """Every file has its line in the page, and every line its file."""
    listed = re.findall(r"^([\w./]+) {2,}\S", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(contents(TEMPLATES / "sync"))


# Where it is written.


def test_a_new_repository_keeps_its_own_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a hoster puts there is not touched; the project is written beside it."""
    monkeypatch.chdir(tmp_path)
    own = {".git/HEAD": "ref", ".gitignore": "*.pyc", "LICENSE": "MIT", "README.md": "# mine"}
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    assert main(["init"]) == 0
    printed = capsys.readouterr().out
    assert "Kept what was there: .gitignore, README.md." in printed
    assert "Add to it: /.venv/ and *.db" in printed
    after = contents(tmp_path)
    assert {name: after[name] for name in own} == own
    assert set(after) == {*contents(TEMPLATES / "sync"), *own}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("app/main.py", "app/main.py is there already"),
        ("app", "app is there already"),
        ("tests/conftest.py", "tests/conftest.py is there already"),
        ("Makefile", "Makefile is there already"),
    ],
)
def test_a_file_that_is_there_is_named_and_nothing_is_written(
    there: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All or nothing."""
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine", "utf-8")
    assert main(["init", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert f"{tmp_path}/{named}" in said.err
    assert "sessionscope init DIR" in said.err
    assert contents(tmp_path) == {there: "mine"}


def test_a_folder_that_alembic_would_misread_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "50%(off)s")]) == 1
    assert "has a % in it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_next_steps_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a shelf's"
    assert main(["init", str(folder)]) == 0
    assert f"  cd {shlex.quote(str(folder))}\n" in capsys.readouterr().out


def test_a_second_init_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the number of files that would be lost."""
    before = contents(project)
    assert main(["init", str(project), "--async"]) == 1
    assert re.search(r"Makefile and \d\d more is there already", capsys.readouterr().err)
    assert contents(project) == before


def test_a_file_in_the_place_of_the_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And left as it is."""
    (tmp_path / "x").write_text("mine", "utf-8")
    assert main(["init", str(tmp_path / "x")]) == 1
    assert f"{tmp_path}/x is there already" in capsys.readouterr().err


def test_a_link_that_leads_nowhere_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To write through it would make a file that nobody named."""
    (tmp_path / "Makefile").symlink_to(tmp_path / "elsewhere")
    assert main(["init", str(tmp_path)]) == 1
    assert "Makefile is there already" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


@pytest.fixture
def nobody() -> Iterator[None]:
    """Where the tests are root's, who may write everywhere, they are nobody's for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        if not os.access(TEMPLATES / "sync", os.R_OK, effective_ids=True):
            pytest.skip("nobody may read this checkout")
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nobody: None
) -> None:
    """With the system's reason, and the mend."""
    if os.geteuid() != 65534:
        tmp_path.chmod(0o500)
    assert main(["init", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written (permission denied), and nothing was: name a folder" in said


def test_what_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """A full disk, here a limit on the size of a file."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); "
        "from sessionscope._cli import main; sys.exit(main(['init', 'new/project']))"
    )
    failed = run(tmp_path, "-c", limited, code=1)
    assert "cannot be written (file too large), and nothing was" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--tortoise"], ["--sync", "--async"], ["x", "y"]])
def test_an_option_that_cannot_be_is_a_usage_error(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As argparse has it: exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["init", *options])
    assert list(tmp_path.iterdir()) == []


def test_it_needs_nothing_but_python(tmp_path: Path) -> None:
    """Neither SQLAlchemy nor an extra is loaded."""
    loaded = (
        "import sys; from sessionscope._cli import main; assert main(['init']) == 0; "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    modules = set(run(tmp_path, "-S", "-c", loaded).stdout.split())
    assert "sessionscope" in modules
    assert not modules & {"sqlalchemy", "fastapi", "alembic", "pytest"}


# Where sessionscope comes from.


def requirements(folder: Path) -> list[str]:
    """Return how the project asks for sessionscope."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [each for each in wanted if each.startswith("sessionscope")]


def test_from_a_checkout(tmp_path: Path) -> None:
    """As a direct reference, which pip and uv both read."""
    assert main(["init", str(tmp_path / "x"), "--from", str(ROOT)]) == 0
    assert requirements(tmp_path / "x") == [
        f"sessionscope[fastapi,postgresql] @ {ROOT.as_uri()}",
        f"sessionscope[testing] @ {ROOT.as_uri()}",
    ]


def test_from_a_wheel_whose_path_has_a_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are written whole."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'my "wheels"'
    folder.mkdir()
    wheel = Path(shutil.make_archive(str(folder / "w"), "zip", TEMPLATES / "async"))
    wheel.rename(folder / "sessionscope-0.1.0-py3-none-any.whl")
    assert main(["init", "x", "--from", f"{folder.name}/sessionscope-0.1.0-py3-none-any.whl"]) == 0
    url = f"{tmp_path.as_uri()}/my%20%22wheels%22/sessionscope-0.1.0-py3-none-any.whl"
    assert requirements(tmp_path / "x")[0].endswith(f" @ {url}")


def test_from_an_sdist(tmp_path: Path) -> None:
    """The other thing that `python -m build` makes."""
    base = tmp_path / "sessionscope-0.1.0"
    sdist = shutil.make_archive(str(base), "gztar", TEMPLATES / "async")
    assert main(["init", str(tmp_path / "x"), "--from", sdist]) == 0
    assert requirements(tmp_path / "x")[1] == f"sessionscope[testing] @ {Path(sdist).as_uri()}"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing", None, "missing is not there"),
        ("sessionscope-0.1.0.zip", "zip", "sessionscope-0.1.0.zip is none"),
        ("sessionscope-0.1.0-py3-none-any.whl", "no archive", "any.whl is none"),
        ("sessionscope-0.1.0.tar.gz", "no archive", "tar.gz is none"),
        ("pyproject.toml", '[project]\nname = "sessionscope"', "pyproject.toml is none"),
        ("other/pyproject.toml", '[project]\nname = "other"', "other is none"),
        ("other/pyproject.toml", "[[[", "other is none"),
        ("other/pyproject.toml", "project = 1", "other is none"),
    ],
)
def test_what_is_no_package_is_one_line_and_exit_code_2(
    name: str, text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    path = tmp_path / name
    if text is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    source = path.parent if "/" in name else path
    assert main(["init", str(tmp_path / "x"), "--from", str(source)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert "name a wheel (sessionscope-….whl), an sdist" in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("origin", "written"),
    [
        (None, ""),
        ({"url": "file:///srv/s.whl", "archive_info": {}}, " @ file:///srv/s.whl"),
        (
            {"url": "https://example.org/s", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
            " @ git+https://example.org/s@12ab",
        ),
    ],
)
def test_without_from_it_is_where_this_one_came_from(
    origin: Mapping[str, object] | None,
    written: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An installer writes that down (PEP 610), unless it was a package index."""
    record = tmp_path / "sessionscope-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sessionscope\n", "utf-8")
    if origin is not None:
        (record / "direct_url.json").write_text(json.dumps(origin), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["init", str(tmp_path / "x")]) == 0
    assert requirements(tmp_path / "x") == [
        f"sessionscope[fastapi,postgresql]{written}",
        f"sessionscope[testing]{written}",
    ]


@pytest.mark.skipif(PACKAGE.parent.name != "src", reason="sessionscope is installed")
def test_from_a_checkout_that_is_not_installed_it_is_that_checkout(project: Path) -> None:
    """`python -m sessionscope init` in a clone."""
    assert requirements(project)[1] == f"sessionscope[testing] @ {ROOT.as_uri()}"


# The whole way, in environments of their own: `make init-test`.


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    if shutil.which("uv"):
        command = ["uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT)]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        command += ["--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@contextmanager
def running(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Serve as `make run` does, and end it as Ctrl-C would; yield the address."""
    with create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    process = subprocess.Popen(
        ["make", "run", f"PORT={port}"], cwd=folder, env=environment, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=30)


def answer(address: str, patience: float = 300.0) -> str:
    """Return what is at *address* as soon as somebody answers there."""
    end = time.monotonic() + patience
    while True:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5) as response:
            return str(response.read().decode())
        assert time.monotonic() < end, f"nobody answers at {address}"
        time.sleep(0.05)


@pytest.mark.skipif("INIT_TEST" not in os.environ, reason="takes minutes: make init-test")
@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_from_init_to_a_running_application(
    kind: str, installer: str, wheel: Path, tmp_path: Path
) -> None:
    """In a fresh environment: the seconds are printed, and `make test` and `make lint` pass."""
    if installer == "uv" and not shutil.which("uv"):
        pytest.skip("uv is not installed")
    unwanted = {"DATABASE_URL", "PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    if installer == "pip":
        folders = environment["PATH"].split(os.pathsep)
        without = [folder for folder in folders if not Path(folder, "uv").exists()]
        environment["PATH"] = os.pathsep.join(without)
    begun = time.perf_counter()
    run(tmp_path, "-m", "sessionscope", "init", "x", f"--{kind}", "--from", str(wheel))
    with running(tmp_path / "x", environment) as address:
        assert answer(f"{address}/health") == '{"status":"ok"}'
        assert answer(f"{address}/items/") == "[]"
        seconds = time.perf_counter() - begun
    for target in ("test", "lint"):
        subprocess.run(["make", target], cwd=tmp_path / "x", env=environment, check=True)
    whole = time.perf_counter() - begun
    print(f"\n{kind}, {installer}: {seconds:.1f} s from init to a running app, {whole:.1f} s with")
    print("make test and make lint")
