"""The line of the user's that a statement comes from."""

import sys
from types import FrameType

_LIBRARIES = (
    *("sessionscope.", "sqlalchemy.", "sqlmodel.", "starlette.", "fastapi.", "anyio."),
    *("asyncio.", "concurrent.", "contextlib", "threading"),
)


def here() -> str:
    """Return the user's line that this call comes from, as ``file:line (name)``."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # documented
    found = _outside(frame) or _outside(_frame_that_waits_for_this_greenlet())
    if found is None:
        return "a place that is not known"
    code = found.f_code
    return f"{code.co_filename}:{found.f_lineno} ({code.co_qualname})"


def _outside(frame: FrameType | None) -> FrameType | None:
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_LIBRARIES):
        frame = frame.f_back
    return frame


def _frame_that_waits_for_this_greenlet() -> FrameType | None:
    greenlet = sys.modules.get("greenlet")
    parent = greenlet.getcurrent().parent if greenlet is not None else None
    return parent.gr_frame if parent is not None else None
