"""Event loops: calls from other threads, and tasks that live until they are done."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


def call_soon(loop: asyncio.AbstractEventLoop, fn: Callable[..., object], *args: object) -> bool:
    """Call *fn* on *loop*, from any thread; return False if the loop has been closed."""
    try:
        loop.call_soon_threadsafe(fn, *args)
    except RuntimeError:
        return False
    return True


def start(work: Coroutine[Any, Any, Any], alive: "set[asyncio.Task[Any]]") -> "asyncio.Task[Any]":
    """Start a task that is in *alive* until it is done: the event loop alone would not keep it."""
    # Not create_task(): an eager task would begin inside of the greenlet that asks for it.
    task = asyncio.Task(work, loop=asyncio.get_running_loop())
    alive.add(task)
    task.add_done_callback(alive.discard)
    return task
