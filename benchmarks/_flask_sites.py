"""Flask applications, each set up as its library's documentation has it; served by waitress."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flask import Flask, Response, jsonify
from sqlalchemy.orm import Session

from benchmarks._bodies import DONE, Body, Kept, bodies, read, run, stream
from benchmarks._settings import ItemOut, Settings
from benchmarks._subject import Site

Scope = Callable[[], AbstractContextManager[Session]]


def sessionscope(settings: Settings) -> Site:
    """Serve our unit of work, opened in the view."""
    from sessionscope import Database

    database = Database(settings.url, pool_timeout=settings.pool_timeout, **settings.pool)
    return _site(_health_app(), settings, database.begin, commit=False)


def flask_sqlalchemy(settings: Settings) -> Site:
    """Serve Flask-SQLAlchemy's session of the application context, committed by the view."""
    from flask_sqlalchemy import SQLAlchemy

    app = _health_app()
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = settings.pool
    db = SQLAlchemy(app)
    # The session itself, not its proxy, so that it can be looked at when it has ended.
    return _site(app, settings, lambda: nullcontext(db.session()), commit=True)


def flask_sqlalchemy_lite(settings: Settings) -> Site:
    """Serve Flask-SQLAlchemy-Lite's session of the application context, committed by the view."""
    from flask_sqlalchemy_lite import SQLAlchemy

    app = _health_app()
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": settings.url, **settings.pool}}
    db = SQLAlchemy(app)
    return _site(app, settings, lambda: nullcontext(db.session), commit=True)


def _health_app() -> Flask:
    app = Flask("benchmarks")

    app.get("/health", endpoint="health")(lambda: DONE)
    return app


def _site(app: Flask, settings: Settings, scope: Scope, *, commit: bool) -> Site:
    kept = Kept()

    def add(body: Body) -> None:
        def view() -> Any:
            with scope() as session:
                result = run(body, session, commit=commit)
            return Response(stream()) if body.streams else _json(result)

        app.get(body.path, endpoint=body.path)(view)

    for body in bodies(settings.query_seconds, kept):
        add(body)

    app.get("/reads-kept", endpoint="reads-kept")(lambda: _json(read(kept.session)))
    return Site(app, "wsgi")


def _json(result: ItemOut | dict[str, str]) -> Any:
    return jsonify(result.model_dump() if isinstance(result, ItemOut) else result)
