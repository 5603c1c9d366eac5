"""The worker and the command line: the same functions, other units of work."""

from importlib import import_module

import pytest
from fastapi.testclient import TestClient

from shop.tests.conftest import Run, Shop


def test_web_command_line_and_worker_share_one_shop(
    client: TestClient, shop: Shop, run: Run
) -> None:
    """The command line sells the last kettles, the worker brings new ones, the web shows them."""
    env = {"DATABASE_URL": shop.url}
    assert run("cli", "order", "1", "4", "3", env=env).stdout == "order 1: 147.00\n"
    assert client.get("/orders/1").json()["total"] == 14700
    assert run("worker", env=env).stdout.splitlines() == [
        "restocked Kettle: 10",
        "restocked Cake stand: 10",
        "sold today: 147.00",
    ]
    assert client.get("/items/").json()[3]["stock"] == 10


def test_the_command_line_lists_and_restocks(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command prints its answer when it is committed."""
    cli = import_module("shop.cli")
    for line, answer in [
        ("users", "Ada <ada@example.org>"),
        ("restock 4 5", "Kettle: 8 left"),
        ("items", "8 left"),
    ]:
        cli.main(line.split())
        assert answer in capsys.readouterr().out


def test_a_refused_command_is_one_line_and_exit_code_1(shop: Shop, run: Run) -> None:
    """Nothing is sold, nothing is printed to stdout."""
    result = run("cli", "order", "1", "4", "4", env={"DATABASE_URL": shop.url})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "shop: Kettle: 4 wanted, 3 left\n"


@pytest.mark.parametrize("text", ["0", "-1", "1000001", "2.5", "two", "²"])
def test_a_quantity_that_is_no_number_is_a_usage_error(
    shop: Shop, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """As argparse has it: exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        import_module("shop.cli").main(["restock", "4", "--", text])
    assert f"{text!r} is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["cli", "items"], ["worker"]])
def test_a_shop_without_tables_says_how_to_make_them(
    url: str, run: Run, command: list[str]
) -> None:
    """The driver's reason, in one line."""
    result = run(*command, env={"DATABASE_URL": url})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "items" in result.stderr
    assert "python -m shop.demo" in result.stderr


NOBODY = "postgresql+psycopg://shop:secret@127.0.0.1:1/shop"


@pytest.mark.parametrize(
    ("command", "url", "mend"),
    [
        (["cli", "items"], "postgres://shop:secret@127.0.0.1/shop", "write 'postgresql://'"),
        (["cli", "items"], NOBODY, "Is the server running"),
        (["worker"], NOBODY, "Is the server running"),
        (["demo"], "no url but a secret", "write postgresql+psycopg://"),
        (["demo"], NOBODY, "Is the server running"),
        (["demo"], "sqlite:////no/such/folder/shop.db", "Check that the folder exists"),
    ],
)
def test_a_bad_database_url_is_one_line_without_the_password(
    run: Run, command: list[str], url: str, mend: str
) -> None:
    """Malformed or unreachable, from whatever command: no traceback, exit code 1."""
    result = run(*command, env={"DATABASE_URL": url, "PORT": "0"})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("shop: ")
    assert result.stderr.count("\n") == 1
    assert mend in result.stderr
    assert "secret" not in result.stderr
