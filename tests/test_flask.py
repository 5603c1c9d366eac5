"""Flask: with_session on views, the answers of install(), and workers that are forked."""

import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import httpx2
import pytest
from flask import Blueprint, Flask, abort
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session

from sessionscope import Database
from sessionscope.exc import DatabaseUnavailable, PoolBusy
from sessionscope.integrations.flask import install
from tests.models import Item, Note, names

ROOT = Path(__file__).parent.parent


def test_a_view_commits_whatever_its_status_and_abort_rolls_back(database: Database) -> None:
    app = Flask("test")

    @app.post("/<name>")
    @database.with_session()
    def create(session: Session, name: str) -> tuple[str, int]:
        session.add(Item(name=name))
        session.flush()
        if name == "plum":
            abort(409)
        return name, 404

    client = app.test_client()
    assert client.post("/pear").status_code == 404
    assert client.post("/plum").status_code == 409
    assert names(database) == ["pear"]


def test_a_failed_commit_reaches_the_apps_own_handler(database: Database) -> None:
    app = Flask("test")

    @app.errorhandler(sa_exc.IntegrityError)
    def conflict(error: Exception) -> tuple[str, int]:
        return "conflict", 409

    @app.post("/")
    @database.with_session()
    def create(session: Session) -> str:
        session.add(Note(item_id=404))
        return "created"

    assert app.test_client().post("/").text == "conflict"


def failing(error: Exception) -> Flask:
    app = Flask("test")

    @app.get("/")
    def read() -> str:
        raise error

    return app


@pytest.mark.parametrize("error", [PoolBusy("busy"), DatabaseUnavailable("down")], ids=repr)
def test_refusals_are_503_also_beside_a_catch_all_handler(error: PoolBusy) -> None:
    app = failing(error)
    install(app)
    app.register_error_handler(Exception, lambda error: ("everything", 500))
    answer = app.test_client().get("/")
    assert answer.status_code == 503
    assert answer.json == {
        "detail": answer.get_json()["detail"],
        "code": error.error_code,
    }
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("cls", [PoolBusy, sa_exc.TimeoutError, sa_exc.SQLAlchemyError])
@pytest.mark.parametrize("first", [True, False])
def test_the_apps_own_handler_goes_before_ours(cls: type[Exception], first: bool) -> None:
    """Whether it is added before install() or after."""
    app = failing(PoolBusy("busy"))
    if not first:
        install(app)
    app.register_error_handler(cls, lambda error: ("mine", 429))
    if first:
        install(app)
    assert app.test_client().get("/").status_code == 429


def test_a_blueprints_handler_goes_before_the_apps() -> None:
    app, blueprint = Flask("test"), Blueprint("inner", "test")
    blueprint.register_error_handler(sa_exc.SQLAlchemyError, lambda error: ("inner", 429))

    @blueprint.get("/inner")
    def read() -> str:
        raise PoolBusy("busy")

    install(app)
    app.register_blueprint(blueprint)
    assert app.test_client().get("/inner").text == "inner"


FORKED = """
import os
from flask import Flask
from sqlalchemy import text
from sessionscope import Database

database = Database(os.environ["DATABASE_URL"])
app = Flask("forked")

@app.get("/")
@database.with_session()
def who(session):
    return {"backend": session.scalar(text("SELECT pg_backend_pid()")), "process": os.getpid()}
"""


def test_workers_that_gunicorn_forks_share_no_connection(postgres_url: str, tmp_path: Path) -> None:
    """Though with --preload all have the Database that was made before the fork."""
    (tmp_path / "forked.py").write_text(FORKED, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        port, bind = listening.getsockname()[1], f"fd://{listening.fileno()}"
        options = ["--preload", "-w", "3", "-k", "gthread", "--threads", "4", "--bind", bind]
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options, "--log-level", "warning", "forked:app"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
                "DATABASE_URL": postgres_url,
            },
            pass_fds=[listening.fileno()],
        )
    processes: dict[int, set[int]] = defaultdict(set)
    try:
        while len(set().union(*processes.values())) < 3:
            answer = httpx2.get(f"http://127.0.0.1:{port}/", timeout=60).json()
            processes[answer["backend"]].add(answer["process"])
    finally:
        server.terminate()
        server.wait(30)
    assert all(len(each) == 1 for each in processes.values())
