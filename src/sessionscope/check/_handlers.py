"""What the handlers of a ``try`` around a database catch, and whether they act on it."""

import ast

from sessionscope.check._facts import Scope, words
from sessionscope.check._model import Model, contains

BROAD = frozenset({"Exception", "BaseException"})
ERRORS = words(
    "SQLAlchemyError DBAPIError IntegrityError OperationalError ProgrammingError DataError "
    "DatabaseError InternalError InterfaceError StatementError UniqueViolation"
)
ENDS = frozenset({"rollback", "close", "aclose", "remove", "invalidate", "reset"})


def caught_by(handler: ast.ExceptHandler) -> str | None:
    """Return the database error that *handler* catches."""
    if handler.type is None:
        return "Exception"
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    names = [t.attr if isinstance(t, ast.Attribute) else getattr(t, "id", "") for t in types]
    return next((n for n in names if n in ERRORS), None) or next(
        (n for n in names if n in BROAD), None
    )


def acts(handler: ast.ExceptHandler, path: str) -> bool:
    """Return whether the handler ends the transaction, raises, or leaves the function."""
    for node in ast.walk(handler):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Attribute) and node.attr in {"is_active", "in_transaction"}:
            return True
        if isinstance(node, ast.Call):
            function = node.func
            last = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            if last in ENDS or last in {"exit", "_exit", "abort", "fail", "skip"}:
                return True
            if last.lstrip("_").startswith(("handle_", "fail_", "abort_", "on_error")):
                return True
            if "rollback" in last or "reset" in last or "close" in last or "raise" in last:
                return True
            if any(ast.unparse(a) == path for a in node.args):
                return True  # handed to someone who may well roll it back
    return False


def calls_one_that_acts(model: Model, scope: Scope, handler: ast.ExceptHandler) -> bool:
    """A function of the project that the handler calls rolls back, or raises for it."""
    for call in scope.calls:
        if contains(handler, call.node):
            target = model.called(call.node, scope)
            function = target.function if target is not None else None
            if function is not None and (
                (target is not None and target.raises)
                or any(
                    isinstance(node, ast.Attribute) and node.attr in ENDS
                    for node in ast.walk(function)
                )
            ):
                return True
    return False


def returns_false(handler: ast.ExceptHandler) -> bool:
    """Return whether the handler tells the caller by a ``return False``."""
    match handler.body[-1]:
        case ast.Return(value=ast.Constant(value=False)):
            return True
        case _:
            return False
