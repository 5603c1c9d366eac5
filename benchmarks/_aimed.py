"""Cancellations that are aimed at COMMIT: what a unit of work says, and what is stored."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import psycopg
from sqlalchemy import URL, delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks._postgres import conninfo
from sessionscope import AsyncDatabase
from sessionscope.exc import CommitUnknown

# Seconds of a COMMIT, and from just before it within which it is cancelled.
_COMMIT, _AIM = 0.005, 0.008
_WORKERS = 4

Shoot = Callable[[], None]
Work = Callable[[Shoot], Awaitable[None]]
Aim = Callable[[Work, float, Counter[str]], Coroutine[Any, Any, None]]


class _Base(DeclarativeBase):
    pass


class Slow(_Base):
    """A row whose COMMIT takes a while."""

    __tablename__ = "slow"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def make_commit_slow(url: URL) -> None:
    """Create the table, with a deferred trigger that takes its time."""
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        for statement in (_TABLE, _FUNCTION, _TRIGGER):
            connection.execute(statement.encode())


_TABLE = "CREATE TABLE slow (id integer PRIMARY KEY)"
_FUNCTION = f"""
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
AS $$BEGIN PERFORM pg_sleep({_COMMIT}); RETURN NULL; END$$
"""
_TRIGGER = """
CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION wait()
"""


async def by_task(work: Work, delay: float, seen: Counter[str]) -> None:
    """Cancel the task; what came after COMMIT was sent is delivered at the next await."""

    async def then() -> None:
        await work(lambda: _later(delay, task.cancel))
        try:
            await asyncio.sleep(2 * _AIM)
        except asyncio.CancelledError:
            seen["delivered"] += 1

    task = asyncio.ensure_future(then())
    await asyncio.wait([task])


async def by_timeout(work: Work, delay: float, seen: Counter[str]) -> None:
    """Cancel by asyncio's timeout, after which no cancellation may be left."""
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            now = asyncio.get_running_loop().time
            await work(lambda: timeout.reschedule(now() + delay))
    await _nothing_stray(seen)


async def by_scope(work: Work, delay: float, seen: Counter[str]) -> None:
    """Cancel by an anyio scope, after which no cancellation may be left."""
    with anyio.CancelScope() as scope:
        await work(lambda: setattr(scope, "deadline", anyio.current_time() + delay))
    await _nothing_stray(seen)


async def by_group(work: Work, delay: float, seen: Counter[str]) -> None:
    """Cancel by the failure of another task in the group."""
    begun = asyncio.Event()

    async def fail() -> None:
        await begun.wait()
        await asyncio.sleep(delay)
        raise ConnectionError

    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(_as_coroutine(work, begun.set))
    await _nothing_comes(seen)


AIMS: dict[str, Aim] = {
    "task.cancel()": by_task,
    "asyncio.timeout()": by_timeout,
    "anyio scope": by_scope,
    "TaskGroup": by_group,
}


async def _as_coroutine(work: Work, shoot: Shoot) -> None:
    await work(shoot)


def _later(delay: float, cancel: Callable[[], object]) -> None:
    asyncio.get_running_loop().call_later(delay, cancel)


async def _nothing_stray(seen: Counter[str]) -> None:
    await _nothing_comes(seen)
    task = asyncio.current_task()
    assert task is not None
    seen["stray"] += bool(task.cancelling())


async def _nothing_comes(seen: Counter[str]) -> None:
    try:
        for pause in (0, 0, 0.002):
            await asyncio.sleep(pause)
    except asyncio.CancelledError:
        seen["stray"] += 1


@dataclass(frozen=True)
class Aimed:
    """How units of work ended, and how often that was not the truth.

    Cancellations are *stray* that came when their scope had ended, and *lost* that
    came after COMMIT was sent and were not delivered at the next await.
    """

    ends: Counter[str]
    wrong: int
    stray: int
    lost: int


async def aim_at_commit(
    database: AsyncDatabase[AsyncSession], aim: Aim, *, times: int, seed: int
) -> Aimed:
    """Cancel *times* units of work around their COMMIT; compare what they say with the table."""
    said: dict[int, str] = {}
    seen: Counter[str] = Counter()
    moments = random.Random(seed)
    async with database.begin() as session:
        await session.execute(delete(Slow))

    async def aim_each(ids: range) -> None:
        for id_ in ids:
            await aim(partial(_unit, database, id_, said), _delay(moments), seen)

    await asyncio.gather(*(aim_each(range(n, times, _WORKERS)) for n in range(_WORKERS)))
    async with database.begin(read_only=True) as session:
        stored = set(await session.scalars(select(Slow.id)))
    wrong = sum(_is_wrong(said[id_], stored=id_ in stored) for id_ in range(times))
    ends = Counter(said.values())
    lost = ends["stored"] - seen["delivered"] if aim is by_task else 0
    return Aimed(ends, wrong, seen["stray"], lost)


def _delay(moments: random.Random) -> float:
    return _AIM * moments.random() ** 3  # most of them early: COMMIT is sent soon


def _is_wrong(end: str, *, stored: bool) -> bool:
    return end != "unknown" and stored != (end == "stored")


async def _unit(
    database: AsyncDatabase[AsyncSession], id_: int, said: dict[int, str], shoot: Shoot
) -> None:
    said[id_] = "failed"
    try:
        async with database.begin() as session:
            await session.connection()
            if id_ % 2 == 0:  # some before the INSERT, which takes less than the COMMIT
                shoot()
            session.add(Slow(id=id_))
            await session.flush()
            if id_ % 2:
                shoot()
        said[id_] = "stored"
    except asyncio.CancelledError:
        said[id_] = "cancelled"
        raise
    except CommitUnknown:
        said[id_] = "unknown"
        raise
