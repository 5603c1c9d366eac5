"""Units of work at random: no false commit, no torn unit, no false alarm, each hook once."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import create_engine, make_url, text

from sessionscope.testing import PostgresServer
from tests.faults.state_machine import Arena, Units

# In all, over the three databases.
STEPS = int(os.environ.get("STATE_MACHINE_STEPS", "900"))
SEED = int(os.environ.get("STATE_MACHINE_SEED", "1"))
STEPS_OF_ONE = 40  # at most, in one run of the machine

DATABASES = ("postgres", "sqlite", "mysql")


@pytest.fixture
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """Ours and a plain one, of each kind in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "mysql":
        yield from _beside_mysql(url)
        return
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        plain = server.create_database()
    else:
        plain = f"{url}.plain"
    with closing(Arena(url, plain)) as arena:
        yield arena


def _beside_mysql(url: str) -> Iterator[Arena]:
    parsed = make_url(url)
    plain = parsed.set(database=f"{parsed.database}_plain")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {plain.database}"))
        with closing(Arena(url, plain.render_as_string(hide_password=False))) as arena:
            yield arena
        connection.execute(text(f"DROP DATABASE {plain.database}"))
    engine.dispose()


# Of changes that a plain session has lost.
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("arena", DATABASES, indirect=True)
def test_what_units_report_is_what_is_stored(arena: Arena) -> None:
    """Whatever is swallowed, rolled back or committed on the way."""
    steps = -(-STEPS // len(DATABASES))
    one_run = settings(
        max_examples=max(1, steps // STEPS_OF_ONE),
        stateful_step_count=STEPS_OF_ONE,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],  # pyright: ignore[reportArgumentType]  # its metaclass
    )
    number = SEED
    while arena.count["steps"] < steps:
        machine = seed(number)(type("Machine", (Units,), {"arena": arena}))
        run_state_machine_as_test(machine, settings=one_run)
        number += 1

    print(f"\n{arena.name}, seeds {SEED} to {number - 1}: {dict(arena.count)}")
    # A run in which nothing is at stake would prove nothing.
    count = arena.count
    assert min(count[name] for name in ("committed", "failed", "hooks", "swallowed")) > 0
    if arena.name == "postgresql":
        assert min(count["doomed"], count["false commits of plain sessions"]) > 0
