"""capture_hooks: a test looks at what would have been called after a commit."""

import threading
from functools import partial

import pytest
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database, after_commit, after_rollback
from sessionscope.testing import capture_hooks, sandbox
from tests.async_drivers import on_one_of_each_kind
from tests.models import Item

on_one_of_each = pytest.mark.parametrize("url", ["sqlite-memory", "postgres"], indirect=True)


@on_one_of_each
def test_what_is_captured_is_not_called_until_the_test_does(database: Database) -> None:
    called: list[str] = []
    with sandbox(database), capture_hooks() as hooks:
        with database.begin() as session:
            session.add(Item(name="pear"))
            after_commit(session, called.append, "pear")
            assert hooks == [], "nothing is due yet"
        (hook,) = hooks
    assert called == []
    assert (hook.func, hook.args, hook.keywords) == (called.append, ("pear",), {})
    hook()
    assert called == ["pear"]


@on_one_of_each
def test_what_is_not_due_is_not_captured(database: Database) -> None:
    with capture_hooks() as hooks:
        with pytest.raises(ZeroDivisionError), database.begin() as session:
            after_commit(session, print, "never")
            after_rollback(session, print, "rolled back")
            _ = 1 / 0
    assert [hook.args for hook in hooks] == [("rolled back",)]


@on_one_of_each
def test_those_of_all_threads_and_sessions_are_captured(database: Database) -> None:
    def work() -> None:
        with database.begin() as session:
            after_commit(session, print, "in a thread")

    with capture_hooks() as hooks:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with database.sessionmaker.begin() as session:
            session.add(Item(name="pear"))
            after_commit(session, print, "of a session of one's own")
        with Session(database.engine) as foreign, foreign.begin():
            foreign.add(Item(name="plum"))
            after_commit(foreign, print, "of any session")
    expected = ["in a thread", "of a session of one's own", "of any session"]
    assert [hook.args[0] for hook in hooks] == expected


def test_afterwards_hooks_are_called_again(database: Database) -> None:
    called: list[str] = []
    with pytest.raises(ZeroDivisionError), capture_hooks():
        _ = 1 / 0
    with database.begin() as session:
        after_commit(session, called.append, "called")
    assert called == ["called"]


def test_one_inside_of_another_takes_its_own(database: Database) -> None:
    def add(name: str) -> None:
        with database.begin() as session:
            after_commit(session, print, name)

    with capture_hooks() as outer:
        with capture_hooks() as inner:
            add("inner")
        add("outer")
    assert [[hook.args[0] for hook in hooks] for hooks in (outer, inner)] == [["outer"], ["inner"]]


@pytest.mark.anyio
@on_one_of_each_kind
async def test_an_asynchronous_hook_is_awaited_by_the_test(async_database: AsyncDatabase) -> None:
    called: list[str] = []

    async def send(name: str) -> None:
        called.append(name)

    with capture_hooks() as hooks:
        async with async_database.begin() as session:
            after_commit(session, send, "pear")
    assert [hook.func for hook in hooks] == [send]
    assert called == []
    sending: partial[object] = hooks[0]
    await sending()  # type: ignore[misc]  # it is what the hook returns
    assert called == ["pear"]
