"""The answer to a request that the database has no room for, the same in every framework."""

import logging
import math
from collections.abc import Mapping
from time import monotonic
from typing import Any

from sessionscope import exc

# What each error is answered with, and what the client is told.
_ANSWERS: dict[type[exc.SessionScopeError], tuple[int, str]] = {
    exc.PoolBusy: (503, "The database is busy."),
    exc.DatabaseUnavailable: (503, "The database cannot be reached."),
    exc.DeadlineExceeded: (504, "The database took too long."),
}
ERRORS = tuple(_ANSWERS)

# When a refusal of each kind was last logged.
_logged_at: dict[type[Exception], float] = {}
_log = logging.getLogger("sessionscope")


def refuse(error: Exception, path: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Log the refusal; return its answer's status, body, to be sent as JSON, and headers."""
    kind = next(kind for kind in ERRORS if isinstance(error, kind))
    status, detail = _ANSWERS[kind]
    _log_refusal(error, path, status)
    body = {"detail": detail, "code": kind.error_code}
    retry_after = getattr(error, "retry_after", None)
    if retry_after is None:  # the same work would take as long again
        return status, body, {}
    return status, body, {"Retry-After": str(math.ceil(retry_after))}


def handler_of_the_app(
    error: type[Exception], handlers: Mapping[Any, Any] | None, ours: object = None
) -> Any:
    """Return the app's handler for a class between *error* and Exception, but not *ours*."""
    for cls in error.__mro__:
        if cls is Exception:
            return None
        handler = (handlers or {}).get(cls)
        if handler is not None and handler is not ours:
            return handler
    return None


def _log_refusal(error: Exception, path: str, status: int) -> None:
    """Log at most one refusal per second and kind: under overload there are thousands."""
    now = monotonic()
    if now - _logged_at.get(type(error), -1.0) >= 1.0:
        _logged_at[type(error)] = now
        _log.warning("%s was refused with %d: %s", path, status, error)
