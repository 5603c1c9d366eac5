"""What an expression can stand for, and what libraries' names stand for."""

import ast
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from sessionscope.check._facts import Module, Scope

Kind = Literal[
    "session",
    "factory",  # a sessionmaker, or what else makes sessions when called
    "registry",  # a scoped_session: makes sessions and stands for one
    "engine",
    "manager",  # a context manager that gives ``inner``
    "generator",  # a generator object that yields ``inner``
    "function",
    "class",
    "instance",
    "module",
    "external",  # something of a library, by its dotted name
    "annotation",  # a type alias, to be read as one
    "callable",  # something that returns ``inner``
    "none",
]


class Injected(NamedTuple):
    """The ``Depends`` of FastAPI that brings a value in, and the generator that yields it."""

    call: ast.Call
    provider: Scope | None


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of the value of an expression."""

    kind: Kind
    is_async: bool = False
    target: Scope | Module | None = None
    name: str = ""
    inner: "Value | None" = None
    fresh: bool = False  # just made: who holds it owns it
    received: bool = False  # came in by parameter or dependency
    scoped: bool = False  # the session of a registry: its owner is elsewhere
    node: ast.expr | None = field(default=None, compare=False)  # what made it
    scope: Scope | None = field(default=None, compare=False)  # where ``node`` stands
    bound: "Value | None" = None  # the object of a method, the factory of a session
    wrapped: Literal["", "manager", "cached"] = ""
    injected: Injected | None = field(default=None, compare=False)

    def held(self) -> "Value":
        """Return this value as seen by someone who does not own it."""
        return replace(self, fresh=False) if self.fresh else self

    def given(self) -> "Value":
        """Return this value as seen by someone who received it."""
        return replace(self, fresh=False, received=True)


NONE = Value("none")
SYNC_SESSION = Value("session")
ASYNC_SESSION = Value("session", is_async=True)


def external(name: str) -> Value:
    """Return the value for a library's dotted name."""
    return Value("external", name=name)


_SESSION_LIBRARIES = frozenset({"sqlalchemy", "sqlmodel"})
_CLASSES = {
    "Session": SYNC_SESSION,
    "AsyncSession": ASYNC_SESSION,
    "sessionmaker": Value("factory"),
    "async_sessionmaker": Value("factory", is_async=True),
    "scoped_session": Value("registry", scoped=True),
    "async_scoped_session": Value("registry", is_async=True, scoped=True),
    "Engine": Value("engine"),
    "AsyncEngine": Value("engine", is_async=True),
    "create_engine": Value("engine"),
    "engine_from_config": Value("engine"),
    "create_async_engine": Value("engine", is_async=True),
    "async_engine_from_config": Value("engine", is_async=True),
}
_EXTENSIONS = frozenset({"flask_sqlalchemy", "flask_sqlalchemy_lite", "quart_sqlalchemy"})
DATABASES = {
    "sessionscope.Database": Value("session"),
    "sessionscope.AsyncDatabase": Value("session", is_async=True),
}


def instance_of(name: str) -> Value | None:
    """Return what an instance of the library's class *name* is, or what its call returns."""
    top, _, rest = name.partition(".")
    if top in _SESSION_LIBRARIES:
        return _CLASSES.get(rest.rpartition(".")[2])
    return None


def is_extension(name: str) -> bool:
    """Return whether *name* is a Flask extension class that offers ``.session``."""
    top, _, rest = name.partition(".")
    return top in _EXTENSIONS and rest.rpartition(".")[2] == "SQLAlchemy"


def is_dependency(name: str) -> bool:
    """Return whether *name* is FastAPI's ``Depends`` or a relative."""
    top, _, rest = name.partition(".")
    last = rest.rpartition(".")[2]
    return (top == "fastapi" and last in {"Depends", "Security"}) or (
        top in {"litestar", "taskiq", "taskiq_dependencies", "fast_depends", "faststream"}
        and last in {"Provide", "TaskiqDepends", "Depends"}
    )


def library_attribute(base: Value, name: str) -> Value | None:
    if is_extension(base.name):
        if name == "session":
            return Value("session", scoped=True)
        return Value("engine") if name == "engine" else external(f"{base.name}.{name}")
    if base.name in DATABASES:
        if name == "sessionmaker":
            return Value("factory", base.name.endswith("AsyncDatabase"))
        return Value("external", name=f"<database>.{name}", bound=base)
    return external(f"{base.name}.{name}")


def method_call(function: Value, node: ast.Call | None, scope: Scope) -> Value | None:
    """Calls of methods of sessions, factories and engines that matter."""
    base = function.bound
    name = function.name.rpartition(".")[2]
    if base is None:
        return None
    if base.kind == "factory" and name == "begin":
        inner = Value("session", base.is_async, node=node, scope=scope, bound=base)
        return Value("manager", base.is_async, inner=inner, name="begin")
    if base.name in DATABASES and name == "begin":
        inner = DATABASES[base.name]
        ends = "" if node is not None and _is_read_only(node) else "begin"
        return Value("manager", inner.is_async, inner=inner, name=ends)
    if base.kind == "generator" and name in {"__next__", "__anext__", "send", "asend"}:
        return base.inner
    if base.kind == "manager" and name in {"__enter__", "__aenter__"}:
        return base.inner
    if base.kind == "session" and name in {"__enter__", "__aenter__"}:
        return base
    if base.kind == "session" and name in {"begin", "begin_nested"}:
        return Value("manager", base.is_async, inner=None, name="begin", bound=base)
    return None


def _is_read_only(call: ast.Call) -> bool:
    """Return whether *call* says ``read_only=True``: such a unit has nothing to commit."""
    return any(
        k.arg == "read_only" and isinstance(k.value, ast.Constant) and k.value.value is True
        for k in call.keywords
    )
