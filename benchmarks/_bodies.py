"""What the compared applications do with the session of a request, whoever gives it to them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import sleep
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from benchmarks._claim_routes import STREAM_SECONDS
from benchmarks._model import FIRST, Item, slow_first
from benchmarks._settings import ItemOut

DONE = {"status": "ok"}
LOST = "lost"

_numbers = itertools.count(1)
_INSERT = text("INSERT INTO ticket VALUES (:n), (:n)")
_FAIL = text("SELECT 1 / 0")


@dataclass(frozen=True)
class Body:
    """What one route does with its session."""

    path: str
    run: Callable[[Any], Any]
    """Called with a Session, or awaited with an AsyncSession."""
    writes: bool = False
    streams: bool = False
    """Whether the answer takes `STREAM_SECONDS` after its first bytes."""

    @property
    def model(self) -> type[ItemOut] | None:
        """Return what FastAPI validates and serializes the answer as."""
        return ItemOut if self.path in ("/slow", "/read", "/write") else None


class Kept:
    """The session of the last request to `/keeps`, which has ended since."""

    session: Any = None

    def keep(self, session: Any) -> dict[str, str]:
        """Remember the session beyond its request."""
        self.session = session
        return DONE


def bodies(seconds: float, kept: Kept) -> Sequence[Body]:
    """Return what `def` routes do; the slow one's query takes *seconds*."""
    statement = slow_first(seconds)

    def slow(session: Session) -> ItemOut:
        return ItemOut.model_validate(session.scalars(statement).one())

    def keep(session: Session) -> dict[str, str]:
        read(session)
        return kept.keep(session)

    return [
        Body("/slow", slow),
        Body("/read", read),
        Body("/write", write, writes=True),
        Body("/unused", unused),
        Body("/fails-at-commit", fails_at_commit, writes=True),
        Body("/swallows", swallows, writes=True),
        Body("/streams", read, streams=True),
        Body("/keeps", keep),
    ]


def unused(session: object) -> dict[str, str]:
    """Do nothing."""
    return DONE


def read(session: Session) -> ItemOut:
    """Read one row."""
    return ItemOut.model_validate(session.scalars(FIRST).one())


def write(session: Session) -> ItemOut:
    """Store one row and answer with its id."""
    item = Item(name="written")
    session.add(item)
    session.flush()
    return ItemOut.model_validate(item)


def fails_at_commit(session: Session) -> dict[str, str]:
    """Store the same number twice, which only COMMIT refuses."""
    session.execute(_INSERT, {"n": next(_numbers)})
    return DONE


def swallows(session: Session) -> dict[str, str]:
    """Store a row, then swallow an error that the database does not forget."""
    session.add(Item(name=LOST))
    session.flush()
    # Not SQLAlchemyError: one peer raises errors of its own.
    with suppress(Exception):
        session.execute(_FAIL)
    return DONE


def async_bodies(seconds: float, kept: Kept) -> Sequence[Body]:
    """Return what `async def` routes do: the same."""
    statement = slow_first(seconds)

    async def slow(session: AsyncSession) -> ItemOut:
        return ItemOut.model_validate((await session.scalars(statement)).one())

    async def keep(session: AsyncSession) -> dict[str, str]:
        await async_read(session)
        return kept.keep(session)

    return [
        Body("/slow", slow),
        Body("/read", async_read),
        Body("/write", async_write, writes=True),
        Body("/unused", async_unused),
        Body("/fails-at-commit", async_fails_at_commit, writes=True),
        Body("/swallows", async_swallows, writes=True),
        Body("/streams", async_read, streams=True),
        Body("/keeps", keep),
    ]


async def async_unused(session: object) -> dict[str, str]:
    """Async version of `unused`."""
    return DONE


async def async_read(session: AsyncSession) -> ItemOut:
    """Async version of `read`."""
    return ItemOut.model_validate((await session.scalars(FIRST)).one())


async def async_write(session: AsyncSession) -> ItemOut:
    """Async version of `write`."""
    item = Item(name="written")
    session.add(item)
    await session.flush()
    return ItemOut.model_validate(item)


async def async_fails_at_commit(session: AsyncSession) -> dict[str, str]:
    """Async version of `fails_at_commit`."""
    await session.execute(_INSERT, {"n": next(_numbers)})
    return DONE


async def async_swallows(session: AsyncSession) -> dict[str, str]:
    """Async version of `swallows`."""
    session.add(Item(name=LOST))
    await session.flush()
    with suppress(Exception):
        await session.execute(_FAIL)
    return DONE


async def run_async(body: Body, session: AsyncSession, *, commit: bool) -> Any:
    """Run *body*, and commit at its end if that is the endpoint's to do."""
    running: Awaitable[Any] = body.run(session)
    result = await running
    if commit and body.writes:
        await session.commit()
    return result


def run(body: Body, session: Session, *, commit: bool) -> Any:
    """Run *body*, and commit at its end if that is the endpoint's to do."""
    result = body.run(session)
    if commit and body.writes:
        session.commit()
    return result


async def async_stream() -> AsyncIterator[bytes]:
    """Yield an answer that takes long."""
    yield b"begun"
    await asyncio.sleep(STREAM_SECONDS)
    yield b"done"


def stream() -> Iterator[bytes]:
    """Yield an answer that takes long."""
    yield b"begun"
    sleep(STREAM_SECONDS)
    yield b"done"
