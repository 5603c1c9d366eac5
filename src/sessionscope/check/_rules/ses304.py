"""An in-memory SQLite database is used from several threads without StaticPool.

## What it does

Flags an engine with a constant in-memory SQLite URL and no ``poolclass=StaticPool`` where threads
use it: in a web application, or with ``check_same_thread`` switched off.

## Why it bites in production

Each thread gets a connection, and so an empty database, of its own: "no such table: users" in
whichever thread did not create the tables.

## Example

```python
engine = create_engine("sqlite://", connect_args={"check_same_thread": False})
```

## Use instead

```python
engine = create_engine(
    "sqlite://", connect_args={"check_same_thread": False}, poolclass=StaticPool
)
```

## When to ignore

Where one thread alone ever uses the engine.
"""

import ast
import re
from collections.abc import Iterator

from sessionscope.check._facts import CallFact, Scope
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model

_MEMORY = re.compile(
    r"^sqlite(\+pysqlite)?://(/?:memory:.*|/?|/?\?.*|/file:.*(mode=memory|:memory:).*)$"
)
_SERVERS = frozenset({"fastapi", "flask", "starlette", "threading", "uvicorn"})


def judge(model: Model) -> Iterator[Finding]:
    """Find databases of which every thread sees another one."""
    for module in model.index.modules:
        for scope in module.scopes:
            for call in scope.calls:
                if call.name == "create_engine":
                    yield from _judge_call(model, scope, call)


def _judge_call(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    node = call.node
    value = model.value(node, scope)
    if value is None or value.kind != "engine":
        return
    options = {k.arg: k.value for k in node.keywords}
    if None in options or {"poolclass", "pool", "creator"} & set(options):
        return
    url = _constant(scope, node.args[0] if node.args else options.get("url"))
    if url is None or not _MEMORY.match(url) or "cache=shared" in url:
        return
    confidence = _confidence(scope, options)
    if confidence is not None:
        yield model.finding(
            RULE,
            scope,
            node,
            'Each thread gets an in-memory database of its own here: "no such table" in every '
            "thread but the one that created the tables. Add `poolclass=StaticPool`",
            confidence=confidence,
            because=[Because(scope, node, f"the URL is {url!r}")],
        )


def _confidence(scope: Scope, options: dict[str | None, ast.expr]) -> Confidence | None:
    arguments = options.get("connect_args")
    if arguments is not None and "check_same_thread" in ast.unparse(arguments):
        return "high" if "False" in ast.unparse(arguments) else None
    served = _SERVERS & {
        str(b.value).partition(":")[0].partition(".")[0]
        for bindings in scope.module.scope.bindings.values()
        for b in bindings
        if b.kind == "import"
    }
    return "medium" if served and scope.kind == "module" else None


def _constant(scope: Scope, node: ast.expr | None) -> str | None:
    """Return the text that *node* is, through names."""
    for _ in range(4):
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if not isinstance(node, ast.Name):
            return None
        bindings = next(
            (s.bindings[node.id] for s in scope.around() if node.id in s.bindings), None
        )
        if bindings is None or len(bindings) != 1 or not isinstance(bindings[0].value, ast.expr):
            return None
        node = bindings[0].value
    return None


RULE = Rule("SES304", "memory-sqlite-pool", "on", judge, fix="safe")
