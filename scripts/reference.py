"""Write docs/reference from the docstrings and signatures of the public modules.

It reads the sources and imports none of them but the command line, which needs the standard
library alone: what it writes is the same on every Python and with every SQLAlchemy.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
TARGET = ROOT / "docs" / "reference"

MODULES = [
    "sessionscope",
    "sessionscope.exc",
    "sessionscope.events",
    "sessionscope.integrations.fastapi",
    "sessionscope.integrations.flask",
    "sessionscope.integrations.litestar",
    "sessionscope.integrations.starlette",
    "sessionscope.testing",
    "sessionscope.pytest_plugin",
    "sessionscope.check",
]
# The names of a module that pytest calls, and no one else.
HOOKS = {"pytest_configure"}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def pages() -> dict[str, str]:
    """Return the text of every page by the name of its file."""
    written = {f"{module}.md": page(module) for module in MODULES}
    return {"README.md": index(), **written, "command-line.md": command_line()}


def index() -> str:
    """Return the list of the pages."""
    rows = [f"| [`{name}`]({name}.md) | {first_sentence(name)} |" for name in MODULES]
    return "\n".join(
        [
            "# Reference",
            "",
            "Written by `make reference` from the docstrings; a test compares them.",
            "",
            "| module | |",
            "|---|---|",
            *rows,
            "| [`sessionscope …`](command-line.md) | The command line. |",
            "",
        ]
    )


def first_sentence(module: str) -> str:
    """Return the first line of a module's docstring."""
    return prose(ast.get_docstring(parse(module)) or "").partition("\n")[0]


def page(module: str) -> str:
    """Return the page of one public module."""
    tree = parse(module)
    parts = [f"# `{module}`", prose(ast.get_docstring(tree) or "")]
    for name in public_names(tree):
        parts.extend(entry(module, tree, name))
    return "\n\n".join(parts) + "\n"


def parse(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def path_of(module: str) -> Path:
    """Return the file of a module."""
    path = SOURCES.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(tree: ast.Module) -> list[str]:
    """Return what ``__all__`` holds."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in HOOKS]
    raise LookupError("a public module has __all__")


def entry(module: str, tree: ast.Module, name: str) -> Iterator[str]:
    """Yield the parts of a page that tell what *name* is."""
    node = definition(tree, name)
    if node is None:
        home = homes(tree)[name]
        if f"{home}.{name}" in MODULES:  # a module of the face, which has its page
            return
        if home in MODULES:
            yield f"## `{name}`"
            yield f"See [`{home}`]({home}.md#{name.lower()})."
            return
        tree = parse(home)
        node = definition(tree, name)
    if isinstance(node, ast.ClassDef):
        yield from class_entry(node)
    elif isinstance(node, FUNCTIONS):
        yield from function_entry(node, heading=f"## `{name}`")
    else:
        yield from value_entry(module, name, node)


def definition(tree: ast.Module, name: str) -> ast.stmt | None:
    """Return the statement of a module that defines *name*, if there is one."""
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node
    return None


def homes(tree: ast.Module) -> dict[str, str]:
    """Return the modules that a face takes its names from."""
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def class_entry(node: ast.ClassDef) -> Iterator[str]:
    """Yield what there is to know about a class, and about its public members."""
    yield f"## `{node.name}`"
    yield code(f"class {class_signature(node)}")
    yield prose(ast.get_docstring(node) or "")
    for member in node.body:
        if isinstance(member, FUNCTIONS) and is_told(member):
            yield from function_entry(member, heading=f"### `{node.name}.{member.name}`")


def is_told(member: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a method belongs into the reference: public, and said what it is for."""
    return not member.name.startswith("_") and ast.get_docstring(member) is not None


def class_signature(node: ast.ClassDef) -> str:
    """Return how a class is called, or what it holds, or what it is one of."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return signature(node.name, member.args, None)
    fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"{node.name}({bases})" if bases else node.name, *fields]
    return "\n    ".join(lines)


def function_entry(node: ast.FunctionDef | ast.AsyncFunctionDef, *, heading: str) -> Iterator[str]:
    """Yield what there is to know about a function."""
    yield heading
    decorators = {ast.unparse(each) for each in node.decorator_list}
    if "property" in decorators:
        yield code(f"{node.name}: {ast.unparse(node.returns) if node.returns else 'Any'}")
    elif any(each.startswith("pytest.fixture") for each in decorators):
        yield "A fixture."
    else:
        prefix = "".join(f"@{each}\n" for each in sorted(decorators & {"classmethod"}))
        prefix += "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        yield code(prefix + f"def {signature(node.name, node.args, node.returns)}")
    yield prose(ast.get_docstring(node) or "")


def value_entry(module: str, name: str, node: ast.stmt | None) -> Iterator[str]:
    """Yield how a type alias is written, with the comment above it."""
    if node is None:
        raise LookupError(f"{module}.{name} is not where it is imported from")
    yield f"## `{name}`"
    yield code(ast.unparse(node))


def signature(name: str, arguments: ast.arguments, returns: ast.expr | None) -> str:
    """Return a signature, without ``self``, one argument a line where it is long."""
    arguments = without_self(arguments)
    end = f" -> {ast.unparse(returns)}" if returns is not None else ""
    written = [spaced(each) for each in split(ast.unparse(arguments))]
    line = f"{name}({', '.join(written)}){end}"
    if len(line) <= 88:
        return line
    inside = "".join(f"    {each},\n" for each in written)
    return f"{name}(\n{inside}){end}"


def without_self(arguments: ast.arguments) -> ast.arguments:
    """Return the arguments that a caller passes."""
    kept = [arg for arg in arguments.args if arg.arg not in ("self", "cls")]
    before = [arg for arg in arguments.posonlyargs if arg.arg not in ("self", "cls")]
    return ast.arguments(
        posonlyargs=before,
        args=kept,
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=arguments.kw_defaults,
        kwarg=arguments.kwarg,
        defaults=arguments.defaults,
    )


def split(arguments: str) -> Iterator[str]:
    """Yield the arguments of a signature one by one: commas in brackets separate none."""
    depth, current = 0, ""
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield current.strip()
            current = ""
        else:
            current += letter
    yield current.strip()


def spaced(argument: str) -> str:
    """Return an argument with spaces around its ``=``, where it has an annotation."""
    return re.sub(r"^(\w+: [^=]+)=", r"\1 = ", argument)


def code(text: str) -> str:
    """Return *text* as a block: not one of Python, since it is no program."""
    return f"```text\n{text}\n```"


def prose(docstring: str) -> str:
    """Return a docstring as Markdown."""
    text = re.sub(r":\w+:`([\w.]+)`", r"`\1`", docstring)
    text = text.replace("``", "`")
    text = re.sub(r"(?<![\w*])\*(\w+)\*(?![\w*])", r"`\1`", text)
    return "\n\n".join(paragraphs(text)).strip()


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring, what is indented as a block."""
    block: list[str] = []
    for part in re.split(r"\n{2,}", text):
        if part.startswith("    "):
            block.append(part)
            continue
        if block:
            yield code(dedent("\n\n".join(block)))
            block.clear()
        yield re.sub(r"::$", ":", part)
    if block:
        yield code(dedent("\n\n".join(block)))


def command_line() -> str:
    """Return the page of the command ``sessionscope``."""
    parser = import_module("sessionscope._cli")._parser()
    parts = ["# The command line", "`python -m sessionscope` is the same."]
    for action in subcommands(parser):
        helps = {each.dest: each.help or "" for each in action._get_subactions()}
        for name, each in action.choices.items():
            parts.extend(command(name, helps[name], each))
    return "\n\n".join(parts) + "\n"


def subcommands(parser: argparse.ArgumentParser) -> list[Any]:
    """Return what holds the parsers of the subcommands: argparse has no public way to it."""
    return [each for each in parser._actions if isinstance(each.choices, dict)]


def command(name: str, summary: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield what a subcommand does, and its arguments."""
    yield f"## `sessionscope {name}`"
    yield f"{summary[:1].upper()}{summary[1:]}."
    shown = [each for each in parser._actions if each.dest != "help"]
    if shown:
        rows = "\n".join(f"| `{written(each)}` | {each.help or ''} |" for each in shown)
        yield f"| argument | |\n|---|---|\n{rows}"


def written(action: argparse.Action) -> str:
    """Return an argument as it is typed."""
    value = action.metavar
    if value is None and action.choices is not None:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if value is None and action.nargs != 0:
        value = action.dest.upper()
    return " ".join([*action.option_strings, *([str(value)] if value else [])])


def write(folder: Path, files: Iterable[tuple[str, str]]) -> None:
    """Write the pages into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCES))
    write(TARGET, pages().items())
