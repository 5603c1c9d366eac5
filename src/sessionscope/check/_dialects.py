"""Guards on the dialect, and code for another one: what PostgreSQL never gets to see."""

import ast
import re
from collections.abc import Iterator

from sessionscope.check._facts import (
    Block,
    Module,
    Scope,
    dotted,
    last_name,
    position,
    receiver,
)
from sessionscope.check._model import Model

_DIALECTS = ("sqlalchemy.dialects.", "sqlalchemy.dialects:")
_OTHERS = ("sqlite", "mysql", "mariadb")
_FLAG = re.compile(
    r"_*(?:is_|uses?_|using_|on_)?(?:sqlite|mysql|mariadb|postgres\w*)", re.IGNORECASE
)
_LEAVES = (ast.Return, ast.Raise, ast.Continue)


def speaks_sqlite_alone(model: Model) -> bool:
    """Return whether each engine of the project is one of SQLite, by the text of its URL."""
    urls = [
        _url(model, call.node, scope)
        for scope, call in model.calls_of(("create_engine", "create_async_engine"))
        if model.value(call.node, scope) is not None
    ]
    return bool(urls) and all("sqlite" in url for url in urls)


def _url(model: Model, call: ast.Call, scope: Scope) -> str:
    """Return the text of an engine's call, with what its URL is bound to."""
    first = call.args[0] if call.args else None
    path = dotted(first) if first is not None else None
    values = _assigned(path, scope) if path is not None else ()
    texts = [ast.unparse(value) if _is_written_out(value) else "?" for value in values]
    told = [text for text in texts if text not in {"''", "None"}]
    # Of several that it may be, the one that is not SQLite's counts.
    other = next((text for text in told if "sqlite" not in text.lower()), None)
    return (other or " ".join([*told, ast.unparse(call if first is None else first)])).lower()


def _is_written_out(value: ast.expr) -> bool:
    """Return whether *value* is no setting, with SQLite's URL for a default."""
    if isinstance(value, ast.Call):
        return last_name(value) not in {"get", "getenv", "pop", "setdefault"}
    return isinstance(value, ast.Constant | ast.JoinedStr | ast.BinOp)


def _assigned(path: str, scope: Scope) -> Iterator[ast.expr]:
    """Yield what *path* is bound to, in the other methods too where the object holds it."""
    method = scope.method()
    own = receiver(method) if method is not None else None
    places = list(scope.around())
    if method is not None and method.parent is not None and path.startswith(f"{own}."):
        places = list(method.parent.children)
    for place in places:
        for binding in place.bindings.get(path, ()):
            if isinstance(binding.value, ast.expr):
                yield binding.value


def keeps_postgresql_out(
    model: Model, scope: Scope, node: ast.expr, block: Block, depth: int = 0
) -> bool:
    """Return whether a guard stands around *node*, above it, or around all calls of *scope*."""
    if (
        any(_guards(around, scope) for around in block.chain())
        or _left_before(scope, node)
        or _is_for_another(scope.module)
    ):
        return True
    callers = model.callers(scope) if depth < 3 else []
    return bool(callers) and all(
        keeps_postgresql_out(model, c.scope, c.call.node, c.call.block, depth + 1) for c in callers
    )


def _is_for_another(module: Module) -> bool:
    """Return whether *module* takes, at its top, what belongs to other databases alone."""
    dialects = [
        re.split("[.:]", str(binding.value))[2]
        for bindings in module.scope.bindings.values()
        for binding in bindings
        if binding.kind == "import" and str(binding.value).startswith(_DIALECTS)
    ]
    return _is_another(dialects, True)


def _guards(block: Block, scope: Scope) -> bool:
    match block.node:
        case ast.If(test=test) if block.kind in {"if", "orelse"}:
            return _excludes(test, block.kind == "if", scope)
        case ast.match_case(pattern=pattern):
            return _is_another(_strings(pattern), True)
        case _:
            return False


def _left_before(scope: Scope, node: ast.expr) -> bool:
    """``if dialect.name != "sqlite": return`` stands above."""
    return any(
        isinstance(above, ast.If)
        and not above.orelse
        and isinstance(above.body[-1], _LEAVES)
        and _excludes(above.test, False, scope)
        for above in (scope.function.body if scope.function is not None else ())
        if position(above) < position(node)
    )


def _excludes(test: ast.expr, truth: bool, scope: Scope) -> bool:
    """Return whether the database is not PostgreSQL where *test* is *truth*."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _excludes(operand, not truth, scope)
        case ast.BoolOp(op=operator, values=values):
            # One part is enough where all hold (``and``), and where none does (``or``).
            enough = any if isinstance(operator, ast.And) is truth else all
            return enough(_excludes(value, truth, scope) for value in values)
        case ast.Compare(ops=[ast.Eq() | ast.In()]):
            return _is_another(_strings(test), truth)
        case ast.Compare(ops=[ast.NotEq() | ast.NotIn()]):
            return _is_another(_strings(test), not truth)
        case ast.Call() if last_name(test) in {"startswith", "isinstance"}:
            return _is_another(_strings(test), truth)
        case ast.Call(func=ast.Name() | ast.Attribute() as function):
            return _excludes(function, truth, scope)
        case ast.Name() | ast.Attribute():
            return _flag_excludes(test, truth, scope)
        case _:
            return False


def _flag_excludes(flag: ast.Name | ast.Attribute, truth: bool, scope: Scope) -> bool:
    path = dotted(flag) or ""
    bindings = scope.bindings.get(path, ())
    if len(bindings) == 1 and isinstance(bindings[0].value, ast.Compare):
        return _excludes(bindings[0].value, truth, scope)
    last = path.rpartition(".")[2]
    return _FLAG.fullmatch(last) is not None and _is_another([last], truth)


def _strings(node: ast.AST) -> Iterator[str]:
    """Yield the texts and the names of classes in *node*."""
    for inner in ast.walk(node):
        match inner:
            case ast.Constant(value=str(text)):
                yield text
            case ast.Name(id=name) | ast.Attribute(attr=name) if name[:1].isupper():
                yield name
            case _:
                pass


def _is_another(names: Iterator[str] | list[str], truth: bool) -> bool:
    """Return whether being one of *names*, or not being one, means not to be PostgreSQL."""
    text = " ".join(names).lower()
    if not truth:
        return "postgres" in text
    return any(other in text for other in _OTHERS) and "postgres" not in text
