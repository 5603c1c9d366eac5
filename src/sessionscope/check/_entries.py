"""Functions that others call: overrides, callbacks, and what a decorator registers.

Nobody who calls them holds a session, so that nobody can hand them one.
"""

import ast
import builtins

from sessionscope.check._background import CALLS, handed_over
from sessionscope.check._facts import Scope, dotted, last_name, words
from sessionscope.check._model import Model

# Bases that declare no method for others to call.
_PLAIN = words(
    "ABC Generic Protocol BaseModel BaseSettings SQLModel DeclarativeBase MappedAsDataclass "
    "NamedTuple TypedDict Enum Base Model"
)
# Calls that start a coroutine for itself.
_RUNNERS = words(
    "run run_until_complete create_task ensure_future run_coroutine_threadsafe start_soon spawn "
    "async_to_sync run_async gather"
)
_STARTERS = frozenset({"create_task", "ensure_future", "start_soon", "run_coroutine_threadsafe"})
_ENTRIES = frozenset({"endpoint", "task", "command"})
# Libraries whose decorators wrap a function and leave its callers as they are.
_WRAPPERS = words(
    "functools contextlib typing typing_extensions abc builtins warnings dataclasses tenacity "
    "backoff cachetools async_lru deprecated opentelemetry pydantic wrapt sqlalchemy sqlmodel"
)
_ASGI = frozenset({"scope", "receive", "send"})
_OWN = frozenset({"property", "staticmethod", "classmethod"})


def is_called_by_others(model: Model, function: Scope) -> bool:
    """Return whether *function* overrides, is handed to somebody who calls it, or is registered."""
    return (
        overrides(model, function)
        or is_callback(model, function)
        or is_started(model, function)
        or any(_registers(model, node, function) for node in function.decorators)
        or function.bindings.keys() >= _ASGI
    )


def overrides(model: Model, method: Scope) -> bool:
    """Return whether a base class declares *method*; one that is not known may well do."""
    owner = method.owner_class
    return owner is not None and _declares(model, owner, method.name, 0)


def _declares(model: Model, owner: Scope, name: str, depth: int) -> bool:
    if not isinstance(owner.node, ast.ClassDef):
        return False
    for base in owner.node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        last = (dotted(plain) or "").rpartition(".")[2]
        if last in _PLAIN or hasattr(builtins, last):
            continue
        found = model.value(plain, owner.parent or owner)
        target = found.target if found is not None else None
        if not isinstance(target, Scope):
            return True
        if name in target.bindings or (depth < 8 and _declares(model, target, name, depth + 1)):
            return True
    return False


def is_callback(model: Model, function: Scope) -> bool:
    """Return whether *function* itself is handed on: to a thread, in a table, as a result."""
    for scope, node in model.handed.get(function.name, ()):
        found = model.value(node, scope)
        if found is not None and found.target is function:
            return True
    return False


def is_started(model: Model, function: Scope) -> bool:
    """Return whether its callers start it alone: ``asyncio.run(function())``, or at start-up."""
    callers = model.callers(function)
    return bool(callers) and all(
        (isinstance(c.call.owner, ast.Call) and last_name(c.call.owner) in _RUNNERS)
        or isinstance(c.scope.node, ast.Lambda)
        or model.in_context(c.scope) in {"start-up", "command"}
        for c in callers
    )


def starts_another(model: Model, function: Scope) -> bool:
    """Return whether *function* starts a thread or a task, or hands something to a queue."""
    return any(
        (call.name in CALLS and handed_over(model, function, call) is not None)
        or (
            call.name in _STARTERS
            and model.external(call.node.func, function).startswith(("asyncio.", "anyio."))
        )
        for call in function.calls
    )


def has_entry_points(model: Model) -> bool:
    """Return whether the project's entry points are among the files that are checked."""
    return any(model.context(scope) in _ENTRIES for scope in model.functions)


def is_never_called(model: Model, function: Scope) -> bool:
    """Return whether no call in the project may be one of *function*, by its name."""
    name = function.name
    if name in model.calls_by_name or name in model.handed:
        return False
    # The calls in files that hold nothing to judge are not recorded.
    return not any(
        target is function.module and not importer.relevant
        for importer, target in model.index.importers()
    )


def _registers(model: Model, node: ast.expr, function: Scope) -> bool:
    """A decorator of a library, or a method of an object, keeps what it decorates."""
    plain = node.func if isinstance(node, ast.Call) else node
    name = dotted(plain)
    if name is None or name in _OWN or name.endswith((".setter", ".getter", ".deleter")):
        return False
    found = model.value(plain, function.parent or function)
    if found is None:
        return "." in name  # ``@bot.command()``, whoever made the bot
    if found.kind == "external":
        return found.name.lstrip("<").partition(".")[0] not in _WRAPPERS
    return found.kind == "function" and found.bound is not None
