"""What holds with SQLAlchemy and nothing else: a script, for there is no pytest either.

The corner `bare` of `make test-all` runs it on the installed package.
"""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions, packages_distributions
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TypeVar

from sqlalchemy import text

import sessionscope
from sessionscope import Database, exc, integrations, testing

ErrorT = TypeVar("ErrorT", bound=Exception)

# SQLAlchemy 2.0 brings greenlet, 2.1 does not; pip and setuptools came with the environment.
EXPECTED = {"sessionscope", "sqlalchemy", "typing-extensions"}
POSSIBLE = {"greenlet", "pip", "setuptools", "wheel"}


def nothing_else_is_installed() -> None:
    """Otherwise the rest would prove nothing."""
    found = {d.metadata["Name"].lower().replace("_", "-") for d in distributions()}
    assert EXPECTED <= found <= EXPECTED | POSSIBLE, found


def the_package_is_the_installed_one() -> None:
    assert sessionscope.__file__.startswith(sys.prefix), sessionscope.__file__


def the_import_loads_the_standard_library_alone() -> None:
    """In a fresh interpreter, as every script of a user is one."""
    assert foreign_modules("import sessionscope") == set()
    assert foreign_modules("import sessionscope.testing") == set()
    loaded = foreign_modules("from sessionscope import Database")
    assert {"sqlalchemy"} <= loaded <= {"sqlalchemy", "typing_extensions", "greenlet"}, loaded


def foreign_modules(statement: str) -> set[str]:
    """Return which other packages *statement* loads."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    command = [sys.executable, "-I", "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    names = {name.partition(".")[0] for name in run.stdout.split()}
    return names & set(packages_distributions()) - {"sessionscope"}


def every_name_of_the_face_resolves() -> None:
    """AsyncDatabase needs greenlet, and where that is missing says which extra brings it."""
    for name in sessionscope.__all__:
        if name == "AsyncDatabase" and find_spec("greenlet") is None:
            assert "[asyncio]" in str(raised(ImportError, getattr, sessionscope, name))
        else:
            getattr(sessionscope, name)


def a_unit_of_work_commits_on_sqlite() -> None:
    with Database("sqlite://") as database:
        with database.begin() as session:
            session.execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY)"))
            session.execute(text("INSERT INTO item DEFAULT VALUES"))
        with database.begin(read_only=True) as session:
            assert session.scalar(text("SELECT count(*) FROM item")) == 1


def an_integration_fails_with_the_import_error_of_its_framework() -> None:
    names = (module.name for module in iter_modules(integrations.__path__))
    modules = [name for name in names if not name.startswith("_")]
    assert "fastapi" in modules
    for module in modules:
        error = raised(ModuleNotFoundError, import_module, f"sessionscope.integrations.{module}")
        assert error.name is not None
        assert error.name.partition(".")[0] not in EXPECTED, error


def a_missing_driver_is_answered_with_the_line_to_install_it() -> None:
    for scheme, line in {
        "postgresql": 'pip install "sessionscope[postgresql]"',
        "postgresql+psycopg": 'pip install "sessionscope[postgresql]"',
        "mysql+pymysql": 'pip install "sessionscope[mysql]"',
    }.items():
        error = raised(exc.ConfigurationError, use, f"{scheme}://user:password@localhost/test")
        assert line in str(error), error
        assert "password" not in str(error), error
    line = 'pip install "sessionscope[testing]"'
    assert line in str(raised(ModuleNotFoundError, testing.PostgresServer))


def use(url: str) -> None:
    with Database(url) as database:
        database.ping()


def raised(kind: type[ErrorT], call: Callable[..., object], *args: object) -> ErrorT:
    """Return the exception of *kind* that ``call(*args)`` raises."""
    try:
        call(*args)
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


if __name__ == "__main__":
    for check in (
        nothing_else_is_installed,
        the_package_is_the_installed_one,
        the_import_loads_the_standard_library_alone,
        every_name_of_the_face_resolves,
        a_unit_of_work_commits_on_sqlite,
        an_integration_fails_with_the_import_error_of_its_framework,
        a_missing_driver_is_answered_with_the_line_to_install_it,
    ):
        check()
        print(f"ok: {check.__name__.replace('_', ' ')}")
