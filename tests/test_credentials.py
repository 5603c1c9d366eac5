"""Passwords that change while the application runs."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError, DatabaseUnavailable
from sessionscope.testing import PostgresServer
from tests.conftest import missing
from tests.replication import ask, until


class Login:
    """A user of the server whose password is changed."""

    def __init__(self, server: Engine) -> None:
        self.server = server
        self.asked = 0
        self.change("first")

    def change(self, password: str, *, told: bool = True) -> None:
        with self.server.connect() as connection:
            connection.execute(text(f"ALTER USER app IDENTIFIED BY '{password}'"))
        self.server_has = password
        if told:
            self.password = password

    def __call__(self) -> tuple[str, str]:
        self.asked += 1
        return "app", self.password


@pytest.fixture
def login(mysql_url: str) -> Iterator[Login]:
    """MariaDB checks passwords, where the tests' PostgreSQL trusts everyone."""
    server = create_engine(mysql_url, isolation_level="AUTOCOMMIT")
    name = make_url(mysql_url).database
    with server.connect() as connection:
        connection.execute(text("CREATE OR REPLACE USER app"))
        connection.execute(text(f"GRANT ALL ON {name}.* TO app"))
    yield Login(server)
    with server.connect() as connection:
        connection.execute(text("DROP USER app"))
    server.dispose()


def user(database: Database) -> str:
    with database.begin(read_only=True) as session:
        return str(session.scalar(text("SELECT CURRENT_USER()")))


def test_each_new_connection_asks_again(mysql_url: str, login: Login) -> None:
    with Database(mysql_url, credentials=login) as database:
        assert user(database).startswith("app@")
        login.change("second")
        assert user(database).startswith("app@")
        assert login.asked == 1
        database.dispose()
        assert user(database).startswith("app@")
        assert login.asked == 2


def test_a_change_just_then_is_no_error(mysql_url: str, login: Login) -> None:
    """The server has the new password, and who asks first still gets the old one."""
    login.change("second", told=False)

    def ask() -> tuple[str, str]:
        told = login()
        login.password = login.server_has
        return told

    with Database(mysql_url, credentials=ask) as database:
        assert user(database).startswith("app@")
        assert login.asked == 2


def test_a_wrong_password_is_said_and_never_shown(mysql_url: str, login: Login) -> None:
    login.password = "hunter2"
    with Database(mysql_url, credentials=login) as database:
        with pytest.raises(DatabaseUnavailable, match="Check the user") as error:
            user(database)
        assert "hunter2" not in f"{error.value!r} {error.value} {database!r}"


@pytest.mark.anyio
async def test_they_may_be_asked_for_asynchronously(mysql_url: str, login: Login) -> None:
    async def ask() -> tuple[str, str]:
        return login()

    url = mysql_url.replace("pymysql", "asyncmy")
    async with AsyncDatabase(url, credentials=ask) as database:
        async with database.begin(read_only=True) as session:
            assert str(await session.scalar(text("SELECT CURRENT_USER()"))).startswith("app@")


def test_what_is_no_login_is_refused(mysql_url: str) -> None:
    with pytest.raises(ConfigurationError, match="belongs into the URL"):
        Database(mysql_url, credentials="hunter2")  # type: ignore[arg-type]  # that is the test
    with (
        Database(mysql_url, credentials=lambda: 3) as database,  # type: ignore[arg-type, return-value]  # likewise
        pytest.raises(ConfigurationError, match="returned a int"),
    ):
        database.ping()


def test_only_a_refused_login_is_tried_again(mysql_url: str, login: Login) -> None:
    """Whatever else is wrong would only be wrong twice."""
    with (
        Database(make_url(mysql_url).set(database="nowhere"), credentials=login) as database,
        pytest.raises(DatabaseUnavailable, match="nowhere"),
    ):
        user(database)
    assert login.asked == 1


def test_listeners_of_your_own_are_called_as_well(mysql_url: str, login: Login) -> None:
    seen: list[bool] = []
    with Database(mysql_url, credentials=login) as database:

        @event.listens_for(database.read_engine, "do_connect")
        def connecting(dialect: object, record: object, args: object, kwargs: object) -> None:
            seen.append(True)

        assert user(database).startswith("app@")
    assert seen == [True]


@pytest.fixture
def strict_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server that wants a password of its user app."""
    try:
        server = PostgresServer()
    except ModuleNotFoundError as error:
        missing(str(error))
    with server:
        assert server._home is not None
        rules = "host all app 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
        (server._home.data / "pg_hba.conf").write_text(rules)
        ask(server, "CREATE USER app PASSWORD 'second'")
        ask(server, "SELECT pg_reload_conf()")
        until(server, "SELECT count(*) = 2 FROM pg_hba_file_rules")
        yield server


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
@pytest.mark.anyio
async def test_a_change_just_then_is_no_error_on_postgresql(
    strict_server: PostgresServer, driver: str
) -> None:
    """libpq has no code for a refused login."""
    passwords = iter(["first", "second"])
    asked = 0

    def tell() -> tuple[str, str]:
        nonlocal asked
        asked += 1
        return "app", next(passwords)

    url = make_url(strict_server.url()).set(drivername=f"postgresql+{driver}")
    who = text("SELECT current_user")
    if driver == "asyncpg":
        async with AsyncDatabase(url, credentials=tell) as database:
            assert await database.run(lambda session: session.scalar(who)) == "app"
    else:
        with Database(url, credentials=tell) as sync:
            assert sync.run(lambda session: session.scalar(who)) == "app"
    assert asked == 2


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("old", ["retired", "nobody"])
def test_a_user_that_is_gone_is_asked_for_again(
    strict_server: PostgresServer, driver: str, old: str
) -> None:
    ask(strict_server, "CREATE ROLE retired NOLOGIN")
    users = iter([(old, ""), ("app", "second")])
    url = make_url(strict_server.url()).set(drivername=f"postgresql+{driver}")
    with Database(url, credentials=lambda: next(users)) as database:
        assert database.run(lambda session: session.scalar(text("SELECT current_user"))) == "app"


@pytest.mark.parametrize(
    ("url", "options", "what"),
    [
        ("sqlite://", {}, "SQLite knows no users"),
        ("postgresql://u@h/d", {"creator": print}, "engine_options has 'creator'"),
    ],
)
def test_credentials_that_no_one_would_ask_for_are_refused(
    url: str, options: dict[str, object], what: str
) -> None:
    with pytest.raises(ConfigurationError, match=what):
        Database(url, credentials=str, engine_options=options)
