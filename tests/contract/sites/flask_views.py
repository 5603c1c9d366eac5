"""Flask with with_session on its views."""

from flask import Flask, Response
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope.integrations.flask import install
from tests.contract.bodies import BODIES, Body, Conflict, Databases, Kept


def build(databases: Databases, kept: Kept) -> Flask:
    app = Flask("contract")
    install(app)

    @app.errorhandler(Conflict)
    def answer(error: Exception) -> tuple[str, int]:
        return "conflict", 409

    for body in BODIES:
        add(app, body, databases, kept)

    @app.get("/stream/<name>")
    @databases["main"].with_session()
    def stream(session: Session, name: str) -> Response:
        session.execute(text("SELECT 1"))
        return Response(kept.rows(lambda: session.execute(text("SELECT 1"))))

    @app.get("/hooked/<name>")
    def hooked(name: str) -> str:
        return str(name in kept.hooked).lower()

    @app.get("/release/<name>")
    def release(name: str) -> str:
        return kept.release()

    return app


def add(app: Flask, body: Body, databases: Databases, kept: Kept) -> None:
    @databases[body.on].with_session(read_only=body.read_only)
    def view(session: Session, name: str) -> str:
        return body.do(session, name, kept)

    app.add_url_rule(f"/{body.path}/<name>", endpoint=body.path, view_func=view)
