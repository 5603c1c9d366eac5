"""What the rules claim of SQLAlchemy and FastAPI is what these do."""

from collections.abc import Iterator
from typing import Any

import fastapi
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.exc import DetachedInstanceError


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO orders VALUES (1)"))
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_on_sqlite_a_failed_statement_leaves_the_session_usable(session: Session) -> None:
    """SES402 finds nothing where a guard keeps PostgreSQL out."""
    with pytest.raises(IntegrityError):
        session.execute(text("INSERT INTO orders VALUES (1)"))
    session.execute(text("INSERT INTO orders VALUES (2)"))
    session.commit()
    assert session.scalar(text("SELECT count(*) FROM orders")) == 2


def test_on_sqlite_too_a_failed_flush_makes_the_session_refuse(session: Session) -> None:
    """SES402 finds it whatever the guard says."""
    session.add(Order(id=1))
    with pytest.raises(IntegrityError):
        session.flush()
    with pytest.raises(PendingRollbackError):
        session.scalar(text("SELECT 1"))


def test_a_refreshed_object_outlives_its_session_and_an_expired_one_does_not(
    session: Session,
) -> None:
    """SES202 leaves the first alone."""
    refreshed, expired = Order(id=2), Order(id=3)
    session.add_all([refreshed, expired])
    session.commit()
    session.refresh(refreshed)
    session.close()
    assert refreshed.id == 2
    with pytest.raises(DetachedInstanceError):
        _ = expired.id


@pytest.mark.parametrize(
    ("options", "order"), [({}, ["task", "end"]), ({"scope": "function"}, ["end", "task"])]
)
def test_fastapi_does_what_the_messages_say_of_it(
    options: dict[str, Any], order: list[str]
) -> None:
    """Of the installed version, which is above 0.121."""
    happened: list[str] = []

    def provider() -> Iterator[None]:
        yield
        happened.append("end")

    def endpoint(tasks: fastapi.BackgroundTasks) -> None:
        tasks.add_task(happened.append, "task")

    app = fastapi.FastAPI()
    app.get("/", dependencies=[fastapi.Depends(provider, **options)])(endpoint)
    assert TestClient(app).get("/").status_code == 200
    assert happened == order
