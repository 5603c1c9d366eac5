"""The ways to open a session that are compared, each an adapter of a few lines.

To add a peer, write a function that takes a URL and engine options, returns a `Peer`, and
list it in `PEERS`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

Unit = Callable[[], AbstractContextManager[Session]]


@dataclass(frozen=True)
class Peer:
    """One way to open sessions."""

    unit: Unit
    read: Unit
    commits: bool
    """Whether *unit* commits by itself; otherwise the code inside calls `session.commit()`."""
    dispose: Callable[[], None]


def seed(url: str, **pool: Any) -> Peer:
    """Return `get_db` as tutorials have it, over an engine with `pool_pre_ping`."""
    engine = create_engine(url, pool_pre_ping=True, **pool)
    session_local = sessionmaker(autoflush=False, bind=engine)

    @contextmanager
    def get_db() -> Iterator[Session]:
        db = session_local()
        try:
            yield db
        finally:
            db.close()

    return Peer(get_db, get_db, commits=False, dispose=engine.dispose)


def bare(url: str, **pool: Any) -> Peer:
    """Return `with Session()` and nothing else."""
    engine = create_engine(url, **pool)
    factory = sessionmaker(engine)
    return Peer(factory, factory, commits=False, dispose=engine.dispose)


def sessionmaker_begin(url: str, **pool: Any) -> Peer:
    """Return `with sessionmaker.begin()`, without a ping."""
    engine = create_engine(url, **pool)
    begin = sessionmaker(engine).begin
    return Peer(begin, begin, commits=True, dispose=engine.dispose)


def pinging_begin(url: str, **pool: Any) -> Peer:
    """Return `with sessionmaker.begin()` over an engine with `pool_pre_ping`."""
    return sessionmaker_begin(url, pool_pre_ping=True, **pool)


def sessionscope(url: str, **pool: Any) -> Peer:
    """Return ours."""
    # Not at the top: what this import installs must not run in the processes of the others.
    from sessionscope import Database

    database = Database(url, **pool)
    return Peer(
        database.begin,
        lambda: database.begin(read_only=True),
        commits=True,
        dispose=database.dispose,
    )


def advanced_alchemy(url: str, **pool: Any) -> Peer:
    """Return the session of an advanced-alchemy configuration, committed by the caller."""
    from advanced_alchemy.config import EngineConfig, SQLAlchemySyncConfig

    engine_config = EngineConfig(**pool)
    config = SQLAlchemySyncConfig(connection_string=url, engine_config=engine_config)
    unit: Unit = config.get_session
    return Peer(unit, unit, commits=False, dispose=config.get_engine().dispose)


def fastapi_sqla(url: str, **pool: Any) -> Peer:
    """Return fastapi-sqla's `open_session`; it reads its options from the environment."""
    for name in [name for name in os.environ if name.startswith("sqlalchemy_")]:
        del os.environ[name]
    options = {"url": url, **pool}
    os.environ.update({f"sqlalchemy_{name}": str(value) for name, value in options.items()})
    from fastapi_sqla import sqla

    sqla.startup()
    unit: Unit = sqla.open_session
    engine = sqla._session_factories["default"].kw["bind"]
    return Peer(unit, unit, commits=True, dispose=engine.dispose)


def flask_sqlalchemy(url: str, **pool: Any) -> Peer:
    """Return an application context and its Flask-SQLAlchemy session."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("benchmarks")
    app.config.update(SQLALCHEMY_DATABASE_URI=url, SQLALCHEMY_ENGINE_OPTIONS=pool)
    db = SQLAlchemy(app)
    return _in_flask(app, db.session)


def flask_sqlalchemy_lite(url: str, **pool: Any) -> Peer:
    """Return an application context and its Flask-SQLAlchemy-Lite session."""
    from flask import Flask
    from flask_sqlalchemy_lite import SQLAlchemy

    app = Flask("benchmarks")
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": url, **pool}}
    db = SQLAlchemy(app)
    return _in_flask(app, lambda: db.session)


def _in_flask(app: Any, find: Callable[[], Session]) -> Peer:
    @contextmanager
    def unit() -> Iterator[Session]:
        with app.app_context():
            yield find()

    with app.app_context():
        engine = find().get_bind()
    return Peer(unit, unit, commits=False, dispose=getattr(engine, "dispose", lambda: None))


def oslo_db(url: str, **pool: Any) -> Peer:
    """Return a writer and a reader of oslo.db's enginefacade."""
    from oslo_db.sqlalchemy import enginefacade

    manager = enginefacade.transaction_context()
    if "pool_size" in pool:
        pool["max_pool_size"] = pool.pop("pool_size")
    manager.configure(connection=url, **pool)

    @enginefacade.transaction_context_provider
    class Context:
        """What oslo.db hangs the transaction on."""

    return Peer(
        lambda: manager.writer.using(Context()),
        lambda: manager.reader.using(Context()),
        commits=True,
        dispose=manager.dispose_pool,
    )


# A peer that does not fit beside the others has an environment of its own.
ENVIRONMENTS = {"fastapi-sqla": "bench-fastapi-sqla"}

PEERS: dict[str, Callable[..., Peer]] = {
    "bare": bare,
    "seed": seed,
    "sessionmaker.begin": sessionmaker_begin,
    "sessionscope": sessionscope,
    "advanced-alchemy": advanced_alchemy,
    "fastapi-sqla": fastapi_sqla,
    "flask-sqlalchemy": flask_sqlalchemy,
    "flask-sqlalchemy-lite": flask_sqlalchemy_lite,
    "oslo.db": oslo_db,
}
