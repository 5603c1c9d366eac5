"""What an annotation says about a value: the types of sessions, and what wraps them."""

import ast
from collections.abc import Callable, Iterable

from sessionscope.check._facts import Scope, dotted
from sessionscope.check._values import (
    DATABASES,
    Value,
    instance_of,
    is_dependency,
    is_extension,
)

_DEPTH = 24
_SUBSCRIPTS_OF_ITEMS = frozenset({"Optional", "Union", "Final", "ClassVar", "Required", "Mapped"})
_YIELDING = frozenset(
    {"Generator", "Iterator", "Iterable", "AsyncGenerator", "AsyncIterator", "AsyncIterable"}
)
_MANAGING = frozenset(
    {
        "ContextManager",
        "AbstractContextManager",
        "AsyncContextManager",
        "AbstractAsyncContextManager",
        "_GeneratorContextManager",
    }
)
_AWAITING = frozenset({"Awaitable", "Coroutine"})


class Annotations:
    """Reads annotations; what the names in them stand for, others tell."""

    def __init__(
        self,
        expression: Callable[[ast.expr | None, Scope], Value | None],
        instance: Callable[[Scope], Value],
        provided: Callable[[ast.Call, Scope], Value | None],
    ) -> None:
        self._expression = expression
        self._instance = instance
        self._provided = provided
        self._depth = 0
        self._parsed: dict[int, ast.expr | None] = {}

    def value(self, node: ast.expr | None, scope: Scope) -> Value | None:
        """Return what a value annotated with *node* stands for."""
        if self._depth > _DEPTH:
            return None
        self._depth += 1
        try:
            return self._annotated(node, scope)
        finally:
            self._depth -= 1

    def _annotated(self, node: ast.expr | None, scope: Scope) -> Value | None:
        match node:
            case ast.Constant(value=str()):
                # Kept, because memos go by the identity of nodes.
                if id(node) not in self._parsed:
                    self._parsed[id(node)] = _parsed(node)
                return self._annotated(self._parsed[id(node)], scope)
            case ast.Name() | ast.Attribute():
                return self._named_type(node, scope)
            case ast.BinOp(op=ast.BitOr()):
                return self._first_type((node.left, node.right), scope)
            case ast.Subscript():
                return self._generic(node, scope)
            case _:
                return None

    def _named_type(self, node: ast.expr, scope: Scope) -> Value | None:
        home = scope if scope.kind == "module" else (scope.parent or scope)
        found = self._expression(node, home)
        if found is None:
            return None
        if found.kind == "annotation" and found.scope is not None:
            return self.value(found.node, found.scope)
        if found.kind == "external":
            if found.name in DATABASES or is_extension(found.name):
                return Value("instance", name=found.name)
            return instance_of(found.name) or Value("instance", name=found.name)
        if found.kind == "class" and isinstance(found.target, Scope):
            return self._instance(found.target)
        return None

    def _first_type(self, nodes: Iterable[ast.expr], scope: Scope) -> Value | None:
        for node in nodes:
            found = self.value(node, scope)
            if found is not None:
                return found
        return None

    def _generic(self, node: ast.Subscript, scope: Scope) -> Value | None:
        last = (dotted(node.value) or "").rpartition(".")[2]
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if last == "Annotated":
            return self._dependency(items[1:], scope) or self.value(items[0], scope)
        if last in _SUBSCRIPTS_OF_ITEMS:
            return self._first_type(items, scope)
        if last in _YIELDING:
            inner = self.value(items[0], scope)
            return Value("generator", inner=inner.given()) if inner is not None else None
        if last in _MANAGING:
            inner = self.value(items[0], scope)
            return Value("manager", inner=inner.given()) if inner is not None else None
        if last in _AWAITING:
            return self.value(items[-1], scope)
        if last == "Callable":
            inner = self.value(items[-1], scope)
            return Value("callable", inner=inner) if inner is not None else None
        return self._named_type(node.value, scope)

    def _dependency(self, items: Iterable[ast.expr], scope: Scope) -> Value | None:
        for item in items:
            if isinstance(item, ast.Call):
                home = scope if scope.kind == "module" else (scope.parent or scope)
                function = self._expression(item.func, home)
                if function is not None and is_dependency(function.name):
                    return self._provided(item, home)
        return None


def _parsed(node: ast.Constant) -> ast.expr | None:
    try:
        parsed = ast.parse(str(node.value), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return ast.copy_location(parsed, node)
