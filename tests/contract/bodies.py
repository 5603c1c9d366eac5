"""What the endpoints of every site do; a site only brings them their session."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import exc as sa_exc
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database, after_commit
from sessionscope.exc import SessionEnded
from tests.models import Item, Note

Databases = Mapping[str, Database]
AsyncDatabases = Mapping[str, AsyncDatabase]

# Seconds after which a stream that no one released ends by itself.
PATIENCE = 60.0


class Conflict(Exception):
    """What every site has a handler for, which answers 409."""


@dataclass
class Kept:
    """What a site keeps in its process between requests."""

    hooked: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    released_here: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> str:
        """End all streams; on an event loop, called there."""
        self.released.set()
        self.released_here.set()
        return "released"

    def rows(self, use: Callable[[], object]) -> Iterator[str]:
        """Stream a line, and when released, what the session says to being used."""
        yield "begun\n"
        self.released.wait(PATIENCE)
        yield outcome(use)

    async def rows_here(self, use: Callable[[], object]) -> AsyncIterator[str]:
        """Async version of :meth:`rows`, which waits without a thread."""
        yield "begun\n"
        await asyncio.wait_for(self.released_here.wait(), PATIENCE)
        yield outcome(use)


def outcome(use: Callable[[], object]) -> str:
    """Return how *use* of an ended session went. It is refused before anything is sent."""
    try:
        use()
    except SessionEnded:
        return "ended\n"
    return "reopened\n"


@dataclass(frozen=True)
class Body:
    """One endpoint, ``/path/{name}``: what it does with its session."""

    path: str
    do: Callable[[Session, str, Kept], str]
    on: str = "main"
    read_only: bool = False


def add(session: Session, name: str, kept: Kept) -> str:
    session.add(Item(name=name))
    return name


def fail_at_commit(session: Session, name: str, kept: Kept) -> str:
    session.add(Note(item_id=404))  # the constraint is checked at COMMIT
    session.flush()
    return name


def conflict(session: Session, name: str, kept: Kept) -> str:
    session.add(Item(name=name))
    session.flush()
    raise Conflict


def swallow(session: Session, name: str, kept: Kept) -> str:
    session.add(Item(name=name))
    session.flush()
    with suppress(sa_exc.ProgrammingError):
        session.execute(text("SELECT * FROM no_such_table"))
    return name


def hook(session: Session, name: str, kept: Kept) -> str:
    session.add(Item(name=name))
    after_commit(session, kept.hooked.append, name)
    return name


def wait_for_lock(session: Session, name: str, kept: Kept) -> str:
    """Hold the connection for as long as the test holds the lock of this number."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": int(name)})
    return name


def read(session: Session, name: str, kept: Kept) -> str:
    return str(session.scalar(text("SELECT 1 FROM pg_sleep(0.005)")))


BODIES = [
    Body("add", add),
    Body("fails-at-commit", fail_at_commit),
    Body("conflicts", conflict),
    Body("swallows", swallow),
    Body("hooks", hook),
    Body("reads-only", add, read_only=True),
    Body("crowd", read),
    Body("small", wait_for_lock, on="small"),
    Body("down", read, on="down"),
]
