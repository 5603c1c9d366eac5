"""A unit of work on each asynchronous driver: commit at its end, rollback on exceptions, closed."""

import asyncio
import gc
from pathlib import Path

import pytest
from sqlalchemy import Executable, delete, insert, select, text, update
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sessionscope import AsyncDatabase, Unit
from sessionscope.exc import ReadOnlyUnit, SessionEnded
from tests.async_drivers import names, on_one_of_each_kind, on_postgres, on_servers, on_uvloop_too
from tests.models import Base, Item, Note

pytestmark = pytest.mark.anyio


@on_uvloop_too
async def test_the_normal_end_commits(async_database: AsyncDatabase) -> None:
    async with async_database.begin() as session:
        session.add(Item(name="kept"))

    assert await names(async_database) == ["kept"]
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
@pytest.mark.parametrize(
    "error", [ValueError, KeyError, GeneratorExit, asyncio.CancelledError, StopAsyncIteration]
)
async def test_any_exception_rolls_back_and_passes(
    async_database: AsyncDatabase, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with async_database.begin() as session:
            session.add(Item(name="gone"))
            await session.flush()
            raise error

    assert await names(async_database) == []
    assert async_database.stats().in_use == 0


@on_uvloop_too
async def test_an_exception_rolls_back(async_database: AsyncDatabase) -> None:
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin() as session:
            session.add(Item(name="gone"))
            await session.flush()
            raise ValueError("stop")

    assert await names(async_database) == []
    assert async_database.stats().rolled_back == 1


async def test_the_session_is_a_plain_one_bound_to_the_engine(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        assert isinstance(session, AsyncSession)
        assert session.bind is async_database.engine
        assert session.get_bind() is async_database.engine.sync_engine
    async with async_database.begin(read_only=True) as session:
        assert session.bind is async_database.read_engine


async def test_objects_stay_readable_after_the_end_and_after_a_commit_inside(
    async_database: AsyncDatabase,
) -> None:
    """An expired attribute would be loaded where nothing can await it."""
    async with async_database.begin() as session:
        item = Item(name="readable")
        session.add(item)
        await session.commit()
        assert item.name == "readable"

    assert item.name == "readable"
    assert item.id is not None


async def test_a_commit_inside_is_allowed_and_later_work_is_of_the_same_unit(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin() as session:
            session.add(Item(name="first"))
            await session.commit()
            session.add(Item(name="second"))
            await session.flush()
            raise ValueError("stop")

    assert await names(async_database) == ["first"]


async def test_a_rollback_inside_undoes_and_the_unit_goes_on(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        session.add(Item(name="undone"))
        await session.flush()
        await session.rollback()
        session.add(Item(name="kept"))

    assert await names(async_database) == ["kept"]


@on_one_of_each_kind
async def test_inner_begin_blocks_of_the_session_work_as_in_sqlalchemy(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        async with session.begin():
            session.add(Item(name="inner"))
        with pytest.raises(ValueError, match="stop"):
            async with session.begin_nested():
                session.add(Item(name="in a savepoint"))
                await session.flush()
                raise ValueError("stop")
        session.add(Item(name="outer"))

    assert await names(async_database) == ["inner", "outer"]


async def test_closing_the_session_inside_is_not_a_silent_rollback(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(SessionEnded, match=r"session\.close\(\) was called inside .*test_async"):
        async with async_database.begin() as session:
            session.add(Item(name="lost"))
            await session.flush()
            await session.close()

    assert await names(async_database) == []


@on_one_of_each_kind
async def test_a_read_only_unit_loads_and_its_objects_stay_readable(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        session.add(Item(name="there"))

    async with async_database.begin(read_only=True) as session:
        item = (await session.scalars(select(Item))).one()
    assert item.name == "there"


async def test_a_read_only_unit_refuses_a_flush_and_names_what_changed(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(ReadOnlyUnit, match=r"changes of Item; nothing was sent"):
        async with async_database.begin(read_only=True) as session:
            session.add(Item(name="refused"))

    assert await names(async_database) == []


@on_one_of_each_kind
@pytest.mark.parametrize(
    "statement",
    [insert(Item).values(name="refused"), update(Item).values(name="refused"), delete(Item)],
    ids=["insert", "update", "delete"],
)
async def test_a_read_only_unit_refuses_statements_before_they_are_sent(
    async_database: AsyncDatabase, statement: Executable
) -> None:
    async with async_database.begin() as session:
        session.add(Item(name="safe"))

    with pytest.raises(ReadOnlyUnit, match="nothing was sent"):
        async with async_database.begin(read_only=True) as session:
            await session.execute(statement)

    assert await names(async_database) == ["safe"]


@on_servers
async def test_the_server_refuses_what_gets_through_to_it(async_database: AsyncDatabase) -> None:
    with pytest.raises(sa_exc.DBAPIError, match=r"(?i)read.?only"):
        async with async_database.begin(read_only=True) as session:
            await session.execute(text("INSERT INTO item (name) VALUES ('text')"))

    assert await names(async_database) == []


async def test_a_writing_unit_writes_after_a_read_only_one(async_database: AsyncDatabase) -> None:
    """The read-only switch is never left on a connection that writes."""
    for number in range(2):
        async with async_database.begin(read_only=True) as session:
            (await session.scalars(select(Item))).all()
        async with async_database.begin() as session:
            session.add(Item(name=f"item {number}"))

    assert len(await names(async_database)) == 2


@on_servers
async def test_a_repeatable_read_unit_is_a_snapshot(async_database: AsyncDatabase) -> None:
    async with async_database.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
        assert (await session.scalars(select(Item))).all() == []
        await asyncio.create_task(_add(async_database, "later"))
        assert (await session.scalars(select(Item))).all() == []

    assert await names(async_database) == ["later"]


@on_postgres
async def test_an_isolation_level_holds_for_one_unit_only(async_database: AsyncDatabase) -> None:
    show = text("SHOW transaction_isolation")
    for read_only in (False, True):
        async with async_database.begin(
            isolation_level="SERIALIZABLE", read_only=read_only
        ) as session:
            assert await session.scalar(show) == "serializable"
        async with async_database.begin(read_only=read_only) as session:
            assert await session.scalar(show) == "read committed"


@on_one_of_each_kind
@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE", "AUTOCOMMIT"])
@pytest.mark.parametrize("read_only", [False, True])
async def test_an_isolation_level_never_poisons_the_pooled_connection(
    async_database: AsyncDatabase, level: str, read_only: bool
) -> None:
    async with async_database.begin(isolation_level=level, read_only=read_only) as session:
        (await session.scalars(select(Item))).all()

    with pytest.raises(ValueError, match="stop"):
        async with async_database.begin() as session:
            session.add(Item(name="gone"))
            await session.flush()
            raise ValueError("stop")
    assert await names(async_database) == []


async def test_autocommit_is_there_for_statements_that_refuse_a_transaction(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin(isolation_level="AUTOCOMMIT") as session:
        is_mysql = async_database.engine.dialect.name == "mysql"
        await session.execute(text("OPTIMIZE TABLE item" if is_mysql else "VACUUM"))


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_unit_streams(async_database: AsyncDatabase, read_only: bool) -> None:
    """PostgreSQL has cursors in transactions only: a read-only unit begins one by itself."""
    async with async_database.begin() as session:
        session.add_all([Item(name=str(number)) for number in range(100)])

    for _ in range(2):  # the same connection, streaming and plain in turn
        async with async_database.begin(read_only=read_only) as session:
            stream = await session.stream_scalars(select(Item.id).execution_options(yield_per=10))
            assert len([item_id async for item_id in stream]) == 100
        async with async_database.begin(read_only=read_only) as session:
            assert await session.scalar(text("SELECT count(*) FROM item")) == 100


async def test_a_stream_that_is_closed_early_leaves_a_clean_connection(
    async_database: AsyncDatabase,
) -> None:
    async with async_database.begin() as session:
        session.add_all([Item(name=str(number)) for number in range(100)])

    for read_only in (True, False):
        async with async_database.begin(read_only=read_only) as session:
            stream = await session.stream_scalars(select(Item.id).execution_options(yield_per=10))
            assert await anext(aiter(stream)) is not None
            await stream.close()
    assert len(await names(async_database)) == 100
    async with async_database.begin() as session:
        session.add(Item(name="next"))
    assert async_database.stats().in_use == 0


@on_postgres
async def test_a_streaming_unit_is_still_read_only(async_database: AsyncDatabase) -> None:
    with pytest.raises(sa_exc.DBAPIError, match="read-only transaction"):
        async with async_database.begin(read_only=True) as session:
            stream = await session.stream_scalars(select(Item.id).execution_options(yield_per=10))
            assert [item_id async for item_id in stream] == []
            await session.execute(text("INSERT INTO item (name) VALUES ('text')"))


@on_one_of_each_kind
async def test_a_failed_commit_rolls_back_and_leaves_a_clean_connection(
    async_database: AsyncDatabase,
) -> None:
    """After a failed COMMIT, SQLite keeps the transaction open: the next unit must not get it."""
    with pytest.raises(sa_exc.IntegrityError):
        async with async_database.begin() as session:
            session.add(Note(item_id=404))
    async with async_database.begin() as session:
        session.add(Item(name="next"))

    assert await names(async_database) == ["next"]
    assert async_database.stats().in_use == 0


@on_postgres
async def test_a_lost_connection_does_not_hide_the_users_exception(
    async_database: AsyncDatabase,
) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with async_database.begin() as session:
            session.add(Item(name="gone"))
            await session.flush()
            with pytest.raises(sa_exc.DBAPIError):
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            raise ValueError("mine")

    assert await names(async_database) == []


async def test_a_unit_step_by_step(async_database: AsyncDatabase) -> None:
    """What integrations do."""
    unit = Unit(async_database)
    await unit.admit_async()
    assert unit.is_async
    assert not unit.needs_io
    unit.session.add(Item(name="stepwise"))
    assert unit.needs_io
    await Unit.end_all_async([unit], Unit.commit)
    await Unit.end_all_async([], Unit.commit)

    assert await names(async_database) == ["stepwise"]
    assert async_database.stats().in_use == 0


@on_one_of_each_kind
async def test_a_unit_is_used_once(async_database: AsyncDatabase) -> None:
    block = async_database.begin()
    async with block as session:
        session.add(Item(name="one"))
    with pytest.raises(sa_exc.InvalidRequestError, match="used once"):
        await block.__aenter__()
    assert async_database.stats().in_use == 0


async def test_a_block_that_is_never_entered_holds_nothing(async_database: AsyncDatabase) -> None:
    async_database.begin()
    gc.collect()
    assert async_database.stats().begun == 0


async def _add(database: AsyncDatabase, name: str) -> None:
    async with database.begin() as session:
        session.add(Item(name=name))


async def test_binds_serve_plain_and_asynchronous_sessions(tmp_path: Path) -> None:
    """A function that run() calls gets a plain session, bound to the same engines."""
    first, second = (f"sqlite+aiosqlite:///{tmp_path / name}.db" for name in ("first", "second"))
    other = create_async_engine(second)
    async with other.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncDatabase(first, session_options={"binds": {Item: other}}) as database:
        await database.run(lambda session: session.add(Item(name="plain")))
        async with database.begin() as session:
            session.add(Item(name="asynchronous"))
            stored = sorted(await session.scalars(select(Item.name)))
    await other.dispose()
    assert stored == ["asynchronous", "plain"]
