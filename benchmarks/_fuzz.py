"""One unit of work, cancelled at each of its awaits in turn, and what it leaves behind."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks._cancelled import Moment, hold_all, listening, watched_by
from sessionscope import AsyncDatabase
from sessionscope._async_backends import AsyncBackends

Doing = Callable[[AsyncDatabase[AsyncSession], int], Awaitable[None]]

ROWS = 3
_PATIENCE = 2.0
# More than any unit here has awaits.
_MOST = 400


class _Base(DeclarativeBase):
    pass


class Cut(_Base):
    """A row of the run that it names."""

    __tablename__ = "cut"

    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[int]


async def write(database: AsyncDatabase[AsyncSession], run: int) -> None:
    """Insert, in a savepoint as well, read, stream, and insert at the commit."""
    async with database.begin() as session:
        session.add(Cut(run=run))
        await session.flush()
        async with session.begin_nested():
            session.add(Cut(run=run))
        (await session.scalars(select(Cut).where(Cut.run == run))).all()
        async for _ in await session.stream_scalars(select(Cut.id)):
            pass
        session.add(Cut(run=run))


async def read(database: AsyncDatabase[AsyncSession], run: int) -> None:
    """Read twice in a read-only unit."""
    async with database.begin(read_only=True) as session:
        for _ in range(2):
            (await session.scalars(select(Cut).where(Cut.run == run))).all()


UNITS: dict[str, Doing] = {"writing": write, "read-only": read}


@dataclass
class Seen:
    """How the runs ended, and whatever was not in order afterwards."""

    ends: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


async def cut_everywhere(url: str, doing: Doing, *, cold: bool, soon: bool, every: int = 1) -> Seen:
    """Run *doing* again and again, cancelled at one await later each time, until it ends first.

    Each run begins with a pool that is empty, if *cold*, or has a connection.
    """
    seen = Seen()
    async with AsyncDatabase(url, pool_size=2, max_overflow=1) as database:
        await _prepare(database)
        with listening() as said:
            for at in range(1, _MOST, every):
                await (database.dispose() if cold and not _is_memory(database) else database.ping())
                moment = Moment(at, soon=soon)
                seen.ends.append(await _run(database, doing, moment, at))
                faults = await _faults(database, seen.ends[-1])
                faults += await _miswritten(database, seen.ends[-1], doing, at)
                seen.faults += [f"{at}: {fault}" for fault in faults]
                if not moment.is_reached:
                    break
            else:
                seen.faults.append("it never came to its end")
        seen.faults += said
    return seen


async def _prepare(database: AsyncDatabase[AsyncSession]) -> None:
    async with database.engine.begin() as connection:
        await connection.run_sync(_Base.metadata.drop_all)
        await connection.run_sync(_Base.metadata.create_all)
    await database.ping()


async def _run(
    database: AsyncDatabase[AsyncSession], doing: Doing, moment: Moment, run: int
) -> str:
    async with watched_by(moment):
        moment.task = asyncio.ensure_future(_as_coroutine(doing, database, run))
        await asyncio.wait([moment.task], timeout=_PATIENCE)
    if not moment.task.done():
        return "hanging"
    if moment.task.cancelled():
        return "cancelled"
    error = moment.task.exception()
    return "normal" if error is None else repr(error)


async def _as_coroutine(doing: Doing, database: AsyncDatabase[AsyncSession], run: int) -> None:
    await doing(database, run)


async def _faults(database: AsyncDatabase[AsyncSession], end: str) -> list[str]:
    """Say what is not as before the run, once it had the time to become so."""
    faults = [] if end in ("normal", "cancelled") else [f"it ended with {end}"]
    await _until(lambda: not database.stats().in_use and len(asyncio.all_tasks()) == 1)
    if database.stats().in_use or len(asyncio.all_tasks()) > 1:
        faults.append(f"{database.stats().in_use} slots, {len(asyncio.all_tasks()) - 1} tasks left")
    try:
        await hold_all(database, 1 if _is_sqlite(database) else 3)
    except TimeoutError:
        return [*faults, "the pool is not whole"]
    return [*faults, *await _miscounted(database)]


async def _until(is_so: Callable[[], bool]) -> None:
    deadline = monotonic() + _PATIENCE
    while not is_so() and monotonic() < deadline:
        await asyncio.sleep(0.002)


async def _miscounted(database: AsyncDatabase[AsyncSession]) -> list[str]:
    counted: Any = database.engine.pool
    backends: AsyncBackends = counted.backends
    if _is_sqlite(database):
        return []
    async with database.begin(read_only=True) as session:
        real = await session.scalar(_CONNECTIONS[session.get_bind().dialect.name])
        return [] if real == backends.count else [f"{real} connections, counted {backends.count}"]


_CONNECTIONS = {
    "postgresql": text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND backend_type = 'client backend'"
    ),
    "mysql": text("SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE()"),
}


async def _miswritten(
    database: AsyncDatabase[AsyncSession], end: str, doing: Doing, run: int
) -> list[str]:
    async with database.begin(read_only=True) as session:
        count = select(func.count()).select_from(Cut).where(Cut.run == run)
        rows = (await session.scalars(count)).one()
    wanted = ROWS if doing is write and end == "normal" else 0
    return [] if rows == wanted else [f"{end}, and {rows} rows"]


def _is_sqlite(database: AsyncDatabase[AsyncSession]) -> bool:
    return database.engine.dialect.name == "sqlite"


def _is_memory(database: AsyncDatabase[AsyncSession]) -> bool:
    return _is_sqlite(database) and not database.engine.url.database
