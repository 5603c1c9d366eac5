"""A database error is swallowed, and the session is used again.

## What it does

Flags an ``except`` around ``flush()``, ``commit()`` or ``execute()`` that neither rolls back nor
raises, with the session used afterwards: in the function, by its caller, by another method of the
object that holds it, or by the commit at the end of the block; unless a savepoint stands around it.

It does not flag a statement that PostgreSQL never sees, because a guard on the dialect stands
around it, above it, or around each call of its function: ``if bind.dialect.name == "sqlite":``; or
because its module imports, at its top, from ``sqlalchemy.dialects`` what belongs to other databases
alone. A flush or a commit that fails there is flagged all the same: the session itself refuses what
comes next, on any database. Nor does it flag an error after which the project's session class rolls
back by itself, nor one that a caller who has passed no session is told by ``return False``.

## Why it bites in production

After a failed flush every further use raises PendingRollbackError. After a failed statement
PostgreSQL answers each next one with "current transaction is aborted", and a COMMIT with ROLLBACK:
it returns as if all was well, and nothing was written.

## Example

```python
for row in rows:
    try:
        session.add(User(**row))
        session.commit()
    except IntegrityError:
        log.warning("already there")
```

## Use instead

```python
    except IntegrityError:
        session.rollback()
        log.warning("already there")
```

In a loop whose commit comes later, a rollback would lose the rows of the earlier turns, and nobody
would be told. There a savepoint stands around the flush. For that reason ``--fix`` writes no
rollback in a loop over one session:

```python
for row in rows:
    try:
        with session.begin_nested():
            session.add(User(**row))
            session.flush()
    except IntegrityError:
        log.warning("already there")
session.commit()
```

## When to ignore

Where the error cannot come from the database.
"""

import ast
from collections.abc import Iterator

from sessionscope.check._dialects import keeps_postgresql_out, speaks_sqlite_alone
from sessionscope.check._facts import Block, Scope, Use, dotted, last_name, position, words
from sessionscope.check._finding import Confidence, Finding, Rule
from sessionscope.check._handlers import (
    BROAD,
    ENDS,
    ERRORS,
    acts,
    calls_one_that_acts,
    caught_by,
    returns_false,
)
from sessionscope.check._lifetime import Swallowed, goes_on
from sessionscope.check._model import Because, Model, contains, dotted_root
from sessionscope.check._reach import begins, bound_in, loops_over, reaches
from sessionscope.check._recovery import recovered
from sessionscope.check._values import Value

_FAILS = frozenset(
    {
        "flush",
        "commit",
        "execute",
        "scalar",
        "scalars",
        "exec",
        "merge",
        "refresh",
        "bulk_save_objects",
        "bulk_insert_mappings",
    }
)
_WRITES = frozenset({"flush", "commit", "merge", "bulk_save_objects", "bulk_insert_mappings"})
_CHANGES = words(
    "add add_all delete update insert text setattr flush merge bulk_save_objects "
    "bulk_insert_mappings"
)


def judge(model: Model) -> Iterator[Finding]:
    """Find transactions that go on after an error."""
    # On SQLite a statement that fails leaves the transaction as it was.
    failing = (_WRITES if speaks_sqlite_alone(model) else _FAILS) - recovered(model)
    for scope in model.functions:
        if not scope.tries:
            continue
        uses = model.session_uses(scope)
        if uses:
            for node, block in scope.tries:
                yield from _judge_try(model, scope, node, block, uses, failing)


def _judge_try(
    model: Model,
    scope: Scope,
    node: ast.Try,
    block: Block,
    known: list[tuple[str, Use, Value]],
    may_fail: frozenset[str],
) -> Iterator[Finding]:
    uses = [(path, use) for path, use, _ in known]
    tried = [
        (path, use)
        for path, use in uses
        if use.name in may_fail
        and _directly_in(use.block, node)
        and not _in_savepoint(use.block, node)
        and (use.name in _WRITES or not keeps_postgresql_out(model, scope, use.node, use.block))
    ]
    if not tried or ("execute" not in may_fail and _only_reads(node)):
        return
    path, failing = next(((p, u) for p, u in tried if u.name in _WRITES), tried[0])
    looped = bool(loops_over(scope, path, block)) or _is_called_in_loop(model, scope, path)
    for handler in node.handlers:
        caught = caught_by(handler)
        if (
            caught is None
            or acts(handler, path)
            or calls_one_that_acts(model, scope, handler)
            or (caught in BROAD and failing.name not in _WRITES and len(node.body) > 3)
        ):
            continue
        after = _used_after(scope, node, block, handler, path, uses)
        if after is not None:
            text = f"and `{path}` is used again in line {after.node.lineno}"
            then = Because(scope, after.node, "and the session is used again here")
            yield _finding(model, scope, handler, path, failing, caught, text, then, looped)
            return
        later = _left_behind(model, scope, node, handler, path, failing, caught, known)
        if later is not None:
            text = f"and whoever holds `{path}` goes on with it"
            yield _finding(model, scope, handler, path, failing, caught, text, later, looped)
            return


def _only_reads(node: ast.Try) -> bool:
    """A commit after reads alone has nothing that could fail, where a failed read does no harm."""
    return not any(
        (isinstance(inner, ast.Call) and last_name(inner) in _CHANGES)
        or (isinstance(inner, ast.Attribute | ast.Subscript) and isinstance(inner.ctx, ast.Store))
        for statement in node.body
        for inner in ast.walk(statement)
    )


def _left_behind(
    model: Model,
    scope: Scope,
    node: ast.Try,
    handler: ast.ExceptHandler,
    path: str,
    failing: Use,
    caught: str,
    known: list[tuple[str, Use, Value]],
) -> Because | None:
    """Return who goes on with the session after the function, unless it is ended here."""
    end = position(node)
    for other, use, _ in known:
        if other == path and use.name in ENDS and position(use.node) > end:
            return None
    value = next(value for _, use, value in known if use is failing)
    written = failing.name in _WRITES
    # Who catches an error of the database by its name has seen it come.
    expected = written or caught in ERRORS
    told = returns_false(handler)
    return goes_on(model, Swallowed(scope, path, failing, value, expected, written, told))


def _directly_in(block: Block, node: ast.Try) -> bool:
    """Return whether an error in *block* reaches the handlers of *node*."""
    for around in block.chain():
        if around.kind == "try":
            return around.node is node
        if around.kind in {"except", "else", "finally"}:
            return False
    return False


def _in_savepoint(block: Block, node: ast.Try) -> bool:
    """A block inside the ``try`` that ends its own transaction or savepoint."""
    for around in block.chain():
        if around.node is node:
            return False
        if isinstance(around.node, ast.With | ast.AsyncWith) and around.kind == "with":
            return True
    return False


def _used_after(
    scope: Scope,
    node: ast.Try,
    block: Block,
    handler: ast.ExceptHandler,
    path: str,
    uses: list[tuple[str, Use]],
) -> Use | None:
    """Return the next use of the session on a way out of the handler."""
    mine = [use for other, use in uses if other == path]
    inside = next((u for u in mine if contains(handler, u.node)), None)
    if inside is not None:
        return None if inside.name in ENDS else inside
    last = handler.body[-1]
    if isinstance(last, ast.Return):
        return None
    end = (node.end_lineno or 0, node.end_col_offset or 0)
    loop = next((b for b in block.chain() if b.kind == "loop"), None)
    if isinstance(last, ast.Break) and loop is not None and loop.parent is not None:
        end = (getattr(loop.node, "end_lineno", 0), getattr(loop.node, "end_col_offset", 0))
        block = loop.parent
    if not isinstance(last, ast.Continue):
        for use in mine:
            if position(use.node) > end and reaches(block, use.block):
                return None if use.name in ENDS else use
    if loop is not None and not isinstance(last, ast.Break):
        if bound_in(scope, path, loop):
            return None
        return next((u for u in mine if loop in u.block.chain()), None)
    return None


def _is_called_in_loop(model: Model, scope: Scope, path: str) -> bool:
    """Return whether a loop calls the function with one session in each of its turns."""
    name = dotted_root(path)
    if not any(b.kind == "parameter" for b in scope.bindings.get(name, ())):
        return False
    for caller in model.callers(scope):
        passed = model.argument_for(caller.call.node, scope, name)
        held = (dotted(passed) if passed is not None else None) or path
        if loops_over(caller.scope, held, caller.call.block):
            return True
    return False


def _mend(path: str, failing: Use, *, looped: bool, awaited: bool) -> str:
    line = f"{'async ' if awaited else ''}with {path}.begin_nested():"
    if any(begins(block, path) for block in failing.block.chain()):
        return f"Write `{line}` around it: a rollback would end the transaction of its block"
    if looped and failing.name != "commit":
        return f"Write `{line}` around it: a rollback would lose the rows of the earlier turns"
    return "Roll back first, or use begin_nested()"


def _consequence(failing: Use) -> str:
    if failing.name in _WRITES:
        return "PendingRollbackError"
    return (
        'PostgreSQL answers each next statement with "current transaction is aborted", and a '
        "COMMIT with ROLLBACK"
    )


def _finding(
    model: Model,
    scope: Scope,
    handler: ast.ExceptHandler,
    path: str,
    failing: Use,
    caught: str,
    then: str,
    because: Because,
    looped: bool,
) -> Finding:
    awaited = any(call.node is failing.node and call.role == "await" for call in scope.calls)
    mend = _mend(path, failing, looped=looped, awaited=awaited)
    confidence: Confidence = "high" if caught in ERRORS or failing.name in _WRITES else "medium"
    return model.finding(
        RULE,
        scope,
        failing.node,
        f"An error of `{path}.{failing.name}()` is swallowed in line {handler.lineno} without a "
        f"rollback, {then}: {_consequence(failing)}. {mend}",
        confidence=confidence,
        because=[
            Because(scope, failing.node, "may fail here" + (", awaited" if awaited else "")),
            Because(scope, handler.body[0], "the error ends here"),
            because,
        ],
        fix=not looped,
    )


RULE = Rule("SES402", "swallowed-db-error", "on", judge, fix="unsafe")
