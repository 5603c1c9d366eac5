"""A session is used after the block that ended it.

## What it does

Flags a session that is used below its ``with`` block, and objects whose attributes are read there
although the commit inside the block has expired them.

## Why it bites in production

A closed session silently opens a new transaction, which nobody closes: "idle in transaction". An
expired object cannot be loaded any more: DetachedInstanceError.

## Example

```python
with SessionLocal() as session:
    user = session.get(User, 1)
orders = session.scalars(select(Order)).all()
```

## Use instead

```python
with SessionLocal() as session:
    user = session.get(User, 1)
    orders = session.scalars(select(Order)).all()
```

## When to ignore

Where the session is meant to be used again and is closed later.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._committing import commits_at_end
from sessionscope.check._facts import STATEMENTS, Binding, Block, Scope, Use, position
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._orm import expires, loaded_from
from sessionscope.check._ownership import CLOSING


def judge(model: Model) -> Iterator[Finding]:
    """Find uses of what its block has ended."""
    for scope in model.functions:
        for node, block in scope.withs:
            for item in node.items:
                name = item.optional_vars
                if isinstance(name, ast.Name):
                    value = model.infer.entered(model.value(item.context_expr, scope))
                    if value is not None and value.kind == "session" and not value.scoped:
                        yield from _session_after(model, scope, node, block, name.id)
                        yield from _objects_after(model, scope, node, block, name.id)


def _session_after(
    model: Model, scope: Scope, node: ast.With | ast.AsyncWith, block: Block, name: str
) -> Iterator[Finding]:
    for use in _after(scope, node, block, name):
        if use.role == "method" and use.name in STATEMENTS and use.name not in CLOSING:
            yield model.finding(
                RULE,
                scope,
                use.node,
                f"`{name}` was closed at the end of its `with` block: it opens a new transaction "
                'here that nobody ends ("idle in transaction"). Move this line into the block',
                because=[Because(scope, node, f"the block that ends `{name}`")],
            )
            return


def _after(scope: Scope, node: ast.With | ast.AsyncWith, block: Block, name: str) -> Iterator[Use]:
    """Yield the uses of *name* below the block, as far as it still has its value from there."""
    end = (node.end_lineno or 0, node.end_col_offset or 0)
    rebound = [b for b in scope.bindings.get(name, ()) if (b.line, b.column) > end]
    for use in scope.uses.get(name, ()):
        here = position(use.node)
        if here <= end or block not in use.block.chain():
            continue
        if any((b.line, b.column) <= here or _loops(b, use) for b in rebound):
            continue
        yield use


def _loops(binding: Binding, use: Use) -> bool:
    return binding.block in use.block.chain() and binding.line <= use.node.lineno


def _objects_after(
    model: Model, scope: Scope, node: ast.With | ast.AsyncWith, block: Block, name: str
) -> Iterator[Finding]:
    if not expires(model, scope, node, name):
        return
    end = _commit_at_end(model, scope, node, name)
    commits = [u.node for u in _inside(scope, node, name) if u.name == "commit"]
    if end is None and not commits:
        return
    commit = end or commits[-1]
    # What is expunged or refreshed before the end of the block: only the former stays loaded.
    spared = {"expunge"} if end is not None else {"refresh", "expunge", "merge"}
    last = position(node if end is not None else commit)
    refreshed = {
        argument.id
        for use in _inside(scope, node, name)
        if use.name in spared and position(use.node) > last
        for argument in (use.node.args if isinstance(use.node, ast.Call) else ())
        if isinstance(argument, ast.Name)
    }
    everything = any(use.name == "expunge_all" for use in _inside(scope, node, name))
    for loaded in loaded_from(model, scope, node, name):
        if loaded in refreshed or everything:
            continue
        for use in _after(scope, node, block, loaded):
            if use.role == "attribute" and not use.name.startswith("_"):
                yield model.finding(
                    RULE,
                    scope,
                    use.node,
                    f"`{loaded}` was expired by the commit and its session is closed: reading "
                    f"`.{use.name}` here raises DetachedInstanceError. Read it inside the block, "
                    "or set expire_on_commit=False",
                    because=[Because(scope, commit, "the commit that expires it")],
                    confidence="medium",
                )
                return


def _commit_at_end(
    model: Model, scope: Scope, node: ast.With | ast.AsyncWith, name: str
) -> ast.expr | None:
    """Return what ends the block of the session *name* with a commit, as ``Maker.begin()`` does."""
    for item in node.items:
        named = isinstance(item.optional_vars, ast.Name) and item.optional_vars.id == name
        if named and commits_at_end(model, scope, item.context_expr):
            return item.context_expr
    return None


def _inside(scope: Scope, node: ast.With | ast.AsyncWith, name: str) -> list[Use]:
    start, end = position(node), (node.end_lineno or 0, node.end_col_offset or 0)
    return [
        use
        for use in scope.uses.get(name, ())
        if use.role == "method" and start <= position(use.node) <= end
    ]


RULE = Rule("SES108", "use-after-scope", "info", judge)
