"""after_commit and after_rollback: once, in order, and only for what really happened."""

import logging
import sys

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from sessionscope import Database, Unit, after_commit, after_rollback
from sessionscope.exc import ConfigurationError, SessionEnded
from tests.models import Item, Note, names


def test_a_hook_runs_after_the_commit_with_its_arguments(database: Database) -> None:
    called: list[object] = []

    def remember(number: int, *, key: int) -> None:
        called.append((number, key))

    with database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, remember, 1, key=2)
        assert called == []

    assert called == [(1, 2)]


def test_hooks_run_in_order_when_the_connection_is_back(database: Database) -> None:
    """So a hook may open a unit of its own, even where there is one connection only."""
    seen: list[object] = []
    with database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, seen.append, "first")
        after_commit(session, lambda: seen.append(names(database)))
        after_commit(session, lambda: seen.append(database.stats().in_use))

    assert seen == ["first", ["one"], 0]


def test_a_rolled_back_unit_runs_the_other_kind(database: Database) -> None:
    called: list[str] = []
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, called.append, "commit")
        after_rollback(session, called.append, "rollback")
        raise ValueError("stop")

    assert called == ["rollback"]


def test_a_failed_commit_counts_as_rolled_back(database: Database) -> None:
    called: list[str] = []
    with pytest.raises(Exception, match="(?i)foreign key"), database.begin() as session:
        session.add(Note(item_id=404))
        after_commit(session, called.append, "commit")
        after_rollback(session, called.append, "rollback")

    assert called == ["rollback"]


def test_hooks_of_a_unit_without_statements_run(database: Database) -> None:
    called: list[str] = []
    with database.begin() as session:
        after_commit(session, called.append, "commit")
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        after_rollback(session, called.append, "rollback")
        raise ValueError("stop")

    assert called == ["commit", "rollback"]


def test_hooks_of_a_read_only_unit_run_at_its_normal_end(database: Database) -> None:
    called: list[str] = []
    with database.begin(read_only=True) as session:
        session.execute(text("SELECT 1"))
        after_commit(session, called.append, "commit")

    assert called == ["commit"]


def test_a_hook_of_a_rolled_back_savepoint_never_runs(database: Database) -> None:
    called: list[str] = []
    with database.begin() as session:
        after_commit(session, called.append, "outer")
        with pytest.raises(ValueError, match="stop"), session.begin_nested():
            after_commit(session, called.append, "inner")
            after_rollback(session, called.append, "inner undone")
            raise ValueError("stop")

    assert called == ["inner undone", "outer"]  # in the order in which they were decided


def test_a_hook_of_a_released_savepoint_waits_for_the_outer_transaction(
    database: Database,
) -> None:
    """SQLAlchemy's after_commit event fires at the release already."""
    called: list[str] = []
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        with session.begin_nested():
            session.add(Item(name="one"))
            after_commit(session, called.append, "commit")
            after_rollback(session, called.append, "rollback")
        assert called == []
        raise ValueError("stop")

    assert called == ["rollback"]


def test_a_savepoint_in_a_savepoint_hands_its_hooks_up_one_level_at_a_time(
    database: Database,
) -> None:
    called: list[str] = []
    with database.begin() as session:
        with pytest.raises(ValueError, match="stop"), session.begin_nested():
            with session.begin_nested():
                after_commit(session, called.append, "dropped with the middle one")
            raise ValueError("stop")
        with session.begin_nested(), session.begin_nested():
            after_commit(session, called.append, "kept")

    assert called == ["kept"]


def test_hooks_of_a_commit_in_the_middle_run_even_if_the_rest_rolls_back(
    database: Database,
) -> None:
    called: list[str] = []
    with pytest.raises(ValueError, match="stop"), database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, called.append, "first")
        session.commit()
        assert called == []
        after_commit(session, called.append, "second")
        session.add(Item(name="two"))
        raise ValueError("stop")

    assert called == ["first"]
    assert names(database) == ["one"]


def test_hooks_before_a_rollback_in_the_middle_are_dropped(database: Database) -> None:
    called: list[str] = []
    with database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, called.append, "first")
        session.rollback()
        session.add(Item(name="two"))
        after_commit(session, called.append, "second")

    assert called == ["second"]


def test_a_rollback_before_any_statement_drops_hooks_as_well(database: Database) -> None:
    """SQLAlchemy's rollback() tells nobody where no transaction has begun."""
    called: list[str] = []
    with database.begin() as session:
        after_commit(session, called.append, "commit 1")
        after_rollback(session, called.append, "rollback 1")
        session.rollback()
        session.add(Item(name="later"))
        after_commit(session, called.append, "commit 2")

    assert called == ["rollback 1", "commit 2"]


def test_a_hook_of_a_session_that_was_closed_hides_nothing(database: Database) -> None:
    """The end of the unit says what was wrong."""
    called: list[str] = []
    with pytest.raises(SessionEnded, match="was called inside"), database.begin() as session:
        session.close()
        after_rollback(session, called.append, "rollback")

    assert called == ["rollback"]


def test_hooks_in_nested_begin_blocks_of_the_session_run_once(database: Database) -> None:
    called: list[str] = []
    with database.begin() as session:
        with session.begin():
            after_commit(session, called.append, "inner")
        after_commit(session, called.append, "outer")

    assert called == ["inner", "outer"]


def test_a_failing_hook_hides_no_other_and_fails_no_commit(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []
    with caplog.at_level(logging.ERROR, "sessionscope"), database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, int, "not a number")
        after_commit(session, called.append, "ran")

    assert called == ["ran"]
    assert names(database) == ["one"]
    assert "not a number" in caplog.text


def test_a_hook_that_registers_a_hook_in_a_unit_of_its_own(database: Database) -> None:
    called: list[str] = []

    def hook() -> None:
        with database.begin() as session:
            session.add(Item(name="by a hook"))
            after_commit(session, called.append, "inner")

    with database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, hook)

    assert called == ["inner"]
    assert len(names(database)) == 2


def test_a_flush_inside_a_hooked_unit_settles_nothing(database: Database) -> None:
    """A flush has an inner transaction of its own."""
    called: list[str] = []
    with database.begin() as session:
        after_commit(session, called.append, "commit")
        session.add(Item(name="one"))
        session.flush()
        assert called == []

    assert called == ["commit"]


def test_a_plain_session_runs_its_hooks_when_its_transaction_has_ended(database: Database) -> None:
    called: list[object] = []
    with database.sessionmaker() as session:
        session.add(Item(name="one"))
        after_commit(session, lambda: called.append(names(database)))
        session.commit()
        assert called == [["one"]]
        session.add(Item(name="two"))
        after_rollback(session, called.append, "undone")

    assert called == [["one"], "undone"]


def test_a_plain_session_of_someone_elses_engine_works_as_well() -> None:
    engine = create_engine("sqlite://")
    called: list[str] = []
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        after_commit(session, called.append, "commit")
        session.commit()
    engine.dispose()

    assert called == ["commit"]


@pytest.mark.parametrize(
    ("mode", "runs"),
    [
        ("create_savepoint", True),  # its own savepoint: the session's commit is a commit to it
        ("control_fully", True),  # commits the outer transaction
        ("rollback_only", False),  # its commit commits nothing
        ("conditional_savepoint", False),  # the same, where the outer one has no savepoint
    ],
)
def test_every_join_transaction_mode(
    database: Database, mode: str, runs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []
    with database.engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
            session.add(Item(name="joined"))
            after_commit(session, called.append, "commit")
            session.commit()
        if outer.is_active:
            outer.rollback()

    assert called == (["commit"] if runs else [])
    assert ("create_savepoint" in caplog.text) is not runs


def test_conditional_savepoint_in_a_savepoint_is_a_savepoint(database: Database) -> None:
    called: list[str] = []
    with database.engine.connect() as connection, connection.begin() as outer:
        connection.begin_nested()
        with Session(connection, join_transaction_mode="conditional_savepoint") as session:
            session.add(Item(name="joined"))
            after_commit(session, called.append, "commit")
            session.commit()
        outer.rollback()

    assert called == ["commit"]


def test_a_listener_that_fails_in_after_commit_does_not_lose_hooks(database: Database) -> None:
    called: list[str] = []
    with pytest.raises(ValueError, match="listener"), database.begin() as session:
        session.add(Item(name="one"))
        after_commit(session, called.append, "commit")

        @event.listens_for(session, "after_commit")
        def fail(session: Session) -> None:
            raise ValueError("listener")

    assert called == ["commit"]
    assert names(database) == ["one"]


def test_a_hook_on_a_session_that_has_ended_is_refused(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.begin() as session:
        after_commit(session, after_commit, session, print)
    assert "SessionEnded" in caplog.text


def test_a_coroutine_function_is_refused_as_a_hook(database: Database) -> None:
    async def hook() -> None: ...

    with (
        pytest.raises(ConfigurationError, match="write it with `def`"),
        database.begin() as session,
    ):
        after_commit(session, hook)


@pytest.mark.parametrize("leave", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("url", ["sqlite-memory", "postgres"], indirect=True)
def test_a_hook_that_leaves_the_process_lets_the_others_run_before(
    database: Database, leave: type[BaseException]
) -> None:
    called: list[str] = []

    def go() -> None:
        called.append("leaves")
        raise leave

    with pytest.raises(leave), database.begin() as session:
        session.add(Item(name="pear"))
        after_commit(session, go)
        after_commit(session, called.append, "runs")
    assert called == ["leaves", "runs"]
    assert names(database) == ["pear"]
    assert database.stats().in_use == 0


def test_the_hooks_of_other_databases_run_before_the_process_is_left() -> None:
    called: list[str] = []
    with Database("sqlite://") as one, Database("sqlite://") as other:
        units = [Unit(one), Unit(other)]
        for unit in units:
            unit.admit()
        after_commit(units[0].session, sys.exit, 3)
        after_commit(units[1].session, called.append, "runs")
        with pytest.raises(SystemExit, match="3"):
            Unit.end_all(units, Unit.commit)
    assert called == ["runs"]
