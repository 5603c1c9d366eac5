"""A lost COMMIT on MariaDB: the row that it would have left tells what became of it."""

import re
import threading
from collections.abc import Iterator
from time import sleep

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sessionscope import AsyncDatabase, Database, after_commit
from sessionscope._marker import Marker, leave_marker
from sessionscope._outcome import has_committed
from sessionscope.exc import CommitUnknown, ConfigurationError
from sessionscope.testing import Fault, FaultProxy
from tests.models import Item, create_tables, names
from tests.test_readme import ROOT

TABLE = "sessionscope_outcome"
PAGE = ROOT / "docs" / "how-to" / "lost-commits.md"


@pytest.fixture
def direct(mysql_url: str) -> Iterator[Database]:
    """A Database with the tests' tables, and the one that the guide says to create."""
    create = re.findall(r"```sql\n(.*?);\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with Database(mysql_url, outcome_table=TABLE) as database:
        create_tables(database)
        with database.engine.begin() as connection:
            connection.exec_driver_sql(create[0])
        yield database


@pytest.fixture
def mysql_proxy(direct: Database) -> Iterator[FaultProxy]:
    url = direct.engine.url
    assert url.host is not None
    assert url.port is not None
    with FaultProxy(url.host, url.port) as proxy:
        yield proxy


@pytest.fixture
def through(mysql_url: str, mysql_proxy: FaultProxy) -> Iterator[Database]:
    """The same database behind the proxy."""
    with Database(mysql_proxy.through(mysql_url), outcome_table=TABLE) as database:
        connect(database)
        yield database


def connect(database: Database) -> None:
    """Open a connection, for which there are COMMITs as well."""
    with database.begin() as session:
        session.execute(text("SELECT 1"))


def add(session: Session, name: str) -> None:
    session.add(Item(name=name))


def rows(database: Database) -> list[tuple[str, int]]:
    with database.begin(read_only=True) as session:
        found = session.execute(text(f"SELECT unit, done FROM {TABLE}"))
        return [(unit, done) for unit, done in found]


@pytest.mark.parametrize(("fault", "retried"), [("cut after", 0), ("cut before", 1)])
def test_a_lost_commit_is_resolved(
    through: Database, mysql_proxy: FaultProxy, direct: Database, fault: Fault, retried: int
) -> None:
    called: list[str] = []

    def work(session: Session) -> None:
        after_commit(session, called.append, "stored")
        add(session, "pear")

    mysql_proxy.aim(fault, b"COMMIT")
    through.run(work)
    assert mysql_proxy.hits == 1
    assert names(direct) == ["pear"]
    assert called == ["stored"]
    assert through.stats().retried == retried


@pytest.mark.parametrize(("fault", "retried"), [("cut after", 0), ("cut before", 1)])
@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
@pytest.mark.anyio
async def test_a_lost_commit_of_a_task_is_resolved(
    mysql_url: str,
    mysql_proxy: FaultProxy,
    direct: Database,
    driver: str,
    fault: Fault,
    retried: int,
) -> None:
    url = make_url(mysql_proxy.through(mysql_url)).set(drivername=f"mysql+{driver}")
    async with AsyncDatabase(url, outcome_table=TABLE) as database:
        async with database.begin() as session:
            await session.execute(text("SELECT 1"))
        mysql_proxy.aim(fault, b"COMMIT")
        await database.run(add, "pear")
        assert mysql_proxy.hits == 1
        assert database.stats().retried == retried
    assert names(direct) == ["pear"]


def test_a_question_whose_answer_is_lost_proves_nothing(
    through: Database, mysql_proxy: FaultProxy, direct: Database
) -> None:
    """The row that was put in the place of the missing one is not taken for it."""
    mysql_proxy.aim("cut before", b"COMMIT")
    mysql_proxy.aim("cut after", b"done = done")
    through.run(add, "pear")
    assert mysql_proxy.hits == 2
    assert names(direct) == ["pear"]
    assert through.stats().retried == 1


@pytest.mark.parametrize("fault", ["cut before", "cut after"])
def test_without_run_or_without_the_table_it_is_unknown(
    through: Database, mysql_url: str, mysql_proxy: FaultProxy, fault: Fault
) -> None:
    mysql_proxy.aim(fault, b"COMMIT")
    with pytest.raises(CommitUnknown), through.begin() as session:
        add(session, "pear")
    with Database(mysql_proxy.through(mysql_url)) as database:
        connect(database)
        mysql_proxy.aim(fault, b"COMMIT")
        with pytest.raises(CommitUnknown):
            database.run(add, "plum")


class Lost:
    """A session that has written its row, and whose COMMIT is not there yet."""

    def __init__(self, database: Database) -> None:
        self.engine = create_engine(database.engine.url)
        self.connection = self.engine.connect()
        self.marker: Marker = leave_marker(self.connection.connection, TABLE)

    def commit(self) -> None:
        self.connection.connection.commit()


@pytest.fixture
def lost(direct: Database) -> Iterator[Lost]:
    lost = Lost(direct)
    yield lost
    lost.connection.invalidate()
    lost.connection.close()
    lost.engine.dispose()


def test_a_session_that_may_still_commit_is_ended(direct: Database, lost: Lost) -> None:
    assert has_committed(lost.marker, direct.read_engine, sleep, None) is False
    with pytest.raises(direct.engine.dialect.loaded_dbapi.Error):
        lost.commit()
    assert rows(direct) == [(lost.marker.unit, 0)]


def test_a_session_of_another_server_is_not_ended(direct: Database, lost: Lost) -> None:
    """There, its number is another session's."""
    lost.marker.server = "elsewhere"
    assert has_committed(lost.marker, direct.read_engine, sleep, 1.5) is None
    lost.commit()
    assert has_committed(lost.marker, direct.read_engine, sleep, None) is True


def test_a_session_that_commits_meanwhile_is_waited_for(direct: Database, lost: Lost) -> None:
    told: list[bool | None] = []
    asking = threading.Thread(
        target=lambda: told.append(has_committed(lost.marker, direct.read_engine, sleep, None))
    )
    asking.start()
    waits = text(
        "SELECT COUNT(*) FROM information_schema.processlist "
        f"WHERE info LIKE '%{lost.marker.unit}%' AND id <> CONNECTION_ID()"
    )
    with direct.begin(read_only=True) as session:
        while not session.scalar(waits):
            pass
    lost.commit()
    asking.join(10)
    assert told == [True]


def test_what_was_said_to_be_missing_is_never_committed(direct: Database) -> None:
    """Not by a session that comes late, nor by a server that applies it later."""
    marker = Marker(f"`{TABLE}`", "0" * 32, "", 0)
    assert has_committed(marker, direct.read_engine, sleep, None) is False
    with pytest.raises(IntegrityError), direct.engine.begin() as connection:
        connection.execute(text(f"INSERT INTO {TABLE} (unit) VALUES ('{marker.unit}')"))
    assert has_committed(marker, direct.read_engine, sleep, None) is False


def test_a_connection_has_one_row_and_those_that_are_gone_none(direct: Database) -> None:
    for name in "abc":
        direct.run(add, name)
    direct.with_session(read_only=True)(lambda session: session.execute(text("SELECT 1")))()
    assert len(rows(direct)) == 1
    with direct.engine.begin() as connection:
        connection.execute(text(f"UPDATE {TABLE} SET at = NOW() - INTERVAL 25 HOUR"))
        connection.execute(text(f"INSERT INTO {TABLE} (unit) VALUES ('young')"))
    direct.dispose()
    direct.run(add, "d")
    assert [unit == "young" for unit, _ in rows(direct)].count(True) == 1
    assert len(rows(direct)) == 2
    with direct.engine.begin() as connection:
        connection.execute(text(f"DELETE FROM {TABLE}"))  # as by hand, of a connection in use
    direct.run(add, "e")
    assert len(rows(direct)) == 1
    assert sorted(names(direct)) == ["a", "b", "c", "d", "e"]


def test_a_table_that_is_missing_is_said_and_nothing_is_written(mysql: Database) -> None:
    with Database(mysql.engine.url, outcome_table="nowhere") as database:
        with pytest.raises(Exception, match=r"nowhere.* doesn't exist"):
            database.run(add, "pear")
        assert names(database) == []


@pytest.mark.parametrize(
    ("url", "table", "what"),
    [
        ("postgresql://u@h/d", TABLE, "is for MySQL and MariaDB"),
        ("sqlite://", TABLE, "is for MySQL and MariaDB"),
        ("mysql+pymysql://u@h/d", "a b", "is not a table's name"),
        ("mysql+pymysql://u@h/d", "a`; DROP TABLE b", "is not a table's name"),
    ],
)
def test_a_table_that_cannot_be_is_refused(url: str, table: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        Database(url, outcome_table=table)
