"""Two engines talk to the same database.

## What it does

Flags a second engine made at module level from the same URL expression as another one.

## Why it bites in production

Each engine has a pool of its own: twice as many connections as were planned for, until PostgreSQL
answers "too many clients already". Sessions of the two see each other's work only after a commit,
and can deadlock with one another.

## Example

```python
# database.py
engine = create_engine(settings.DATABASE_URL)

# reports.py
engine = create_engine(settings.DATABASE_URL)
```

## Use instead

```python
# reports.py
from database import engine
```

## When to ignore

Where the two differ on purpose, for instance in their isolation level or pool.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import CallFact, Scope, dotted
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model, is_migration


def judge(model: Model) -> Iterator[Finding]:
    """Find engines whose URL another engine has."""
    known: dict[str, tuple[Scope, CallFact]] = {}
    for module in sorted(model.modules, key=lambda m: m.path):
        if is_migration(module) or model.is_script(module):
            continue
        for call in module.scope.calls:
            key = _key(model, module.scope, call)
            if key is None:
                continue
            if key in known and known[key][1].node is not call.node:
                yield _finding(model, module.scope, call, known[key])
            known.setdefault(key, (module.scope, call))


def _key(model: Model, scope: Scope, call: CallFact) -> str | None:
    """Return what tells the databases of engines apart: the colour and the URL's origin."""
    value = model.value(call.node, scope)
    if value is None or value.kind != "engine" or value.node is not call.node:
        return None
    if call.role != "assign" or _in_main(call):
        return None
    url = next(
        iter([*call.node.args[:1], *(k.value for k in call.node.keywords if k.arg == "url")]), None
    )
    origin = _origin(model, scope, url)
    return f"{'async' if value.is_async else 'sync'} {origin}" if origin else None


def _in_main(call: CallFact) -> bool:
    return any(
        isinstance(b.node, ast.If) and "__name__" in ast.unparse(b.node.test)
        for b in call.block.chain()
    )


def _origin(model: Model, scope: Scope, node: ast.expr | None, depth: int = 0) -> str | None:
    """Return where the URL comes from, the same text for the same place."""
    if depth > 4:
        return None
    match node:
        case ast.Constant(value=str(text)):
            return None if "memory" in text or text in {"sqlite://", ""} else f"'{text}'"
        case ast.Name(id=name):
            return _of_name(model, scope, name, depth)
        case ast.Attribute():
            base = _origin_of_base(model, scope, node.value)
            return f"{base}.{node.attr}" if base else None
        case ast.Call(func=function, args=[first, *_]) if dotted(function) in {
            "os.getenv",
            "os.environ.get",
            "getenv",
            "environ.get",
            "str",
        }:
            inner = _origin(model, scope, first, depth + 1)
            return f"env({inner})" if inner else None
        case ast.Call(func=ast.Attribute() as function, args=[], keywords=[]):
            inner = _origin(model, scope, function, depth + 1)
            return f"{inner}()" if inner else None
        case ast.Subscript(value=value, slice=ast.Constant(value=key)) if dotted(value) in {
            "os.environ",
            "environ",
        }:
            return f"env({key!r})"
        case _:
            return None


def _of_name(model: Model, scope: Scope, name: str, depth: int) -> str | None:
    bindings = model.index.bindings(scope.module, name)
    if len(bindings) != 1:
        return None
    binding = bindings[0]
    if binding.kind == "import":
        found = model.index.imported(scope.module, str(binding.value))
        if not isinstance(found, tuple) or not found[1]:
            return None
        return _of_name(model, found[0].scope, found[1], depth + 1)
    if isinstance(binding.value, ast.expr):
        return _origin(model, scope, binding.value, depth + 1) or f"{scope.module.path}:{name}"
    return None


def _origin_of_base(model: Model, scope: Scope, node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        bindings = model.index.bindings(scope.module, node.id)
        if len(bindings) == 1 and bindings[0].kind == "import":
            found = model.index.imported(scope.module, str(bindings[0].value))
            if isinstance(found, tuple):
                return f"{found[0].path}:{found[1]}"
            return found
        return f"{scope.module.path}:{node.id}" if bindings else None
    base = _origin_of_base(model, scope, node.value) if isinstance(node, ast.Attribute) else None
    return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else None


def _finding(model: Model, scope: Scope, call: CallFact, other: tuple[Scope, CallFact]) -> Finding:
    same = _options(call.node) == _options(other[1].node)
    confidence: Confidence = "high" if same or not _differs(call.node, other[1].node) else "low"
    return model.finding(
        RULE,
        scope,
        call.node,
        f"Another engine has this URL ({other[0].module.path}:{other[1].node.lineno}): two pools, "
        'twice the connections, until the server answers "too many clients". Import that one',
        confidence=confidence,
        because=[
            Because(other[0], other[1].node, "the first engine"),
            Because(scope, call.node, "the second engine"),
        ],
    )


_PURPOSES = frozenset({"isolation_level", "poolclass", "execution_options", "connect_args"})


def _options(node: ast.Call) -> dict[str | None, str]:
    return {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in _PURPOSES}


def _differs(one: ast.Call, other: ast.Call) -> bool:
    return _options(one) != _options(other)


RULE = Rule("SES301", "several-engines", "high", judge)
