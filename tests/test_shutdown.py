"""SIGTERM and fork under real servers: no acknowledged write is lost, and nothing hangs."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import httpx2
import pytest
from sqlalchemy import text

from sessionscope import Database
from tests.models import create_tables, names

ROOT = Path(__file__).parent.parent
WRITERS, ENOUGH, QUESTIONS = 8, 40, 300
PATIENCE = 30.0

FASTAPI_DEF = """
import os
from typing import Annotated
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.orm import Session
from sessionscope import Database
from sessionscope.integrations.fastapi import install, session_per_request
from tests.models import Item

database = Database(os.environ["DATABASE_URL"])
app = FastAPI()
install(app, database)

@app.post("/{name}")
def add(name: str, session: Annotated[Session, session_per_request(database)]) -> str:
    session.add(Item(name=name))
    session.flush()
    session.execute(text(f"SELECT pg_sleep({2.0 if name == 'slow' else 0.02})"))
    return name

@app.get("/{number}")
def ask(number: int, session: Annotated[Session, session_per_request(database)]) -> list[int]:
    query = text(f"SELECT {number}, pg_backend_pid()")
    return [*session.execute(query).one(), os.getpid()]
"""

FASTAPI_ASYNC = (
    FASTAPI_DEF.replace("def ", "async def ")
    .replace("Session, s", "AsyncSession, s")
    .replace("import Session", "import Session\nfrom sqlalchemy.ext.asyncio import AsyncSession")
    .replace("Database", "AsyncDatabase")
    .replace("session.flush", "await session.flush")
    .replace("    session.execute", "    await session.execute")
    .replace("session.execute(query).one()", "(await session.execute(query)).one()")
)

FLASK = """
import os
from flask import Flask
from sqlalchemy import text
from sessionscope import Database
from tests.models import Item

database = Database(os.environ["DATABASE_URL"])
app = Flask("test")

@app.post("/<name>")
@database.with_session()
def add(session, name):
    session.add(Item(name=name))
    session.flush()
    session.execute(text(f"SELECT pg_sleep({2.0 if name == 'slow' else 0.02})"))
    return name

@app.get("/<int:number>")
@database.with_session()
def ask(session, number):
    return [*session.execute(text(f"SELECT {number}, pg_backend_pid()")).one(), os.getpid()]
"""

# Before the workers are forked, connections of both engines are opened.
USED = """
for each in ({"read_only": False}, {"read_only": True}):
    with database.begin(**each) as session:
        session.execute(text("SELECT 1"))
"""
USED_ASYNC = """
import asyncio
async def use():
    for each in ({"read_only": False}, {"read_only": True}):
        async with database.begin(**each) as session:
            await session.execute(text("SELECT 1"))
asyncio.run(use())
"""

UVICORN = ["uvicorn", "--log-level", "error"]
GUNICORN = ["gunicorn", "--log-level", "error", "--workers", "2"]
THREADS = ["-k", "gthread", "--threads", "8"]
ON_UVICORN = ["-k", "uvicorn.workers.UvicornWorker"]

by_server = pytest.mark.parametrize(
    ("server", "app"),
    [
        pytest.param(UVICORN, FASTAPI_DEF, id="uvicorn, def"),
        pytest.param(UVICORN, FASTAPI_ASYNC, id="uvicorn, async def"),
        pytest.param([*GUNICORN, *THREADS], FLASK, id="gunicorn, Flask"),
        pytest.param([*GUNICORN, *ON_UVICORN], FASTAPI_DEF, id="gunicorn, def"),
        pytest.param([*GUNICORN, *ON_UVICORN], FASTAPI_ASYNC, id="gunicorn, async def"),
    ],
)


@contextmanager
def serving(
    command: list[str], app: str, url: str, folder: Path
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run a server; yield its address and its process."""
    (folder / "served.py").write_text(app, encoding="utf-8")
    if "AsyncDatabase" in app:
        url = url.replace("+psycopg:", "+asyncpg:")
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        number = listening.fileno()
        bind = ["--fd", str(number)] if command[0] == "uvicorn" else ["--bind", f"fd://{number}"]
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *bind, "served:app"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "DATABASE_URL": url},
            pass_fds=[number],
        )
        address = "http://127.0.0.1:{1}".format(*listening.getsockname())
    try:
        httpx2.get(f"{address}/1", timeout=60).raise_for_status()
        yield address, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def stock(postgres_url: str) -> Iterator[Database]:
    with Database(postgres_url) as database:
        yield create_tables(database)


@by_server
def test_what_was_acknowledged_before_sigterm_is_stored(
    stock: Database, postgres_url: str, tmp_path: Path, server: list[str], app: str
) -> None:
    """And who was being served is served to the end."""
    acknowledged: list[str] = []
    enough = threading.Event()
    with serving(server, app, postgres_url, tmp_path) as (address, process):

        def post(client: httpx2.Client, name: str) -> None:
            client.post(f"{address}/{name}").raise_for_status()
            acknowledged.append(name)

        def write(writer: int) -> None:
            number = 0
            with httpx2.Client(timeout=PATIENCE) as client:
                while True:
                    try:
                        post(client, f"{writer}-{number}")
                    except httpx2.HTTPError:  # refused, or cut off: it was not acknowledged
                        return
                    number += 1
                    if len(acknowledged) >= ENOUGH:
                        enough.set()

        def wait_long() -> None:
            with httpx2.Client(timeout=PATIENCE) as client:
                post(client, "slow")

        slow = threading.Thread(target=wait_long)
        threads = [slow, *(threading.Thread(target=write, args=(n,)) for n in range(WRITERS))]
        for thread in threads:
            thread.start()
        assert enough.wait(PATIENCE)
        until_it_sleeps(stock)
        process.send_signal(signal.SIGTERM)
        signalled = monotonic()
        process.wait(PATIENCE)
        assert monotonic() - signalled < PATIENCE / 2
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert "slow" in acknowledged
    stored = names(stock)
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))


def until_it_sleeps(stock: Database) -> None:
    """Wait until the server is at work on the slow request."""
    sleeps = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(2%'")
    with stock.begin(read_only=True) as session:
        while session.scalars(sleeps).one() < 2:  # its own query is like that, too
            pass


@pytest.mark.parametrize(
    ("server", "app"),
    [
        pytest.param([*GUNICORN, *THREADS], FLASK + USED, id="Flask"),
        pytest.param([*GUNICORN, *ON_UVICORN], FASTAPI_DEF + USED, id="def"),
        pytest.param([*GUNICORN, *ON_UVICORN], FASTAPI_ASYNC + USED_ASYNC, id="async def"),
    ],
)
def test_workers_that_were_forked_after_the_engines_were_used(
    postgres_url: str, tmp_path: Path, server: list[str], app: str
) -> None:
    """`--preload`: no answer is another worker's, and no connection is shared."""
    answers: list[tuple[int, list[int]]] = []
    with serving([*server, "--preload"], app, postgres_url, tmp_path) as (address, process):

        def ask(asker: int) -> None:
            # Without keep-alive, any worker may answer.
            once = httpx2.Limits(max_keepalive_connections=0)
            with httpx2.Client(timeout=PATIENCE, limits=once) as client:
                numbers = range(asker, QUESTIONS, WRITERS)
                answers.extend((n, client.get(f"{address}/{n}").json()) for n in numbers)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        process.terminate()
        process.wait(PATIENCE)
    assert len(answers) == QUESTIONS
    assert [number for number, answer in answers if answer[0] != number] == []
    workers: dict[int, set[int]] = defaultdict(set)
    for _, (_, backend, worker) in answers:
        workers[backend].add(worker)
    assert len(set.union(*workers.values())) > 1
    assert [backend for backend, sharing in workers.items() if len(sharing) > 1] == []
