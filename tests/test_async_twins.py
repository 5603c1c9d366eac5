"""AsyncDatabase is Database's twin: the same members, parameters, order and defaults."""

import inspect
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope._async_source import AsyncSource
from sessionscope._source import Source

DOES_IO = {"dispose", "drain", "ping", "run"}
# Their own words say all: a name that means another class, or nothing that differs.
WITH_THEIR_OWN_WORDS = {"engine", "read_engine", "sessionmaker", "stats"}


def members(cls: type) -> dict[str, Any]:
    """The public members, and the special methods that a class of ours defines itself."""
    public = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    return {"__init__": vars(cls)["__init__"], **public}


PAIRS = {name: (member, members(AsyncDatabase)[name]) for name, member in members(Database).items()}


def plain(member: Any) -> Any:
    """The function behind a method, a class method or a property."""
    function = member.fget if isinstance(member, property) else member
    return getattr(function, "__func__", function)


def shape(member: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of the parameters, in order."""
    parameters = inspect.signature(plain(member)).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters]


def test_they_have_the_same_members_in_the_same_order() -> None:
    assert list(members(Database)) == list(members(AsyncDatabase))
    assert {"begin", "run", "with_session", "stats", "drain", "from_env"} <= set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_member_takes_the_same_parameters(name: str) -> None:
    twin, async_twin = PAIRS[name]
    ours = [each for each in shape(twin) if each[0] != "session_class"]
    theirs = [each for each in shape(async_twin) if each[0] != "session_class"]
    assert ours == theirs
    assert type(twin) is type(async_twin)


def test_the_session_class_is_where_they_differ() -> None:
    for cls, session_class in ((Database, Session), (AsyncDatabase, AsyncSession)):
        parameters = inspect.signature(cls.__init__).parameters
        assert parameters["session_class"].default is session_class
    order = [list(inspect.signature(cls).parameters) for cls in (Database, AsyncDatabase)]
    assert order[0] == order[1]


@pytest.mark.parametrize("name", PAIRS)
def test_what_does_io_is_awaited_and_nothing_else(name: str) -> None:
    """begin() returns a block for ``async with``, with_session() a decorator."""
    twin, async_twin = (plain(member) for member in PAIRS[name])
    assert not inspect.iscoroutinefunction(twin)
    assert inspect.iscoroutinefunction(async_twin) is (name in DOES_IO)


@pytest.mark.parametrize("name", sorted(PAIRS.keys() - {"__init__"} - WITH_THEIR_OWN_WORDS))
def test_the_docstring_says_whose_async_version_it_is(name: str) -> None:
    twin, async_twin = (plain(member) for member in PAIRS[name])
    assert inspect.getdoc(twin)
    role = f"Async version of :meth:`Database.{name}`"
    assert (inspect.getdoc(async_twin) or "").startswith(role)


@pytest.mark.parametrize("name", sorted(WITH_THEIR_OWN_WORDS))
def test_the_others_have_a_docstring_as_well(name: str) -> None:
    assert all(inspect.getdoc(plain(member)) for member in PAIRS[name])


def test_what_is_beneath_them_has_the_same_members() -> None:
    own = {name for name in vars(AsyncSource) if not name.startswith("_")}
    beneath = {name for name in vars(Source) if not name.startswith("_")}
    assert own - beneath == {"async_engine"}


@pytest.mark.anyio
async def test_the_plain_objects_are_sqlalchemys(async_database: AsyncDatabase) -> None:
    """Nothing is hidden or wrapped; the same object each time."""
    assert async_database.engine is async_database.engine
    assert async_database.read_engine is async_database.read_engine
    assert async_database.sessionmaker is async_database.sessionmaker
    async with async_database.sessionmaker() as session:
        assert type(session).__mro__[1] is AsyncSession
        assert await session.scalar(select(1)) == 1


@pytest.mark.anyio
async def test_guards_are_on_the_databases_own_sessions_alone() -> None:
    """async_sessionmaker, unlike sessionmaker, makes no class of its own to put them on."""
    async with AsyncDatabase("sqlite+aiosqlite://") as one:
        async with AsyncDatabase("sqlite+aiosqlite://") as other:
            assert AsyncSession.sync_session_class is Session
            guarded = [type(each.sessionmaker().sync_session) for each in (one, other)]
    assert guarded[0] is not guarded[1]
    assert [each.__mro__[1] for each in guarded] == [Session, Session]
