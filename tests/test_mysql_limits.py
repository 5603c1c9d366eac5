"""MySQL and MariaDB are told, with each statement, how long a unit of work may still take."""

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy import exc as sa_exc

from sessionscope import Database
from sessionscope._mysql import limited
from sessionscope.exc import ReadOnlyUnit
from sessionscope.testing import sandbox
from tests.models import Item, create_tables, names

LIMIT = text("SELECT @@max_statement_time")


def test_the_server_is_told(mysql: Database) -> None:
    with mysql.begin(timeout=30) as session:
        limit = session.scalar(LIMIT)
        assert limit is not None
        assert 0 < limit <= 30.05
    with mysql.begin() as session:
        assert session.scalar(LIMIT) == 0


@pytest.mark.parametrize(("own", "expected"), [(0.2, 0.2), (3600, 30)])
def test_a_smaller_limit_of_the_connections_own_stays(
    mysql_url: str, own: float, expected: float
) -> None:
    options = {"connect_args": {"init_command": f"SET max_statement_time = {own}"}}
    with Database(mysql_url, engine_options=options) as database:
        with database.begin(timeout=30) as session:
            assert session.scalar(LIMIT) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT\n@@max_statement_time",
        "select\t@@max_statement_time",
        "/* a comment */ SELECT @@max_statement_time",
        "-- a comment\n SELECT @@max_statement_time",
        "# a comment\nSELECT/**/@@max_statement_time",
    ],
)
def test_it_is_told_however_the_statement_is_written(mysql: Database, statement: str) -> None:
    with mysql.begin(timeout=30) as session:
        limit = session.connection().exec_driver_sql(statement).scalar()
        # Only statements of the session's own methods know of the deadline on MySQL.
        assert limit == 0
        limit = session.scalar(text(statement))
        assert limit is not None
        assert 0 < limit <= 30.05


def statements_of(database: Database) -> list[str]:
    sent: list[str] = []

    @event.listens_for(database.engine, "connect")
    def connected(dbapi_connection: object, record: object) -> None:
        query = dbapi_connection.query  # type: ignore[attr-defined]

        def note(sql: bytes | str, *args: object, **kwargs: object) -> object:
            sent.append(sql if isinstance(sql, str) else sql.decode())
            return query(sql, *args, **kwargs)

        dbapi_connection.query = note  # type: ignore[attr-defined]

    database.dispose()
    return sent


def test_many_rows_are_still_one_insert(mysql: Database) -> None:
    """The driver makes one statement of them only if it begins with INSERT."""
    sent = statements_of(mysql)
    with mysql.begin(timeout=30) as session:
        rows = [{"id": number, "name": f"pear {number}"} for number in range(1, 51)]
        session.execute(text("INSERT INTO item (id, name) VALUES (:id, :name)"), rows)
        session.execute(
            text("UPDATE item SET name = :name WHERE id = :id"),
            [{"id": 1, "name": "plum"}, {"id": 2, "name": "fig"}],
        )
    assert sum("INSERT" in each for each in sent) == 1
    updates = [each for each in sent if "UPDATE" in each]
    assert [each.startswith("SET STATEMENT max_statement_time=") for each in updates] == [True] * 2


def test_a_read_only_unit_with_a_deadline_refuses_writes(mysql: Database) -> None:
    with pytest.raises(ReadOnlyUnit), mysql.begin(read_only=True, timeout=30) as session:
        session.execute(update(Item).values(name="plum"))


def test_a_sandbox_sees_the_statements_of_a_unit_with_a_deadline(mysql: Database) -> None:
    with sandbox(mysql):
        with mysql.begin(timeout=30) as session:
            session.add(Item(name="pear"))
        with pytest.raises(sa_exc.IntegrityError), mysql.begin(timeout=30) as session:
            session.add(Item(name="plum"))
            session.flush()
            session.execute(text("INSERT INTO item SELECT * FROM item LIMIT 1"))
        assert names(mysql) == ["pear"]
    assert names(mysql) == []


@pytest.mark.parametrize(
    ("statement", "sent"),
    [
        ("SELECT 1", "SELECT /*+ MAX_EXECUTION_TIME(5000) */ 1"),
        ("SELECT\n  a FROM t", "SELECT /*+ MAX_EXECUTION_TIME(5000) */\n  a FROM t"),
        (
            "SELECT /*+ NO_INDEX_MERGE(t) */ a FROM t",
            "SELECT /*+ MAX_EXECUTION_TIME(5000) NO_INDEX_MERGE(t) */ a FROM t",
        ),
        ("SELECT /*+ max_execution_time(9) */ 1", "SELECT /*+ max_execution_time(9) */ 1"),
        ("/* a */ SELECT 1", "/* a */ SELECT /*+ MAX_EXECUTION_TIME(5000) */ 1"),
        ("/*!80000 SET x=1 */", "/*!80000 SET x=1 */"),
        ("UPDATE t SET a = 1", "UPDATE t SET a = 1"),
        ("SELECTED", "SELECTED"),
    ],
)
def test_mysqls_hint_joins_those_of_the_statement(statement: str, sent: str) -> None:
    """MySQL heeds the first comment with hints alone."""
    assert limited(statement, 5.0, is_mariadb=False) == sent


@pytest.mark.parametrize(("own", "is_told"), [(0, True), (4000, False), (6000, True)])
def test_mysqls_hint_raises_no_limit_of_the_connections_own(own: int, is_told: bool) -> None:
    assert ("MAX" in limited("SELECT 1", 5.0, is_mariadb=False, own=own)) is is_told


def test_create_tables_with_a_deadline(mysql_url: str) -> None:
    """DDL carries no limit, and is executed all the same."""
    with Database(mysql_url, timeout=30) as database:
        create_tables(database)
        with database.begin() as session:
            assert session.scalars(select(Item)).all() == []
