"""The corners of `make test-all`: each Python with each SQLAlchemy, no extras, wheel, sdist.

One corner alone: make test-all ARGS="-s 'tests-3.13(2.0.44)'"; what follows `--` goes to pytest.
uv makes the environments where it is there; ARGS="-db virtualenv" does without it.
"""

import atexit
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Timer
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).parent
PINS = ROOT / "requirements" / "test.txt"
# What this run makes beside its environments; it goes with the run.
folder_of_results = tempfile.TemporaryDirectory(prefix="sessionscope-corners-")
RESULTS = Path(folder_of_results.name)
REPORT = RESULTS / "nox.json"

PYTHONS = ["3.11", "3.12", "3.13"]
SQLALCHEMYS = [
    nox.param("==2.0.44", id="2.0.44"),
    nox.param(">=2.0,<2.1", id="2.0"),
    nox.param(">=2.1,<2.2", id="2.1"),
]
# Our own make must not hand its options on, nor a developer's database its rows.
CLEAN = {"DATABASE_URL": None, "MAKEFLAGS": None, "MAKELEVEL": None, "PYTHONPATH": None}
PATIENCE = 60.0

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.envdir = ".venv/corners"
nox.options.error_on_missing_interpreters = os.environ.get("CI") == "true"
nox.options.report = str(REPORT)

# What ran in each corner, by the name of its session.
versions: dict[str, str] = {}


@nox.session(python=PYTHONS)
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run all tests from src, with the pins of `make test` except SQLAlchemy's."""
    pins = RESULTS / "pins.txt"
    pins.write_text(without_sqlalchemy(PINS.read_text(encoding="utf-8")), encoding="utf-8")
    session.install("--require-hashes", "--no-deps", "-r", str(pins))
    session.install(f"SQLAlchemy{sqlalchemy}")
    check_requirements(session)
    see_src(session)
    run_tests(session)


@nox.session(python=PYTHONS)
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def bare(session: nox.Session, sqlalchemy: str) -> None:
    """Use the wheel with SQLAlchemy and no extra."""
    _, wheel = build()
    session.install(str(wheel), f"SQLAlchemy{sqlalchemy}")
    note_versions(session)
    with fresh_folder() as folder, session.chdir(folder):
        session.run("python", "-I", "-W", "error", str(ROOT / "tests" / "without_extras.py"))


@nox.session(python=PYTHONS[-1])
def wheel(session: nox.Session) -> None:
    """Run all tests on the installed wheel, where src cannot be imported."""
    sdist, wheel = build()
    session.install("--require-hashes", "--no-deps", "-r", str(PINS))
    session.install("--no-deps", str(wheel))
    check_requirements(session)
    with unpacked(session, sdist) as folder, session.chdir(folder):
        # Not a package any more, src loses to the installed one wherever a test looks for it.
        Path("src/sessionscope/__init__.py").unlink()
        run_tests(session, "--override-ini=pythonpath=examples .")


@nox.session(python=PYTHONS[0])
def sdist(session: nox.Session) -> None:
    """Run `make test` and `make demo` in the unpacked sdist, for a user with an empty home."""
    python = session.run("python", "-c", "import sys; print(sys._base_executable)", silent=True)
    with unpacked(session, build()[0]) as folder, fresh_folder() as home, session.chdir(folder):
        env = {**CLEAN, "HOME": str(home), "PYTHON": str(python).strip()}
        session.run("make", ".venv/test/ready", ".venv/demo/ready", env=env, external=True)
        note_versions(session, ".venv/test/bin/python")
        options = shlex.join([f"--junitxml={results_of(session)}", *session.posargs])
        session.run("make", "test", f"ARGS={options}", env=env, external=True)
        visit_the_demo({**os.environ, **env})


def switch_on_pyenv() -> None:
    """Let pyenv's python3.12 answer even where it is not the version in use."""
    if "PYENV_VERSION" in os.environ or not shutil.which("pyenv"):
        return
    command = ["pyenv", "versions", "--bare", "--skip-aliases"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    names = [name for name in run.stdout.split() if name.rpartition(".")[0] in PYTHONS]
    if names:
        os.environ["PYENV_VERSION"] = ":".join(names)


def without_sqlalchemy(pins: str) -> str:
    """Return the requirements file *pins* without its entry for SQLAlchemy."""
    kept, count = re.subn(r"(?m)^sqlalchemy==.*\n(?:[ \t].*\n)*", "", pins)
    assert count == 1
    return kept


def check_requirements(session: nox.Session) -> None:
    """Fail if a package does not work with the SQLAlchemy that was put beside it."""
    if session.venv_backend == "uv":
        session.run("uv", "pip", "check", external=True)
    else:
        session.run("python", "-m", "pip", "check")


def see_src(session: nox.Session) -> None:
    """Let every interpreter of this environment import src, as `make test` does."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = session.run("python", "-c", ask, silent=True)
    path = Path(str(packages).strip(), "sessionscope.pth")
    path.write_text(f"{ROOT / 'src'}\n", encoding="utf-8")


def run_tests(session: nox.Session, *options: str) -> None:
    """Run pytest in the folder where *session* is, and keep its numbers for the table."""
    note_versions(session)
    junit = f"--junitxml={results_of(session)}"
    session.run("python", "-m", "pytest", junit, *options, *session.posargs, env=CLEAN)


def note_versions(session: nox.Session, python: str = "python") -> None:
    """Keep for the table which versions *python* has."""
    ask = "import platform, sqlalchemy as s; print(platform.python_version(), '|', s.__version__)"
    said = session.run(python, "-c", ask, silent=True, external=True, env=CLEAN)
    versions[session.name] = str(said).strip()


def results_of(session: nox.Session) -> Path:
    """Return the file for pytest's numbers."""
    return RESULTS / f"{session.name}.xml"


@cache
def build() -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; return their paths."""
    target = RESULTS / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    subprocess.run([*command, str(ROOT)], check=True)
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return sdist, wheel


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """Make a folder outside of every repository, and remove it in the end."""
    with tempfile.TemporaryDirectory(prefix="sessionscope-") as folder:
        yield Path(folder).resolve()


@contextmanager
def unpacked(session: nox.Session, sdist: Path) -> Iterator[Path]:
    """Unpack *sdist* into a fresh folder."""
    with fresh_folder() as folder:
        session.run(
            "tar", "-xzf", str(sdist), "-C", str(folder), "--strip-components=1", external=True
        )
        yield folder


def visit_the_demo(env: dict[str, str | None]) -> None:
    """Start `make demo` on a free port, load its page, and stop it as Ctrl-C would."""
    process = subprocess.Popen(
        ["make", "demo"],
        env={**{k: v for k, v in env.items() if v is not None}, "PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # Whatever hangs, the page or the shutdown, ends here.
    alarm = Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    try:
        with process:
            page = load(address_told(process))
            os.killpg(process.pid, signal.SIGINT)
            farewell, _ = process.communicate()
    finally:
        alarm.cancel()
    assert "<html" in page
    assert "The shop is closed." in farewell


def address_told(process: subprocess.Popen[str]) -> str:
    """Return the address that `make demo` prints when it is open."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if match := re.search(r"The shop is open: (\S+)", line):
            return match[1]
    raise RuntimeError(f"make demo ended without an address:\n{said}")


def load(address: str) -> str:
    """Return the page at *address*."""
    with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


@atexit.register
def print_table() -> None:
    """Print every corner of this run with its result and its duration."""
    if not REPORT.exists():
        return
    corners = json.loads(REPORT.read_text(encoding="utf-8"))["sessions"]
    print("\n| corner | Python | SQLAlchemy | result | passed | skipped | seconds |")
    print("|---|---|---|---|--:|--:|--:|")
    for corner in corners:
        name = corner["signatures"][0]
        passed, skipped = numbers(RESULTS / f"{name}.xml")
        seen = versions.get(name, " | ")
        seconds = f"{corner['duration']:.0f}"
        print(f"| {name} | {seen} | {corner['result']} | {passed} | {skipped} | {seconds} |")
    total = sum(corner["duration"] for corner in corners)
    print(f"\ncorners: {len(corners)}, seconds: {total:.0f}")


def numbers(junit: Path) -> tuple[str, str]:
    """Return how many tests passed and how many were skipped, as far as any ran."""
    if not junit.exists():
        return "", ""
    suite = ElementTree.parse(junit).getroot()[0]
    names = ("tests", "skipped", "failures", "errors")
    ran, skipped, failures, errors = (int(suite.attrib[name]) for name in names)
    return str(ran - skipped - failures - errors), str(skipped)


switch_on_pyenv()
