"""Whole units run again: for which errors, how often, and never twice."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from sessionscope import Database, after_commit, after_rollback
from sessionscope.exc import ConfigurationError, DatabaseUnavailable, TransactionDoomed
from tests.models import Item


def test_two_hundred_increments_of_ten_threads_are_all_there(postgres: Database) -> None:
    """A12: READ COMMITTED loses most of them and says ok, SERIALIZABLE alone fails most."""
    with postgres.begin() as session:
        session.add(Item(id=1, name="0"))

    @postgres.with_session(isolation_level="SERIALIZABLE")
    def increment(session: Session) -> None:
        item = session.get_one(Item, 1)
        item.name = str(int(item.name) + 1)

    errors = in_threads(10, lambda: [increment() for _ in range(20)])
    assert errors == []
    assert postgres.run(lambda session: session.get_one(Item, 1).name) == "200"


def in_threads(count: int, work: Callable[[], object]) -> list[BaseException]:
    """Call *work* in so many threads at once; return what they raised."""
    start, errors = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
