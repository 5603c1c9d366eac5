"""Ending units of work on an event loop, so that no cancellation can prevent it.

The steps are Unit's own, run in one of SQLAlchemy's greenlets, and where they may
wait, in a task of their own. A cancellation that comes before COMMIT was sent rolls
back. One that comes after waits for the outcome, which is then reported as it is,
and is delivered at the next ``await``: a hook's, if there are any.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from sqlalchemy.util import greenlet_spawn

from sessionscope._loops import start
from sessionscope.exc import CommitUnknown

_tasks: set[asyncio.Task[Any]] = set()


async def end(finish: Callable[[], object]) -> None:
    """Call *finish*, which nothing can prevent, in a task of its own.

    A cancellation is delivered at once, and *finish* goes on.
    """
    await asyncio.shield(start(greenlet_spawn(finish), _tasks))


async def flush(work: Callable[[], None], undo: Callable[[], None]) -> None:
    """Call *work*; if it fails, or is cancelled, call *undo*, which nothing can prevent."""
    try:
        await greenlet_spawn(work)
    except BaseException:
        await end(undo)
        raise


async def commit(finish: Callable[[], None], run_hooks: Callable[[], Awaitable[bool]]) -> None:
    """Call *finish* in a task of its own, and when it has ended *run_hooks* in this one.

    A cancellation that ends a hook, of which *run_hooks* tells, cannot undo the outcome.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelled_before = task.cancelling()
    try:
        await _outcome(start(greenlet_spawn(finish), _tasks), task)
    finally:
        if await run_hooks() and task.cancelling() > cancelled_before:
            _cancel_soon(task)


async def _outcome(committing: "asyncio.Task[None]", task: "asyncio.Task[Any]") -> None:
    """Wait in *task* until *committing* is done, whatever is cancelled meanwhile."""
    with _shield():
        try:
            await asyncio.shield(committing)
            return
        except asyncio.CancelledError:  # also in the moment when it was done already
            await _done(committing)
    _cancel_soon(task)
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


def _cancel_soon(task: "asyncio.Task[Any]") -> None:
    """Deliver at the next ``await`` a cancellation that was caught."""
    task.get_loop().call_soon(_cancel_again, task)


def _cancel_again(task: "asyncio.Task[Any]") -> None:
    """Deliver a cancellation that had to wait, unless the timeout behind it is over."""
    if task.cancelling() and not task.done():
        task.uncancel()
        task.cancel()


def _shield() -> AbstractContextManager[object]:
    # An anyio scope that was cancelled cancels again at every await, in a busy loop.
    anyio = sys.modules.get("anyio")
    return anyio.CancelScope(shield=True) if anyio is not None else nullcontext()
