"""Ending units of work on an event loop, so that no cancellation can prevent it.

The steps are Unit's own, run in one of SQLAlchemy's greenlets, and where they may
wait, in a task of their own. A cancellation that comes before COMMIT was sent rolls
back. One that comes after waits for the outcome, which is then reported as it is,
and is delivered at the next ``await``.
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from sqlalchemy.util import greenlet_spawn

from sessionscope.exc import CommitUnknown

_tasks: set[asyncio.Task[Any]] = set()


async def end(finish: Callable[[], None]) -> None:
    """Call *finish*, which nothing can prevent, in a task of its own.

    A cancellation is delivered at once, and *finish* goes on.
    """
    await asyncio.shield(start(greenlet_spawn(finish)))


async def commit(
    finish: Callable[[], None], flush: Callable[[], None] | None, undo: Callable[[], None]
) -> None:
    """Call *flush*, if there is something to flush, and then *finish* in a task of its own.

    If *flush* fails, or is cancelled, *undo* is called instead.
    """
    if flush is not None:
        try:
            await greenlet_spawn(flush)
        except BaseException:
            await end(undo)
            raise
    await _outcome(start(greenlet_spawn(finish)))


def start(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    """Start a task that lives until it is done."""
    task = asyncio.Task(work, loop=asyncio.get_running_loop())
    _tasks.add(task)  # the event loop alone would not keep it alive
    task.add_done_callback(_tasks.discard)
    return task


async def _outcome(committing: "asyncio.Task[None]") -> None:
    """Wait until *committing* is done, whatever is cancelled meanwhile."""
    with _shield():
        try:
            await asyncio.shield(committing)
            return
        except asyncio.CancelledError:  # also in the moment when it was done already
            await _done(committing)
    task = asyncio.current_task()
    assert task is not None
    task.get_loop().call_soon(_cancel_again, task)
    if committing.cancelled():  # no one has it but the event loop, which is being shut down
        raise CommitUnknown(
            "The event loop was shut down during COMMIT: the database may have committed, or not. "
            "Look before you try again"
        )
    committing.result()


async def _done(committing: "asyncio.Task[None]") -> None:
    while not committing.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([committing])


def _cancel_again(task: "asyncio.Task[Any]") -> None:
    """Deliver a cancellation that had to wait, unless the timeout behind it is over."""
    if task.cancelling() and not task.done():
        task.uncancel()
        task.cancel()


def _shield() -> AbstractContextManager[object]:
    # An anyio scope that was cancelled cancels again at every await, in a busy loop.
    anyio = sys.modules.get("anyio")
    return anyio.CancelScope(shield=True) if anyio is not None else nullcontext()
