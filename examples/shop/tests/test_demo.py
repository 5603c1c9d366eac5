"""What ``make demo`` runs."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from sqlalchemy import func, select

from sessionscope import Database
from shop.models import Item, User
from shop.seed import create_and_fill
from shop.tests.conftest import Run, Shop


@pytest.fixture
def demo(url: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process of its own, on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shop.demo"],
        env={**environment, "DATABASE_URL": url, "PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_three_lines_work_when_pasted_and_ctrl_c_ends_it(demo: subprocess.Popen[str]) -> None:
    """A reader, an order, and a clean end."""
    assert demo.stdout is not None
    shown = [demo.stdout.readline() for _ in range(5)]
    assert re.match(r"The shop is open: http://127.0.0.1:\d+/  \((SQLite|PostgreSQL) \d", shown[0])
    answers = [
        subprocess.run(line.strip(), shell=True, capture_output=True, text=True, check=True).stdout
        for line in shown[2:]
    ]
    assert '"name":"Teapot"' in answers[0]
    assert '"name":"Ada"' in answers[1]
    assert '"total":4900' in answers[2]
    demo.send_signal(signal.SIGINT)
    out, err = demo.communicate(timeout=30)
    assert (demo.returncode, out) == (0, "\nThe shop is closed.\n")
    assert err == "INFO:     order 1 is committed: tell the customer\n"


def test_a_second_demo_finds_the_shelves_as_they_are(shop: Shop) -> None:
    """Seeding again adds nothing and resets nothing."""
    with shop.database.begin() as session:
        session.get_one(Item, 1).stock = 7
    create_and_fill(shop.database)
    with shop.database.begin(read_only=True) as session:
        assert session.scalar(select(func.count(User.id))) == 3
        assert session.scalars(select(Item.stock).order_by(Item.id)).all() == [7, 2000, 120, 3, 0]


def test_demos_that_start_at_once_fill_the_shelves_once(
    url: str, environment: dict[str, str]
) -> None:
    """Each in a process of its own, as it is: Alembic serves one thread of a process."""
    start = (
        "from sessionscope import Database; from shop.seed import create_and_fill; "
        f"database = Database({url!r}); print(flush=True); input(); create_and_fill(database)"
    )
    demos = [
        subprocess.Popen(
            [sys.executable, "-c", start],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for demo in demos:
        assert demo.stdout is not None
        demo.stdout.readline()
    for demo in demos:
        assert demo.stdin is not None
        demo.stdin.write("\n")
        demo.stdin.flush()
    for demo in demos:
        demo.communicate()
    assert [demo.returncode for demo in demos] == [0] * 4
    with Database(url) as database, database.begin(read_only=True) as session:
        assert session.scalar(select(func.count(User.id))) == 3


def test_an_occupied_port_is_one_line_and_nothing_is_half_started(run: Run, tmp_path: Path) -> None:
    """The port is taken before the database file is touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(
            "demo", env={"PORT": str(port), "DATABASE_URL": f"sqlite:///{tmp_path / 'shop.db'}"}
        )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert f"port {port} cannot be used" in result.stderr
    assert re.search(r"PORT=\d+ make demo", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", ["http", "-1", "65536", "80.5", "²"])
def test_a_port_that_is_no_port_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    """With an example of how to write it."""
    monkeypatch.setenv("PORT", port)
    with pytest.raises(SystemExit, match=f"PORT='{port}' is no port number: write PORT=8001"):
        import_module("shop.demo").port_wanted()


def test_without_a_port_it_is_8000(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not set, or set to nothing."""
    demo = import_module("shop.demo")
    monkeypatch.setenv("PORT", "")
    assert demo.port_wanted() == 8000
    monkeypatch.delenv("PORT")
    assert demo.port_wanted() == 8000
