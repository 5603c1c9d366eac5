"""What an expression stands for: names looked up, calls followed, across files."""

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property

from sessionscope.check._annotations import Annotations
from sessionscope.check._behaviour import session_by_use
from sessionscope.check._facts import (
    Binding,
    Module,
    Scope,
    decorator_names,
    dotted,
    last_name,
    receiver,
)
from sessionscope.check._index import Index
from sessionscope.check._values import (
    DATABASES,
    NONE,
    Injected,
    Value,
    external,
    instance_of,
    is_dependency,
    is_extension,
    library_attribute,
    method_call,
)

_DEPTH = 24
_LIBRARIES = ("sqlalchemy", "sqlmodel", "flask_sqlalchemy")
_PATHS = frozenset({ast.Name, ast.Attribute})
_VAGUE = frozenset({"external", "instance"})
_CACHES = frozenset({"lru_cache", "cache", "cached_property", "cached", "singleton"})


class Inference:
    """Answers what expressions stand for, from facts alone; nothing is imported or run."""

    def __init__(
        self, index: Index, factories: Iterable[str] = (), providers: Iterable[str] = ()
    ) -> None:
        self.index = index
        self._factories = frozenset(factories)
        self._providers = frozenset(providers)
        self._depth = 0
        self._annotations = Annotations(self.value, self._typed, self._provided)
        # What callers pass to a parameter that says nothing of itself; the model knows them.
        self.passed: Callable[[Scope, str], Value | None] = lambda scope, name: None

    def value(self, node: ast.expr | None, scope: Scope) -> Value | None:
        """Return what *node* stands for in *scope*; None where nobody knows."""
        if node is None:
            return None
        key = id(node)
        if key in scope.memo:
            known = scope.memo[key]
            return known if isinstance(known, Value) else None
        if self._depth > _DEPTH:
            return None
        scope.memo[key] = None  # a circle knows nothing
        self._depth += 1
        try:
            found = self._evaluate(node, scope)
            if found is None or (found.kind in _VAGUE and found.target is None):
                found = self._by_use(node, scope) or found
        finally:
            self._depth -= 1
        scope.memo[key] = found
        return found

    def _evaluate(self, node: ast.expr, scope: Scope) -> Value | None:
        match node:
            case ast.Name():
                return self.name(node.id, scope, (node.lineno, node.col_offset))
            case ast.Attribute():
                return self._attribute(node, scope)
            case ast.Call():
                return self._call(node, scope)
            case ast.Await() | ast.Starred() | ast.NamedExpr():
                return self.value(node.value, scope)
            case ast.IfExp():
                return self._either([node.body, node.orelse], scope)
            case ast.BoolOp():
                return self._either(node.values, scope)
            case ast.Subscript():
                return self._subscript(node, scope)
            case ast.Lambda():
                return self._lambda(node, scope)
            case ast.Constant(value=None):
                return NONE
            case _:
                return None

    def _by_use(self, node: ast.expr, scope: Scope) -> Value | None:
        """What nobody declares may still show by its use that it is a session."""
        if scope.kind != "function" or type(node) not in _PATHS or not self._has_sessions:
            return None
        path = dotted(node)
        return session_by_use(path, scope, self.value) if path is not None else None

    @cached_property
    def _has_sessions(self) -> bool:
        """Whether the project imports a library whose sessions these may be."""
        return any(
            target.startswith(_LIBRARIES)
            for module in self.index.modules
            for target in module.imports
        )

    def annotation(self, node: ast.expr | None, scope: Scope) -> Value | None:
        """Return what a value annotated with *node* stands for."""
        return self._annotations.value(node, scope)

    def _either(self, nodes: Iterable[ast.expr], scope: Scope) -> Value | None:
        """One of several: known, but not owned for certain."""
        for node in nodes:
            found = self.value(node, scope)
            if found is not None and found is not NONE:
                return found.held()
        return None

    def _lambda(self, node: ast.Lambda, scope: Scope) -> Value | None:
        for child in scope.children:
            if child.node is node:
                return Value("function", target=child)
        return None

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Value | None:
        base = self.value(node.value, scope)
        if base is not None and base.kind in {"external", "class"}:
            if base.name.rpartition(".")[2] in {"sessionmaker", "async_sessionmaker"}:
                return base
            return Value("annotation", node=node, scope=scope, name=base.name)
        return None

    # Names.

    def name(self, name: str, scope: Scope, at: tuple[int, int]) -> Value | None:
        """Return what *name* stands for at the place *at* of *scope*."""
        for around in scope.around():
            bindings = around.bindings.get(name)
            if around.kind == "module" or name in scope.globals:
                found = self.symbol(scope.module, name)
                return found.held() if found is not None else None
            if not bindings:
                continue
            if around is scope:
                return self._local(bindings, around, at)
            found = self._last(bindings, around)
            return found.held() if found is not None else None
        return None

    def symbol(self, module: Module, name: str) -> Value | None:
        """Return what *name* stands for at the top of *module*."""
        memo = module.scope.memo
        key = ("symbol", name)
        if key not in memo:
            memo[key] = None  # a circle of imports knows nothing
            memo[key] = self._symbol(module, name)
        known = memo[key]
        return known if isinstance(known, Value) else None

    def _symbol(self, module: Module, name: str) -> Value | None:
        bindings = self.index.bindings(module, name)
        if bindings:
            return self._last(bindings, module.scope)
        inner = self.index.submodule(module, name)
        if inner is not None:
            return Value("module", target=inner)
        return external(f"builtins.{name}") if name in _BUILTINS else None

    def _made_late(self, module: Module) -> Value | None:
        """A module's ``__getattr__`` that makes one object when it is first asked for."""
        for binding in module.scope.bindings.get("__getattr__", ()):
            function = binding.value
            if isinstance(function, Scope) and len(function.returns) == 1:
                found = self.returned(function)
                return found.held() if found is not None else None
        return None

    def _local(self, bindings: list[Binding], scope: Scope, at: tuple[int, int]) -> Value | None:
        before = [b for b in bindings if (b.line, b.column) < at]
        for binding in reversed(before or bindings):
            found = self.binding(binding, scope)
            if found is not NONE:
                return found
        return NONE

    def _last(self, bindings: list[Binding], scope: Scope) -> Value | None:
        foreign: Value | None = None
        for binding in reversed(bindings):
            found = self.binding(binding, scope)
            if found is None or found is NONE:
                continue
            # ``try: from .db import x`` … ``except ImportError: from db import x``
            if found.kind != "external" or len(bindings) == 1:
                return found
            foreign = foreign or found
        return foreign

    def binding(self, binding: Binding, scope: Scope) -> Value | None:
        """Return what a binding binds its name to."""
        value = binding.value
        match binding.kind:
            case "import":
                return self._imported(scope.module, str(value))
            case "scope" if isinstance(value, Scope):
                return Value("function" if value.kind == "function" else "class", target=value)
            case "parameter":
                return self._parameter(binding, scope)
            case "annotation":
                declared = self.annotation(binding.annotation, scope)
                return declared.given() if declared is not None else None
            case _:
                pass
        if not isinstance(value, ast.expr):
            return None
        home = self._home(value, scope, binding)
        found = self.value(value, home)
        if binding.kind == "with":
            return self.entered(found)
        if binding.kind == "loop":
            return found.inner if found is not None and found.kind == "generator" else None
        if binding.place is not None:
            return self._unpacked(value, home, binding.place)
        if found in (None, NONE) and binding.annotation is not None:
            return self.annotation(binding.annotation, scope) or found
        return found

    def _unpacked(self, node: ast.expr, scope: Scope, index: int) -> Value | None:
        """``engine, factory = connect()``: one place of the tuple that a function returns."""
        call = node.value if isinstance(node, ast.Await) else node
        function = self.value(call.func, scope) if isinstance(call, ast.Call) else None
        if function is None or function.kind != "function":
            return None
        target = function.target
        if not isinstance(target, Scope):
            return None
        for outcome in target.returns:
            if isinstance(outcome.value, ast.Tuple) and index < len(outcome.value.elts):
                return self.value(outcome.value.elts[index], target)
        return None

    def _home(self, value: ast.expr, scope: Scope, binding: Binding) -> Scope:
        """Return the scope in which a binding's value stands: global names live elsewhere."""
        if scope.kind != "module":
            return scope
        root = list(binding.block.chain())[-1].node
        if root is scope.node:
            return scope
        for inner in scope.module.scopes:
            if inner.node is root:
                return inner
        return scope

    def _imported(self, module: Module, target: str) -> Value | None:
        found = self.index.imported(module, target)
        if isinstance(found, str):
            return self._configured(found) or external(found)
        if found is None:
            return None
        origin, name = found
        if self._factories or self._providers:
            known = self._configured(f"{origin.name}.{name}")
            if known is not None:
                return known
        if not name:
            return Value("module", target=origin)
        return self.symbol(origin, name) or self._made_late(origin)

    def _configured(self, name: str) -> Value | None:
        if name in self._factories:
            return Value("factory", name=name)
        if name in self._providers:
            return Value("callable", inner=Value("generator", inner=Value("session")))
        return None

    def _parameter(self, binding: Binding, scope: Scope) -> Value | None:
        owner = scope.owner_class
        node = scope.node
        if owner is not None and not isinstance(node, ast.Module | ast.ClassDef):
            first = (node.args.posonlyargs + node.args.args)[:1]
            if first and (first[0].lineno, first[0].col_offset) == (binding.line, binding.column):
                kinds = decorator_names(scope)
                if "staticmethod" not in kinds:
                    return Value("class" if "classmethod" in kinds else "instance", target=owner)
        default = binding.value if isinstance(binding.value, ast.expr) else None
        injected = self._injected(default, scope)
        if injected is not None:
            return injected
        if binding.annotation is None and isinstance(binding.value, ast.expr | None):
            passed = self._passed(scope, binding)
            return passed.given() if passed is not None else None
        found = self.annotation(binding.annotation, scope)
        return found.given() if found is not None else None

    def _passed(self, scope: Scope, binding: Binding) -> Value | None:
        for name, bindings in scope.bindings.items():
            if binding in bindings:
                return self.passed(scope, name) if _SESSION_LIKE.search(name) else None
        return None

    def _injected(self, default: ast.expr | None, scope: Scope) -> Value | None:
        """What ``= Depends(provider)`` brings in."""
        if not isinstance(default, ast.Call):
            return None
        outer = scope.parent or scope
        function = self.value(default.func, outer)
        if function is None or not is_dependency(function.name):
            return None
        return self._provided(default, outer)

    def _provided(self, call: ast.Call, scope: Scope) -> Value | None:
        provider = next(
            iter([*call.args, *(k.value for k in call.keywords if k.arg == "dependency")]), None
        )
        made = self.called(self.value(provider, scope), None, scope)
        driven: Scope | Module | None = None
        if made is not None and made.kind in {"generator", "manager"}:
            driven = made.target
            made = made.inner
        if made is None:
            return None
        function = self.value(call.func, scope)
        if function is None or not function.name.startswith("fastapi."):
            return made.given()
        injected = Injected(call, driven if isinstance(driven, Scope) else None)
        return replace(made.given(), injected=injected)

    # Attributes.

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Value | None:
        path = dotted(node)
        if path is not None and (bindings := scope.bindings.get(path)):
            found = self._local(bindings, scope, (node.lineno, node.col_offset))
            if found is not None and found is not NONE:
                return found.held()
        base = self.value(node.value, scope)
        if base is None:
            return None
        if base.kind == "external":
            # ``import app.database`` binds ``app``, which may be a folder without __init__.py.
            module = self.index.find(scope.module, f"{base.name}.{node.attr}")
            if module is not None:
                return Value("module", target=module)
        return self.attribute(base, node.attr)

    def attribute(self, base: Value, name: str) -> Value | None:
        """Return what the attribute *name* of *base* stands for."""
        target = base.target
        match base.kind:
            case "external":
                full = f"{base.name}.{name}"
                return self._configured(full) or external(full)
            case "module" if isinstance(target, Module):
                return self._module_attribute(target, name)
            case "class" | "instance" if isinstance(target, Scope):
                return self.member(target, name, base)
            case "instance":
                return library_attribute(base, name)
            case "registry" if name == "session_factory":
                return base.inner
            case "session" if name in {"sync_session", "session"}:
                return replace(base, is_async=False, fresh=False)
            case _:
                return Value("external", name=f"<{base.kind}>.{name}", bound=base)

    def _module_attribute(self, module: Module, name: str) -> Value | None:
        if self._factories or self._providers:
            known = self._configured(f"{module.name}.{name}")
            if known is not None:
                return known
        return self.symbol(module, name) or self._made_late(module)

    def member(self, owner: Scope, name: str, base: Value, depth: int = 0) -> Value | None:
        """Return the attribute *name* of a class or of its instances."""
        key = ("member", name, base.kind)
        if depth == 0 and key in owner.memo:
            known = owner.memo[key]
            return known if isinstance(known, Value) else None
        owner.memo[key] = None
        found = self._own_member(owner, name, base)
        if found is None and depth < 6:
            for parent in self.bases(owner):
                if isinstance(parent.target, Scope) and parent.target is not owner:
                    found = self.member(parent.target, name, base, depth + 1)
                elif parent.kind == "external" and is_extension(parent.name):
                    found = library_attribute(Value("instance", name=parent.name), name)
                if found is not None:
                    break
        owner.memo[key] = found
        return found

    def _own_member(self, owner: Scope, name: str, base: Value) -> Value | None:
        bindings = owner.bindings.get(name)
        if bindings:
            found = self._last(bindings, owner)
            if found is not None and found.kind == "function":
                return self._method(found, base)
            if found is not None:
                return found.held()
        declared: Value | None = None
        for method in owner.children:
            own = receiver(method)
            stored = method.bindings.get(f"{own}.{name}") if own else None
            found = self._last(stored, method) if stored else None
            if found is None:
                continue
            if found.node is not None or found.kind != "factory":
                return found.held()
            declared = found  # ``self.factory: sessionmaker | None = None``; made elsewhere
        return declared

    def _method(self, found: Value, base: Value) -> Value | None:
        function = found.target
        if isinstance(function, Scope) and not decorator_names(function).isdisjoint(
            {"property", "cached_property", "hybrid_property"}
        ):
            made = self.returned(function)
            return made.held() if made is not None else None
        return replace(found, bound=base)

    def bases(self, owner: Scope) -> list[Value]:
        """Return what the bases of the class *owner* stand for."""
        if not isinstance(owner.node, ast.ClassDef):
            return []
        outer = owner.parent or owner
        plain = [b.value if isinstance(b, ast.Subscript) else b for b in owner.node.bases]
        return [found for base in plain if (found := self.value(base, outer)) is not None]

    def session_class(self, owner: Scope, depth: int = 0) -> Value | None:
        """Return the kind of session that instances of *owner* are, if they are any."""
        for base in self.bases(owner):
            made = instance_of(base.name) if base.kind == "external" else None
            if made is None and isinstance(base.target, Scope) and depth < 6:
                made = self.session_class(base.target, depth + 1)
            if made is not None and made.kind in {"session", "factory"}:
                return made
        return None

    # Calls.

    def _call(self, node: ast.Call, scope: Scope) -> Value | None:
        function = self.value(node.func, scope)
        return self.called(function, node, scope)

    def called(self, function: Value | None, node: ast.Call | None, scope: Scope) -> Value | None:
        """Return what calling *function* gives; *node* is the call, if there is one."""
        if function is None:
            return None
        target = function.target
        match function.kind:
            case "external":
                return self._external_call(function, node, scope)
            case "factory":
                return Value(
                    "session", function.is_async, fresh=True, node=node, scope=scope, bound=function
                )
            case "registry":
                return Value("session", function.is_async, scoped=True, node=node, scope=scope)
            case "callable":
                return function.inner
            case "function" if isinstance(target, Scope):
                made = self.result(target, managed=function.wrapped == "manager")
                cached = function.wrapped == "cached" and made is not None
                return made.held() if cached and made is not None else made
            case "class" if isinstance(target, Scope):
                return self._instance(target, node, scope)
            case "instance" if isinstance(target, Scope):
                caller = self.member(target, "__call__", function)
                return self.called(caller, node, scope) if caller is not None else None
            case _:
                return None

    def _instance(self, owner: Scope, node: ast.Call | None, scope: Scope) -> Value:
        made = self.session_class(owner)
        if made is None:
            return Value("instance", target=owner, node=node, scope=scope)
        return replace(made, fresh=made.kind == "session", node=node, scope=scope)

    def _typed(self, owner: Scope) -> Value:
        """Return what a value of the class *owner* is, whoever made it."""
        return replace(self._instance(owner, None, owner), fresh=False)

    def _external_call(self, function: Value, node: ast.Call | None, scope: Scope) -> Value | None:
        name = function.name
        if name.startswith("<"):
            return method_call(function, node, scope)
        if name in DATABASES or (
            name.endswith("Database.from_env") and name.startswith("sessionscope.")
        ):
            known = name.removesuffix(".from_env")
            return Value("instance", name=known, node=node, scope=scope)
        if is_extension(name):
            return Value("instance", name=name)
        made = instance_of(name)
        if made is not None:
            return self._made(made, node, scope)
        last = name.rpartition(".")[2]
        if last[:1].isupper() and not is_dependency(name):
            return Value("instance", name=name)
        if node is None:
            return None
        if is_dependency(name):
            return self._provided(node, scope)
        return self._of_argument(last, node, scope)

    def _made(self, made: Value, node: ast.Call | None, scope: Scope) -> Value:
        inner = None
        is_async = made.is_async
        if made.kind == "registry" and node is not None and node.args:
            inner = self.value(node.args[0], scope)
            is_async = is_async or (inner is not None and inner.is_async)
        if made.kind == "factory" and node is not None:
            is_async = is_async or self._async_class(node, scope)
        # A registry that a function makes anew is no registry: its session is the caller's.
        fresh = made.kind == "session" or (made.kind == "registry" and scope.kind == "function")
        return replace(made, is_async=is_async, fresh=fresh, node=node, scope=scope, inner=inner)

    def _async_class(self, node: ast.Call, scope: Scope) -> bool:
        for keyword in node.keywords:
            if keyword.arg == "class_":
                made = self.annotation(keyword.value, scope)
                return made is not None and made.is_async
        return False

    def _of_argument(self, last: str, node: ast.Call, scope: Scope) -> Value | None:
        """Calls of libraries that hand on what they are given."""
        if not node.args:
            return None
        if last == "cast" and len(node.args) == 2:
            return self.value(node.args[1], scope) or self.annotation(node.args[0], scope)
        first = self.value(node.args[0], scope)
        if first is None:
            return None
        match last:
            case "contextmanager" | "asynccontextmanager":
                return replace(first, wrapped="manager") if first.kind == "function" else None
            case "closing" | "aclosing" | "nullcontext":
                return Value("manager", inner=first.held())
            case "next" | "anext":
                return first.inner.held() if first.inner is not None else None
            case "partial" | "wraps" | "staticmethod":
                return first
            case "lru_cache" | "cache":
                return replace(first, wrapped="cached")
            case "run" | "wait_for" | "shield" | "async_to_sync" | "ensure_future":
                return first
            case "Annotated":
                return None
            case _:
                return None

    def result(self, function: Scope, *, managed: bool = False) -> Value | None:
        """Return what a call of *function* gives: its value, generator or manager."""
        names = decorator_names(function)
        if managed or names & {"contextmanager", "asynccontextmanager"}:
            return Value("manager", function.is_async, function, inner=self.yielded(function))
        if function.is_generator:
            if names & {"fixture"}:
                return self.yielded(function)
            return Value("generator", function.is_async, function, inner=self.yielded(function))
        made = self.returned(function)
        if made is not None and made.fresh and names & _CACHES:
            return made.held()
        return made

    def yielded(self, function: Scope) -> Value | None:
        """Return what the generator *function* yields, as its consumer sees it."""
        for outcome in function.yields:
            found = self.value(outcome.value, function)
            if isinstance(outcome.node, ast.YieldFrom):
                found = found.inner if found is not None else None
            if found is not None and found is not NONE:
                return found.given()
        declared = self._declared(function)
        return declared.inner if declared is not None else None

    def returned(self, function: Scope) -> Value | None:
        """Return what *function* returns."""
        for outcome in function.returns:
            found = self.value(outcome.value, function)
            if found is not None and found is not NONE:
                return found.held() if _keeps(function, outcome.value) else found
        return self._declared(function)

    def _declared(self, function: Scope) -> Value | None:
        node = function.function
        if node is None or node.returns is None:
            return None
        return self.annotation(node.returns, function.parent or function)

    def entered(self, found: Value | None) -> Value | None:
        """Return what ``with found as x`` binds to x."""
        if found is None:
            return None
        if found.kind == "manager":
            return found.inner
        if found.kind in {"session", "registry"}:
            return found
        if found.kind == "instance" and found.target is None:
            return found
        if found.kind == "instance" and isinstance(found.target, Scope):
            for name in ("__enter__", "__aenter__"):
                method = self.member(found.target, name, found)
                if method is not None and isinstance(method.target, Scope):
                    made = self.returned(method.target)
                    return made.given() if made is not None else None
        return None


def _keeps(function: Scope, node: ast.expr | None) -> bool:
    """Return whether *function* also puts what it returns where it, or others, find it again."""
    if not isinstance(node, ast.Name):
        return False
    for use in function.uses.get(node.id, ()):
        match use.owner:
            case ast.Assign(targets=targets) if use.role == "assign":
                if any(isinstance(target, ast.Subscript | ast.Attribute) for target in targets):
                    return True
            case ast.Call() as call if use.role == "argument" and last_name(call) in _KEEPERS:
                return True
            case _:
                pass
    values = [binding.value for binding in function.bindings.get(node.id, ())]
    return any(
        binding.value is value and isinstance(value, ast.Call)
        for path, bindings in function.bindings.items()
        if "." in path
        for binding in bindings
        for value in values
    )


_KEEPERS = frozenset({"set", "setdefault", "setattr", "append", "register", "put", "push"})
# Worth asking the callers about; the name alone proves nothing.
_SESSION_LIKE = re.compile(r"(?i)sess|^_?db|database|engine|factory|maker|^uow|^s$|^conn")
_BUILTINS = frozenset({"next", "anext", "iter", "aiter", "open", "map", "list", "tuple", "super"})
