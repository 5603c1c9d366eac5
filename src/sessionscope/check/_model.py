"""What the rules ask: sessions and their uses, callers, contexts, findings."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, cast

from sessionscope.check._facts import (
    SESSION_METHODS,
    STATEMENTS,
    Block,
    CallFact,
    Module,
    Scope,
    Use,
    decorator_names,
    dotted,
    last_name,
    parameters,
    position,
    words,
)
from sessionscope.check._finding import Confidence, Evidence, Finding, Rule
from sessionscope.check._index import Index
from sessionscope.check._infer import Inference
from sessionscope.check._values import Value, is_dependency
from sessionscope.check._versions import Version

_TEST_FOLDERS = frozenset({"tests", "test", "unittests"})
_MIGRATIONS = frozenset({"alembic", "migrations", "versions", "migration"})
_VERBS = words(
    "get post put delete patch head options route api_route websocket websocket_route "
    "before_request after_request middleware exception_handler errorhandler"
)
_TASKS = frozenset(
    {"task", "shared_task", "actor", "job", "periodic_task", "subscriber", "consumer", "listener"}
)
_DEPENDS = ("Depends", "Security", "Provide", "TaskiqDepends")
_COMMANDS = frozenset({"command", "callback", "cli"})
_STARTS = re.compile(
    r"lifespan$|^(on_)?start_?up(_event|_handler)?$|^_?(async_)?main$|^(create|make|setup|init)_app$"
    r"|^_?(bootstrap|seed|populate)(_|$)|^_?(init|create|setup|initiali[sz]e)_(db|database|data"
    r"|tables?|models|schema|first_\w+|super_?user|initial_\w+|default_\w+)$"
)


class Called(NamedTuple):
    """A call of one of the project's functions."""

    scope: Scope
    call: CallFact


class Because(NamedTuple):
    """A step of evidence that is not yet written down."""

    scope: Scope
    node: ast.expr | ast.stmt | None
    text: str


class Model:
    """The project as the rules see it."""

    def __init__(
        self,
        index: Index,
        inference: Inference,
        *,
        version: Version | None = None,
        blocking: Iterable[str] = (),
    ) -> None:
        self.index = index
        self.infer = inference
        self.version = version
        self.blocking = frozenset(blocking)
        inference.passed = self.passed

    def value(self, node: ast.expr | None, scope: Scope) -> Value | None:
        """Return what *node* stands for in *scope*."""
        return self.infer.value(node, scope)

    # What there is to judge.

    @cached_property
    def modules(self) -> list[Module]:
        """The modules with anything to judge, without tests."""
        return [m for m in self.index.modules if m.relevant and not is_test(m)]

    @cached_property
    def scopes(self) -> list[Scope]:
        """The modules, classes and functions of :attr:`modules`."""
        return [scope for module in self.modules for scope in module.scopes]

    @cached_property
    def functions(self) -> list[Scope]:
        """All functions, methods and lambdas of :attr:`modules`."""
        return [scope for scope in self.scopes if scope.kind == "function"]

    @cached_property
    def libraries(self) -> frozenset[str]:
        """The top names of what the project imports from outside."""
        return frozenset(
            target.partition(":")[0].partition(".")[0]
            for module in self.index.modules
            for target in module.imports
        )

    @cached_property
    def imported(self) -> set[int]:
        """The modules (by identity) that another module of the project imports."""
        return {id(target) for importer, target in self.index.importers() if importer != target}

    # Sessions.

    def session(self, node: ast.expr | None, scope: Scope) -> Value | None:
        """Return the session that *node* stands for, if it is one."""
        found = self.value(node, scope)
        if found is None or found.kind not in {"session", "registry"}:
            return None
        return found

    def session_uses(self, scope: Scope) -> list[tuple[str, Use, Value]]:
        """Return the method calls on sessions in *scope*, in order."""
        if not scope.asked:
            return []
        known = scope.memo.get("session uses")
        if isinstance(known, list):
            return cast("list[tuple[str, Use, Value]]", known)
        found: list[tuple[str, Use, Value]] = []
        for path, uses in scope.uses.items():
            methods = [use for use in uses if use.role == "method"]
            if any(use.name in SESSION_METHODS for use in methods):
                found += self._judged(path, methods, scope)
        found.sort(key=lambda item: position(item[1].node))
        scope.memo["session uses"] = found
        return found

    def _judged(self, path: str, uses: list[Use], scope: Scope) -> Iterator[tuple[str, Use, Value]]:
        for use in uses:
            call = use.node
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                value = self.session(call.func.value, scope)
                if value is not None and not self._awaited_elsewhere(path, value, scope):
                    yield path, use, value

    def _awaited_elsewhere(self, path: str, value: Value, scope: Scope) -> bool:
        """An annotation that says ``Session`` while the calls are awaited is wrong."""
        return not value.is_async and any(
            call.role == "await"
            and isinstance(call.node.func, ast.Attribute)
            and call.node.func.attr in STATEMENTS
            and dotted(call.node.func.value) == path
            for call in scope.calls
        )

    # Calls.

    @cached_property
    def calls_by_name(self) -> dict[str, list[Called]]:
        """All calls by the last name of what they call."""
        found: dict[str, list[Called]] = {}
        for scope in self.scopes:
            for call in scope.calls:
                if call.name:
                    found.setdefault(call.name, []).append(Called(scope, call))
        return found

    def calls_of(self, names: Iterable[str]) -> Iterator[tuple[Scope, CallFact]]:
        """Yield the calls of anything that has one of *names* for its last name."""
        for name in names:
            yield from self.calls_by_name.get(name, ())

    def callers(self, function: Scope) -> list[Called]:
        """Return the calls that are known to call *function*."""
        name = function.name
        if name == "__init__" and function.owner_class is not None:
            return self.callers(function.owner_class)
        known = function.memo.get("callers")
        if isinstance(known, list):
            return cast("list[Called]", known)
        found = [
            called
            for called in self.calls_by_name.get(name, ())
            if self.called(called.call.node, called.scope) is function
        ]
        function.memo["callers"] = found
        return found

    @cached_property
    def handed(self) -> dict[str, list[tuple[Scope, ast.expr]]]:
        """The names that are handed on, by their last part, with where that happens."""
        found: dict[str, list[tuple[Scope, ast.expr]]] = {}
        for scope in self.scopes:
            for node in _handed_on(scope):
                name = (dotted(node) or "").rpartition(".")[2]
                if name:
                    found.setdefault(name, []).append((scope, node))
        return found

    def passed(self, function: Scope, name: str) -> Value | None:
        """Return what the first callers that are known pass to the parameter *name*."""
        if not function.module.relevant or is_test(function.module):
            return None
        for caller in self.callers(function)[:6]:
            found = self.value(self.argument_for(caller.call.node, function, name), caller.scope)
            if found is not None and found.kind in {"session", "factory", "engine", "registry"}:
                return found
        return None

    def called(self, call: ast.Call, scope: Scope) -> Scope | None:
        """Return the project's function or class that *call* calls."""
        found = self.value(call.func, scope)
        if found is not None and found.kind in {"function", "class"}:
            return found.target if isinstance(found.target, Scope) else None
        return None

    def argument_for(self, call: ast.Call, function: Scope, name: str) -> ast.expr | None:
        """Return what *call* passes to the parameter *name* of *function*."""
        for keyword in call.keywords:
            if keyword.arg == name:
                return keyword.value
        names = (
            [a.arg for a, _ in parameters(function.node)]
            if not isinstance(function.node, ast.Module | ast.ClassDef)
            else []
        )
        place = names.index(name) if name in names else -1
        if function.owner_class is not None and "staticmethod" not in decorator_names(function):
            place -= 1
        return call.args[place] if 0 <= place < len(call.args) else None

    def external(self, node: ast.expr | None, scope: Scope) -> str:
        """Return the dotted name of the library's object that *node* stands for, or ""."""
        found = self.value(node, scope)
        if found is None or found.kind not in {"external", "instance"}:
            return ""
        return found.name

    # Contexts.

    @cached_property
    def dependencies(self) -> dict[int, list[tuple[Scope, ast.Call]]]:
        """The functions (by identity) that a ``Depends`` names, with each ``Depends``."""
        found: dict[int, list[tuple[Scope, ast.Call]]] = {}
        for scope, call in self.depends:
            provider = self.value(call.args[0] if call.args else None, scope)
            if provider is not None and isinstance(provider.target, Scope):
                found.setdefault(id(provider.target), []).append((scope, call))
        return found

    @cached_property
    def depends(self) -> list[tuple[Scope, ast.Call]]:
        """All calls of ``Depends`` and its relatives, in calls and in annotations."""
        found: list[tuple[Scope, ast.Call]] = []
        for scope, call in self.calls_of(_DEPENDS):
            if is_dependency(self.external(call.node.func, scope)):
                found.append((scope, call.node))
        for scope in self.scopes:
            found += self._annotated_depends(scope)
        return found

    def _annotated_depends(self, scope: Scope) -> Iterator[tuple[Scope, ast.Call]]:
        outer = scope.parent or scope
        for bindings in scope.bindings.values():
            for binding in bindings:
                annotation = binding.annotation
                if isinstance(annotation, ast.Subscript):
                    for item in ast.walk(annotation.slice):
                        if isinstance(item, ast.Call) and self._is_depends(item, outer):
                            yield outer, item

    def _is_depends(self, call: ast.Call, scope: Scope) -> bool:
        return last_name(call) in _DEPENDS and is_dependency(self.external(call.func, scope))

    def context(self, function: Scope) -> str:
        """Return how *function* comes to run: endpoint, task, command, start-up, ""."""
        for decorator in function.decorators:
            node = decorator.func if isinstance(decorator, ast.Call) else decorator
            name = (dotted(node) or "").rpartition(".")[2]
            if name in _VERBS and isinstance(node, ast.Attribute):
                return "endpoint"
            if name in _TASKS:
                return "task"
            if (name in _COMMANDS or "cli" in name.split("_")) and not function.is_async:
                return "command"
            if name == "on_event":
                return "start-up"
        if id(function) in self.dependencies:
            return "dependency"
        return "start-up" if _STARTS.search(function.name) else ""

    def in_context(self, function: Scope) -> str:
        """Return the context of *function* or of the function around it."""
        for scope in function.around():
            if scope.kind == "function" and (context := self.context(scope)):
                return context
        return ""

    def is_script(self, module: Module) -> bool:
        """Return whether nobody imports *module* and it serves nothing."""
        if id(module) in self.imported or module.forever:
            return False
        return not any(self.context(scope) in {"endpoint", "task"} for scope in module.scopes)

    def runs_once(self, scope: Scope) -> bool:
        """Return whether *scope* belongs to a script that soon ends, and its process with it."""
        module = scope.module
        return (
            module.main is not None
            and not any(around.decorators for around in scope.around())
            and self.is_script(module)
        )

    # Findings.

    def finding(
        self,
        rule: Rule,
        scope: Scope,
        node: ast.expr | ast.stmt,
        message: str,
        *,
        confidence: Confidence = "high",
        because: Iterable[Because] = (),
        fix: bool = True,
    ) -> Finding:
        """Return a finding of *rule* at *node*."""
        steps = tuple(
            Evidence(step.scope.module.path, step.node.lineno, step.text)
            for step in because
            if step.node is not None
        )
        return Finding(
            path=scope.module.path,
            line=node.lineno,
            column=node.col_offset + 1,
            end_line=node.end_lineno or node.lineno,
            code=rule.code,
            name=rule.name,
            message=message,
            confidence=confidence,
            evidence=steps or (Evidence(scope.module.path, node.lineno, "it happens here"),),
            fix=rule.fix if fix else None,
            info=rule.default == "info",
        )


def _handed_on(scope: Scope) -> Iterator[ast.expr]:
    """Yield arguments, elements, what is returned, and what objects keep as an attribute."""
    for call in scope.calls:
        yield from call.node.args
        yield from (keyword.value for keyword in call.node.keywords)
    for outcome in (*scope.returns, *scope.yields):
        if outcome.value is not None:
            yield outcome.value
    for path, bindings in scope.bindings.items():
        if "." in path:
            yield from (b.value for b in bindings if isinstance(b.value, ast.expr))
    for uses in scope.uses.values():
        yield from (use.node for use in uses if use.role == "element")


def is_test(module: Module) -> bool:
    """Return whether *module* is a test or serves tests."""
    *folders, file = module.local.split("/")
    return (
        not _TEST_FOLDERS.isdisjoint(folders)
        or file.startswith("test_")
        or file.endswith(("_test.py", "_tests.py"))
        or file in {"conftest.py", "tests.py"}
    )


def is_migration(module: Module) -> bool:
    """Return whether *module* is a migration script or runs them."""
    return not _MIGRATIONS.isdisjoint(module.local.split("/"))


def enclosing(block: Block, *kinds: str) -> Block | None:
    """Return the innermost block around of one of *kinds*."""
    return next((b for b in block.chain() if b.kind in kinds), None)


def contains(outer: ast.AST, inner: ast.AST) -> bool:
    """Return whether *inner* stands inside *outer* in the same file."""
    start, end = getattr(outer, "lineno", 0), getattr(outer, "end_lineno", 0)
    line = getattr(inner, "lineno", 0)
    if not start <= line <= end:
        return False
    return (start, getattr(outer, "col_offset", 0)) <= (
        line,
        getattr(inner, "col_offset", 0),
    ) and (getattr(inner, "end_lineno", 0), getattr(inner, "end_col_offset", 0)) <= (
        end,
        getattr(outer, "end_col_offset", 0),
    )


def dotted_root(path: str) -> str:
    """Return the first name of a dotted path."""
    return path.partition(".")[0]
