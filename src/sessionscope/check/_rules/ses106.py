"""A business function opens a session of its own.

## What it does

Flags a function that makes a session, although the code that calls it could hand it one. Opt-in:
``--select SES106``. It does not flag

- entry points: endpoints, tasks, commands, scripts, start-up, and what a library's decorator
  registers;
- providers: what yields or returns the session;
- callbacks: a function that is handed to a thread, a scheduler, an event, or started for itself
  (``asyncio.run(work())``), and what start-up and commands alone call;
- methods that a base class declares, or a base class that the checker cannot see may declare. A
  store behind an interface (``class SqlStore(Store)``) is the border of the unit of work: another
  store may keep the same promise over HTTP, so that no caller has a session for it.

What such a store does for itself is flagged: a helper that opens a second session, a method that
the interface does not know. So is a class without an interface that keeps an engine or a factory
(``self.session_factory``) and opens a session in each method: two of its methods in a row are two
transactions.

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

from sessionscope.check._entries import is_called_by_others
from sessionscope.check._facts import CallFact, Scope
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, is_migration
from sessionscope.check._ownership import on_connection


def judge(model: Model) -> Iterator[Finding]:
    """Find functions that should receive their session."""
    for scope in model.functions:
        if scope.function is None or is_migration(scope.module) or _may_open(model, scope):
            continue
        made = _made(model, scope)
        if made is not None and not is_called_by_others(model, scope):
            yield _finding(model, scope, made)


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
                return None if _given_away(scope, call) else call.node
    return None


def _asks_for_none(scope: Scope, test: ast.expr) -> bool:
    """``if db is None:``, or ``if own:`` after ``own = db is None``."""
    bindings = scope.bindings.get(test.id, ()) if isinstance(test, ast.Name) else ()
    asked = [b.value for b in bindings if isinstance(b.value, ast.Compare)]
    return any("None" in ast.unparse(node) for node in (test, *asked))


def _given_away(scope: Scope, call: CallFact) -> bool:
    """``return session, True`` provides it, too."""
    targets = call.owner.targets if isinstance(call.owner, ast.Assign) else []
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return any(
        isinstance(element, ast.Name) and element.id in names
        for outcome in scope.returns
        if isinstance(outcome.value, ast.Tuple)
        for element in outcome.value.elts
    )


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


def _finding(model: Model, scope: Scope, node: ast.Call) -> Finding:
    return model.finding(
        RULE,
        scope,
        node,
        f"`{scope.name}()` opens a session of its own: its work is a transaction apart from its "
        'caller\'s, on a second connection ("QueuePool limit reached" under load). Let it '
        "receive the session as a parameter",
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
