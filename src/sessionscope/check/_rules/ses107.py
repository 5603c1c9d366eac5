"""A function closes the session that it received.

## What it does

Flags ``close()``, and ``with session:``, on a session that came in by parameter, by dependency or
through the constructor. Whoever made the session closes it. Where all callers are known it is
flagged if one of them still needs the session: it uses it later, or has written before.

## Why it bites in production

The caller goes on with a closed session: its objects raise DetachedInstanceError, its pending
changes are rolled back, and its next statement silently opens a new transaction that nobody
closes, "idle in transaction" on the server.

## Example

```python
def create_user(session: Session, name: str) -> User:
    user = User(name=name)
    session.add(user)
    session.commit()
    session.close()
    return user
```

## Use instead

```python
def create_user(session: Session, name: str) -> User:
    user = User(name=name)
    session.add(user)
    session.flush()
    return user
```

## When to ignore

In a function whose documented purpose is to end the unit of work.
"""

import ast
import re
from collections.abc import Iterator

from sessionscope.check._callers import goes_on_closed, returns_expired
from sessionscope.check._facts import Binding, Block, Scope, Use, decorator_names, position
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._model import Because, Model, dotted_root
from sessionscope.check._ownership import own_name, stored_in

# Functions whose very purpose is to end what they are given.
_ENDS = re.compile(
    r"clos|releas|dispos|clean|tear_?down|shut_?down|finish|finali[sz]e|remove|exit|__del__|stop|end$"
    r"|disconnect|terminate|reset|rollback|commit"
)


def judge(model: Model) -> Iterator[Finding]:
    """Find receivers that end what is not theirs."""
    for scope in model.functions:
        if scope.function is None or any(_ENDS.search(s.name) for s in scope.around()):
            continue
        if "listens_for" in decorator_names(scope):
            continue
        told = set[str]()
        for path, uses in scope.uses.items():
            for use in uses:
                if path in told or not _closes(use) or not _received(model, scope, path, use):
                    continue
                told.add(path)
                owner = _owner(model, scope, path)
                if owner is not None:
                    yield _finding(model, scope, path, use, owner)


def _closes(use: Use) -> bool:
    return (use.role == "method" and use.name in {"close", "aclose"}) or use.role == "with"


def _received(model: Model, scope: Scope, path: str, use: Use) -> bool:
    if _guarded(use.block) or _released_early(scope, path, use) or _done(model, scope, path, use):
        return False
    node = use.node
    if use.role == "method" and isinstance(node, ast.Call):
        node = node.func.value if isinstance(node.func, ast.Attribute) else node
    value = model.session(node, scope)
    if value is None or value.kind != "session" or value.scoped or value.fresh:
        return False
    root = dotted_root(path)
    if "." not in path:
        bindings = scope.bindings.get(path, [])
        return (
            len(bindings) == 1
            and bindings[0].kind == "parameter"
            and value.received
            and not _is_its_own(model, scope, bindings[0])
        )
    return (
        value.received
        and root + "." == own_name(scope)
        and path.count(".") == 1
        and stored_in(scope) is not None
        and path not in scope.bindings
        and not _is_scope(stored_in(scope))
    )


def _owner(model: Model, scope: Scope, path: str) -> Because | None:
    """Return who goes on with the session; a known caller that needs it no more does not."""
    names = {use.name for name in _names(scope, path) for use in scope.uses.get(name, ())}
    saved = "commit" in names
    unsaved = not saved and not names.isdisjoint({"add", "add_all", "delete", "merge"})
    goes_on = Because(scope, scope.function, "its owner goes on with it")
    if "." in path or unsaved or returns_expired(scope, path):
        return goes_on
    return goes_on_closed(model, scope, path, saved=saved)


def _names(scope: Scope, path: str) -> Iterator[str]:
    """``with db as session:`` is a second name of it."""
    yield path
    for name, bindings in scope.bindings.items():
        if any(
            b.kind == "with" and isinstance(b.value, ast.Name) and b.value.id == path
            for b in bindings
        ):
            yield name


def _is_its_own(model: Model, scope: Scope, binding: Binding) -> bool:
    """``def work(db=SessionLocal())``: nobody else has what the function makes for itself."""
    default = binding.value if isinstance(binding.value, ast.Call) else None
    made = model.session(default, scope.parent or scope)
    return made is not None and made.fresh


def _released_early(scope: Scope, path: str, use: Use) -> bool:
    """An endpoint that gives its connection back before it goes on with slower work."""
    function = scope.function
    bindings = scope.bindings.get(path, [])
    if function is None or use.role != "method" or use.block.kind != "body" or not bindings:
        return False
    slow = [
        position(inner)
        for node in function.body
        if position(node) > position(use.node)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Await | ast.With | ast.AsyncWith | ast.For | ast.Try)
    ]
    # What comes after the slow work may well take a connection again.
    return bool(slow) and not any(
        position(use.node) < position(other.node) < min(slow) for other in scope.uses[path]
    )


def _done(model: Model, scope: Scope, path: str, use: Use) -> bool:
    """An endpoint that commits, closes and answers: its provider alone goes on, and closes too."""
    return (
        model.context(scope) == "endpoint"
        and use.role == "method"
        and all(
            position(other.node) <= position(use.node) or other.block.kind == "except"
            for other in scope.uses[path]
        )
        and any(other.name == "commit" and other.block is use.block for other in scope.uses[path])
    )


def _is_scope(owner: Scope | None) -> bool:
    """A unit of work that is a context manager ends its session in one of its methods."""
    return owner is not None and bool({"__exit__", "__aexit__"} & set(owner.bindings))


def _guarded(block: Block) -> bool:
    """``if own_session:`` says that it is closed only where it was made."""
    return any(b.kind in {"if", "orelse"} for b in block.chain())


def _finding(model: Model, scope: Scope, path: str, use: Use, owner: Because) -> Finding:
    node = use.node
    confidence: Confidence = "high" if use.role == "method" else "medium"
    bindings = scope.bindings.get(path, [])
    argument = bindings[0].value if bindings else None
    return model.finding(
        RULE,
        scope,
        node,
        f"`{path}` was received and is closed here: its owner goes on with a closed session "
        "(DetachedInstanceError), whose next statement opens a transaction that nobody ends. "
        "Leave closing to whoever made it",
        confidence=confidence,
        because=[
            Because(
                scope,
                argument if isinstance(argument, ast.expr) else scope.function,
                f"`{path}` comes in here",
            ),
            *([owner] if owner.scope is not scope else []),
        ],
        fix=use.role == "method" and _is_statement(scope, node),
    )


def _is_statement(scope: Scope, call: ast.AST) -> bool:
    """Return whether *call* is a line of its own: nothing is lost with it but the close."""
    lines = [node for node in ast.walk(scope.node) if isinstance(node, ast.Expr)]
    values = [line.value for line in lines]
    return any((value.value if isinstance(value, ast.Await) else value) is call for value in values)


RULE = Rule("SES107", "receiver-closes-session", "on", judge, fix="unsafe")
