"""The answer to a request that the database has no room for, the same in every framework."""

import logging
import math
from collections.abc import Mapping
from time import monotonic
from typing import Any

from sessionscope import exc

STATUS = 503
ERRORS = (exc.PoolBusy, exc.DatabaseUnavailable)

# When a refusal of each kind was last logged.
_logged_at: dict[type[Exception], float] = {}
_log = logging.getLogger("sessionscope")


def refuse(error: Exception, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Log the refusal; return the body, to be sent as JSON, and the headers of its answer."""
    _log_refusal(error, path)
    busy = isinstance(error, exc.PoolBusy)
    body = {
        "detail": "The database is busy." if busy else "The database cannot be reached.",
        "code": getattr(error, "error_code", None),
    }
    return body, {"Retry-After": str(math.ceil(getattr(error, "retry_after", 1.0)))}


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


def _log_refusal(error: Exception, path: str) -> None:
    """Log at most one refusal per second and kind: under overload there are thousands."""
    now = monotonic()
    if now - _logged_at.get(type(error), -1.0) >= 1.0:
        _logged_at[type(error)] = now
        _log.warning("%s was refused with 503: %s", path, error)
