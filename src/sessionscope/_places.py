"""Places in the user's code, for errors and warnings to name."""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from types import CodeType, FrameType
from typing import Any

# A line of code, kept as it comes and put into words only for an error.
Place = tuple[CodeType, int]

_LIBRARIES = ("sessionscope.", "sqlalchemy.")


def caller(depth: int) -> Place:
    """Return the place that many calls above the function that asks."""
    # A whole stack costs a hundred times more.
    frame = sys._getframe(depth + 1)  # pyright: ignore[reportPrivateUsage]  # documented
    return frame.f_code, frame.f_lineno


def describe(place: Place | None) -> str:
    """Return the place as ``file:line (function)``."""
    if place is None:
        return "a place that is not known"
    code, line = place
    return f"{code.co_filename}:{line} ({code.co_qualname})"


def place_of(fn: Callable[..., Any]) -> Place | None:
    """Return where *fn* is defined, or what it calls; of what is not Python, who calls it."""
    while isinstance(fn, partial):
        fn = fn.func
    code: CodeType | None = getattr(fn, "__code__", None)
    if code is None:  # an object that can be called
        code = getattr(getattr(type(fn), "__call__", None), "__code__", None)  # noqa: B004  # it is
    return (code, code.co_firstlineno) if code is not None else here()


def begin(*, is_async: bool) -> str:
    """Return how a unit of work is opened, for errors that say what to write instead."""
    return "async with database.begin()" if is_async else "with database.begin()"


def here() -> Place | None:
    """Return the innermost place of the user's that this call comes from."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # documented
    return _outside(frame) or _outside(_frame_that_waits_for_this_greenlet())


def there(user: "int | asyncio.Task[Any]") -> Place | None:
    """Return where another thread, by its identity, or another task is now."""
    if isinstance(user, int):
        frame = sys._current_frames().get(user)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and not _is_of_a_library(frame):  # the driver, and what it waits in
            frame = frame.f_back
        return _outside(frame)
    place = None
    step: Any = user.get_coro()
    while (frame := getattr(step, "cr_frame", None)) is not None and not _is_of_a_library(frame):
        place = frame.f_code, frame.f_lineno
        step = step.cr_await
    return place


def _outside(frame: FrameType | None) -> Place | None:
    while frame is not None and _is_of_a_library(frame):
        frame = frame.f_back
    if frame is None or _module(frame).startswith("asyncio."):  # a task that runs no code but ours
        return None
    return frame.f_code, frame.f_lineno


def _is_of_a_library(frame: FrameType) -> bool:
    return _module(frame).startswith(_LIBRARIES)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _frame_that_waits_for_this_greenlet() -> FrameType | None:
    greenlet = sys.modules.get("greenlet")
    parent = greenlet.getcurrent().parent if greenlet is not None else None
    return parent.gr_frame if parent is not None else None
