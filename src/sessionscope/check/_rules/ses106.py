"""A business function opens a session of its own.

## What it does

Flags a function that makes a session, although the code that calls it could hand it one. Opt-in:
``--select SES106``.

**A store behind an interface is not flagged.** Where a class implements methods that a base class
declares, or that a base class which the checker cannot see may declare (``class SqlStore(Store)``),
these methods are the border of the unit of work: another store keeps the same promise over HTTP or
in memory, so that no caller has a session for it. What such a store does for itself is flagged: a
helper that opens a second session, a method that the interface does not know.

A class that names no interface as its base is no such store, even if a ``Protocol`` describes it.
If it keeps an engine or a factory (``self.session_factory``) and opens a session in each method, it
is flagged, because two of its methods in a row are two transactions.

It does not flag either

- entry points: endpoints, tasks, commands, scripts, start-up, and what a library's decorator
  registers;
- providers and factories: what yields or returns the session or an object that holds it, and what
  receives the factory as a parameter, so that its caller has decided;
- callbacks: a function that is handed on (to a thread, a scheduler, in a table, as a result) or is
  started for itself (``asyncio.run(work())``, ``gather``, a lambda), and what start-up and commands
  alone call;
- starters: what starts a thread or a task or fills a queue must have committed before, which a
  session of its caller has not;
- functions that nobody calls, where the project's entry points are among the files that are
  checked: they are dead, or called in a way that the checker does not see. ``--confidence low``
  shows them.

A call that is seen makes the finding sure; a call that may be meant, of medium confidence.

## Why it bites in production

What two such functions do is two transactions: one can commit and the other fail. A caller that
holds a session of its own takes a second connection from the pool, and under load waits for it
for ever: "QueuePool limit of size 5 overflow 10 reached". Tests cannot roll back what it commits.

## Example

```python
def get_user(user_id):
    with SessionLocal() as session:
        return session.get(User, user_id)
```

## Use instead

```python
def get_user(session: Session, user_id):
    return session.get(User, user_id)
```

## When to ignore

Where a function is an entry point that the checker does not know as one, or the class is the
border of the unit of work by the project's own rule: ``per-file-ignores``.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._entries import (
    has_entry_points,
    is_called_by_others,
    is_never_called,
    starts_another,
)
from sessionscope.check._facts import CallFact, Role, Scope, last_name
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import goes_along, on_connection
from sessionscope.check._values import Value

_GIVES = frozenset[Role]({"return", "yield"})


def judge(model: Model) -> Iterator[Finding]:
    """Find functions that should receive their session."""
    in_view = has_entry_points(model)
    for scope in model.functions:
        if scope.function is None or is_migration(scope.module) or _may_open(model, scope):
            continue
        made = _made(model, scope)
        if made is None or is_called_by_others(model, scope) or starts_another(model, scope):
            continue
        confidence: Confidence = "high" if model.callers(scope) else "medium"
        if in_view and is_never_called(model, scope):
            confidence = "low"
        yield _finding(model, scope, made, confidence)


def _made(model: Model, scope: Scope) -> ast.Call | None:
    """Return the call with which *scope* makes a session for itself."""
    for call in scope.calls:
        value = model.session(call.node, scope)
        if value is None or value.kind != "session" or on_connection(value):
            continue
        if value.fresh and value.node is call.node:
            guarded = any(
                isinstance(b.node, ast.If) and _asks_for_none(scope, b.node.test)
                for b in call.block.chain()
            )
            if not guarded and call.role not in {"return", "yield", "element"}:
                if _is_received(call, value) or _given_away(scope, call):
                    return None
                return call.node
    return None


def _asks_for_none(scope: Scope, test: ast.expr) -> bool:
    """``if db is None:``, or ``if own:`` after ``own = db is None``."""
    bindings = scope.bindings.get(test.id, ()) if isinstance(test, ast.Name) else ()
    asked = [b.value for b in bindings if isinstance(b.value, ast.Compare)]
    return any("None" in ast.unparse(node) for node in (test, *asked))


def _is_received(call: CallFact, value: Value) -> bool:
    """``factory()``, where ``factory`` is a parameter: whoever passed it has decided."""
    factory = value.bound
    return isinstance(call.node.func, ast.Name) and factory is not None and factory.received


def _given_away(scope: Scope, call: CallFact) -> bool:
    """``return session, True`` provides it, too, and so does ``yield Repository(session)``."""
    return _in_object(scope, call.role, call.owner) or any(
        use.role in _GIVES
        or (use.role == "element" and isinstance(use.owner, ast.Return | ast.Yield))
        or _in_object(scope, use.role, use.owner)
        for name in _names_of(call)
        for use in scope.uses.get(name, ())
    )


def _in_object(scope: Scope, role: Role, owner: ast.AST) -> bool:
    """Return whether what is used so goes into an object that the function makes for others."""
    return (
        role == "argument"
        and isinstance(owner, ast.Call)
        and last_name(owner)[:1].isupper()
        and goes_along(scope, owner, _GIVES)
    )


def _names_of(call: CallFact) -> Iterator[str]:
    """Yield the names that the session gets."""
    match call.owner:
        case ast.Assign(targets=targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        case ast.With(items=items) | ast.AsyncWith(items=items):
            for item in items:
                if item.context_expr is call.node and isinstance(item.optional_vars, ast.Name):
                    yield item.optional_vars.id
        case _:
            pass


def _may_receive(scope: Scope) -> bool:
    """A parameter like ``session: Session | None``: it opens one where it received none."""
    return any(
        binding.kind == "parameter"
        and binding.annotation is not None
        and "Session" in (text := ast.unparse(binding.annotation))
        and ("None" in text or "Optional" in text)
        for bindings in scope.bindings.values()
        for binding in bindings
    )


def _finding(model: Model, scope: Scope, node: ast.Call, confidence: Confidence) -> Finding:
    return model.finding(
        RULE,
        scope,
        node,
        f"`{scope.name}()` opens a session of its own: its work is a transaction apart from its "
        'caller\'s, on a second connection ("QueuePool limit reached" under load). Let it '
        "receive the session as a parameter",
        confidence=confidence,
        because=[
            Because(scope, scope.function, f"`{scope.qualname}` is no entry point"),
            *(Because(c.scope, c.call.node, "is called here") for c in model.callers(scope)[:1]),
        ],
    )


def _may_open(model: Model, scope: Scope) -> bool:
    if model.in_context(scope) or model.runs_once(scope) or _may_receive(scope):
        return True
    made = model.infer.result(scope)
    inner = made.inner if made is not None and made.kind in {"generator", "manager"} else made
    gives = inner is not None and inner.kind == "session"
    return gives or scope.name in {"__init__", "__enter__", "__aenter__", "run"}


RULE = Rule("SES106", "function-opens-own-session", "opt-in", judge)
