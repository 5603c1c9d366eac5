"""AsyncSource: what all units of work of one AsyncDatabase share."""

import asyncio
import warnings
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from typing_extensions import TypeVar

from sessionscope._guards import Scope
from sessionscope._loops import call_soon
from sessionscope._source import Source
from sessionscope._timer import timed
from sessionscope._watch import UNIT

AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession, default=AsyncSession)

# What a unit of work calls on the synchronous session inside of an asynchronous one.
_ENDINGS = ("close", "commit", "flush", "rollback")


class AsyncSource(Source[AsyncSessionT]):
    """Async version of :class:`Source`."""

    def make_sessionmakers(self) -> None:
        """Make the factory of the sessions that users get."""
        session_class = self.options.session_class
        _warn_of_what_is_bypassed(session_class)
        self._async_engines: dict[int, AsyncEngine] = {}
        write = self.async_engine(self.engines.write)
        inner, unit_class = self.guarded(session_class.sync_session_class)
        # async_sessionmaker makes no class of its own, as sessionmaker does: without this one,
        # the guards would be on every AsyncSession of the process.
        outer = _around(session_class, inner.class_)
        self.async_sessionmaker: async_sessionmaker[AsyncSessionT] = async_sessionmaker(
            write, class_=outer, **self.session_options
        )
        self.unit_class = _around(outer, unit_class)
        self.timed_class = _around(outer, timed(unit_class, UNIT))

    @property
    def session_options(self) -> dict[str, Any]:
        """The options of all sessions.

        Attributes of expired objects would be loaded where no one can await it
        (https://docs.sqlalchemy.org/en/21/orm/extensions/asyncio.html).
        """
        return {"expire_on_commit": False, **super().session_options}

    def open_session(self, bind: Engine, scope: Scope) -> tuple[AsyncSessionT, Session]:
        """Return a session as the user gets it, and the synchronous one inside of it."""
        options = self.unit_options(self.async_sessionmaker.kw, self.async_engine(bind), scope)
        session_class = self.unit_class if scope.timer is None else self.timed_class
        session = session_class(**options)
        return session, session.sync_session

    def open_plain(self, bind: Engine, scope: Scope) -> tuple[Any, Session]:
        """Return a plain session, twice, without an asynchronous one around it."""
        options = self.unit_options(self.async_sessionmaker.kw, bind, scope)
        if binds := options.get("binds"):
            options["binds"] = {
                key: getattr(each, "sync_engine", each) for key, each in binds.items()
            }
        session_class = self.unit_class if scope.timer is None else self.timed_class
        session = session_class.sync_session_class(**options)
        return session, session

    def async_engine(self, engine: Engine) -> AsyncEngine:
        """Return the asynchronous face of *engine*."""
        found = self._async_engines.get(id(engine))
        if found is None:
            found = self._async_engines[id(engine)] = AsyncEngine(engine)
        return found

    def _cut_off(self, scope: Scope) -> None:
        """Cancel the task that holds the unit, on whichever event loop that is."""
        if scope.task is not None:
            call_soon(scope.task.get_loop(), scope.task.cancel)

    def sleep(self, seconds: float) -> None:
        """Wait while another task leaves a session."""
        await_only(asyncio.sleep(seconds))


def create_engine(*args: Any, **kwargs: Any) -> Engine:
    """Return the engine inside of ``create_async_engine()``'s."""
    return create_async_engine(*args, **kwargs).sync_engine


def _around(session_class: type[Any], inside: type[Session]) -> type[Any]:
    """Return a class of asynchronous sessions that make their synchronous ones of *inside*."""
    return type(session_class.__name__, (session_class,), {"sync_session_class": inside})


def _warn_of_what_is_bypassed(session_class: type[AsyncSession]) -> None:
    for name in _ENDINGS:
        if getattr(session_class, name) is not getattr(AsyncSession, name):
            warnings.warn(
                f"{session_class.__name__}.{name}() is not called at the end of a unit of work, "
                "which ends the synchronous session inside: override it in the class that "
                "sync_session_class names, or listen to SQLAlchemy's session events",
                RuntimeWarning,
                stacklevel=5,
            )
