"""Entry points: functions that are called without a session and own a unit of work."""

import inspect
from collections.abc import Awaitable, Callable
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType
from typing import Any

from sessionscope._places import begin
from sessionscope.exc import ConfigurationError

# Runs fn, which takes a session as its first argument, as one unit of work.
Runner = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


AsyncRunner = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Awaitable[Any]]


def refuse_bare(fn: object) -> None:
    """Raise ConfigurationError if with_session was written without its parentheses."""
    if fn is not None:
        raise ConfigurationError(
            "with_session is called first, also without options: write @database.with_session() "
            f"above def {getattr(fn, '__name__', 'fn')}"
        )


def entry_point(fn: Callable[..., Any], run: Runner) -> Callable[..., Any]:
    """Return *fn* as a callable without its session parameter.

    The parameter is the first one, or the one after ``self`` or ``cls``. It is
    also missing from the signature that the result shows, which is what
    frameworks read, so there is no ``__wrapped__`` to find it through.
    """
    if is_async(fn):
        raise ConfigurationError(
            f"with_session() of a Database cannot wrap {_name(fn)}, an `async def` function: its "
            "queries would block the event loop. Use an AsyncDatabase, or write it with `def`; "
            "async frameworks run such functions in a thread"
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(fn, args, kwargs)

    def call_method(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
        return run(fn.__get__(owner), args, kwargs)

    return _without_session(fn, call, call_method)


def async_entry_point(fn: Callable[..., Any], run: AsyncRunner) -> Callable[..., Any]:
    """Async version of :func:`entry_point`, whose result is an ``async def``."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await run(fn, args, kwargs)

    async def call_method(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
        return await run(fn.__get__(owner), args, kwargs)

    return _without_session(fn, call, call_method)


def is_async(fn: Callable[..., Any]) -> bool:
    """Return whether a call of *fn* must be awaited."""
    if type(fn) is FunctionType:  # inspect looks at forty things more
        return bool(fn.__code__.co_flags & inspect.CO_COROUTINE)
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004  # of an object, its class's
    )


def finished(result: Any, fn: Callable[..., Any], why: str) -> Any:
    """Return *result*, unless it is a coroutine or a generator, which has not worked yet."""
    if isinstance(result, CoroutineType):
        result.close()
        raise ConfigurationError(
            f"{_name(fn)} returned a coroutine, and {why}: its work would be done after the unit "
            "of work, or nowhere. Pass an `async def` to an AsyncDatabase, and a `def` that does "
            "its work itself to a Database"
        )
    if isinstance(result, GeneratorType | AsyncGeneratorType):
        raise ConfigurationError(
            f"{_name(fn)} returned a generator, whose work would be done after the unit of work, "
            "with an ended session: return a list"
        )
    return result


def _without_session(
    fn: Callable[..., Any], call: Callable[..., Any], call_method: Callable[..., Any]
) -> Callable[..., Any]:
    """Return *call*, or *call_method*, dressed as *fn* without its session parameter."""
    signature = _evaluated_signature(fn)
    parameters = list(signature.parameters.values())
    is_method = bool(parameters) and parameters[0].name in ("self", "cls")
    position = 1 if is_method else 0
    _check(fn, parameters, position)
    wrapper = call_method if is_method else call
    session = parameters.pop(position)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(fn, name):
            setattr(wrapper, name, getattr(fn, name))
    wrapper.__annotations__ = {
        name: value for name, value in _annotations(signature).items() if name != session.name
    }
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typeshed knows no such attribute
    return wrapper


def _check(fn: Callable[..., Any], parameters: list[inspect.Parameter], position: int) -> None:
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise ConfigurationError(
            f"with_session() cannot wrap {_name(fn)}, a generator function: its body runs after "
            "the unit of work has ended. Return a list, or open the unit inside: "
            f"{begin(is_async=inspect.isasyncgenfunction(fn))} as session: ..."
        )
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) <= position or parameters[position].kind not in positional:
        raise ConfigurationError(
            f"with_session() passes the session as the first argument, and {_name(fn)} takes "
            f"none: write def {getattr(fn, '__name__', 'fn')}(session, ...)"
        )


def _evaluated_signature(fn: Callable[..., Any]) -> inspect.Signature:
    if not callable(fn):
        raise ConfigurationError(
            f"with_session() decorates functions, not {type(fn).__name__}: write "
            "@database.with_session() directly above `def`, below @classmethod"
        )
    try:
        # Frameworks evaluate annotations in the wrapper's module, which is this one.
        return inspect.signature(fn, eval_str=True)
    except NameError:
        return inspect.signature(fn)


def _annotations(signature: inspect.Signature) -> dict[str, Any]:
    annotations = {name: each.annotation for name, each in signature.parameters.items()}
    annotations["return"] = signature.return_annotation
    return {name: each for name, each in annotations.items() if each is not signature.empty}


def _name(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__qualname__', repr(fn))}()"
