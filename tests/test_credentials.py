"""Passwords that change while the application runs."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError, DatabaseUnavailable


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
