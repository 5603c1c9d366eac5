"""When FastAPI ends a dependency: by its version, and by the dependency's scope."""

import ast

from sessionscope.check._versions import Version


def is_function_scoped(depends: ast.Call) -> bool:
    """Return whether *depends* says ``scope="function"``."""
    return any(
        k.arg == "scope" and isinstance(k.value, ast.Constant) and k.value.value == "function"
        for k in depends.keywords
    )


def ends_after_response(version: Version | None, depends: ast.Call) -> bool | None:
    """Return whether what stands after the ``yield`` runs after the response.

    The background tasks are a part of the response. None: nobody knows the version.
    """
    if is_function_scoped(depends):
        return False
    if version is None:
        return None
    return not (0, 106) <= version.numbers < (0, 118)
