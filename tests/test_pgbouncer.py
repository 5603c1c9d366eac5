"""Behind PgBouncer in transaction mode: no statement and no setting is left in a session."""

import asyncio
import os
from collections.abc import Iterator

import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError, DeadlineExceeded, ReadOnlyUnit
from sessionscope.testing import Fault, FaultProxy
from tests.conftest import missing, with_psycopg2
from tests.models import Item, create_tables, names
from tests.pgbouncer import PROGRAM, pgbouncer

# `make pooler` asks for 10,000.
UNITS = int(os.environ.get("POOLER_UNITS", "200"))


@pytest.fixture
def bouncer_url(postgres_url: str) -> Iterator[str]:
    """A database behind PgBouncer, which shares three sessions among all."""
    if PROGRAM is None:
        missing("PgBouncer is not installed (Debian: apt install pgbouncer)")
    with Database(postgres_url) as database:
        create_tables(database)
    with pgbouncer(make_url(postgres_url)) as url:
        yield url.render_as_string(hide_password=False)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_many_units_share_few_sessions(bouncer_url: str, driver: str) -> None:
    url = with_psycopg2(bouncer_url) if driver == "psycopg2" else bouncer_url
    with Database(url, pooler="pgbouncer-transaction") as database:
        for number in range(UNITS):
            with database.begin() as session:
                session.add(Item(name=str(number)))
            with database.begin(read_only=True) as session:
                found = session.scalars(select(Item).where(Item.name == str(number))).one()
                assert found.name == str(number)
        assert len(names(database)) == UNITS


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.anyio
async def test_many_tasks_share_few_sessions(bouncer_url: str, driver: str) -> None:
    url = make_url(bouncer_url).set(drivername=f"postgresql+{driver}")
    async with AsyncDatabase(url, pooler="pgbouncer-transaction") as database:

        async def work(number: int) -> None:
            async with database.begin(timeout=30) as session:
                session.add(Item(name=str(number)))
            async with database.begin(read_only=True) as session:
                query = select(Item).where(Item.name == str(number))
                assert (await session.scalars(query)).one().name == str(number)

        for start in range(0, UNITS, 20):
            await asyncio.gather(*(work(number) for number in range(start, start + 20)))


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_deadline_cancels_the_statement_of_its_own_unit(bouncer_url: str, driver: str) -> None:
    """A cancellation goes through PgBouncer, to whichever session has the transaction."""
    url = with_psycopg2(bouncer_url) if driver == "psycopg2" else bouncer_url
    with Database(url, pooler="pgbouncer-transaction") as database:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded), database.begin(timeout=0.3) as session:
                session.add(Item(name="pear"))
                session.flush()
                session.execute(text("SELECT pg_sleep(60)"))
        with database.begin(timeout=30) as session:
            session.add(Item(name="plum"))
        assert names(database) == ["plum"]


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
def test_a_lost_commit_is_resolved_through_it(bouncer_url: str, fault: Fault) -> None:
    port = make_url(bouncer_url).port
    assert port is not None
    with FaultProxy("127.0.0.1", port) as proxy:
        through = make_url(bouncer_url).set(host="127.0.0.1", port=proxy.port)
        with Database(through, pooler="pgbouncer-transaction") as database:

            def work(session: Session) -> None:
                session.add(Item(name="pear"))

            proxy.aim(fault, b"COMMIT")
            database.run(work)
            assert proxy.hits == 1
            assert names(database) == ["pear"]
            assert database.stats().retried == (1 if fault == "cut before" else 0)


def test_a_read_only_unit_changes_no_session(bouncer_url: str) -> None:
    """A setting of the session would refuse the writes of another client."""
    with Database(bouncer_url, pooler="pgbouncer-transaction") as database:
        with database.begin(read_only=True) as session:
            assert session.scalar(text("SHOW transaction_read_only")) == "on"
            assert session.scalar(text("SHOW default_transaction_read_only")) == "off"
        with pytest.raises(ReadOnlyUnit), database.begin(read_only=True) as session:
            session.add(Item(name="pear"))
        with (
            pytest.raises(DBAPIError, match="read-only"),
            database.begin(read_only=True) as session,
        ):
            session.execute(text("INSERT INTO item (name) VALUES ('pear')"))
        with database.begin(read_only=True, isolation_level="REPEATABLE READ") as session:
            assert session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
            assert session.scalar(text("SHOW transaction_read_only")) == "on"
        assert names(database) == []


@pytest.mark.parametrize(
    ("url", "pooler"),
    [("postgresql://u@h/d", "pgbouncer"), ("sqlite://", "pgbouncer-transaction")],
)
def test_a_pooler_that_cannot_be_is_refused(url: str, pooler: str) -> None:
    with pytest.raises(ConfigurationError, match="pooler="):
        Database(url, pooler=pooler)
