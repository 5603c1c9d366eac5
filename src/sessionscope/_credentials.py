"""Credentials that change: asked for again before each new connection is opened."""

import re
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only

from sessionscope.exc import ConfigurationError

# A password, or a user and a password.
Login = str | tuple[str, str]
Credentials = Callable[[], Login | Awaitable[Login]]

# invalid_authorization_specification and invalid_password; ER_ACCESS_DENIED_ERROR of MySQL.
_REFUSED = {"28000", "28P01"}
_ACCESS_DENIED = 1045
# Of every method that PostgreSQL knows (password, PAM, LDAP, RADIUS), and of a role that is gone.
_WORDS = re.compile('authentication failed|role ".*" (?:is not permitted to log in|does not exist)')


def ask_for_credentials(engine: Engine, credentials: Credentials) -> None:
    """Log in to each new connection of *engine* with what *credentials* returns then.

    If the server refuses that, and they have changed meanwhile, once more.
    """
    dialect = engine.dialect
    connect = dialect.connect

    def connect_with_login(*args: Any, **kwargs: Any) -> Any:
        login = _login(credentials)
        try:
            return connect(*args, **{**kwargs, **login})
        except Exception as error:
            # They may have been changed on the server just now.
            if not _is_refused(error) or (fresh := _login(credentials)) == login:
                raise
        return connect(*args, **{**kwargs, **fresh})

    # A do_connect listener that connects would end the chain of those after it.
    dialect.connect = connect_with_login  # type: ignore[method-assign]  # as a subclass would


def _is_refused(error: Exception) -> bool:
    """Return whether the server has refused the login: libpq has only words for that."""
    return (
        getattr(error, "sqlstate", None) in _REFUSED
        or next(iter(error.args), None) == _ACCESS_DENIED
        or _WORDS.search(str(error)) is not None
    )


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
