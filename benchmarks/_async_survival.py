"""What becomes of the units of tasks: when they are in each other's way, and when cancelled."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import count

from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from benchmarks._entries import Entry, Number, Told
from sessionscope import AsyncDatabase
from sessionscope.exc import CommitUnknown

_TASKS, _TIMES = 10, 20
# Seconds that everything the client sends is late, so that a COMMIT is often hit.
DELAY = 0.002


def incremented(url: URL) -> tuple[int, int, int]:
    """Increment one number in ten tasks; return its value, the errors and the retries."""
    return asyncio.run(_incremented(url))


async def _incremented(url: URL) -> tuple[int, int, int]:
    async with AsyncDatabase(url) as database:

        @database.with_session(isolation_level="SERIALIZABLE")
        async def increment(session: AsyncSession) -> None:
            number = await session.get_one(Number, 1)
            number.value += 1

        async def work() -> None:
            for _ in range(_TIMES):
                await increment()

        done = await asyncio.gather(*(work() for _ in range(_TASKS)), return_exceptions=True)
        errors = sum(isinstance(each, BaseException) for each in done)
        value = await database.run(_value)
        return value, errors, database.stats().retried


def cancelled(url: URL, times: int) -> tuple[Told, Counter[str]]:
    """A14: cancel so many units, each at a moment of its own; return what was told, and is there.

    A cancellation that comes once COMMIT was sent is delivered after the unit has returned.
    """
    return asyncio.run(_cancelled(url, times))


async def _cancelled(url: URL, times: int) -> tuple[Told, Counter[str]]:
    told, names = Told(), map(str, count())
    async with AsyncDatabase(url) as database:

        async def work(name: str) -> None:
            await database.run(_append, name)
            told.stored.append(name)

        took = await _duration(lambda: database.run(_append, next(names)))
        told.stored.append("0")
        for _ in range(times):
            name = next(names)
            task = asyncio.create_task(work(name))
            await asyncio.sleep(random.uniform(0, 1.2 * took))  # spreads, guards nothing
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                if name not in told.stored:
                    told.failed.append(name)
            except CommitUnknown:
                told.unknown.append(name)
        async with database.begin(read_only=True) as session:
            return told, Counter(await session.scalars(select(Entry.name)))


async def _duration(work: Callable[[], Awaitable[object]]) -> float:
    began = asyncio.get_running_loop().time()
    await work()
    return asyncio.get_running_loop().time() - began


def _value(session: Session) -> int:
    return session.get_one(Number, 1).value


async def _append(session: AsyncSession, name: str) -> None:
    session.add(Entry(name=name))
