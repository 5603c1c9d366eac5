"""SQLAlchemy's own tests of sessions and transactions, run with our guards and listeners.

They are no part of what SQLAlchemy installs: its source distribution is downloaded once, and
unpacked in the user's cache. Its tests run in a process of their own, in which this module is a
pytest plugin that does to every Session and to every Engine what a Database does to its own.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import sqlalchemy
from sqlalchemy import Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Session, sessionmaker

from sessionscope import _guards
from sessionscope._commit import verify_commits
from sessionscope._identity import let_ride
from sessionscope._liveness import keep_alive
from sessionscope._mysql import limit_statements
from sessionscope._places import caller
from sessionscope._watch import UNIT

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("sqlalchemy_expected.txt")

# What the tests of the asyncio extension need: sessions that tasks use.
_ASYNC = "SQLALCHEMY_SUITE_ASYNC"
_PATIENCE = 1200.0

# Tests for each backend are classes of their own, named after it and its version.
_BACKEND = re.compile(r"_(?:postgresql|sqlite|mysql|mariadb)[+_][^:.]*?(?=::|$)")


class NotThere(Exception):
    """SQLAlchemy's source distribution cannot be had."""


def pytest_configure() -> None:
    """Guard all sessions and all engines of this process."""
    is_async = os.environ.get(_ASYNC) == "1"
    factory = sessionmaker()
    factory.class_ = Session  # in place of a class of its own, so that no session is left out
    _guards.guard(factory, _ignore, is_async=is_async)
    _make_units_of(Session, is_async=is_async)
    DefaultDialect.engine_created = classmethod(_engine_created)  # type: ignore[method-assign, assignment]  # its hook


def _make_units_of(session_class: type[Session], *, is_async: bool) -> None:
    """Let each session be that of a unit of work, as begin() makes it.

    But for SQLAlchemy's own close_resets_only=False: many of its tests go on with a session
    that they have closed, and would end there.
    """
    make: Any = session_class.__init__

    def init(self: Session, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.info[UNIT] = _guards.Scope(
            session_class,
            caller(0),
            is_async=is_async,
            read_only=False,
            autocommit=False,
            independent=False,
        )

    session_class.__init__ = init  # type: ignore[method-assign]  # as ours does


def _engine_created(dialect_class: object, engine: Engine) -> None:
    if "do_commit" in vars(engine.dialect):  # for mariadb:// it is called twice
        return
    verify_commits(engine, "Database('of the tests')", _ignore, None)
    if engine.dialect.name != "sqlite":
        keep_alive(engine)
        let_ride(engine)
        limit_statements(engine)


def _ignore(told: object) -> None:
    pass


def source() -> Path:
    """Return the folder with the source distribution of the SQLAlchemy that is installed.

    Downloaded at the first call. Raises NotThere.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sessionscope"
    folder = cache / f"sqlalchemy-{version('sqlalchemy')}"
    if not (folder / "test" / "conftest.py").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            unpacked = _unpacked(_downloaded(Path(temporary)), Path(temporary) / "unpacked")
            shutil.rmtree(folder, ignore_errors=True)
            unpacked.rename(folder)
    return folder


def _downloaded(folder: Path) -> Path:
    wanted = f"sqlalchemy=={version('sqlalchemy')}"
    problems = []
    for pip in _pips():
        command = [*pip, "download", "--quiet", "--no-deps", "--no-binary", "sqlalchemy"]
        run = subprocess.run(
            [*command, "--dest", str(folder), wanted],
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if run.returncode == 0:
            return next(folder.glob("*.tar.gz"))
        problems.append(f"{' '.join(pip)}: {run.stderr.strip()[-300:]}")
    raise NotThere(f"The source distribution {wanted} cannot be downloaded: {'; '.join(problems)}")


def _pips() -> Iterator[list[str]]:
    """Yield how pip may be called: an environment that uv made has none of its own."""
    yield [sys.executable, "-m", "pip"]
    yield [str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "pip"]
    if uv := shutil.which("uv"):
        yield [uv, "tool", "run", "pip"]


def _unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (only,) = folder.iterdir()
    return only


def run(
    path: str, url: str, report: Path, *, is_async: bool, guarded: bool = True
) -> dict[str, str]:
    """Run SQLAlchemy's tests in *path* on *url*; return what became of each: "passed", ...

    Without *guarded* they run as SQLAlchemy's authors run them, for comparison.
    """
    plugin = ["-p", f"{__name__}"] if guarded else []
    # -s: the SQLAlchemy that is installed, not the one beside the tests.
    command = [sys.executable, "-s", "-m", "pytest", *plugin, path, "--dburi", url]
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
    finished = subprocess.run(
        [*command, *options, "--tb=short"],
        check=False,
        cwd=source(),
        env={**os.environ, **_environment(is_async=is_async)},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )
    if not report.exists():
        raise AssertionError(f"pytest did not run: {finished.stdout}\n{finished.stderr}")
    return dict(_results(report))


def _environment(*, is_async: bool) -> Mapping[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        _ASYNC: "1" if is_async else "0",
    }


def _results(report: Path) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = {child.tag for child in case}
        outcome = next((end for end in ("error", "failure", "skipped") if end in ends), "passed")
        yield _BACKEND.sub("", name), outcome


def expected(suite: str) -> dict[str, str]:
    """Return the tests of *suite* that fail, and why."""
    found = {}
    for line in EXPECTED.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        test, _, reason = line.partition("  # ")
        suites, _, name = test.partition(" ")
        if not reason:
            raise ValueError(f"{EXPECTED.name} does not say why {name} fails")
        if suite in suites.split(","):
            found[name.strip()] = reason
    return found


def is_the_version_of_the_list() -> bool:
    """Return whether the list of expected failures was written for this SQLAlchemy."""
    return sqlalchemy.__version__.startswith("2.1.")
