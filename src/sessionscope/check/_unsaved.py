"""What a function writes and leaves to others to commit."""

import ast
from collections.abc import Iterator
from typing import NamedTuple, cast

from sessionscope.check._committing import decorator_commits
from sessionscope.check._facts import (
    Block,
    CallFact,
    Scope,
    dotted,
    last_name,
    parameters,
    position,
    words,
)
from sessionscope.check._model import Because, Model
from sessionscope.check._ownership import own_name

_WRITES = words(
    "add add_all delete merge flush bulk_save_objects bulk_insert_mappings bulk_update_mappings"
)
_ENDS = frozenset({"commit", "rollback", "close", "aclose", "reset"})
_STATEMENTS = frozenset({"execute", "exec", "scalar", "scalars"})
_CHANGES = frozenset({"insert", "update", "delete"})
_DEPTH = 6


class Writes(NamedTuple):
    """What becomes of the writes of one call of a function."""

    left: Because | None = None  # the last one that nobody has committed at its end
    ends: bool = False  # it commits, or drops what was written
    at_await: Because | None = None  # one that was not yet committed while it waited
    unknown: Because | None = None  # where the session goes to somebody who may write


class _Step(NamedTuple):
    place: tuple[int, int]
    block: Block
    writes: Writes
    waits: bool = False


def writes(model: Model, function: Scope, path: str, depth: int = 0) -> Writes:
    """Return what *function* writes to the session *path*, here and in what it calls.

    With "self." for *path* it is any session that the object holds.
    """
    key = ("writes", path, depth)  # of which the deepest know less
    if key not in function.memo:
        function.memo[key] = _in_order(model, function, path, depth)
    return cast("Writes", function.memo[key])


def _in_order(model: Model, function: Scope, path: str, depth: int) -> Writes:
    left: Because | None = None
    at_await: Because | None = None
    unknown: Because | None = None
    ends = False
    ended: list[Block] = []
    steps = [*_own(model, function, path), *_of_calls(model, function, path, depth)]
    for step in sorted(steps, key=lambda step: step.place):
        if any(block.kind == "except" for block in step.block.chain()):
            continue
        unknown = step.writes.unknown or unknown
        at_await = at_await or step.writes.at_await or (left if step.waits else None)
        if step.writes.ends:
            left, unknown, ends = None, None, True
            ended.append(step.block)
        if step.writes.left is not None and not _is_committed(step.block, path, ended):
            left = step.writes.left
    if left is not None and decorator_commits(model, function) is not None:
        return Writes(None, ends=True, at_await=at_await)
    return Writes(left, ends, at_await, unknown)


def _own(model: Model, function: Scope, path: str) -> Iterator[_Step]:
    """Yield what the function itself does with the session."""
    for name in _paths(model, function, path):
        for use in function.uses.get(name, ()):
            node = use.node
            if use.role != "method" or not isinstance(node, ast.Call):
                continue
            if use.name in _ENDS:
                yield _Step(position(node), use.block, Writes(ends=True))
            elif use.name in _WRITES or _changes(function, node, use.name):
                left = Because(function, node, f"`{function.name}` writes here")
                yield _Step(position(node), use.block, Writes(left))
    for call in function.calls:
        if call.name in _CHANGES and _queries(call.node, path):
            left = Because(function, call.node, f"`{function.name}` writes here")
            yield _Step(position(call.node), call.block, Writes(left))


def _paths(model: Model, function: Scope, path: str) -> list[str]:
    if path != "self.":
        return [path]
    own = own_name(function)
    found = {name for name, _, _ in model.session_uses(function) if name.startswith(own)}
    return sorted(found)


def _changes(function: Scope, call: ast.Call, name: str) -> bool:
    """``session.execute(update(User)...)``, with the statement here or in a line above."""
    if name not in _STATEMENTS or not call.args:
        return False
    node = call.args[0]
    if isinstance(node, ast.Name):
        values = [b.value for b in function.bindings.get(node.id, ())]
        return any(isinstance(v, ast.expr) and _is_change(v) for v in values)
    return _is_change(node)


def _is_change(node: ast.expr) -> bool:
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inner = node.func.value
        if last_name(node) in _CHANGES and not isinstance(inner, ast.Call):
            return True
        node = inner
    return isinstance(node, ast.Call) and last_name(node) in _CHANGES


def _queries(call: ast.Call, path: str) -> bool:
    """``session.query(User).filter(...).delete()``."""
    node: ast.expr = call
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "query":
            base = dotted(node.func.value) or ""
            return base == path or (path == "self." and base.startswith(path))
        node = node.func.value
    return False


def _is_committed(block: Block, path: str, ended: list[Block]) -> bool:
    """In ``with session.begin():``, or in the ``else`` of what commits, as its caller wished."""
    return any(
        around.kind == "orelse"
        and any(other.node is around.node for end in ended for other in end.chain())
        for around in block.chain()
    ) or any(
        isinstance(around.node, ast.With | ast.AsyncWith)
        and any(
            isinstance(item.context_expr, ast.Call)
            and last_name(item.context_expr) == "begin"
            and (dotted(item.context_expr.func) or "").startswith(f"{path.removesuffix('.')}.")
            for item in around.node.items
        )
        for around in block.chain()
    )


def _of_calls(model: Model, function: Scope, path: str, depth: int) -> Iterator[_Step]:
    """Yield what the functions do that the session is handed to, or whose object holds it."""
    for call in function.calls:
        waits = call.role == "await"
        found = _of_call(model, function, call, path, depth) if depth < _DEPTH else Writes()
        if waits or found != Writes():
            yield _Step(position(call.node), call.block, found, waits)


def _of_call(model: Model, function: Scope, call: CallFact, path: str, depth: int) -> Writes:
    handed = _handed(model, function, call.node, path)
    if handed is None and not isinstance(call.node.func, ast.Attribute):
        return Writes()
    value = model.value(call.node.func, function)
    if value is None or value.kind not in {"function", "class"}:
        return _handed_away(function, call) if handed is not None else Writes()
    target = value.target
    if value.kind == "class" or not isinstance(target, Scope) or target is function:
        return Writes()
    if handed is not None:
        name = _parameter(model, call.node, target, handed)
        return writes(model, target, name, depth + 1) if name else Writes()
    if value.bound is None or target.owner_class is None:
        return Writes()
    return writes(model, target, "self.", depth + 1)


def _handed_away(function: Scope, call: CallFact) -> Writes:
    shown = ast.unparse(call.node.func)
    return Writes(unknown=Because(function, call.node, f"`{shown}` gets the session here"))


def _handed(model: Model, function: Scope, call: ast.Call, path: str) -> ast.expr | None:
    """Return the argument of *call* that is the session."""
    names = _paths(model, function, path)
    for node in (*call.args, *(k.value for k in call.keywords)):
        if dotted(node) in names:
            return node
    return None


def _parameter(model: Model, call: ast.Call, target: Scope, node: ast.expr) -> str | None:
    if isinstance(target.node, ast.Module | ast.ClassDef):
        return None
    for argument, _ in parameters(target.node):
        if model.argument_for(call, target, argument.arg) is node:
            return argument.arg
    return None
