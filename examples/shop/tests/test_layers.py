"""The business does not know who calls it."""

import ast
from importlib import import_module
from pathlib import Path

import pytest


def imported(module: str) -> set[str]:
    """Return the packages and sibling modules that a module of the shop imports."""
    file = import_module(f"shop.{module}").__file__
    assert file is not None
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("models", {"datetime", "sqlalchemy"}),
        ("schemas", {"datetime", "typing", "pydantic"}),
        ("crud", {"collections", "datetime", "sqlalchemy", ".models"}),
    ],
)
def test_the_business_knows_neither_the_web_nor_the_database(
    module: str, allowed: set[str]
) -> None:
    """So the web side, the worker and the command line can all call it."""
    assert imported(module) == allowed
