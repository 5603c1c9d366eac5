"""A session is not closed on some path.

## What it does

Flags a session that a function makes and does not close on every way out: never, not after an
early ``return``, not when a statement raises. Also a session made inline and thrown away
(``SessionLocal().query(...)``), and one that an object makes for itself and never closes.

## Why it bites in production

The connection goes back to the pool only when the garbage collector comes by. Under load that is
too late: "QueuePool limit of size 5 overflow 10 reached, connection timed out". Until then the
server shows the connection as "idle in transaction", with its locks held.

## Example

```python
def count_users():
    session = SessionLocal()
    total = session.scalar(select(func.count(User.id)))
    session.close()  # not reached when the query fails
    return total
```

## Use instead

```python
def count_users():
    with SessionLocal() as session:
        return session.scalar(select(func.count(User.id)))
```

## When to ignore

In a short script whose process ends with the session.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Binding, CallFact, Scope, Use
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import (
    CLOSING,
    Owned,
    ancestry,
    fresh_call,
    marks,
    nested_use,
    on_connection,
    own_name,
    owned,
    stays_in_block,
    stored_in,
)
from sessionscope.check._paths import IDLE, OPEN, leave
from sessionscope.check._values import Value

_SHORT_LIVED = frozenset({"command", "start-up"})
_ENDS = (
    "until the garbage collector comes by its connection is missing from the pool "
    '("QueuePool limit reached")'
)


def judge(model: Model) -> Iterator[Finding]:
    """Find sessions that are left open."""
    for scope in model.functions:
        if is_migration(scope.module):
            continue
        seen = set[str]()
        for session in owned(model, scope):
            if session.name not in seen:
                seen.add(session.name)
                yield from _judge_local(model, session)
        yield from _judge_inline(model, scope)
        yield from _judge_stored(model, scope)


def _judge_local(model: Model, session: Owned) -> Iterator[Finding]:
    scope = session.scope
    if scope.function is None or nested_use(scope, session.name):
        return
    if any(use.role == "yield" for use in scope.uses.get(session.name, ())):
        return  # a provider: SES103
    found = marks(model, session)
    if not found.used and not found.idle:
        return
    exits, places = leave(scope.function.body, found)
    normal = exits.falls | exits.returned
    place: ast.stmt | None = None
    confidence: Confidence = "high"
    if normal & OPEN or (normal & IDLE and not found.closed):
        if not found.closed:
            how = "is never closed"
            confidence = "high" if normal & OPEN else "medium"
        else:
            how = "is not closed on every way out"
        place = places.get("return")
    elif exits.raised & OPEN and not found.given:
        place = places.get("error") or places.get("raise")
        how = "is not closed when a statement raises"
        confidence = "medium"
    else:
        return
    yield model.finding(
        RULE,
        scope,
        session.made,
        f"`{session.name}` {how}: {_ENDS}. Write "
        f"`{_with(session.value)} {_short(session.made)} as {session.name}:`",
        confidence=_softened(model, scope, confidence),
        because=[
            Because(scope, session.made, f"`{session.name}` is made here"),
            Because(scope, place, "and still open when the function is left here"),
        ],
        fix=stays_in_block(scope, session.name),
    )


def _with(value: Value) -> str:
    return "async with" if value.is_async else "with"


def _softened(model: Model, scope: Scope, confidence: Confidence) -> Confidence:
    """The process of a script ends soon after, and its sessions with it."""
    if model.runs_once(scope):
        return "low"
    context = "command" if _serves_a_command(model, scope) else model.in_context(scope)
    if context not in _SHORT_LIVED:
        return confidence
    return "medium" if confidence == "high" and context == "start-up" else "low"


def _serves_a_command(model: Model, scope: Scope) -> bool:
    """Return whether commands alone call what has its name: their process ends with it."""
    callers = model.calls_by_name.get(scope.name, [])
    return bool(callers) and all(model.in_context(c.scope) == "command" for c in callers)


def _short(node: ast.Call) -> str:
    return ast.unparse(node) if len(ast.unparse(node)) <= 40 else f"{ast.unparse(node.func)}(...)"


def _judge_inline(model: Model, scope: Scope) -> Iterator[Finding]:
    for call in scope.calls:
        if call.role not in {"method", "argument"} or not isinstance(call.owner, ast.Call):
            continue
        value = model.session(call.node, scope)
        if value is None or not value.fresh or value.kind != "session" or on_connection(value):
            continue
        if call.role == "method" and not _queries(call.owner):
            continue
        if call.role == "argument" and not _only_uses(model, scope, call):
            continue
        yield model.finding(
            RULE,
            scope,
            call.node,
            f"The session of `{_short(call.node)}` is thrown away unclosed: {_ENDS}. Write "
            f"`with {_short(call.node)} as session:`",
            confidence=_softened(model, scope, "high" if call.role == "method" else "medium"),
            because=[Because(scope, call.node, "made here, bound to no name")],
            fix=False,
        )


def _queries(owner: ast.Call) -> bool:
    function = owner.func
    return isinstance(function, ast.Attribute) and function.attr not in {
        *CLOSING,
        "begin",
        "__enter__",
        "__aenter__",
        "close_all",
    }


def _only_uses(model: Model, scope: Scope, call: CallFact) -> bool:
    """A function of the project gets it as a plain argument, and does not close it."""
    owner = call.owner
    if not isinstance(owner, ast.Call):
        return False
    target = model.called(owner, scope)
    if target is None or target.kind != "function" or target.is_generator:
        return False
    return not any(
        use.name in CLOSING or use.role in {"with", "return", "yield", "assign"}
        for uses in target.uses.values()
        for use in uses
    )


def _judge_stored(model: Model, scope: Scope) -> Iterator[Finding]:
    owner = stored_in(scope)
    if owner is None or scope.kind != "function":
        return
    prefix = own_name(scope)
    for path, bindings in scope.bindings.items():
        if not path.startswith(prefix) or path.count(".") != 1:
            continue
        for binding in bindings:
            made = fresh_call(model, scope, binding)
            name = path.removeprefix(prefix)
            value = model.session(made, scope)
            if value is None or value.kind != "session":
                continue
            if made is not None and not _ended(model, owner, name) and _kept_here(scope, binding):
                yield model.finding(
                    RULE,
                    scope,
                    made,
                    f"`{path}` is made by the object for itself and never closed: {_ENDS}. Let "
                    f"the object receive its session, or open one per unit of work",
                    confidence=_softened(model, scope, "medium"),
                    because=[Because(scope, made, f"`{path}` is made here")],
                    fix=False,
                )


def _kept_here(scope: Scope, binding: Binding) -> bool:
    """Names of an outer function that happen to look alike do not count."""
    return scope.method() is scope


def _ended(model: Model, owner: Scope, name: str) -> bool:
    """Return whether anything ends the session that instances of *owner* hold as *name*."""
    return any(
        _ends(use) and _may_be_of(model, scope, use, owner)
        for scope in model.scopes
        for path, uses in scope.uses.items()
        if path.endswith(f".{name}")
        for use in uses
    )


def _ends(use: Use) -> bool:
    return use.role in {"yield", "return"} or _closes(use)


def _closes(use: Use) -> bool:
    if use.role in {"method", "attribute"}:
        return use.name in CLOSING
    return use.role == "with" or (
        use.role == "argument"
        and isinstance(use.owner, ast.Call)
        and "clos" in ast.unparse(use.owner.func)
    )


def _may_be_of(model: Model, scope: Scope, use: Use, owner: Scope) -> bool:
    """Return whether the object whose attribute is used may be an instance of *owner*."""
    node = use.node
    if use.role == "method" and isinstance(node, ast.Call):
        node = node.func
    if use.role in {"method", "attribute"} and isinstance(node, ast.Attribute):
        node = node.value
    held = model.value(node.value, scope) if isinstance(node, ast.Attribute) else None
    if held is None:
        return _closes(use)  # ``return request.session`` proves nothing
    return isinstance(held.target, Scope) and any(
        {id(held.target), id(owner)} <= ancestry(model, each)
        for each in model.scopes
        if each.kind == "class"
    )


RULE = Rule("SES102", "session-not-closed", "on", judge, fix="unsafe")
