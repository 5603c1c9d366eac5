"""One PostgreSQL server for all processes of a run, which the first one starts."""

import subprocess
import sys
from pathlib import Path

from sqlalchemy import create_engine, make_url, text

from sessionscope.testing import shared_postgres

STARTS_AND_LEAVES_FIRST = """
import sys
from pathlib import Path
from sessionscope.testing import shared_postgres

with shared_postgres(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
print("leaving", flush=True)
"""


def ask(url: str) -> object:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT current_database()"))
    finally:
        engine.dispose()


def test_who_has_started_it_waits_for_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_AND_LEAVES_FIRST, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        its_url = first.stdout.readline().strip()
        with shared_postgres(tmp_path) as url:
            assert make_url(url).port == make_url(its_url).port
            assert make_url(url).database != make_url(its_url).database
            first.stdin.close()
            assert ask(url) == make_url(url).database
            assert first.poll() is None, "it waits, and its server with it"
            assert ask(url) == make_url(url).database
        assert first.stdout.readline() == "leaving\n"
        assert first.wait() == 0
    assert not (tmp_path / "postgres.url").exists(), "who comes later starts another one"


def test_the_template_is_filled_once_and_copied(tmp_path: Path) -> None:
    filled: list[str] = []

    def fill(url: str) -> None:
        filled.append(url)
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE pear (id INTEGER)"))
        engine.dispose()

    with shared_postgres(tmp_path, fill) as url, shared_postgres(tmp_path, fill) as other:
        for each in (url, other):
            engine = create_engine(each)
            with engine.begin() as connection:
                connection.execute(text("INSERT INTO pear VALUES (1)"))
                assert connection.scalar(text("SELECT count(*) FROM pear")) == 1
            engine.dispose()
    assert len(filled) == 1
