"""What a session promises in every framework, behind a real server and on PostgreSQL.

The first line of each test is a row of the table in docs/frameworks.md.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import httpx2
import pytest
from sqlalchemy import Engine, create_engine, text

from sessionscope.testing import PostgresServer
from tests.contract.running import SITES, RunningSite
from tests.models import Base

CLIENTS = 200
STREAMS = 20
# COMMIT takes long for late items.
SLOW_COMMIT = """
CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM pg_sleep(0.15); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER delay AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.name LIKE 'late%') EXECUTE FUNCTION delay();
"""
_numbers = count(1)


@dataclass
class Observed:
    """A running site, and a view of its database that is not the site's."""

    site: RunningSite
    engine: Engine

    def get(self, path: str) -> httpx2.Response:
        return self.site.get(path)

    def count(self, query: str, **parameters: object) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(text(query), parameters) or 0)

    def stored(self, name: str) -> int:
        """Return how many items have this *name*."""
        return self.count("SELECT count(*) FROM item WHERE name = :name", name=name)

    def backends(self, what: str) -> int:
        """Return how many of the site's connections are like *what*."""
        return self.count(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            f"AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND {what}"
        )


@pytest.fixture(scope="module", params=SITES, ids=lambda site: site.name)
def site(request: pytest.FixtureRequest, postgres_server: PostgresServer) -> Iterator[Observed]:
    """Each site in turn, served for all tests of this file, on a database of its own."""
    url = postgres_server.create_database()
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        connection.execute(text(SLOW_COMMIT))
    with RunningSite(request.param, url) as running:
        yield Observed(running, engine)
    engine.dispose()


def fresh(prefix: str = "item") -> str:
    """Return a name that no other test has."""
    return f"{prefix}-{next(_numbers)}"


def test_what_was_answered_is_stored(site: Observed) -> None:
    """What was answered is stored: the commit comes before the response."""
    for name in [fresh("late") for _ in range(10)]:
        assert site.get(f"/add/{name}").is_success
        assert site.stored(name) == 1


def test_a_failed_commit_is_never_a_success(site: Observed) -> None:
    """A commit that fails is answered with an error, never with a success."""
    answers = [site.get("/fails-at-commit/x").status_code for _ in range(20)]
    assert answers == [500] * 20
    assert site.count("SELECT count(*) FROM note") == 0


def test_a_swallowed_error_is_never_a_success(site: Observed) -> None:
    """A database error that the code swallowed is not answered with a success either."""
    name = fresh()
    assert site.get(f"/swallows/{name}").status_code == 500
    assert site.stored(name) == 0


def test_an_exception_rolls_back(site: Observed) -> None:
    """An exception rolls back, also one that a handler of the app answers."""
    name = fresh()
    assert site.get(f"/conflicts/{name}").status_code == 409
    assert site.stored(name) == 0


def test_a_reading_session_writes_nothing(site: Observed) -> None:
    """A session that only reads refuses to write."""
    name = fresh()
    assert site.get(f"/reads-only/{name}").status_code == 500
    assert site.stored(name) == 0


def test_hooks_run_before_the_response(site: Observed) -> None:
    """`after_commit` hooks have run when the response arrives."""
    name = fresh()
    assert site.get(f"/hooks/{name}").is_success
    assert site.get(f"/hooked/{name}").text == "true"


def test_streams_hold_no_connection(site: Observed) -> None:
    """A stream holds no connection, and using the session in it is refused."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(site.site.client.stream("GET", f"/stream/{n}"))
            for n in range(STREAMS)
        ]
        lines = [stream.iter_lines() for stream in streams]
        assert [next(each) for each in lines] == ["begun"] * STREAMS
        assert site.backends("state <> 'idle'") == 0
        assert site.get(f"/add/{fresh()}").is_success
        assert site.get("/release/all").is_success
        assert [next(each) for each in lines] == ["ended"] * STREAMS
    assert site.backends("state <> 'idle'") == 0


def test_overload_is_503(site: Observed) -> None:
    """Too much load is answered 503 with Retry-After, and the others are served."""
    key = next(_numbers)
    with ThreadPoolExecutor(1) as threads, site.engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        holder = threads.submit(site.get, f"/small/{key}")
        wait_until_one_waits_for_a_lock(site)
        refused = site.get(f"/small/{key}")
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
        assert holder.result(30).is_success
    assert (refused.status_code, refused.json()["code"]) == (503, "pool_busy")
    assert int(refused.headers["Retry-After"]) >= 1
    assert site.get(f"/small/{key}").is_success


def wait_until_one_waits_for_a_lock(site: Observed) -> None:
    while not site.backends("wait_event_type = 'Lock'"):
        pass


def test_a_database_that_is_down_is_503(site: Observed) -> None:
    """A database that cannot be reached is answered 503 with Retry-After."""
    refused = site.get("/down/x")
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1


def test_200_clients_at_once_are_all_served(site: Observed) -> None:
    """200 clients at once are all served, over 15 connections."""

    async def main() -> list[int]:
        limits = httpx2.Limits(max_connections=CLIENTS)
        async with httpx2.AsyncClient(
            base_url=site.site.address, limits=limits, timeout=60
        ) as client:
            answers = await asyncio.gather(*(client.get("/crowd/x") for _ in range(CLIENTS)))
        return [answer.status_code for answer in answers]

    assert asyncio.run(main()) == [200] * CLIENTS
    assert site.backends("true") <= 16  # and that of the small Database
