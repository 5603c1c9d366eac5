"""Print how the code reads, in numbers: a hint where to look, no judge."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "sessionscope"
IGNORE = re.compile(r"#\s*(type: ignore|pyright: |noqa|pragma)")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Named = Function | ast.ClassDef


def texts(*folders: Path) -> dict[Path, str]:
    """Return the text of every Python file below *folders*, but for what `init` writes."""
    paths = (path for folder in folders for path in folder.rglob("*.py"))
    return {path: path.read_text() for path in paths if "_templates" not in path.parts}


def lines(sources: dict[Path, str]) -> int:
    """Count lines that are not blank."""
    return sum(bool(line.strip()) for text in sources.values() for line in text.splitlines())


def comments(sources: dict[Path, str]) -> list[str]:
    return [
        token.string
        for text in sources.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]


def length(function: Function) -> int:
    """Count the lines of *function* from ``def`` to its end, without its docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    docstring = function.body[0]
    return total - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def public(tree: ast.Module | ast.ClassDef) -> Iterator[Named]:
    """Yield the classes, functions and methods that carry no underscore."""
    for node in tree.body:
        if isinstance(node, Named) and not node.name.startswith("_") and not is_overload(node):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def is_overload(node: Named) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(tree: ast.Module) -> set[str]:
    """Return what *tree* imports when it is loaded: its top level alone."""
    found = set[str]()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {f"{node.module}"}
    return found


def circle(trees: dict[Path, ast.Module]) -> str:
    """Return the first circle of imports, or "0"."""
    names = {module_name(path) for path in trees}
    graph = {
        # Every module needs its package; that is no import of its own.
        module_name(path): (imports(tree) & names) - {PACKAGE.name}
        for path, tree in trees.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " > ".join(error.args[1])
    return "0"


def report() -> Iterator[tuple[str, str, str]]:
    """Yield what was measured, the figure, and what the project aims at."""
    source = texts(PACKAGE)
    tests = texts(ROOT / "tests", ROOT / "typing_tests")
    trees = {path: ast.parse(text) for path, text in source.items()}
    functions = [
        length(node)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    ]
    names = [name for tree in trees.values() for name in public(tree)]
    documented = [name for name in names if ast.get_docstring(name)]
    remarks = comments(source)
    ignores = [remark for remark in remarks if IGNORE.match(remark)]
    size = lines(source)

    yield "circles of imports", circle(trees), "0"
    yield "function lines, median", f"{median(functions):g}", "<= 8"
    yield "function lines, 90th percentile", f"{quantiles(functions, n=10)[-1]:g}", "<= 25"
    yield "function lines, longest", f"{max(functions)}", "<= 60"
    yield "comments per 100 lines", f"{100 * (len(remarks) - len(ignores)) / size:.1f}", "3 to 8"
    yield "public names with docstring", f"{100 * len(documented) / len(names):.0f} %", ">= 95 %"
    yield "ignores per 1,000 lines", f"{1000 * len(ignores) / size:.1f}", "<= 7"
    yield "tests : source", f"{lines(tests) / size:.2f}", "1.2 to 2.0"
    yield "source lines", f"{size}", ""


if __name__ == "__main__":
    for name, figure, aim in report():
        print(f"{name:<34}{figure:>10}   {aim}")
