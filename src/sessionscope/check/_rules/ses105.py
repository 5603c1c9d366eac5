"""A session provider is driven by hand.

## What it does

Flags ``next(get_db())``, ``db = get_db()`` used as if it were a session, and
``async for db in get_db()`` left with ``break`` or ``return``.

## Why it bites in production

The generator of ``next(get_db())`` is garbage at once: its ``finally`` closes the session before
the first query. The session silently reopens, and then nobody closes it: connections pile up
until "QueuePool limit of size 5 overflow 10 reached".

## Example

```python
def send_report():
    db = next(get_db())
    rows = db.query(Sale).all()
```

## Use instead

```python
def send_report():
    with contextmanager(get_db)() as db:
        rows = db.query(Sale).all()
```

## When to ignore

Where the generator is kept in a variable and closed in a ``finally``. A session that is closed by
hand, in a ``finally``, by ``with closing(db):`` or ``with next(get_db()) as db:``, is not flagged:
it reopens, but comes back. Nor is ``for db in get_db()``: leaving that loop closes the generator at
once. ``next()`` of an asynchronous provider is flagged for what it is, a TypeError.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._committing import late_commit
from sessionscope.check._facts import SESSION_METHODS, CallFact, Scope, dotted, last_name
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model, contains, enclosing
from sessionscope.check._ownership import CLOSING, stays_in_block
from sessionscope.check._values import Value

_OF_SESSIONS = SESSION_METHODS - {"close", "aclose"}
_PLAIN_STEPS = frozenset({"next", "__next__", "send"})
_STEPS = frozenset({"__next__", "__anext__", "send", "asend"})


def judge(model: Model) -> Iterator[Finding]:
    """Find providers that are not run to their end."""
    for scope, call in model.calls_of(("next", "anext", *_STEPS)):
        yield from _stepped(model, scope, call)
    for scope in model.scopes:
        yield from _used_as_session(model, scope)
        yield from _left_loops(model, scope)


def _provider(model: Model, node: ast.expr | None, scope: Scope) -> Value | None:
    """Return the generator object that *node* stands for, if it gives sessions."""
    found = model.value(node, scope)
    if found is None or found.kind != "generator" or found.inner is None:
        return None
    return found if found.inner.kind in {"session", "registry"} else None


def _stepped(model: Model, scope: Scope, call: CallFact) -> Iterator[Finding]:
    node = call.node
    function = node.func
    if isinstance(function, ast.Name) and function.id in {"next", "anext"} and node.args:
        generator = node.args[0]
    elif isinstance(function, ast.Attribute) and function.attr in _STEPS:
        generator = function.value
    else:
        return
    found = _provider(model, generator, scope)
    # A generator with a name lives as long as the name: it is not garbage at once.
    if found is None or dotted(generator) is not None:
        return
    name = ast.unparse(generator.func if isinstance(generator, ast.Call) else generator)
    step = function.attr if isinstance(function, ast.Attribute) else function.id
    if found.is_async and step in _PLAIN_STEPS:
        yield _finding(model, scope, call, _no_iterator(node, name), found, fix=False)
    elif found.is_async or not _closed_by_hand(scope, call):
        message = _thrown_away(node, name, found)
        yield _finding(model, scope, call, message, found, fix=_can_be_wrapped(scope, call))


def _no_iterator(node: ast.Call, name: str) -> str:
    return (
        f"`{ast.unparse(node)}` fails each time: `{name}` is an asynchronous generator, "
        "\"TypeError: 'async_generator' object is not an iterator\". Receive the session as a "
        f"parameter, or in an `async def` write `async with asynccontextmanager({name})() as "
        "session:`"
    )


def _thrown_away(node: ast.Call, name: str, found: Value) -> str:
    if found.is_async:
        then = "its clean-up closes the session while it is in use, then the session reopens by "
        then += "itself and nobody answers for it"
    else:
        then = "it closes the session at once, the session reopens by itself and is never closed "
        then += "again"
    return (
        f"`{ast.unparse(node)}` throws the generator away: {then}, until "
        f'"QueuePool limit reached". Write `{_manager(found)}({name})() as session:`'
    )


def _closed_by_hand(scope: Scope, call: CallFact) -> bool:
    """Return whether the session is closed, where an error comes by, too."""
    return call.role == "with" or any(
        use.role == "with"
        or (use.role == "method" and use.name in CLOSING and enclosing(use.block, "finally"))
        or (
            use.role == "argument"
            and isinstance(use.owner, ast.Call)
            and last_name(use.owner) == "closing"
        )
        for name in _names(scope, call)
        for use in scope.uses.get(name, ())
    )


def _finding(
    model: Model, scope: Scope, call: CallFact, message: str, found: Value, *, fix: bool
) -> Finding:
    target = found.target if isinstance(found.target, Scope) else None
    because = [Because(target, target.function, "the provider")] if target else ()
    return model.finding(RULE, scope, call.node, message, because=because, fix=fix)


def _manager(found: Value) -> str:
    return "async with asynccontextmanager" if found.is_async else "with contextmanager"


def _can_be_wrapped(scope: Scope, call: CallFact) -> bool:
    """Return whether the session is a name that the rest of one block alone uses."""
    owner = call.owner
    statement = call.role in {"assign", "await"} and isinstance(owner, ast.Assign | ast.Await)
    names = _names(scope, call)
    return (
        statement
        and scope.kind == "function"
        and len(names) == 1
        and "." not in names[0]
        and len(call.node.args) == 1
        and isinstance(call.node.func, ast.Name)
        and stays_in_block(scope, names[0])
    )


def _names(scope: Scope, call: CallFact) -> list[str]:
    """Return what the outcome of *call* is called."""
    return [
        name
        for name, bindings in scope.bindings.items()
        for binding in bindings
        if binding.value is call.node
        or (isinstance(binding.value, ast.Await) and binding.value.value is call.node)
    ]


def _used_as_session(model: Model, scope: Scope) -> Iterator[Finding]:
    """``db = get_db()`` and then ``db.query()``."""
    if not scope.asked:
        return
    for path, uses in scope.uses.items():
        for use in uses:
            if use.role != "method" or use.name not in _OF_SESSIONS:
                continue
            node = use.node
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            found = _provider(model, node.func.value, scope)
            if found is not None:
                target = found.target if isinstance(found.target, Scope) else None
                yield model.finding(
                    RULE,
                    scope,
                    node,
                    f"`{path}` is the generator that the provider returns, not a session: "
                    f"`.{use.name}()` raises AttributeError. Write "
                    f"`with contextmanager(...)() as {path}:`",
                    because=[Because(target, target.function, "the provider")] if target else (),
                    fix=False,
                )
                break


def _left_loops(model: Model, scope: Scope) -> Iterator[Finding]:
    loops = {
        id(call.owner): call.owner
        for call in scope.calls
        if call.role == "loop" and isinstance(call.owner, ast.AsyncFor)
    }
    for loop in loops.values():
        found = _provider(model, loop.iter, scope)
        if found is None or not isinstance(loop.iter, ast.Call) or not _is_left(loop):
            continue
        target = found.target if isinstance(found.target, Scope) else None
        commit = late_commit(model, target) if target is not None else None
        because = [Because(target, target.function, "the provider")] if target else []
        if commit is not None and target is not None:
            because.append(Because(target, commit, "this commit never runs"))
        yield model.finding(
            RULE,
            scope,
            loop.iter,
            f"The loop over `{ast.unparse(loop.iter)}` is left before its end: {_then(commit)}. "
            f"Write `{_manager(found)}({ast.unparse(loop.iter.func)})() as session:`",
            because=because,
            confidence="medium" if commit is None else "high",
            fix=False,
        )


def _then(commit: ast.expr | None) -> str:
    if commit is not None:
        return "the provider is closed at its `yield`, and never comes to its commit"
    return (
        "the provider's clean-up does not run here but in a task that the event loop starts later, "
        "which keeps the connection until then, and hides its errors"
    )


def _is_left(loop: ast.AsyncFor) -> bool:
    def leaves(node: ast.AST, inner: bool) -> bool:
        if isinstance(node, ast.Return) or (isinstance(node, ast.Break) and not inner):
            return True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            return False
        inner = inner or isinstance(node, ast.For | ast.AsyncFor | ast.While)
        return any(leaves(child, inner) for child in ast.iter_child_nodes(node))

    return any(leaves(node, inner=False) for node in loop.body) and contains(loop, loop.body[0])


RULE = Rule("SES105", "provider-driven-by-hand", "on", judge, fix="unsafe")
