"""The types of AsyncDatabase's lines; read by mypy and pyright, never run."""

from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from sessionscope import AsyncDatabase, Stats, Unit, after_commit, after_rollback


class MySession(AsyncSession):
    def mine(self) -> int:
        return 1


plain = AsyncDatabase("sqlite+aiosqlite://")
assert_type(plain, AsyncDatabase[AsyncSession])
assert_type(plain.engine, AsyncEngine)
assert_type(plain.read_engine, AsyncEngine)
assert_type(plain.sessionmaker, async_sessionmaker[AsyncSession])
assert_type(plain.stats(), Stats)
assert_type(AsyncDatabase.from_env(), AsyncDatabase[AsyncSession])

custom = AsyncDatabase("sqlite+aiosqlite://", session_class=MySession)
assert_type(custom, AsyncDatabase[MySession])

models = AsyncDatabase("sqlite+aiosqlite://", session_class=SQLModelSession)
assert_type(models, AsyncDatabase[SQLModelSession])


async def blocks() -> None:
    async with plain as itself:
        assert_type(itself, AsyncDatabase[AsyncSession])
    async with plain.begin() as session:
        assert_type(session, AsyncSession)
    async with plain.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert_type(session, AsyncSession)
    async with custom.begin(independent=True) as my_session:
        assert_type(my_session, MySession)
        assert_type(my_session.mine(), int)
    async with models.begin() as model_session:
        assert_type(model_session, SQLModelSession)
    assert_type(Unit(custom).session, MySession)
    assert_type(await plain.drain(1.0), bool)
    with plain.begin() as session:  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
        pass


async def send(line: str, *, times: int = 1) -> None: ...


async def transfer(session: AsyncSession, source: int, *, amount: float) -> str:
    after_commit(session, print, source, sep="")
    after_commit(session, send, "done", times=2)
    after_rollback(session, send, "undone")
    return "done"


def transfer_plainly(session: Session, source: int, *, amount: float) -> str:
    return "done"


async def runs() -> None:
    assert_type(await plain.run(transfer, 1, amount=2.0), str)
    assert_type(await plain.run(transfer_plainly, 1, amount=2.0), str)
    await plain.run(transfer, "1", amount=2.0)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    await plain.run(transfer_plainly, 1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@plain.with_session()
async def entry(session: AsyncSession, name: str, *, count: int = 1) -> list[str]:
    return [name] * count


@plain.with_session(read_only=True)
def plain_entry(session: Session, name: str) -> list[str]:
    return [name]


class Jobs:
    @plain.with_session(read_only=True)
    async def nightly(self, session: AsyncSession, day: int) -> int:
        return day


async def calls() -> None:
    assert_type(await entry("a", count=2), list[str])
    assert_type(await plain_entry("a"), list[str])
    assert_type(await Jobs().nightly(3), int)
    await entry(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
