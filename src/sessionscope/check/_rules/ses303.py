"""An object of an AsyncSession is read after the commit that expired it.

## What it does

Flags attributes read after ``await session.commit()`` where the session's factory was made without
``expire_on_commit=False`` and the object was not refreshed.

## Why it bites in production

The commit expires all objects, so that reading an attribute loads it again, which an AsyncSession
cannot do behind a plain attribute: "MissingGreenlet: greenlet_spawn has not been called".

## Example

```python
async with async_sessionmaker(engine)() as session:
    session.add(user)
    await session.commit()
    return user.id
```

## Use instead

```python
factory = async_sessionmaker(engine, expire_on_commit=False)
```

## When to ignore

Where the attribute is set again after the commit.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._facts import Scope, Use, position
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._orm import expire_option, loads_object
from sessionscope.check._values import Value

_ENDS = frozenset({"refresh", "expunge", "expunge_all", "merge", "rollback", "close"})


def judge(model: Model) -> Iterator[Finding]:
    """Find reads that would need I/O behind a plain attribute."""
    for scope in model.functions:
        if not scope.is_async:
            continue
        for path, use, value in model.session_uses(scope):
            if use.name == "commit" and value.is_async and _expires(model, scope, value):
                found = _read_after(scope, path, use)
                if found is not None:
                    yield _finding(model, scope, found, use)
                    break


def _expires(model: Model, scope: Scope, value: Value) -> bool:
    return expire_option(value) is True


def _read_after(scope: Scope, path: str, commit: Use) -> tuple[str, Use] | None:
    """Return an object of the session and its first read after the commit."""
    after = position(commit.node)
    later = [
        use
        for use in scope.uses.get(path, ())
        if use.role == "method" and position(use.node) > after
    ]
    for name in _objects(scope, path, after):
        if any((b.line, b.column) > after for b in scope.bindings.get(name, ())):
            continue
        for use in scope.uses.get(name, ()):
            if (
                position(use.node) > after
                and commit.block in use.block.chain()
                and use.role == "attribute"
                and not use.name.startswith("_")
                and not any(
                    _renews(other, name) and position(other.node) < position(use.node)
                    for other in later
                )
            ):
                return name, use
    return None


def _renews(use: Use, name: str) -> bool:
    if use.name not in _ENDS:
        return False
    node = use.node
    return use.name in {"expunge_all", "close", "rollback"} or (
        isinstance(node, ast.Call)
        and any(isinstance(a, ast.Name) and a.id == name for a in node.args)
    )


def _objects(scope: Scope, path: str, before: tuple[int, int]) -> Iterator[str]:
    added = {
        argument.id
        for use in scope.uses.get(path, ())
        if use.name == "add" and isinstance(use.node, ast.Call)
        for argument in use.node.args
        if isinstance(argument, ast.Name) and position(use.node) < before
    }
    for name, bindings in scope.bindings.items():
        if name in added or any(
            loads_object(b, path) and (b.line, b.column) < before for b in bindings
        ):
            yield name


def _finding(model: Model, scope: Scope, found: tuple[str, Use], commit: Use) -> Finding:
    name, use = found
    return model.finding(
        RULE,
        scope,
        use.node,
        f"The commit has expired `{name}`: reading `.{use.name}` needs a query that a plain "
        "attribute cannot await (MissingGreenlet). Make the factory with expire_on_commit=False",
        confidence="medium",
        because=[Because(scope, commit.node, "the commit that expires it")],
    )


RULE = Rule("SES303", "async-expire-on-commit", "info", judge)
