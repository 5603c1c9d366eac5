"""The checker: finds where code makes, shares, leaks and misuses SQLAlchemy sessions.

It reads source code and runs none of it; nothing but the standard library is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessionscope.check._api import check_paths, check_source
    from sessionscope.check._config import Config, UsageError
    from sessionscope.check._finding import Finding, Rule

__all__ = ["Config", "Finding", "Rule", "UsageError", "check_paths", "check_source"]

_HOMES = {
    "Config": "_config",
    "Finding": "_finding",
    "Rule": "_finding",
    "UsageError": "_config",
    "check_paths": "_api",
    "check_source": "_api",
}


def __getattr__(name: str) -> Any:
    # Resolved at first use: a run that the cache answers needs little of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'sessionscope.check' has no attribute {name!r}")
    value = getattr(import_module(f"sessionscope.check.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
