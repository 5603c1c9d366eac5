"""What runs elsewhere: background tasks, threads and their pools, task queues."""

import ast
from typing import NamedTuple

from sessionscope.check._facts import CallFact, Scope
from sessionscope.check._model import Model

_TASK_CALLS = (
    "delay",
    "apply_async",
    "s",
    "si",
    "send",
    "kiq",
    "enqueue",
    "enqueue_job",
    "send_task",
    "signature",
)
# The last names of all calls that may hand something over.
CALLS = (
    *_TASK_CALLS,
    "add_task",
    "BackgroundTask",
    "Thread",
    "Process",
    "Timer",
    "submit",
    "map",
    "run_in_executor",
)
BACKGROUND_TASK = "a background task"


class Handed(NamedTuple):
    """What runs elsewhere, and the expressions that go there."""

    where: str
    nodes: list[ast.expr]


def handed_over(model: Model, scope: Scope, call: CallFact) -> Handed | None:
    """Return what *call*, one of :data:`CALLS`, hands over; None if it is called so by chance."""
    node = call.node
    function = node.func
    last = call.name
    nodes = [*node.args, *(k.value for k in node.keywords)]
    match last:
        case "add_task" if _base_is(model, scope, function, "BackgroundTasks", "BackgroundTask"):
            return Handed(BACKGROUND_TASK, nodes)
        case "BackgroundTask" if model.external(function, scope).startswith(
            ("starlette", "fastapi")
        ):
            return Handed(BACKGROUND_TASK, nodes)
        case "Thread" | "Process" | "Timer" if _is_thread(model.external(function, scope)):
            return Handed("a thread", nodes)
        case "submit" | "map" if _is_pool(model, scope, function):
            return Handed("a thread pool", nodes)
        case "run_in_executor" if call.role != "await":
            return Handed("a thread pool", nodes[1:])
        case _ if last in _TASK_CALLS and _is_task(model, scope, function):
            return Handed("a task queue", nodes)
        case _:
            return None


def _base_is(model: Model, scope: Scope, function: ast.expr, *names: str) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    known = model.external(function.value, scope)
    top, _, rest = known.partition(".")
    return top in {"fastapi", "starlette"} and rest.rpartition(".")[2] in names


def _is_thread(name: str) -> bool:
    return name.partition(".")[0] in {"threading", "multiprocessing"}


def _is_pool(model: Model, scope: Scope, function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and model.external(function.value, scope).startswith(
        "concurrent.futures"
    )


def _is_task(model: Model, scope: Scope, function: ast.expr) -> bool:
    """``task.delay()`` of a function that a task decorator made a task."""
    if not isinstance(function, ast.Attribute):
        return False
    found = model.value(function.value, scope)
    if found is not None and found.kind == "function" and isinstance(found.target, Scope):
        return model.context(found.target) == "task"
    name = found.name.partition(".")[0] if found is not None else ""
    return name in {"celery", "rq", "dramatiq"} and function.attr != "send"
