"""The reference is what the docstrings say, and says something about every public name."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import sessionscope
from tests.documents import ROOT

PACKAGE = Path(sessionscope.__file__).parent
FOLDER = ROOT / "docs" / "reference"


def script() -> ModuleType:
    """Return scripts/reference.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SOURCES = PACKAGE.parent  # type: ignore[attr-defined]  # of what is tested, installed or not
    return module


REFERENCE = script()


def test_the_reference_is_current() -> None:
    """``make reference`` writes it anew."""
    written = REFERENCE.pages()
    assert {path.name for path in FOLDER.iterdir()} == set(written)
    for name, text in written.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("name", REFERENCE.MODULES)
def test_every_public_name_is_told_about(name: str) -> None:
    """As the module itself names them, not as the script has found them."""
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for public in importlib.import_module(name).__all__:
        if f"{name}.{public}" not in REFERENCE.MODULES and public not in REFERENCE.HOOKS:
            assert f"\n## `{public}`\n" in page


def test_no_public_module_is_left_out() -> None:
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    public = {
        ".".join(["sessionscope", *path.with_suffix("").parts])
        for path in files
        if not any(part.startswith("_") for part in path.parts)
    }
    packages = {"sessionscope.testing", "sessionscope.check", "sessionscope"}
    assert public | packages == set(REFERENCE.MODULES)
