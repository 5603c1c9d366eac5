"""What the tests of an application need; nothing here imports a test framework."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sessionscope.testing._capture import capture_hooks
    from sessionscope.testing._count import Statement, TooManyStatements, count_statements
    from sessionscope.testing._errors import SandboxError
    from sessionscope.testing._fault_proxy import Fault, FaultProxy
    from sessionscope.testing._postgres import PostgresServer
    from sessionscope.testing._sandbox import async_sandbox, sandbox
    from sessionscope.testing._shared import shared_postgres

__all__ = [
    "Fault",
    "FaultProxy",
    "PostgresServer",
    "SandboxError",
    "Statement",
    "TooManyStatements",
    "async_sandbox",
    "capture_hooks",
    "count_statements",
    "sandbox",
    "shared_postgres",
]

_HOMES = {
    "Fault": "_fault_proxy",
    "FaultProxy": "_fault_proxy",
    "PostgresServer": "_postgres",
    "SandboxError": "_errors",
    "Statement": "_count",
    "TooManyStatements": "_count",
    "async_sandbox": "_sandbox",
    "capture_hooks": "_capture",
    "count_statements": "_count",
    "sandbox": "_sandbox",
    "shared_postgres": "_shared",
}


def __getattr__(name: str) -> Any:
    # Resolved at first use, so that a server alone does not load SQLAlchemy.
    if name not in _HOMES:
        raise AttributeError(f"module 'sessionscope.testing' has no attribute {name!r}")
    value = getattr(import_module(f"sessionscope.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
