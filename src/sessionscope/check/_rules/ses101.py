"""An engine or a sessionmaker is made per request, task or message.

## What it does

Flags ``create_engine()``, ``create_async_engine()``, ``sessionmaker()`` and sessionscope's
``Database()`` in a function that runs per request, task, message or event.

## Why it bites in production

Each engine has a pool of its own. Ten requests make ten pools, none of which is reused: every
request pays for a new connection, and PostgreSQL soon answers "too many clients already". The
connections stay open until the engine happens to be collected.

## Example

```python
@app.get("/users")
def read_users():
    engine = create_engine(URL)
    with Session(engine) as session:
        return session.scalars(select(User)).all()
```

## Use instead

```python
engine = create_engine(URL)  # once, at the top of database.py

@app.get("/users")
def read_users():
    with Session(engine) as session:
        return session.scalars(select(User)).all()
```

## When to ignore

Where each call really talks to another database, and the engine is disposed of afterwards.
"""

import ast
import builtins
from collections.abc import Iterator

from sessionscope.check._facts import CallFact, Scope, decorator_names
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._values import DATABASES

_CACHES = frozenset(
    {
        "lru_cache",
        "cache",
        "cached_property",
        "cached",
        "singleton",
        "fixture",
        "alru_cache",
        "memoize",
    }
)
_COSTS = {
    "engine": "a pool of its own and leaves its connections open, until the server answers "
    '"too many clients"',
    "factory": "a class of sessions anew, which takes longer than to make a session, and whose "
    "event listeners the next one does not have",
}
_RUNS = {"endpoint": "per request", "task": "per task", "dependency": "per request"}


def judge(model: Model) -> Iterator[Finding]:
    """Find engines and factories made over and over."""
    for scope, call in model.calls_of(_MAKERS):
        if scope.kind == "function" and not is_migration(scope.module):
            yield from _judge_call(model, scope, call)


def _judge_call(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    name = call.name
    made = model.value(call.node, scope)
    if made is None or made.node is not call.node:
        return
    what = "engine" if made.name in DATABASES else made.kind
    if what not in _COSTS:
        return
    if made.kind == "factory" and _binds_engine_made_here(model, scope, call.node):
        return
    if _kept(scope, call) or not (name == "from_env" or _is_fixed(call.node, scope)):
        return
    chain = _reached(model, scope, 0, set())
    if chain is None:
        return
    runs, because = chain
    yield model.finding(
        RULE,
        scope,
        call.node,
        f"`{name}()` runs {runs} here: each call makes {_COSTS[what]}. Make it once, at the "
        "top of a module",
        because=because,
        fix=_can_be_hoisted(scope, call),
    )


def _can_be_hoisted(scope: Scope, call: CallFact) -> bool:
    """Return whether the statement means the same at the top of the module, under its name."""
    module = scope.module.scope
    owner = call.owner
    if scope.parent is not module or not isinstance(owner, ast.Assign):
        return False
    if sum(other.name in _MAKERS for other in scope.calls) > 1:
        return False  # what is left would be made over and over
    target = owner.targets[0]
    if len(owner.targets) != 1 or not isinstance(target, ast.Name) or owner.value is not call.node:
        return False
    names = {n.id for n in ast.walk(call.node) if isinstance(n, ast.Name)}
    known = all(
        name not in scope.bindings
        and any(b.line < call.node.lineno for b in module.bindings.get(name, ()))
        for name in names
        if not hasattr(builtins, name)
    )
    taken = target.id in module.bindings or hasattr(builtins, target.id)
    return known and len(scope.bindings[target.id]) == 1 and not taken


_MAKERS = (
    "create_engine",
    "create_async_engine",
    "engine_from_config",
    "async_engine_from_config",
    "sessionmaker",
    "async_sessionmaker",
    "Database",
    "AsyncDatabase",
    "from_env",
)


def _binds_engine_made_here(model: Model, scope: Scope, node: ast.Call) -> bool:
    """The engine beside it is the finding, not the factory too."""
    return any(call.name in {"create_engine", "create_async_engine"} for call in scope.calls)


def _is_fixed(node: ast.Call, scope: Scope) -> bool:
    """Return whether each call connects to the same database, through a pool."""
    first = node.args[0] if node.args else None
    for keyword in node.keywords:
        if keyword.arg is None or (
            keyword.arg == "poolclass" and "NullPool" in ast.unparse(keyword.value)
        ):
            return False
        if keyword.arg in {"url", "bind"}:
            first = keyword.value
    return first is not None and _same_each_time(first, scope, 0)


def _same_each_time(node: ast.expr, scope: Scope, depth: int) -> bool:
    """Return whether *node* rests on names of the module, its imports and constants alone."""
    for name in ast.walk(node):
        if not isinstance(name, ast.Name):
            continue
        around = next((s for s in scope.around() if name.id in s.bindings), None)
        if around is None or around.kind == "module":
            continue
        for binding in around.bindings[name.id]:
            value = binding.value
            if binding.kind == "import" or isinstance(value, Scope):
                continue
            if binding.kind != "value" or not isinstance(value, ast.expr) or depth > 3:
                return False
            if not _same_each_time(value, around, depth + 1):
                return False
    return True


def _kept(scope: Scope, call: CallFact) -> bool:
    """It is cached, global, stored in an object, disposed of, or made only if it is missing."""
    if call.role == "with" or _is_entered(scope, call):
        return True  # a Database disposes of its engine at the end of its block
    if any(
        not _CACHES.isdisjoint(decorator_names(s)) for s in scope.around() if s.kind == "function"
    ):
        return True
    if scope.globals or scope.name in {"__new__", "__init_subclass__"}:
        return True
    if any(
        use.name in {"dispose", "sync_engine"} and use.role in {"method", "attribute"}
        for uses in scope.uses.values()
        for use in uses
    ):
        return True
    if (
        scope.name != "__init__"
        and isinstance(call.owner, ast.Assign)
        and any(not isinstance(target, ast.Name) for target in call.owner.targets)
    ):
        return True
    if (
        scope.is_generator
        and len(scope.yields) == 1
        and "contextmanager" in " ".join(decorator_names(scope))
    ):
        return _starts(scope)
    return any(_tests_for_none(block.node) for block in call.block.chain() if block.kind == "if")


def _is_entered(scope: Scope, call: CallFact) -> bool:
    return any(
        use.role == "with"
        for name, bindings in scope.bindings.items()
        for use in scope.uses.get(name, ())
        if any(binding.value is call.node for binding in bindings)
    )


def _starts(scope: Scope) -> bool:
    return "lifespan" in scope.name or "start" in scope.name


def _tests_for_none(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and (
        "None" in ast.unparse(node.test) or "not " in ast.unparse(node.test)
    )


def _reached(
    model: Model, scope: Scope, depth: int, seen: set[int]
) -> tuple[str, list[Because]] | None:
    """Return how often the function runs, by its callers, and the chain from there."""
    context = model.in_context(scope)
    here = Because(scope, scope.function, f"`{scope.qualname}` runs {_RUNS.get(context, '')}")
    if context in _RUNS:
        return _RUNS[context], [here]
    if context or depth > 5 or id(scope) in seen:
        return None
    seen.add(id(scope))
    for caller in model.callers(scope):
        if caller.scope.kind != "function" or _kept(caller.scope, caller.call):
            continue
        found = _reached(model, caller.scope, depth + 1, seen)
        if found is not None:
            step = Because(caller.scope, caller.call.node, f"calls `{scope.name}()`")
            return found[0], [*found[1], step]
    return None


RULE = Rule("SES101", "engine-per-call", "high", judge, fix="unsafe")
