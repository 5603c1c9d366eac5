"""Admission: one queue for threads and event loops in front of the pools."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from sessionscope import Database
from sessionscope._gate import Gate
from sessionscope.exc import PoolBusy
from tests.models import Item

PATIENCE = 10.0
pytestmark = pytest.mark.anyio


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do, by looking at the gate itself."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it never happened")
        time.sleep(0)  # lets the other thread run


def release(gate: Gate) -> None:
    gate.release(committed=True, used=0.0)


@contextmanager
def full(gate: Gate) -> Iterator[None]:
    """Hold all slots of *gate*; give one back at the end."""
    while gate.limit is not None and gate.in_use < gate.limit:
        gate.admit()
    yield
    release(gate)


def test_no_more_than_the_limit_are_admitted() -> None:
    gate = Gate(2, 0.0)
    gate.admit()
    gate.admit()
    with pytest.raises(PoolBusy, match="all 2 are in use") as caught:
        gate.admit()
    assert caught.value.retry_after > 0
    assert (gate.in_use, gate.refused, gate.waiting) == (2, 1, 0)


def test_a_released_slot_goes_to_the_first_in_the_queue(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE)
    order: list[int] = []

    def work(number: int) -> None:
        gate.admit()
        order.append(number)
        release(gate)

    with full(gate):
        futures = []
        for number in range(5):
            futures.append(threads.submit(work, number))
            wait_until(lambda number=number: gate.waiting == number + 1)  # type: ignore[misc]
    for future in futures:
        future.result(PATIENCE)

    assert order == [0, 1, 2, 3, 4]
    assert gate.in_use == 0


def test_a_newcomer_does_not_overtake_the_queue(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    first = threads.submit(gate.admit)
    wait_until(lambda: gate.waiting == 1)
    release(gate)
    newcomer = threads.submit(gate.admit)

    first.result(PATIENCE)
    wait_until(lambda: gate.waiting == 1)
    assert not newcomer.done()
    release(gate)
    newcomer.result(PATIENCE)


def test_waiting_ends_at_the_timeout_and_leaves_the_queue() -> None:
    gate = Gate(1, 0.05)
    gate.admit()
    with pytest.raises(PoolBusy, match="pool_timeout=0.05"):
        gate.admit()
    release(gate)

    gate.admit()
    assert (gate.waiting, gate.in_use) == (0, 1)
    assert gate.longest_wait >= 0.05


def test_a_full_queue_refuses_at_once(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE, max_waiting=1)
    with full(gate):
        waiting = threads.submit(gate.admit)
        wait_until(lambda: gate.waiting == 1)
        with pytest.raises(PoolBusy, match="max_waiting=1"):
            gate.admit()
    waiting.result(PATIENCE)


def test_an_unlimited_gate_never_waits() -> None:
    gate = Gate(None, 0.0)
    for _ in range(1000):
        gate.admit()
    assert gate.in_use == 1000


async def test_a_task_waits_without_a_thread() -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    task = asyncio.create_task(gate.admit_async())
    while gate.waiting == 0:
        await asyncio.sleep(0)
    release(gate)
    await task
    assert gate.in_use == 1


async def test_a_task_gets_pool_busy_at_the_timeout() -> None:
    gate = Gate(1, 0.01)
    gate.admit()
    with pytest.raises(PoolBusy):
        await gate.admit_async()
    assert gate.waiting == 0


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    task = asyncio.create_task(gate.admit_async())
    while gate.waiting == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.waiting == 0
    release(gate)
    assert gate.in_use == 0


async def test_a_waiter_cancelled_after_its_turn_came_gives_the_slot_back() -> None:
    """It owns the slot from the moment it is taken out of the queue."""
    gate = Gate(1, PATIENCE)
    gate.admit()
    task = asyncio.create_task(gate.admit_async())
    while gate.waiting == 0:
        await asyncio.sleep(0)
    release(gate)  # the task is granted the slot, and has not run yet
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert gate.in_use == 0
    gate.admit()


async def test_a_cancelled_waiter_passes_its_slot_to_the_next() -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    first = asyncio.create_task(gate.admit_async())
    second = asyncio.create_task(gate.admit_async())
    while gate.waiting < 2:
        await asyncio.sleep(0)
    release(gate)
    first.cancel()
    await second
    assert gate.in_use == 1


def test_waiters_of_a_dead_loop_are_skipped(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(gate.admit_async())
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert gate.waiting == 1
    loop.close()
    alive = threads.submit(gate.admit)
    wait_until(lambda: gate.waiting == 2)

    release(gate)
    alive.result(PATIENCE)
    release(gate)
    assert gate.in_use == 0
    abandoned.get_coro().close()
    abandoned._log_destroy_pending = False  # type: ignore[attr-defined]
    assert gate.in_use == 0


def test_a_waiter_whose_loop_dies_after_its_turn_came_gives_the_slot_back() -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    loop = asyncio.new_event_loop()
    task = loop.create_task(gate.admit_async())
    loop.call_soon(loop.stop)
    loop.run_forever()
    release(gate)  # granted, but its loop never runs again
    assert gate.in_use == 1
    loop.close()
    task.get_coro().close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert gate.in_use == 0


def test_threads_and_loops_share_one_budget(threads: ThreadPoolExecutor) -> None:
    gate = Gate(3, PATIENCE)
    most = 0
    lock = threading.Lock()

    def inside() -> None:
        nonlocal most
        with lock:
            most = max(most, gate.in_use)

    def in_a_thread() -> None:
        for _ in range(50):
            gate.admit()
            inside()
            release(gate)

    async def in_a_task() -> None:
        for _ in range(50):
            await gate.admit_async()
            inside()
            await asyncio.sleep(0)
            release(gate)

    async def in_a_loop() -> None:
        await asyncio.gather(*(in_a_task() for _ in range(8)))

    futures = [threads.submit(in_a_thread) for _ in range(8)]
    futures += [threads.submit(asyncio.run, in_a_loop()) for _ in range(2)]
    for future in futures:
        future.result(60)

    assert most == 3
    assert (gate.in_use, gate.waiting, gate.refused) == (0, 0, 0)
    assert gate.begun == gate.committed == 8 * 50 + 2 * 8 * 50


def test_an_event_loop_is_never_blocked() -> None:
    """begin() in an async function may take a free slot, and never waits for one."""
    gate = Gate(1, PATIENCE)

    async def main() -> None:
        gate.admit()
        with pytest.raises(PoolBusy, match="on an event loop"):
            gate.admit()

    asyncio.run(main())


def test_a_frameworks_thread_pool_never_fills_with_waiters(threads: ThreadPoolExecutor) -> None:
    """Of 4 threads 2 are needed by those who hold a slot: 2 may wait, the next is refused."""
    gate = Gate(2, PATIENCE)
    gate.limit_waiting_threads(pool_of_four)
    with full(gate):
        waiting = [threads.submit(gate.admit) for _ in range(2)]
        wait_until(lambda: gate.waiting == 2)
        with pytest.raises(PoolBusy, match="Declare the session as a dependency"):
            gate.admit()
    waiting.pop(0).result(PATIENCE)
    release(gate)
    waiting.pop(0).result(PATIENCE)


def pool_of_four() -> int | None:
    return 4


def test_the_thread_rule_counts_over_all_databases_that_share_the_pool(
    threads: ThreadPoolExecutor,
) -> None:
    def pool_of_five() -> int | None:
        return 5

    one, two = Gate(2, PATIENCE), Gate(2, PATIENCE)
    for gate in (one, two):
        gate.limit_waiting_threads(pool_of_five)
    with full(two), full(one):
        waiting = threads.submit(one.admit)
        wait_until(lambda: one.waiting == 1)
        with pytest.raises(PoolBusy):
            two.admit()
    waiting.result(PATIENCE)


def test_a_foreign_thread_takes_no_place_of_the_pools_own(threads: ThreadPoolExecutor) -> None:
    """Of a pool of two one thread may wait, however many others wait as well."""
    foreign = threading.local()

    def pool_of_two() -> int | None:
        return None if hasattr(foreign, "yes") else 2

    gate = Gate(1, PATIENCE)
    gate.limit_waiting_threads(pool_of_two)

    def admit_foreign() -> None:
        foreign.yes = True
        gate.admit()

    with full(gate):
        waiting = [threads.submit(admit_foreign)]
        wait_until(lambda: gate.waiting == 1)
        waiting.append(threads.submit(gate.admit))
        wait_until(lambda: gate.waiting == 2 or gate.refused > 0)
    waiting[0].result(PATIENCE)
    release(gate)
    waiting[1].result(PATIENCE)
    assert gate.refused == 0


def test_a_thread_of_no_pool_is_not_counted(threads: ThreadPoolExecutor) -> None:
    def no_pool() -> int | None:
        return None

    gate = Gate(1, PATIENCE)
    gate.limit_waiting_threads(no_pool)
    with full(gate):
        waiting = threads.submit(gate.admit)
        wait_until(lambda: gate.waiting == 1)
    waiting.result(PATIENCE)


def test_the_database_takes_the_thread_rule(sqlite: Database) -> None:
    sqlite.limit_waiting_threads(lambda: 0)
    with sqlite.begin() as session:
        session.add(Item(name="first"))
        session.flush()
        with ThreadPoolExecutor(1) as executor:
            waits = executor.submit(lambda: sqlite.begin().__enter__())
            with pytest.raises(PoolBusy, match="0 threads already wait"):
                waits.result(PATIENCE)


def test_draining_refuses_newcomers_and_waiters_and_waits_for_the_rest(
    threads: ThreadPoolExecutor,
) -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    waiting = threads.submit(gate.admit)
    wait_until(lambda: gate.waiting == 1)

    gate.start_draining()
    with pytest.raises(PoolBusy, match="shutting down"):
        waiting.result(PATIENCE)
    with pytest.raises(PoolBusy, match="shutting down"):
        gate.admit()
    assert not gate.wait_until_empty(0)
    release(gate)
    assert gate.wait_until_empty(PATIENCE)
    gate.stop_draining()

    gate.admit()
    assert gate.in_use == 1


def test_who_was_refused_by_a_drain_is_told_so_when_it_is_over(
    threads: ThreadPoolExecutor,
) -> None:
    """drain(0) is over before the thread that waited has woken up."""
    gate = Gate(1, PATIENCE)
    gate.admit()
    waiting = threads.submit(gate.admit)
    wait_until(lambda: gate.waiting == 1)
    with gate._lock:  # pyright: ignore[reportPrivateUsage]  # as if it woke up late
        gate.start_draining()
        gate.stop_draining()
    with pytest.raises(PoolBusy, match="shutting down"):
        waiting.result(PATIENCE)


def test_a_forked_child_starts_with_an_empty_gate() -> None:
    gate = Gate(1, 0.0)
    gate.admit()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            gate.admit()
            os.write(writer, b"admitted")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.set_blocking(reader, False)
    assert os.read(reader, 100) == b"admitted"
    assert gate.in_use == 1
    os.close(reader)
    os.close(writer)


def test_two_drains_at_once_both_learn_that_it_is_empty(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE)
    gate.admit()
    gate.start_draining()
    gate.start_draining()
    gate.stop_draining()
    with pytest.raises(PoolBusy, match="shutting down"):
        gate.admit()
    waiting = threads.submit(gate.wait_until_empty, PATIENCE)
    release(gate)
    assert waiting.result(PATIENCE)
    gate.stop_draining()


def test_threads_that_loop_do_not_starve_tasks(threads: ThreadPoolExecutor) -> None:
    gate = Gate(1, PATIENCE)
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            gate.admit()
            release(gate)

    async def tasks() -> None:
        for _ in range(20):
            await gate.admit_async()
            release(gate)

    looping = [threads.submit(loop) for _ in range(3)]
    asyncio.run(tasks())
    stop.set()
    for future in looping:
        future.result(PATIENCE)
    assert gate.refused == 0


def test_a_unit_that_was_open_across_a_fork_is_not_the_childs() -> None:
    gate = Gate(1, 0.0)
    gate.admit()
    gate.forget()
    release(gate)
    assert gate.in_use == 0


async def test_threads_and_tasks_take_turns(threads: ThreadPoolExecutor) -> None:
    """Threads first would starve tasks; tasks first would keep a framework's threads waiting."""
    gate = Gate(1, PATIENCE)
    gate.admit()
    order: list[str] = []

    def in_a_thread() -> None:
        gate.admit()
        order.append("thread")
        release(gate)

    async def in_a_task() -> None:
        await gate.admit_async()
        order.append("task")
        release(gate)

    tasks = [asyncio.create_task(in_a_task()) for _ in range(2)]
    while gate.waiting < 2:
        await asyncio.sleep(0)
    futures = [threads.submit(in_a_thread) for _ in range(2)]
    while gate.waiting < 4:
        await asyncio.sleep(0)
    release(gate)
    await asyncio.gather(*tasks, *map(asyncio.wrap_future, futures))
    assert order in (["thread", "task", "thread", "task"], ["task", "thread", "task", "thread"])
