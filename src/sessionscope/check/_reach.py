"""Where control may come to after a block, with the same session."""

import ast
from typing import cast

from sessionscope.check._facts import Block, Scope, last_name

_LEAVES = (ast.Return, ast.Raise, ast.Continue)


def reaches(block: Block, other: Block, path: str = "") -> bool:
    """Return whether control that leaves *block* at its end may come to *other*, further down.

    A ``with`` may have ended the session *path*; where no path is given, any may.
    """
    around = list(other.chain())
    inner: Block | None = block
    while inner is not None:
        if inner in around:
            return True
        if isinstance(_last(inner), _LEAVES) or (inner.kind == "with" and _holds(inner, path)):
            return False
        if inner.parent in around and _is_instead(inner, around, inner.parent):
            return False
        inner = inner.parent
    return False


def _last(block: Block) -> ast.stmt | None:
    """Return the statement that ends *block*."""
    name = {"orelse": "orelse", "else": "orelse", "finally": "finalbody"}.get(block.kind, "body")
    body = cast("list[ast.stmt] | ast.expr", getattr(block.node, name, []))
    return body[-1] if isinstance(body, list) and body else None


def _holds(block: Block, path: str) -> bool:
    node = block.node
    if not path or not isinstance(node, ast.With | ast.AsyncWith):
        return True
    return any(
        path == ast.unparse(part) or ast.unparse(part).startswith(f"{path}.")
        for item in node.items
        for part in (item.optional_vars, item.context_expr)
        if part is not None
    )


def _is_instead(block: Block, around: list[Block], parent: Block | None) -> bool:
    """Return whether the other place is in a branch that runs where *block* does not."""
    branch = next((b for b in around if b.parent is parent), None)
    match branch:
        case Block(kind="orelse"):
            return branch.node is block.node
        case Block(kind="except"):
            return isinstance(block.node, ast.Try) and branch.node in block.node.handlers
        case Block(kind="else", node=ast.Try(handlers=handlers)):
            return block.node in handlers
        case Block(kind="case"):
            return block.kind == "case"
        case _:
            return False


def begins(block: Block, path: str) -> bool:
    """Return whether *block* is one transaction of the session *path*, by ``begin()``."""
    if block.kind != "with" or not isinstance(block.node, ast.With | ast.AsyncWith):
        return False
    return any(
        ast.unparse(item.context_expr) == f"{path}.begin()"
        or (
            isinstance(item.context_expr, ast.Call)
            and last_name(item.context_expr) == "begin"
            and item.optional_vars is not None
            and ast.unparse(item.optional_vars) == path
        )
        for item in block.node.items
    )


def bound_in(scope: Scope, path: str, loop: Block) -> bool:
    """Return whether each turn of *loop* binds *path* anew: its session forgets the error."""
    return any(loop in binding.block.chain() for binding in scope.bindings.get(path, ()))


def loops_over(scope: Scope, path: str, block: Block) -> list[Block]:
    """Return the loops around *block* that use one session in each of their turns."""
    return [b for b in block.chain() if b.kind == "loop" and not bound_in(scope, path, b)]
