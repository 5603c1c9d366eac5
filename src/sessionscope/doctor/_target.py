"""The Database that is looked at, as the command line names it."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError


def load(target: str) -> Database[Any] | AsyncDatabase[Any]:
    """Return the Database that ``module:attribute`` names. Raises ConfigurationError.

    The module is looked for in the working folder first, as ``python -m`` does.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{target!r} names no Database: write module:attribute")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ConfigurationError:  # the Database's own
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigurationError(
            f"{module_name!r} cannot be imported ({why}): {_mend(error, module_name)}, and run the "
            "command where your application runs, with its environment"
        ) from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"{module_name} has no {attribute!r}: {_names(module)}")
        found = getattr(found, name)
    if not isinstance(found, Database | AsyncDatabase):
        raise ConfigurationError(
            f"{target} is a {type(found).__name__}, not a Database: {_names(module)}"
        )
    return found  # pyright: ignore[reportUnknownVariableType]  # of whatever sessions


def _mend(error: Exception, module_name: str) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        return "write module:attribute of your Database"
    return "mend what fails in it"


def _names(module: object) -> str:
    databases = [
        name for name, value in vars(module).items() if isinstance(value, Database | AsyncDatabase)
    ]
    return f"it has {', '.join(databases)}" if databases else "it has no Database at all"
