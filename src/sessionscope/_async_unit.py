"""Ending units of work on an event loop, so that no cancellation can prevent it.

The steps are Unit's own, run in one of SQLAlchemy's greenlets, and where they may
wait, in a task of their own. A cancellation that comes before COMMIT was sent rolls
back. One that comes after waits for the outcome, which is then reported as it is,
and is delivered at the next ``await``.
"""

import asyncio
import sys
from collections.abc import Callable, Collection, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sqlalchemy.util import greenlet_spawn

from sessionscope._unit import Unit

_tasks: set[asyncio.Task[Any]] = set()


async def end_all(units: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]) -> None:
    """Async version of :meth:`Unit.end_all`."""
    for unit in units:
        unit.leave()
    if not any(unit.needs_io for unit in units):
        await greenlet_spawn(Unit.end_all, units, how)
        return
    if how is not Unit.commit:
        await asyncio.shield(start(greenlet_spawn(Unit.end_all, units, how)))
        return
    try:
        if any(unit.has_changes for unit in units):
            await greenlet_spawn(Unit.flush_all, units)
    except BaseException:
        await asyncio.shield(start(greenlet_spawn(Unit.end_all, units, Unit.rollback)))
        raise
    await _outcome(start(greenlet_spawn(Unit.end_all, units, how)))


def start(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Start a task that lives until it is done."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)  # the event loop alone would not keep it alive
    task.add_done_callback(_tasks.discard)
    return task


async def _outcome(committing: "asyncio.Task[None]") -> None:
    """Wait until *committing* is done, whatever is cancelled meanwhile."""
    cancelled = False
    with _shield():
        while not committing.done():
            try:
                await asyncio.wait([committing])
            except asyncio.CancelledError:
                cancelled = True
    if cancelled:
        task = asyncio.current_task()
        assert task is not None
        task.get_loop().call_soon(_cancel_again, task)
    committing.result()


def _cancel_again(task: "asyncio.Task[Any]") -> None:
    """Deliver a cancellation that had to wait, unless the timeout behind it is over."""
    if task.cancelling() and not task.done():
        task.uncancel()
        task.cancel()


def _shield() -> AbstractContextManager[object]:
    # An anyio scope that was cancelled cancels again at every await, in a busy loop.
    anyio = sys.modules.get("anyio")
    return anyio.CancelScope(shield=True) if anyio is not None else nullcontext()
