"""A streaming response reads from the request's session.

## What it does

Flags a generator given to ``StreamingResponse``, ``EventSourceResponse`` or their like that uses
a session which belongs to the request.

## Why it bites in production

The stream lasts as long as the slowest client. Either the session ends before the first byte is
sent (a closed session that silently reopens, DetachedInstanceError), or each open stream holds a
connection "idle in transaction": twenty slow clients and "QueuePool limit reached" for all others.

## Example

```python
@app.get("/export")
def export(db: Session = Depends(get_db)):
    def rows():
        for user in db.scalars(select(User)):
            yield user.name
    return StreamingResponse(rows())
```

## Use instead

```python
@app.get("/export")
def export():
    def rows():
        with SessionLocal() as session:
            for user in session.scalars(select(User)):
                yield user.name
    return StreamingResponse(rows())
```

## When to ignore

Where everything was read before the stream starts.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._escapes import Escape, captured, escapes, is_made_anew
from sessionscope.check._facts import STATEMENTS, CallFact, Scope, last_name
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model

_STREAMS = (
    "StreamingResponse",
    "EventSourceResponse",
    "Stream",
    "StreamingHttpResponse",
    "stream_with_context",
    "StreamingJSONResponse",
)


def judge(model: Model) -> Iterator[Finding]:
    """Find streams that outlive their session, or keep it."""
    for scope, call in model.calls_of(_STREAMS):
        if scope.kind == "function" and call.node.args + call.node.keywords:
            yield from _judge_stream(model, scope, call)


def _judge_stream(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    content = [k.value for k in call.node.keywords if k.arg in {"content", "iterator"}]
    node = next(iter([*call.node.args, *content]), None)
    if node is None:
        return
    found = _session_of(model, scope, node)
    if found is None:
        return
    yield model.finding(
        RULE,
        scope,
        call.node,
        f"The stream reads from the session of the request (`{found.shown}`): it is closed before "
        "the stream starts and silently reopens, or each open stream keeps a connection "
        '"idle in transaction". Open a session inside the generator',
        because=[
            Because(found.value.scope or scope, found.value.node, "the session is made here"),
            Because(found.scope, found.node, "the generator uses it here"),
        ],
    )


def _session_of(model: Model, scope: Scope, node: ast.expr, depth: int = 0) -> Escape | None:
    if isinstance(node, ast.Name) and depth < 2:
        for binding in reversed(scope.bindings.get(node.id, [])):
            if binding.kind == "value" and isinstance(binding.value, ast.expr):
                return _session_of(model, scope, binding.value, depth + 1)
    if isinstance(node, ast.Await):
        node = node.value
    if isinstance(node, ast.GeneratorExp):
        return _of_generator_expression(model, scope, node)
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name) and node.func.id in {"map", "filter"} and node.args:
        return _of_lambda(model, scope, node.args[0])
    function = model.value(node.func, scope)
    if function is None or not isinstance(function.target, Scope):
        return None
    target = function.target
    if not target.is_generator:
        return _indirect(model, scope, node, target, depth) if depth < 2 else None
    inside = captured(model, target, bound=function.bound is not None)
    if inside is not None and not inside.value.scoped:
        return inside
    given = next(escapes(model, [*node.args, *(k.value for k in node.keywords)], scope), None)
    return given if given is not None and _reads(model, target) else None


def _of_generator_expression(model: Model, scope: Scope, node: ast.GeneratorExp) -> Escape | None:
    """All but the first iterable is evaluated when the stream runs."""
    first, *others = node.generators
    later = [node.elt, *first.ifs, *others]
    for part in (inner for each in later for inner in ast.walk(each)):
        if not isinstance(part, ast.Call) or last_name(part) not in STATEMENTS:
            continue
        held = part.func.value if isinstance(part.func, ast.Attribute) else None
        value = model.session(held, scope)
        if held is None or value is None or value.kind != "session" or value.scoped:
            continue
        if not is_made_anew(held, value):
            return Escape(value, part, scope, ast.unparse(held))
    return None


def _of_lambda(model: Model, scope: Scope, node: ast.expr) -> Escape | None:
    function = model.value(node, scope)
    if function is None or function.kind != "function" or not isinstance(function.target, Scope):
        return None
    return captured(model, function.target, bound=function.bound is not None)


def _indirect(
    model: Model, scope: Scope, node: ast.Call, target: Scope, depth: int
) -> Escape | None:
    """A call that wraps a generator, ``iterate(rows())``, or a function that returns one."""
    places = [(scope, argument) for argument in node.args]
    places += [(target, o.value) for o in target.returns if o.value is not None]
    inner = (_session_of(model, where, value, depth + 1) for where, value in places)
    return next((found for found in inner if found is not None), None)


def _reads(model: Model, generator: Scope) -> bool:
    """Return whether the generator does anything with a session that it was given."""
    return any(
        use.name in STATEMENTS or use.role in {"argument", "element"}
        for path, uses in generator.uses.items()
        if path.partition(".")[0] in generator.bindings
        for use in uses
        if _is_session(model, use.node, use.role, generator)
    )


def _is_session(model: Model, node: ast.expr, role: str, scope: Scope) -> bool:
    if role == "method" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    found = model.value(node, scope)
    return found is not None and found.kind == "session" and not found.fresh


RULE = Rule("SES204", "session-in-stream", "on", judge)
