"""The one walk over a file: from its syntax tree to facts per scope."""

import ast
import builtins
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

from sessionscope.check._facts import (
    SESSION_METHODS,
    Binding,
    Block,
    BlockKind,
    CallFact,
    Function,
    Module,
    Outcome,
    Role,
    Scope,
    Use,
    dotted,
    last_name,
    parameters,
)

# A file without any of these words holds nothing to judge, only names to pass on.
_WORDS = (b"session", b"sqlalchemy", b"sqlmodel", b"create_engine", b"database")
_SHORT_WORD = re.compile(rb"\b(?:get_)?db\b")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# The fields of each expression that hold expressions, without contexts and operators.
_CHILDREN: dict[type[ast.AST], tuple[str, ...]] = {
    ast.BinOp: ("left", "right"),
    ast.UnaryOp: ("operand",),
    ast.Compare: ("left", "comparators"),
    ast.Subscript: ("value", "slice"),
    ast.Slice: ("lower", "upper", "step"),
    ast.JoinedStr: ("values",),
    ast.FormattedValue: ("value",),
}
_PASSED_ON = (ast.Name, ast.Attribute, ast.Call, ast.Subscript)
_BORING = "boring"
_TELLING = re.compile(r"(?i)sess|db|database|engine|maker|factory|uow|transaction|conn|local")
_LOOKS = frozenset({"other", "test"})
_BUILTINS = frozenset(dir(builtins))
_OWN = frozenset({"self", "cls"})
_CONTAINERS = (ast.Tuple, ast.List, ast.Set)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


def walk(tree: ast.Module, path: str, name: str, source: bytes) -> Module:
    """Return the facts of one parsed file."""
    module = Module(path, name)
    module.relevant = _is_relevant(source)
    walker = _Walker(module)
    if module.relevant:
        walker.body(tree.body)
    else:
        walker.names(tree.body)
    return module


def _is_relevant(source: bytes) -> bool:
    lowered = source.lower()
    return any(word in lowered for word in _WORDS) or bool(_SHORT_WORD.search(lowered))


class _Walker:
    """Walks statements and expressions; ``scope`` and ``block`` say where it is."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.scope = module.scope
        self.block = Block("body", module.scope.node, None)
        self.module.scopes.append(self.scope)

    # Names alone, for files that hold nothing to judge.

    def names(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports(node)
            elif isinstance(node, _DEFINITIONS):
                self.bind(node.name, "unknown", node)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value, _PASSED_ON):
                        self.bind(target.id, "value", node, node.value)
            elif isinstance(node, ast.If | ast.Try):
                self.names(node.body)

    # Scopes and blocks.

    def body(self, statements: Iterable[ast.stmt]) -> None:
        for node in statements:
            method = _STATEMENTS.get(type(node))
            if method is not None:
                method(self, node)

    def inside(self, kind: BlockKind, node: ast.AST, statements: Iterable[ast.stmt]) -> None:
        outer = self.block
        self.block = Block(kind, node, outer)
        self.body(statements)
        self.block = outer

    def bind(
        self,
        name: str,
        kind: Literal["value", "with", "loop", "import", "scope", "parameter", "unknown"]
        | Literal["annotation"],
        node: ast.stmt | ast.expr | ast.excepthandler | ast.arg,
        value: "ast.expr | Scope | ast.arg | str | None" = None,
        annotation: ast.expr | None = None,
        index: int | None = None,
    ) -> None:
        binding = Binding(kind, node.lineno, node.col_offset, value, self.block, annotation, index)
        self.scope.bindings.setdefault(name, []).append(binding)
        # What a function assigns to a global name is a binding of the module too.
        if name in self.scope.globals:
            self.module.scope.bindings.setdefault(name, []).append(binding)

    def define(self, node: ast.ClassDef | Function, kind: Literal["class", "function"]) -> Scope:
        name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
        scope = Scope(kind, name, node, self.scope, self.module, self.block)
        self.scope.children += (scope,)
        self.module.scopes.append(scope)
        return scope

    def enter(self, scope: Scope, work: Callable[[], None]) -> None:
        outer = self.scope, self.block
        self.scope, self.block = scope, Block("body", scope.node, None)
        work()
        self.scope, self.block = outer

    def function(self, node: Any) -> None:
        self.decorators(node)
        scope = self.define(node, "function")
        self.bind(node.name, "scope", node, scope)
        self.enter(scope, lambda: self.function_body(node))
        scope.raises = isinstance(node.body[-1], ast.Raise)
        if _is_boring(scope):
            # What it binds and calls stays; the rest is most of what a file weighs.
            node.body = node.body[:1]
            scope.uses = {}
            scope.withs, scope.tries = (), ()

    def decorators(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            self.expression(decorator, "other", node)
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                self.expression(default, "other", node)

    def function_body(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        _forget_docstring(node)
        self.parameters(node)
        self.body(node.body)

    def parameters(self, node: Function) -> None:
        for argument, default in parameters(node):
            self.bind(argument.arg, "parameter", argument, default, argument.annotation)

    def class_(self, node: Any) -> None:
        self.decorators(node)
        scope = self.define(node, "class")
        self.bind(node.name, "scope", node, scope)
        _forget_docstring(node)
        self.enter(scope, lambda: self.body(node.body))

    def lambda_(self, node: Any, role: Role, owner: ast.AST) -> None:
        scope = self.define(node, "function")

        def work() -> None:
            self.parameters(node)
            scope.returns += (Outcome(node.body, node.body, self.block),)
            self.expression(node.body, "return", node)

        self.enter(scope, work)

    # Statements.

    def imports(self, node: Any) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                self.bind_import(name, node, alias.name if alias.asname else name)
            return
        origin = "." * node.level + (node.module or "")
        for alias in node.names:
            if alias.name == "*":
                self.module.stars.append(origin)
            else:
                self.bind_import(alias.asname or alias.name, node, f"{origin}:{alias.name}")

    def bind_import(self, name: str, node: ast.Import | ast.ImportFrom, target: str) -> None:
        self.module.imports.append(target)
        self.bind(name, "import", node, target)

    def statement_expression(self, node: Any) -> None:
        self.expression(node.value, "statement", node)

    def assign(self, node: Any) -> None:
        self.expression(node.value, "assign", node)
        for target in node.targets:
            self.target(target, node.value, node)

    def target(
        self, target: ast.expr, value: ast.expr | None, node: ast.stmt, index: int | None = None
    ) -> None:
        if isinstance(target, ast.Name):
            self.bind(target.id, "value", node, value, None, index)
        elif isinstance(target, ast.Attribute):
            path = dotted(target)
            if path:
                self.bind(path, "value", node, value, None, index)
            self.expression(target.value, "other", node)
        elif isinstance(target, ast.Tuple | ast.List):
            pairs = value.elts if isinstance(value, ast.Tuple | ast.List) else None
            for place, element in enumerate(target.elts):
                if pairs is not None and len(pairs) == len(target.elts):
                    self.target(element, pairs[place], node)
                else:
                    self.target(element, value, node, place)
        elif isinstance(target, ast.Starred):
            self.target(target.value, None, node, 0)
        else:
            self.expression(target, "other", node)

    def annotated(self, node: Any) -> None:
        if node.value is not None:
            self.expression(node.value, "assign", node)
        path = dotted(node.target)
        if path:
            kind: Literal["value", "annotation"] = "value" if node.value else "annotation"
            self.bind(path, kind, node, node.value, node.annotation)

    def type_alias(self, node: Any) -> None:
        self.bind(node.name.id, "value", node, node.value)

    def augmented(self, node: Any) -> None:
        self.expression(node.value, "assign", node)

    def return_(self, node: Any) -> None:
        if node.value is not None:
            self.expression(node.value, "return", node)
        self.scope.returns += (Outcome(node, node.value, self.block),)

    def raise_(self, node: Any) -> None:
        for part in (node.exc, node.cause):
            if part is not None:
                self.expression(part, "other", node)

    def assert_(self, node: Any) -> None:
        self.expression(node.test, "test", node)

    def delete(self, node: Any) -> None:
        for target in node.targets:
            path = dotted(target)
            if path:
                self.bind(path, "unknown", node)
            else:
                self.expression(target, "other", node)

    def global_(self, node: Any) -> None:
        self.scope.globals |= frozenset(node.names)

    def if_(self, node: Any) -> None:
        self.expression(node.test, "test", node)
        outer = self.block
        self.inside("if", node, node.body)
        if self.scope.kind == "module" and _is_main(node.test):
            self.module.main = Block("if", node, outer)
        if node.orelse:
            self.inside("orelse", node, node.orelse)

    def while_(self, node: Any) -> None:
        if isinstance(node.test, ast.Constant) and node.test.value:
            self.module.forever = True
        outer = self.block
        self.block = Block("loop", node, outer)
        self.expression(node.test, "test", node)
        self.body(node.body)
        self.block = outer
        self.body(node.orelse)

    def for_(self, node: Any) -> None:
        self.expression(node.iter, "loop", node)
        self.loop_target(node.target, node.iter, node)
        self.inside("loop", node, node.body)
        self.body(node.orelse)

    def loop_target(self, target: ast.expr, iterated: ast.expr, node: Any) -> None:
        if isinstance(target, ast.Name):
            self.bind(target.id, "loop", target, iterated)
        else:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    self.bind(name.id, "unknown", name)

    def with_(self, node: Any) -> None:
        for item in node.items:
            self.expression(item.context_expr, "with", node)
            target = item.optional_vars
            path = dotted(target) if target is not None else None
            if path and target is not None:
                self.bind(path, "with", target, item.context_expr)
            elif target is not None:
                self.target(target, None, node)
        self.scope.withs += ((node, self.block),)
        self.inside("with", node, node.body)

    def try_(self, node: Any) -> None:
        self.scope.tries += ((node, self.block),)
        self.inside("try", node, node.body)
        for handler in node.handlers:
            if handler.type is not None:
                self.expression(handler.type, "other", handler)
            if handler.name:
                self.bind(handler.name, "unknown", handler)
            self.inside("except", handler, handler.body)
        if node.orelse:
            self.inside("else", node, node.orelse)
        if node.finalbody:
            self.inside("finally", node, node.finalbody)

    def match(self, node: Any) -> None:
        self.expression(node.subject, "other", node)
        for case in node.cases:
            if case.guard is not None:
                self.expression(case.guard, "test", node)
            self.inside("case", case, case.body)

    # Expressions: *role* is what *owner* does with the value.

    def expression(self, node: ast.expr, role: Role, owner: ast.AST) -> None:
        kind = type(node)
        if kind is ast.Constant:
            return
        if kind is ast.Name:
            # A mere look at a value tells no rule anything.
            if role in _LOOKS or (role == "call" and node.id in _BUILTINS):  # type: ignore[attr-defined]
                return
            self.use(node.id, role, "", node, owner)  # type: ignore[attr-defined]
            return
        method = _EXPRESSIONS.get(kind)
        if method is not None:
            method(self, node, role, owner)
            return
        for field in _CHILDREN.get(kind, ()):
            value: Any = getattr(node, field)
            if type(value) is list:
                for child in cast("list[ast.expr]", value):
                    self.expression(child, "other", node)
            elif value is not None:
                self.expression(value, "other", node)

    def use(self, path: str, role: Role, name: str, node: ast.expr, owner: ast.AST) -> None:
        use = Use(role, name, node, owner, self.block)
        try:
            self.scope.uses[path].append(use)
        except KeyError:
            self.scope.uses[path] = [use]

    def attribute(self, node: Any, role: Role, owner: ast.AST) -> None:
        path = dotted(node)
        if path is None:
            self.expression(node.value, "attribute", node)
            return
        self.use(path, role, "", node, owner)
        base, _, name = path.rpartition(".")
        self.use(base, "attribute", name, node, owner)
        root = base.partition(".")[0]
        if root != base and root not in _OWN:
            self.use(root, "attribute", name, node, owner)

    def call(self, node: Any, role: Role, owner: ast.AST) -> None:
        function = node.func
        if type(function) is ast.Attribute:
            path = dotted(function.value)
            if path is None:
                self.expression(function.value, "method", node)
            else:
                self.use(path, "method", function.attr, node, owner)
                if function.attr in SESSION_METHODS:
                    self.scope.asked = True
                root, dot, _ = path.partition(".")
                if dot and root not in _OWN:
                    self.use(root, "attribute", "", function.value, function)
        else:
            self.expression(function, "call", node)
        for argument in node.args:
            self.expression(argument, "argument", node)
        for keyword in node.keywords:
            self.expression(keyword.value, "argument", node)
        self.scope.calls.append(CallFact(node, role, owner, self.block, last_name(node)))

    def await_(self, node: Any, role: Role, owner: ast.AST) -> None:
        self.expression(node.value, "await", owner if role == "statement" else node)

    def starred(self, node: Any, role: Role, owner: ast.AST) -> None:
        self.expression(node.value, "element" if role == "argument" else role, owner)

    def container(self, node: Any, role: Role, owner: ast.AST) -> None:
        for element in node.elts:
            self.expression(element, "element", owner)

    def dictionary(self, node: Any, role: Role, owner: ast.AST) -> None:
        for part in (*node.keys, *node.values):
            if part is not None:
                self.expression(part, "element", owner)

    def comprehension(self, node: Any, role: Role, owner: ast.AST) -> None:
        for generator in node.generators:
            self.expression(generator.iter, "loop", node)
            self.loop_target(generator.target, generator.iter, node)
            for test in generator.ifs:
                self.expression(test, "test", node)
        outer = self.block
        self.block = Block("loop", node, outer)
        parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        for part in parts:
            self.expression(part, "element", owner)
        self.block = outer

    def conditional(self, node: Any, role: Role, owner: ast.AST) -> None:
        self.expression(node.test, "test", node)
        self.expression(node.body, role, owner)
        self.expression(node.orelse, role, owner)

    def boolean(self, node: Any, role: Role, owner: ast.AST) -> None:
        for value in node.values:
            self.expression(value, role, owner)

    def walrus(self, node: Any, role: Role, owner: ast.AST) -> None:
        self.expression(node.value, "assign", node)
        self.bind(node.target.id, "value", node, node.value)

    def yield_(self, node: Any, role: Role, owner: ast.AST) -> None:
        self.scope.is_generator = True
        self.scope.yields += (Outcome(node, node.value, self.block),)
        if node.value is not None:
            self.expression(node.value, "yield", node)


def _is_boring(scope: Scope) -> bool:
    """Return whether no rule can need the statements of a function once they were walked."""
    if scope.is_generator or any(not child.memo.get(_BORING) for child in scope.children):
        return False
    # One search through all names: one for each takes several times as long.
    names = " ".join((*scope.uses, *scope.bindings))
    boring = scope.memo[_BORING] = not scope.asked and _TELLING.search(names) is None
    return boring


def _forget_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
    """Docstrings are a good part of what a syntax tree weighs."""
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        first.value.value = None


def _is_main(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and "__name__" in (
        getattr(side, "id", None) for side in (test.left, *test.comparators)
    )


_Visitor = Callable[[_Walker, Any, Role, ast.AST], None]
_STATEMENTS: dict[type[ast.AST], Callable[[_Walker, Any], None]] = {
    ast.FunctionDef: _Walker.function,
    ast.AsyncFunctionDef: _Walker.function,
    ast.ClassDef: _Walker.class_,
    ast.Import: _Walker.imports,
    ast.ImportFrom: _Walker.imports,
    ast.Expr: _Walker.statement_expression,
    ast.Assign: _Walker.assign,
    ast.AnnAssign: _Walker.annotated,
    ast.AugAssign: _Walker.augmented,
    ast.Return: _Walker.return_,
    ast.Raise: _Walker.raise_,
    ast.Assert: _Walker.assert_,
    ast.Delete: _Walker.delete,
    ast.Global: _Walker.global_,
    ast.Nonlocal: _Walker.global_,
    ast.If: _Walker.if_,
    ast.While: _Walker.while_,
    ast.For: _Walker.for_,
    ast.AsyncFor: _Walker.for_,
    ast.With: _Walker.with_,
    ast.AsyncWith: _Walker.with_,
    ast.Try: _Walker.try_,
    ast.TryStar: _Walker.try_,
    ast.Match: _Walker.match,
}
if sys.version_info >= (3, 12):
    _STATEMENTS[ast.TypeAlias] = _Walker.type_alias
_EXPRESSIONS: dict[type[ast.AST], _Visitor] = {
    ast.Attribute: _Walker.attribute,
    ast.Call: _Walker.call,
    ast.Await: _Walker.await_,
    ast.Starred: _Walker.starred,
    ast.Dict: _Walker.dictionary,
    ast.Lambda: _Walker.lambda_,
    ast.IfExp: _Walker.conditional,
    ast.BoolOp: _Walker.boolean,
    ast.NamedExpr: _Walker.walrus,
    ast.Yield: _Walker.yield_,
    ast.YieldFrom: _Walker.yield_,
    **dict.fromkeys(_CONTAINERS, _Walker.container),
    **dict.fromkeys(_COMPREHENSIONS, _Walker.comprehension),
}
