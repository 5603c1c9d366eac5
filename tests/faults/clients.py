"""Clients that write to the ledger: threads, and tasks of an event loop."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sqlalchemy import make_url

from sessionscope import AsyncDatabase, Database
from sessionscope.events import Stats
from tests.faults.ledger import Order, Told, carry_out

# Seconds that a unit has, and that a client waits between two: without, the machine's own limit
# would be measured, not what the clients want.
TIMEOUT = 1.0
_PAUSE = 0.02
_PATIENCE = 30.0

SERIALIZABLE = "SERIALIZABLE"
CALM = "nothing"


@dataclass
class Clients:
    """Those of one Database, what they were told, and when they have succeeded."""

    name: str
    seed: int
    told: Told
    fault: str = CALM  # what is broken now
    successes: list[float] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)  # once they have ended

    def orders(self, client: int) -> Iterator[tuple[str, Order]]:
        """The calls of one client and what they are to do, the same for each seed."""
        random = Random(f"{self.seed} {self.name} {client}")
        number = 0
        while True:
            number += 1
            call = random.choice(["run", "run", "serializable", "begin"])
            name = f"{self.name} {client} {number}"
            yield call, Order.draw(name, random, locks=call != "serializable")

    def note(self, name: str, call: str, fault: str, error: Exception | None) -> None:
        """Note the end of a call that began while *fault* was at work."""
        if error is None:
            self.successes.append(time.monotonic())
        self.told.note(name, call, self.fault if fault == CALM else fault, error)


@contextmanager
def threads(clients: Clients, count: int, url: str) -> Iterator[None]:
    """Let so many threads work meanwhile."""
    stop = threading.Event()
    with Database(url, timeout=TIMEOUT) as database:
        working = [
            threading.Thread(target=_work, args=(clients, number, database, stop), daemon=True)
            for number in range(count)
        ]
        for thread in working:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in working:
                thread.join(_PATIENCE)
                assert not thread.is_alive(), "a client does not end"
            clients.stats.append(database.stats())


def _work(clients: Clients, number: int, database: Database, stop: threading.Event) -> None:
    serializable = database.with_session(isolation_level=SERIALIZABLE)(carry_out)
    done = clients.told.done.append
    for call, order in clients.orders(number):
        if stop.is_set():
            return
        error, fault = None, clients.fault
        try:
            if call == "run":
                database.run(carry_out, order, done)
            elif call == "serializable":
                serializable(order, done)
            else:
                with database.begin() as session:
                    carry_out(session, order, done)
        except Exception as raised:
            error = raised
        clients.note(order.name, call, fault, error)
        time.sleep(_PAUSE)


@contextmanager
def tasks(clients: Clients, count: int, url: str, driver: str) -> Iterator[None]:
    """Let so many tasks of an event loop in a thread of its own work meanwhile."""
    url = make_url(url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    stop, failed = threading.Event(), list[BaseException]()

    async def work() -> None:
        async with AsyncDatabase(url, timeout=TIMEOUT) as database:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(_work_async(clients, number, database, stop))
            clients.stats.append(database.stats())

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with ExitStack() as stack:
        stack.callback(_end, thread, failed)
        stack.callback(stop.set)
        yield


def _end(thread: threading.Thread, failed: list[BaseException]) -> None:
    thread.join(_PATIENCE)
    assert not thread.is_alive(), "a client does not end"
    if failed:
        raise failed[0]


async def _work_async(
    clients: Clients, number: int, database: AsyncDatabase, stop: threading.Event
) -> None:
    serializable: Any = database.with_session(isolation_level=SERIALIZABLE)(carry_out)
    done = clients.told.done.append
    for call, order in clients.orders(number):
        if stop.is_set():
            return
        error, fault = None, clients.fault
        try:
            if call == "run":
                await database.run(carry_out, order, done)
            elif call == "serializable":
                await serializable(order, done)
            else:
                async with database.begin() as session:
                    await session.run_sync(carry_out, order, done)
        except Exception as raised:
            error = raised
        clients.note(order.name, call, fault, error)
        await asyncio.sleep(_PAUSE)
