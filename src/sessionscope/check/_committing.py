"""Where a unit of work commits although nobody says ``commit()`` there."""

import ast

from sessionscope.check._facts import Scope, position
from sessionscope.check._model import Model
from sessionscope.check._values import Value


def late_commit(model: Model, scope: Scope) -> ast.expr | None:
    """Return the commit that happens when the generator goes on after its ``yield``."""
    first = next((o for o in scope.yields if model.session(o.value, scope) is not None), None)
    if first is None:
        return None
    for _, use, _ in model.session_uses(scope):
        late = use.name == "commit" and position(use.node) > position(first.node)
        if late and not any(b.kind == "except" for b in use.block.chain()):
            return use.node
    for block in first.block.chain():
        if isinstance(block.node, ast.With | ast.AsyncWith):
            for item in block.node.items:
                if commits_at_end(model, scope, item.context_expr):
                    return item.context_expr
    return None


def commits_at_end(model: Model, scope: Scope, node: ast.expr) -> bool:
    """Return whether leaving the block over *node* commits."""
    found = model.value(node, scope)
    if found is None or found.kind != "manager":
        return False
    if found.name == "begin":
        return "nested" not in ast.unparse(node)
    return isinstance(found.target, Scope) and _commits_itself(model, found.target, found)


def _commits_itself(model: Model, function: Scope, found: Value) -> bool:
    return function.is_generator and late_commit(model, function) is not None


def decorator_commits(model: Model, function: Scope) -> tuple[Scope, ast.expr] | None:
    """Return where a decorator of the project commits for *function* once it has returned."""
    for node in function.decorators:
        plain = node.func if isinstance(node, ast.Call) else node
        found = model.value(plain, function.parent or function)
        decorator = found.target if found is not None and found.kind == "function" else None
        if isinstance(decorator, Scope):
            for wrapper in decorator.within():
                commit = _commit_after_call(model, wrapper, decorator)
                if commit is not None:
                    return wrapper, commit
    return None


def _commit_after_call(model: Model, wrapper: Scope, decorator: Scope) -> ast.expr | None:
    for call in wrapper.calls:
        if not is_decorated(call.node.func, wrapper, decorator):
            continue
        for block in call.block.chain():
            if block.kind == "with" and isinstance(block.node, ast.With | ast.AsyncWith):
                for item in block.node.items:
                    if commits_at_end(model, wrapper, item.context_expr):
                        return item.context_expr
        for uses in wrapper.uses.values():
            for use in uses:
                late = use.role == "method" and position(use.node) > position(call.node)
                if late and use.name == "commit":
                    return use.node
    return None


def is_decorated(node: ast.expr, wrapper: Scope, decorator: Scope) -> bool:
    """Return whether *node* is a parameter of the decorator, or of a function inside of it."""
    if not isinstance(node, ast.Name) or node.id in wrapper.bindings:
        return False
    return any(
        binding.kind == "parameter"
        for around in wrapper.around()
        if around in list(decorator.within())
        for binding in around.bindings.get(node.id, ())
    )
