"""What is tested is what was asked for, and what is built is whole."""

import sysconfig
from pathlib import Path

import pytest

import sessionscope

ROOT = Path(__file__).parent.parent
PACKAGE = Path(sessionscope.__file__).parent


def test_the_package_is_the_one_that_was_asked_for(pytestconfig: pytest.Config) -> None:
    """From src; the installed one where pytest's pythonpath was given without src."""
    src = ROOT / "src"
    asked = src if src in pytestconfig.getini("pythonpath") else sysconfig.get_path("purelib")
    assert PACKAGE.parent == Path(asked)


def test_the_package_tells_type_checkers_that_it_is_typed() -> None:
    """An empty file, and so easily lost between src and the wheel."""
    assert (PACKAGE / "py.typed").is_file()
