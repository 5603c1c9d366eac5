"""``sessionscope doctor``: what it sees, on which databases, and what it says of bad input."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sessionscope._cli import main
from sessionscope.doctor._pool import Load, Room, connections, waiting
from sessionscope.doctor._queue import simulate
from sessionscope.doctor._versions import server_version

# The sync and the async drivers of each kind of database.
KINDS = ("sqlite", "aiosqlite", "psycopg", "asyncpg", "pymysql", "asyncmy")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module of the user's, in the working folder, that no test shares."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # it is taken away again
    return re.sub(r"\W", "_", f"database_{tmp_path.parent.name}_{tmp_path.name}")


def write(name: str, source: str) -> None:
    Path(f"{name}.py").write_text(source, encoding="utf-8")


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    if "sqlite" in kind:
        return "sqlite:///shop.db" if kind == "sqlite" else "sqlite+aiosqlite:///shop.db"
    if kind in ("psycopg", "asyncpg"):
        url = str(request.getfixturevalue("postgres_url"))
    else:
        url = str(request.getfixturevalue("mysql_url"))
    return f"{url.partition('://')[0].partition('+')[0]}+{kind}://{url.partition('://')[2]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_database_is_told_line_by_line(
    kind: str, module: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    is_async = kind in ("aiosqlite", "asyncpg", "asyncmy")
    face = "AsyncDatabase" if is_async else "Database"
    write(
        module,
        f"from sessionscope import {face}\ndatabase = {face}({url_of(kind, request)!r})\n",
    )
    main(["doctor", f"{module}:database", "--format", "json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    lines = {line["name"]: line for line in told["lines"]}
    assert (
        f"over {kind.replace('sqlite', 'pysqlite', 1) if kind == 'sqlite' else kind}"
        in (lines["server"]["seen"])
    )
    assert "ms per round trip" in lines["server"]["seen"]
    assert {"server", "version", "packages"} <= set(lines)
    if "sqlite" in kind:
        assert lines["pragmas"]["level"] == "ok"
    else:
        assert {"role", "isolation", "clock", "encryption", "connections"} <= set(lines)
        assert lines["role"]["level"] == lines["clock"]["level"] == "ok"


def test_too_many_connections_are_an_error_with_the_number_that_fits(
    module: str, postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(module, f"from sessionscope import Database\ndb = Database({postgres_url!r})\n")
    assert main(["doctor", f"{module}:db", "--processes", "1000"]) == 1
    (told,) = (line for line in capsys.readouterr().out.splitlines() if " connections " in line)
    assert told.startswith("bad")
    assert "1000 processes x (15 + 1 in reserve) = 16000" in told
    assert "raise max_connections" in told


@pytest.mark.parametrize(
    ("target", "source", "told"),
    [
        ("nothing", None, "write module:attribute"),
        ("{module}:database", None, "cannot be imported (ModuleNotFoundError"),
        (
            "{module}:nothing",
            "from sessionscope import Database\ndb = Database('sqlite://')\n",
            "it has db",
        ),
        ("{module}:name", "name = 1\n", "is a int, not a Database: it has no Database at all"),
        (
            "{module}:name",
            "import no_such_package\n",
            "No module named 'no_such_package'): mend what fails in it",
        ),
        ("{module}:name", "raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
        ("no_such_module:name", None, "write module:attribute of your Database"),
        (
            "{module}:db",
            "from sessionscope import Database\ndb = Database('postgres://h/d')\n",
            "write 'postgresql://'",
        ),
        (
            "{module}:db",
            "from sessionscope import Database as D\ndb = D('postgresql://u:secret@127.0.0.1:1/d')\n",
            "Is the server running",
        ),
    ],
)
def test_bad_input_is_one_line_with_the_mend(
    target: str,
    source: str | None,
    told: str,
    module: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if source is not None:
        write(module, source)
    assert main(["doctor", target.format(module=module)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("sessionscope: ")
    assert told in err
    assert "secret" not in err


@pytest.mark.parametrize("options", [["--processes", "0"], ["--rate", "-1"], ["--hold", "no"]])
def test_numbers_that_make_no_sense_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "database:database", *options])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("server", "version", "is_bad"),
    [
        ("sqlite", "3.51.2", True),
        ("sqlite", "3.51.3", False),
        ("sqlite", "3.50.7", False),
        ("sqlite", "3.50.6", True),
        ("sqlite", "3.53.0", False),
        ("postgresql", "14.3 (Debian)", True),
        ("postgresql", "14.20", False),
        ("postgresql", "12.9", True),
        ("postgresql", "18beta1", False),
        ("mariadb", "11.8.3-MariaDB", False),
    ],
)
def test_versions_that_are_known_to_be_bad(server: str, version: str, is_bad: bool) -> None:
    assert (server_version(server, version).level == "note") is is_bad


def test_the_simulation_agrees_with_the_formula_where_there_is_one() -> None:
    """One slot, constant holds: the Pollaczek-Khinchine formula, rho * hold / (2 * (1 - rho))."""
    for rho in (0.5, 0.8):
        waits = simulate(1, rho / 0.02, [0.02], timeout=60.0)
        assert waits.mean == pytest.approx(rho * 0.02 / (2 * (1 - rho)), rel=0.05)
        assert waits.busy == pytest.approx(rho, rel=0.02)
        assert waits.refused == 0.0


def test_more_units_than_slots_can_serve_are_refused_after_the_timeout() -> None:
    waits = simulate(5, 500.0, [0.02], timeout=1.0)
    assert waits.refused == pytest.approx(0.5, abs=0.02)
    assert waits.busy == pytest.approx(1.0, abs=0.01)
    assert 0.9 < waits.mean <= 1.0


def test_waiting_is_told_for_the_load_of_one_process() -> None:
    load = Load(processes=4, rate=880.0, holds=[0.02])
    (line,) = waiting(5, load, 5.0)
    assert line.level == "note"  # 80 % busy is the most that leaves room
    assert "at 220 units/s in each process, 20 ms each, 5 slots are 88% busy" in line.seen
    assert "6 slots would be 80% busy at most" in line.mend
    assert list(waiting(5, Load(4, None, [0.02]), 5.0)) == []


def test_a_pool_without_a_limit_is_an_error() -> None:
    line = connections(None, Load(1, None, [0.02]), Room(100, 3))
    assert line.level == "bad"
    assert "pool_size above 0" in line.mend
