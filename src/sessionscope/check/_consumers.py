"""Who gets the session of a FastAPI dependency: functions, and objects made with it."""

import ast
from functools import cached_property
from typing import NamedTuple

from sessionscope.check._facts import Scope, dotted
from sessionscope.check._model import Model


class Consumer(NamedTuple):
    """A function that gets the session, or an object that holds it, as its parameter *name*."""

    function: Scope
    name: str
    depends: ast.Call


class Consumers:
    """The consumers of all dependencies of a project, looked for when the first one is asked."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def of(self, provider: Scope) -> list[Consumer]:
        """Return what uses the session of *provider*, without other dependencies."""
        sessions, objects = self._received
        direct = sessions.get(id(provider), [])
        holders = {
            id(owner): user.depends
            for user in direct
            for owner in self._made_with(user.function, user.name)
        }
        # An object made with a repository holds its session, too.
        for _ in range(2):
            for function, name, owner in objects:
                if id(owner) in holders:
                    for outer in self._made_with(function, name):
                        holders.setdefault(id(outer), holders[id(owner)])
        indirect = (
            Consumer(function, name, holders[id(owner)])
            for function, name, owner in objects
            if id(owner) in holders
        )
        return [user for user in (*direct, *indirect) if not self._hands_on(user.function)]

    def _hands_on(self, function: Scope) -> bool:
        return function.name == "__init__" or self._model.context(function) == "dependency"

    @cached_property
    def _received(self) -> tuple[dict[int, list[Consumer]], list[tuple[Scope, str, Scope]]]:
        """What the session of each dependency goes to, and the parameters that are objects."""
        sessions: dict[int, list[Consumer]] = {}
        objects: list[tuple[Scope, str, Scope]] = []
        for function in self._model.functions:
            for name, bindings in function.bindings.items():
                first = bindings[0]
                told = isinstance(first.value, ast.Call) or first.annotation is not None
                if first.kind != "parameter" or not told:
                    continue
                value = self._model.infer.binding(first, function)
                if value is None:
                    continue
                if value.injected is not None and value.injected.provider is not None:
                    user = Consumer(function, name, value.injected.call)
                    sessions.setdefault(id(value.injected.provider), []).append(user)
                elif (
                    value.kind == "instance"
                    and isinstance(value.target, Scope)
                    and (value.injected is not None or self._is_called_by_framework(function))
                ):
                    objects.append((function, name, value.target))
        return sessions, objects

    def _is_called_by_framework(self, function: Scope) -> bool:
        return function.name == "__init__" or bool(self._model.context(function))

    def _made_with(self, function: Scope, name: str) -> list[Scope]:
        """Return the classes of the objects that *function* makes with its parameter *name*."""
        if function.name == "__init__" and function.owner_class is not None:
            return [function.owner_class]
        found: list[Scope] = []
        for call in function.calls:
            arguments = (*call.node.args, *(k.value for k in call.node.keywords))
            if any(dotted(node) == name for node in arguments):
                made = self._model.called(call.node, function)
                if made is not None and made.kind == "class":
                    found.append(made)
        return found
