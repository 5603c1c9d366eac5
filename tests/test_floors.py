"""The plan of the house: imports point down, and what is optional stays unloaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sessionscope

ROOT = Path(sessionscope.__file__).parent
FACE = "sessionscope"

# From the ground up; a module imports from the floors below its own.
FLOORS = [
    {"exc", "events"},
    {"_credentials", "_loops", "_pooler"},
    {"_options"},
    {"_async_unit", "_places", "_signal", "_telling"},
    {"_deadline"},
    {
        "_backends",
        "_gate",
        "_retry",
        "_sqlite",
        "_timed_cursor",
        "_watch",
        "_watchdog",
    },
    {"_interrupt", "_mysql"},
    {"_async_backends", "_overlap", "_pool"},
    {"_guards", "_timer"},
    {"_demotion", "_doom", "_entry", "_hooks", "_identity", "_read_only"},
    {"_marker"},
    {"_commit", "_liveness", "_outcome"},
    {"_engines"},
    {"_source"},
    {"_async_source"},
    {"_unit"},
    {"_async_database", "_database"},
    {FACE},
    {"doctor", "integrations", "testing"},
    {"_cli", "_project", "pytest_plugin"},
    {"__main__"},
]
# Stands beside the house: what is in it knows nothing of the rest, and only `_cli` knows it.
TOWER = "check"
# These alone may import at first use; the faces name their homes and load none.
LAZY = {"", "check", "testing", "pytest_plugin"}


def name_of(path: Path) -> str:
    """Return the module's name from the package on, "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


# What `init` writes belongs to its users: it is no part of this house.
TREES = {
    name_of(path): ast.parse(path.read_bytes())
    for path in ROOT.rglob("*.py")
    if ROOT / "_templates" not in path.parents
}


def part(module: str) -> str:
    """Return the part of the house that *module* belongs to."""
    return module.partition(".")[0] or FACE


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of this package that *tree* imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == FACE:
                yield next((m for m in (rest, rest.rpartition(".")[0]) if m in TREES), "")


def module_imports() -> Iterator[tuple[str, str]]:
    for module, tree in TREES.items():
        if module not in LAZY and part(module) != TOWER:
            yield from ((module, target) for target in imported(tree))


def floor(module: str) -> int:
    return next(n for n, floor in enumerate(FLOORS) if part(module) in floor)


def test_every_module_has_a_floor() -> None:
    """A new module is given its place here first; one that is gone leaves the plan."""
    assert {part(module) for module in TREES} - {TOWER} == set.union(*FLOORS)


def test_imports_point_down() -> None:
    """Inside one floor nobody knows the neighbour; a package may import its own modules."""
    upward = [
        f"{module} imports {target or FACE}"
        for module, target in module_imports()
        if floor(target) >= floor(module) and part(target) != part(module)
    ]
    assert upward == []


def test_what_stands_on_the_face_imports_the_face_alone() -> None:
    """So each integration could leave as a package of its own by a rename."""
    private = [
        f"{module} imports {target}"
        for module, target in module_imports()
        if floor(module) > floor("") and part(target) not in {FACE, "exc", "_cli", part(module)}
    ]
    assert private == []


def test_the_tower_stands_alone() -> None:
    """The checker needs the standard library alone; its fixes, and nothing else, LibCST."""
    foreign = {
        (module, name)
        for module, tree in TREES.items()
        for name in top_names(tree)
        if (part(module) == TOWER) and name not in {*sys.stdlib_module_names, FACE}
    }
    fixes = {"check._fix", "check._fix_blocks", "check._fix_imports", "check._fix_places"}
    assert foreign == {(module, "libcst") for module in fixes}
    crossing = {
        (part(module), part(target))
        for module, tree in TREES.items()
        for target in imported(tree)
        if (part(module) == TOWER) != (part(target) == TOWER)
    }
    assert crossing == set()


def top_names(tree: ast.AST) -> Iterator[str]:
    """Yield the first part of each name that *tree* imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_there_are_no_circles() -> None:
    """Inside a package neither; a circle is a CycleError that names its modules."""
    graph: dict[str, set[str]] = {}
    for module, tree in TREES.items():
        if module not in LAZY:
            graph[module] = set(imported(tree)) - {TOWER}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(set(TREES) - LAZY))
def test_imports_stand_at_the_top(module: str) -> None:
    """Not in functions, not under TYPE_CHECKING, not in try: what is needed is visible."""
    tree = TREES[module]
    everywhere = {n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
    assert [n.lineno for n in everywhere - set(tree.body)] == []


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import sessionscope", set()),
        ("import sessionscope.testing", set()),
        ("from sessionscope import Database", {"sqlalchemy", "typing_extensions"}),
    ],
)
def test_what_is_optional_is_not_loaded(statement: str, loaded: set[str]) -> None:
    """No framework, no driver; before the first name not even SQLAlchemy.

    SQLAlchemy 2.0 loads greenlet by itself where it finds it.
    """
    script = f"""
import sys
before = set(sys.modules)
{statement}
print(*(name for name in set(sys.modules) - before))
"""
    installed = set(packages_distributions())
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True, text=True)
    new = set(run.stdout.split())
    assert FACE in new
    assert {n.partition(".")[0] for n in new} & installed - {FACE, "greenlet"} == loaded
    assert "sqlalchemy.ext.asyncio" not in new


def test_every_name_of_the_face_resolves() -> None:
    """The lazy face promises names that it must find."""
    missing = [name for name in sessionscope.__all__ if not hasattr(sessionscope, name)]
    assert missing == []
    assert not hasattr(sessionscope, "no_such_name")


@pytest.mark.parametrize(
    "module", sorted(m for m in TREES if "._" not in f".{m}" and TREES[m].body)
)
def test_public_modules_list_their_names_in_order(module: str) -> None:
    """A sorted ``__all__`` is the table of contents."""
    names = [
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert names == [sorted(names[0])]
