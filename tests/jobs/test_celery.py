"""Celery: a task that is decorated with with_session is one unit of work."""

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from sessionscope import Database, after_commit
from sessionscope.testing import PostgresServer
from tests.conftest import missing
from tests.jobs.celery_tasks import TABLES, Jobs, build

ROOT = Path(__file__).parents[2]
# `make jobs` asks for more.
TASKS = int(os.environ.get("JOBS_TASKS", "100"))
PATIENCE = 60.0 + TASKS / 10
BROKERS = {
    "redis": ("redis://127.0.0.1:6379/9", "redis://127.0.0.1:6379/9"),
    "rabbitmq": ("amqp://guest:guest@127.0.0.1:5672//", "rpc://"),
}


@dataclass
class Running:
    """The application as the test sees it, and how to start workers for it."""

    jobs: Jobs
    settings: dict[str, str]

    def count(self, query: str) -> int:
        with self.jobs.database.begin(read_only=True) as session:
            return int(session.scalar(text(query)) or 0)

    def tickets(self, number: int) -> int:
        return self.count(f"SELECT count(*) FROM ticket WHERE number = {number}")

    def done(self) -> int:
        """Return how many keys are done, after a while in which the workers have the machine."""
        return self.count("SELECT count(*) FROM done, pg_sleep(0.02)")

    @contextmanager
    def worker(self, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a worker in a process group of its own, which ends with the block."""
        program = "-m celery -A tests.jobs.celery_worker:app worker --without-gossip"
        quiet = "--without-mingle --without-heartbeat --loglevel warning"
        name = f"--hostname={uuid.uuid4().hex}@localhost"
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [sys.executable, *program.split(), *quiet.split(), name, *options],
                cwd=ROOT,
                env={**os.environ, **self.settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            except BaseException:
                log.seek(0)
                print(log.read().decode()[-5000:])
                raise
            finally:
                stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop the worker as its supervisor would, and when it does not obey, with its children."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def running_on(broker: str, server: PostgresServer) -> Iterator[Running]:
    """The application on a broker, with a queue and a database of its own."""
    url, results = BROKERS[broker]
    settings = {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "DATABASE_URL": server.create_database(),
        "JOBS_BROKER": url,
        "JOBS_RESULTS": results,
        "JOBS_NAME": f"sessionscope-test-{uuid.uuid4().hex}",
    }
    jobs = build(settings)
    try:
        with jobs.app.connection() as connection:
            connection.ensure_connection(max_retries=1)
    except OperationalError as error:
        missing(f"No broker at {url}: {error}")
    with jobs.database.begin() as session:
        session.execute(text(TABLES))
    try:
        yield Running(jobs, settings)
    finally:
        with jobs.app.connection() as connection:
            jobs.app.amqp.queues[settings["JOBS_NAME"]](connection.channel()).delete()
        if broker == "redis":
            forget(url, settings["JOBS_NAME"])
        jobs.app.close()
        jobs.database.dispose()


def forget(url: str, name: str) -> None:
    """Delete this run's keys: Redis has no queue that they would go with."""
    with Redis.from_url(url) as client:
        for key in client.scan_iter(f"{name}*"):
            client.delete(key)


WORKERS = [
    ("redis", ["--pool=prefork", "-c4"]),
    ("rabbitmq", ["--pool=prefork", "-c4"]),
    ("redis", ["--pool=threads", "-c8"]),
]


@pytest.fixture(scope="module", params=WORKERS, ids=lambda each: f"{each[0]} {each[1][0][7:]}")
def running(request: pytest.FixtureRequest, postgres_server: PostgresServer) -> Iterator[Running]:
    """The application on each broker, and a worker with each pool."""
    broker, options = request.param
    with running_on(broker, postgres_server) as running, running.worker(*options):
        yield running


def test_what_has_a_result_is_stored(running: Running) -> None:
    """COMMIT, which is slow here, comes before the result."""
    for number in range(5):
        running.jobs.book.delay(number).get(timeout=PATIENCE)
        assert running.tickets(number) == 1


def test_a_failed_commit_is_a_failed_task(running: Running) -> None:
    with pytest.raises(Exception, match="ticket_number_key"):
        running.jobs.book.delay(77, 77).get(timeout=PATIENCE)
    assert running.tickets(77) == 0


def test_a_task_that_fails_or_tries_again_rolls_back(running: Running) -> None:
    before = running.done()
    with pytest.raises(ValueError, match="1001"):
        running.jobs.pay_and_fail.delay(1001).get(timeout=PATIENCE)
    assert running.done() == before
    running.jobs.pay_at_second_try.delay(1002).get(timeout=PATIENCE)
    assert running.count("SELECT count(*) FROM attempt WHERE key = 1002") == 1


def test_a_task_is_sent_once_its_sender_has_committed(running: Running) -> None:
    """A worker that is faster than COMMIT finds the row that its task is about."""
    jobs, results = running.jobs, list[Any]()

    def send(key: int) -> None:
        results.append(jobs.pay.delay(key))

    with jobs.database.begin() as session:
        after_commit(session, send, 2001)
        session.execute(text("INSERT INTO ticket VALUES (2001)"))
        assert results == []
    results[0].get(timeout=PATIENCE)
    with pytest.raises(IntegrityError), jobs.database.begin() as session:
        after_commit(session, send, 2002)
        session.execute(text("INSERT INTO ticket VALUES (2001)"))
    assert len(results) == 1
    assert running.count("SELECT count(*) FROM done WHERE key > 2000") == 1


def test_a_task_sends_another_one(running: Running) -> None:
    before = running.done()
    running.jobs.pay_later.delay(3001).get(timeout=PATIENCE)
    wait_until(lambda: running.done() > before)


SHARED_BACKENDS = (
    "SELECT count(*) FROM (SELECT backend FROM attempt GROUP BY backend "
    "HAVING count(DISTINCT process) > 1) AS shared"
)


@pytest.mark.timeout(60 + 5 * PATIENCE)
@pytest.mark.parametrize("broker", BROKERS)
def test_every_task_is_done_once_though_workers_are_killed(
    broker: str, postgres_server: PostgresServer
) -> None:
    """One process of a worker's pool gets SIGKILL, and later a whole worker, in the middle.

    With acks_late an unacknowledged task comes back, and its unit is idempotent. No process
    has another one's connection.
    """
    with running_on(broker, postgres_server) as running, ExitStack() as stack:
        jobs = running.jobs
        stack.enter_context(running.worker("-c2"))
        second = stack.enter_context(running.worker("-c2"))
        results = [jobs.pay.delay(key) for key in range(TASKS)]
        wait_until(lambda: running.done() >= TASKS // 4)
        os.kill(running.count("SELECT process FROM attempt LIMIT 1"), signal.SIGKILL)
        # Celery on Redis looks every 100 seconds for what a lost worker has left.
        if broker != "redis" or PATIENCE > 200:
            wait_until(lambda: running.done() >= TASKS // 2)
            os.killpg(second.pid, signal.SIGKILL)
        for result in results:
            result.get(timeout=PATIENCE)
        processes = running.count("SELECT count(DISTINCT process) FROM attempt")
        attempts = running.count("SELECT count(*) FROM attempt")
        print(f"{broker}: {TASKS} tasks, {attempts} attempts, {processes} processes")
        assert running.done() == TASKS
        assert running.count("SELECT amount FROM balance") == TASKS
        assert running.count(SHARED_BACKENDS) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < deadline


@pytest.fixture
def eager(sqlite_url: str) -> Iterator[Jobs]:
    """The application without a worker: tasks run where they are sent from."""
    settings = {
        "DATABASE_URL": sqlite_url,
        "JOBS_BROKER": "memory://",
        "JOBS_RESULTS": "cache+memory://",
        "JOBS_NAME": "eager",
    }
    jobs = build(settings)
    jobs.app.conf.task_always_eager = True
    with jobs.database.begin() as session:
        session.execute(text("CREATE TABLE ticket (number integer UNIQUE)"))
    yield jobs
    jobs.app.close()
    jobs.database.dispose()


def test_an_eager_task_is_a_unit_of_its_own(eager: Jobs) -> None:
    eager.book.delay(1).get()
    assert isinstance(eager.book.delay(1).result, IntegrityError)
    with eager.database.begin() as session:
        after_commit(session, eager.book.delay, 2)
    assert tickets(eager.database) == [1, 2]


def tickets(database: Database) -> list[int]:
    with database.begin(read_only=True) as session:
        return list(session.scalars(text("SELECT number FROM ticket ORDER BY number")))


def test_the_session_is_not_part_of_the_tasks_signature(eager: Jobs) -> None:
    """Celery checks the arguments when a task is sent, without the session."""
    with pytest.raises(TypeError, match="positional"):
        eager.pay.apply_async(args=(1, 2), task_id="x")
