"""Credentials that change: asked for again before each new connection is opened."""

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.util import await_only

from sessionscope.exc import ConfigurationError

# A password, or a user and a password.
Login = str | tuple[str, str]
Credentials = Callable[[], Login | Awaitable[Login]]


def ask_for_credentials(engine: Engine, credentials: Credentials) -> None:
    """Log in to each new connection of *engine* with what *credentials* returns then."""

    def connecting(
        dialect: Dialect, record: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        login = _login(credentials)
        try:
            return dialect.connect(*args, **{**kwargs, **login})
        except dialect.loaded_dbapi.Error:
            # They may have been changed on the server just now.
            fresh = _login(credentials)
            if fresh == login:
                raise
        return dialect.connect(*args, **{**kwargs, **fresh})

    event.listen(engine, "do_connect", connecting)


def _login(credentials: Credentials) -> dict[str, str]:
    told = credentials()
    login: Any = await_only(told) if isawaitable(told) else told
    if isinstance(login, str):
        return {"password": login}
    if isinstance(login, tuple) and len(login) == 2:  # pyright: ignore[reportUnknownArgumentType]  # any tuple
        return {"user": login[0], "password": login[1]}
    # What it is is not said: it may hold a password.
    kind: str = type(login).__name__  # pyright: ignore[reportUnknownArgumentType]  # likewise
    raise ConfigurationError(
        f"credentials returned a {kind}: return a password, or a pair of a user and a password"
    )
