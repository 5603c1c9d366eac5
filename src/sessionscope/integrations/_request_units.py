"""The units of work of one request, on an event loop: opened together, ended together."""

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from types import CodeType
from typing import Any, TypeVar

from sessionscope import Unit

Units = dict[Any, Unit[Any]]

_R = TypeVar("_R")


# Units end in threads of their own: in the framework's pool they would queue
# behind requests that wait for the very connections they hold. There are never
# more of them at work than units, so the gates are the bound.
_ending: ThreadPoolExecutor


def _new_executor() -> None:
    global _ending  # noqa: PLW0603  # a forked child has none of its parent's threads
    _ending = ThreadPoolExecutor(max_workers=1000, thread_name_prefix="sessionscope-end")


_new_executor()
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_new_executor)


def in_order(wanted: Mapping[Any, bool]) -> dict[Any, bool]:
    """Return the databases of a request in the order that is the same for all requests."""
    return dict(sorted(wanted.items(), key=_id_of_database)) if len(wanted) > 1 else dict(wanted)


def _id_of_database(item: tuple[Any, bool]) -> int:
    return id(item[0])


async def open_units(wanted: Mapping[Any, bool], code: CodeType | None) -> Units:
    """Admit a unit for each database in *wanted*, which tells whether it is only read.

    Errors name the function that *code* belongs to.
    """
    opened_at = (code, code.co_firstlineno) if code is not None else None
    opened: Units = {}
    try:
        for database, read_only in wanted.items():
            unit = Unit(database, read_only=read_only, opened_at=opened_at)
            await unit.admit_async()
            opened[database] = unit
    except BaseException:
        for unit in opened.values():
            unit.close()
        raise
    return opened


async def end_units(units: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]) -> None:
    """End the units: those of AsyncDatabases here, the others in a thread."""
    here = [unit for unit in units if unit.is_async]
    others = [unit for unit in units if not unit.is_async]
    if not here:
        await _end_in_thread(others, how)
    elif not others:
        await Unit.end_all_async(here, how)
    elif how is Unit.commit:
        await _commit_both(here, others)
    else:
        await _undo_both(here, others, how)


async def _commit_both(here: Collection[Unit[Any]], others: Collection[Unit[Any]]) -> None:
    """Flush all units, of both kinds, and then commit them."""
    if any(unit.has_changes for unit in others):
        await _flush_first(here, others)
    try:
        await Unit.end_all_async(here, Unit.commit)
    except BaseException:
        await _end_in_thread(others, Unit.rollback)
        raise
    await _end_in_thread(others, Unit.commit)


async def _flush_first(here: Collection[Unit[Any]], others: Collection[Unit[Any]]) -> None:
    """Flush the *others* in a thread; if that fails, undo all units."""
    flushing = start(partial(Unit.flush_all, others))
    try:
        await asyncio.shield(flushing)
    except asyncio.CancelledError:
        # It goes on in its thread, is interrupted, and no one asks for its error any more.
        flushing.add_done_callback(lambda flushed: flushed.exception())
        await _undo_both(here, others, Unit.discard)
        raise
    except BaseException:
        await _undo_both(here, others, Unit.rollback)
        raise


async def _undo_both(
    here: Collection[Unit[Any]], others: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]
) -> None:
    # Under a cancelled anyio scope every await raises: what each starts before its first is done.
    try:
        await Unit.end_all_async(here, how)
    finally:
        await _end_in_thread(others, how)


async def _end_in_thread(units: Collection[Unit[Any]], how: Callable[[Unit[Any]], None]) -> None:
    """End the units of Databases, in a thread if that may wait for one."""
    # discard() interrupts a statement and waits for another thread, whatever the unit did.
    if how is not Unit.discard and not any(unit.needs_io for unit in units):
        Unit.end_all(units, how)
        return
    # Started before the first await: a cancellation cannot prevent it.
    await asyncio.shield(start(partial(Unit.end_all, units, how)))


def start(work: Callable[[], _R]) -> "asyncio.Future[_R]":
    """Start *work* in a thread that sees the request's context."""
    context = copy_context()
    return asyncio.get_running_loop().run_in_executor(_ending, lambda: context.run(work))
