"""Celery tasks on a Database, for the test that sends them and the workers that run them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.entity import Queue
from sqlalchemy import text
from sqlalchemy.orm import Session

from sessionscope import Database, after_commit

# COMMIT takes long for late rows, and fails for two with the same number.
TABLES = """
CREATE TABLE done (key integer PRIMARY KEY);
CREATE TABLE balance (amount integer NOT NULL);
INSERT INTO balance VALUES (0);
CREATE TABLE attempt (key integer, process integer, backend integer);
CREATE TABLE ticket (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM pg_sleep(0.15); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER delay AFTER INSERT ON ticket
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION delay();
"""


@dataclass
class Jobs:
    """The application, its Database, and its tasks."""

    app: Celery
    database: Database
    pay: Any
    pay_and_fail: Any
    book: Any
    pay_at_second_try: Any
    pay_later: Any


def build(settings: Mapping[str, str]) -> Jobs:
    app: Any = application(settings)
    database = Database(settings["DATABASE_URL"])

    @app.task(name="pay", acks_late=True, reject_on_worker_lost=True)
    @database.with_session()
    def pay(session: Session, key: int) -> int:
        """Pay once, however often it is run."""
        return pay_once(session, key)

    @app.task(name="pay_and_fail")
    @database.with_session()
    def pay_and_fail(session: Session, key: int) -> None:
        pay_once(session, key)
        raise ValueError(key)

    @app.task(name="book")
    @database.with_session()
    def book(session: Session, *numbers: int) -> None:
        """COMMIT fails for two equal numbers."""
        for number in numbers:
            session.execute(text("INSERT INTO ticket VALUES (:number)"), {"number": number})

    @app.task(name="pay_at_second_try", bind=True)
    @database.with_session()
    def pay_at_second_try(self: Any, session: Session, key: int) -> int:
        process = pay_once(session, key)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return process

    @app.task(name="pay_later")
    @database.with_session()
    def pay_later(session: Session, key: int) -> None:
        """Send another task, once this one has committed."""
        session.execute(text("INSERT INTO ticket VALUES (:number)"), {"number": key})
        after_commit(session, pay.delay, key)

    return Jobs(app, database, pay, pay_and_fail, book, pay_at_second_try, pay_later)


def application(settings: Mapping[str, str]) -> Celery:
    """Make the application; its queue, keys and results are this run's own."""
    name = settings["JOBS_NAME"]
    app = Celery("jobs", broker=settings["JOBS_BROKER"], backend=settings["JOBS_RESULTS"])
    # RabbitMQ forgets the queue of a run that was killed.
    queue = Queue(name, routing_key=name, queue_arguments={"x-expires": 600_000})
    app.conf.update(
        task_queues=[queue],
        task_default_queue=name,
        task_default_routing_key=name,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        result_backend_transport_options={"global_keyprefix": f"{name}-results-"},
        result_expires=600,
    )
    if settings["JOBS_BROKER"].startswith("redis"):
        # Redis knows of no connection that was lost: an unacknowledged task comes back then.
        app.conf.broker_transport_options = {"global_keyprefix": name, "visibility_timeout": 5}
    return app


def pay_once(session: Session, key: int) -> int:
    """Do what must be done once for each key; return the process that was asked to."""
    backend = "INSERT INTO attempt VALUES (:key, :process, pg_backend_pid())"
    session.execute(text(backend), {"key": key, "process": os.getpid()})
    first = "INSERT INTO done VALUES (:key) ON CONFLICT DO NOTHING RETURNING key"
    if session.scalar(text(first), {"key": key}) is not None:
        session.execute(text("UPDATE balance SET amount = amount + 1"))
    return os.getpid()
