"""What is refused, with the place and the mend: use after the end, a second unit."""

import asyncio
import threading

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import exc as sa_exc
from sqlalchemy import select, text

from sessionscope import Database, Unit
from sessionscope.exc import NestedUnit, SessionEnded
from tests.models import Item, names


def test_a_session_that_has_ended_refuses_everything_that_would_reopen_it(
    database: Database,
) -> None:
    with database.begin() as session:
        session.execute(text("SELECT 1"))

    for use in (
        lambda: session.execute(text("SELECT 1")),
        lambda: session.scalars(select(Item)),
        lambda: session.get(Item, 1),
        lambda: session.add(Item(name="late")),
        lambda: session.begin(),
        lambda: session.connection(),
        lambda: session.commit(),
    ):
        with pytest.raises(SessionEnded, match=r"test_guards\.py:\d+") as caught:
            use()
        assert "with database.begin() as session" in str(caught.value)
    assert isinstance(caught.value, sa_exc.InvalidRequestError)
    assert database.stats().in_use == 0
    assert names(database) == []


def test_an_ended_session_never_used_refuses_too(database: Database) -> None:
    with database.begin() as session:
        pass
    with pytest.raises(SessionEnded):
        session.execute(text("SELECT 1"))


def test_closing_an_ended_session_again_is_harmless(database: Database) -> None:
    with database.begin() as session:
        pass
    session.rollback()
    session.close()


def test_a_second_unit_in_the_same_flow_is_refused_at_once(database: Database) -> None:
    """Four threads that each hold one connection of four and ask for another freeze."""
    with database.begin(), pytest.raises(NestedUnit, match=r"test_guards\.py:\d+") as caught:
        with database.begin():
            pytest.fail("the second unit was opened")
    assert database.stats().longest_wait == 0  # a refusal, not a wait
    assert "Pass the session on" in str(caught.value)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_read_only_units_count_as_well(database: Database, outer: bool, inner: bool) -> None:
    with database.begin(read_only=outer), pytest.raises(NestedUnit):
        database.begin(read_only=inner).__enter__()


def test_every_way_to_open_a_unit_is_refused(database: Database) -> None:
    @database.with_session()
    def entry_point(session: object) -> None:
        pytest.fail("it ran")

    with database.begin():
        for open_another in (entry_point, lambda: database.run(print), database.ping):
            with pytest.raises(NestedUnit):
                open_another()


def test_one_unit_after_the_other_is_fine(database: Database) -> None:
    for _ in range(3):
        with database.begin() as session:
            session.execute(text("SELECT 1"))


def test_after_a_unit_that_failed_the_flow_is_free(database: Database) -> None:
    with pytest.raises(ValueError, match="stop"), database.begin():
        raise ValueError("stop")
    with database.begin():
        pass


def test_another_database_is_another_matter(database: Database, sqlite: Database) -> None:
    with database.begin() as one, sqlite.begin() as two:
        assert one is not two


def test_a_new_thread_is_a_flow_of_its_own(postgres: Database) -> None:
    done = []

    def work() -> None:
        with postgres.begin() as session:
            done.append(session.scalar(text("SELECT 1")))

    with postgres.begin():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert done == [1]


def test_a_new_task_is_a_flow_of_its_own(postgres: Database) -> None:
    async def work() -> int:
        unit = Unit(postgres)
        await unit.admit_async()
        try:
            return int(unit.session.scalar(text("SELECT 1")) or 0)
        finally:
            unit.close()

    async def main() -> list[int]:
        with postgres.begin():
            # The context is copied into the new tasks; the flow is not.
            return await asyncio.gather(*(asyncio.create_task(work()) for _ in range(3)))

    assert asyncio.run(main()) == [1, 1, 1]


def test_the_same_task_is_the_same_flow(postgres: Database) -> None:
    async def main() -> None:
        with postgres.begin():
            with pytest.raises(NestedUnit):
                await Unit(postgres).admit_async()

    asyncio.run(main())


def test_a_worker_thread_that_the_unit_awaits_is_the_same_flow(postgres: Database) -> None:
    async def main() -> None:
        with postgres.begin():
            with pytest.raises(NestedUnit):
                await asyncio.to_thread(postgres.ping)

    asyncio.run(main())


def test_a_unit_that_was_closed_in_another_thread_holds_no_flow(postgres: Database) -> None:
    unit = Unit(postgres)
    unit.admit()
    thread = threading.Thread(target=unit.close)
    thread.start()
    thread.join()

    with postgres.begin():
        pass


def test_a_request_of_a_test_client_inside_a_unit_is_a_flow_of_its_own(postgres: Database) -> None:
    app = FastAPI()

    @app.get("/")
    def read() -> int:
        with postgres.begin() as session:
            return int(session.scalar(text("SELECT 1")) or 0)

    with postgres.begin():
        assert TestClient(app).get("/").json() == 1


def test_a_loop_inside_the_units_own_thread_is_the_same_flow(database: Database) -> None:
    async def main() -> None:
        with database.begin():
            pytest.fail("it was opened")

    with database.begin(), pytest.raises(NestedUnit):
        asyncio.run(main())
