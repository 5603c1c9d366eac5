"""The session layer for SQLAlchemy: one engine, one factory, one session per unit of work."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessionscope import events, exc
    from sessionscope._async_database import AsyncDatabase
    from sessionscope._database import Database
    from sessionscope._hooks import after_commit, after_rollback
    from sessionscope._unit import Unit
    from sessionscope.events import Stats

__all__ = [
    "AsyncDatabase",
    "Database",
    "Stats",
    "Unit",
    "after_commit",
    "after_rollback",
    "events",
    "exc",
]

_HOMES = {
    "AsyncDatabase": "_async_database",
    "Database": "_database",
    "Stats": "events",
    "Unit": "_unit",
    "after_commit": "_hooks",
    "after_rollback": "_hooks",
}


def __getattr__(name: str) -> Any:
    # Resolved at first use, so that the command line does not load SQLAlchemy.
    if name in ("events", "exc"):
        return import_module(f"sessionscope.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sessionscope' has no attribute {name!r}")
    value = getattr(import_module(f"sessionscope.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
