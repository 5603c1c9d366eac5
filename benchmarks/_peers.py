"""The ways to open a session that are compared, each an adapter of a few lines.

To add a peer, write a function that takes a URL and engine options, returns a `Peer`, and
list it in `PEERS`.
"""

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


PEERS: dict[str, Callable[..., Peer]] = {
    "bare": bare,
    "seed": seed,
    "sessionmaker.begin": sessionmaker_begin,
    "sessionscope": sessionscope,
}
