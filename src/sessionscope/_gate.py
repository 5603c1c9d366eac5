"""Admission: who may hold a connection, and who waits for how long.

One first-in first-out queue stands in front of the connection pools, for threads
and for event loops. It exists because a pool can only block the thread that asks:
under a framework's thread pool those who wait for a connection then occupy the
threads that those who hold one need to finish.
"""

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic

from sessionscope.exc import PoolBusy

# The size of the bounded thread pool that the current thread belongs to, if any:
# only the framework whose pool it is can tell.
PooledThreads = Callable[[], int | None]


class _Waiter:
    """One place in the queue; its answer is written under the gate's lock only."""

    __slots__ = ("drained", "granted", "queue")

    def __init__(self, queue: "deque[_Waiter]") -> None:
        self.granted = False
        self.drained = False
        self.queue = queue
        queue.append(self)

    def wake(self) -> bool:
        raise NotImplementedError


class _ThreadWaiter(_Waiter):
    __slots__ = ("_signal",)

    def __init__(self, queue: "deque[_Waiter]") -> None:
        self._signal = threading.Lock()
        self._signal.acquire()
        super().__init__(queue)

    def wake(self) -> bool:
        if self._signal.locked():  # drain() may wake the same waiter twice
            self._signal.release()
        return True

    def wait(self, timeout: float) -> None:
        self._signal.acquire(timeout=timeout)


class _TaskWaiter(_Waiter):
    __slots__ = ("_future", "_loop")

    def __init__(self, queue: "deque[_Waiter]", loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] = loop.create_future()
        super().__init__(queue)

    def wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:  # its event loop has been closed
            return False
        return True

    def _resolve(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, timeout: float) -> None:
        timer = self._loop.call_later(timeout, self._resolve)
        try:
            await self._future
        finally:
            timer.cancel()


class _ThreadPool:
    """The bounded thread pool in which several gates' threads wait.

    Those who hold a slot need a thread each to go on: were all of the pool's
    threads waiting, no slot would ever come free.
    """

    def __init__(self, threads: PooledThreads) -> None:
        self.threads = threads
        self.slots = 0
        self.forget()

    def forget(self) -> None:
        """Start anew with no one waiting: what a forked child must do."""
        self._waiting = 0
        self._lock = threading.Lock()

    def enter(self, threads: int) -> str | None:
        """Count one of so many threads as waiting, or return why it must not wait."""
        with self._lock:
            spare = max(0, threads - self.slots)
            if self._waiting >= spare:
                return (
                    f"{spare} threads already wait in begin() while the others are needed by those "
                    "who hold a connection. Declare the session as a dependency of the endpoint, "
                    "which waits without a thread"
                )
            self._waiting += 1
        return None

    def leave(self) -> None:
        with self._lock:
            self._waiting -= 1


class Gate:
    """Admits at most *limit* units of work at once; ``None`` admits all.

    *mend* is what errors advise besides shorter units, where there is something.
    """

    def __init__(
        self,
        limit: int | None,
        timeout: float,
        max_waiting: int | None = None,
        mend: str = ", or raise pool_size or max_overflow",
    ) -> None:
        self.limit = limit
        self._mend = mend
        self.timeout = min(timeout, threading.TIMEOUT_MAX)
        self.max_waiting = max_waiting
        self._pool: _ThreadPool | None = None
        self.begun = self.committed = self.rolled_back = self.refused = 0
        self.longest_wait = self.longest_use = 0.0
        self.forget()
        _gates.add(self)

    def forget(self) -> None:
        """Start anew with no one inside: what a forked child must do."""
        # Re-entrant: the garbage collector may close an abandoned waiter's
        # coroutine, which gives its slot back, while this thread is in here.
        self._lock = threading.RLock()
        self._threads: deque[_Waiter] = deque()
        self._tasks: deque[_Waiter] = deque()
        self._empty = threading.Event()
        self._drains = 0
        self._thread_was_last = False
        self.in_use = 0

    @property
    def waiting(self) -> int:
        """How many units wait for a slot."""
        return len(self._threads) + len(self._tasks)

    def admit(self, timeout: float | None = None) -> None:
        """Take a slot, blocking this thread for at most *timeout* seconds.

        By default the gate's own. Raises PoolBusy.
        """
        timeout = self.timeout if timeout is None else timeout
        with self._lock:
            if self._take():
                return
            pool = self._enter_thread()
            waiter = _ThreadWaiter(self._threads)
        started = monotonic()
        try:
            waiter.wait(timeout)
        except BaseException:
            self._abandon(waiter)
            raise
        finally:
            if pool is not None:
                pool.leave()
        self._claim(waiter, started)

    def admit_at_once(self) -> bool:
        """Take a slot if one is free; return whether it was. Raises PoolBusy while draining."""
        if self.limit is not None and self.in_use >= self.limit:
            return False
        with self._lock:
            return self._take()

    async def admit_async(self, timeout: float | None = None) -> None:
        """Async version of :meth:`admit`: waits without blocking a thread."""
        with self._lock:
            if self._take():
                return
            waiter = _TaskWaiter(self._tasks, asyncio.get_running_loop())
        started = monotonic()
        try:
            await waiter.wait(self.timeout if timeout is None else timeout)
        except BaseException:
            # Cancelled, or the loop was closed: a slot granted meanwhile is ours to give back.
            self._abandon(waiter)
            raise
        self._claim(waiter, started)

    def release(self, *, committed: bool, used: float) -> None:
        """Give a slot back that was *used* for so many seconds, to the next in the queue."""
        with self._lock:
            if committed:
                self.committed += 1
            else:
                self.rolled_back += 1
            if used > self.longest_use:  # max() costs each unit a call
                self.longest_use = used
            self._pass_on()

    def limit_waiting_threads(self, threads: PooledThreads) -> None:
        """Let no more threads of a bounded pool wait here than it can spare.

        Gates that are given the same callable count as one.
        """
        with self._lock:
            pool = _pools.setdefault(threads, _ThreadPool(threads))
            if pool is not self._pool:
                pool.slots += self.limit or 0
                self._pool = pool

    def start_draining(self) -> None:
        """Refuse new units and those that wait, until :meth:`stop_draining`."""
        with self._lock:
            self._drains += 1
            self._empty.clear()
            if not self.in_use:
                self._empty.set()
            for waiter in (*self._threads, *self._tasks):
                waiter.drained = True  # it may wake up when the drain is over
                waiter.wake()

    def wait_until_empty(self, timeout: float) -> bool:
        """Return whether the last unit ended within *timeout* seconds."""
        return self._empty.wait(max(0.0, timeout))

    def stop_draining(self) -> None:
        """Admit units again."""
        with self._lock:
            self._drains -= 1

    def _take(self) -> bool:
        """Take a slot if no one need wait for it; raise if waiting is pointless."""
        if self._drains:
            raise self._draining()
        if self.limit is None or self.in_use < self.limit:
            self.in_use += 1
            self.begun += 1
            return True
        if self.max_waiting is not None and self.waiting >= self.max_waiting:
            self._refuse(f"max_waiting={self.max_waiting} others already wait")
        return False

    def _enter_thread(self) -> _ThreadPool | None:
        """Refuse if this thread must not wait; return the pool that counts it as waiting."""
        if asyncio._get_running_loop() is not None:
            self._refuse(
                "begin() was called on an event loop, which must not block. Write the function "
                "with `def` instead of `async def`, so that it runs in a thread"
            )
        pool = self._pool
        threads = pool.threads() if pool is not None else None
        if pool is None or threads is None:
            return None
        if why := pool.enter(threads):
            self._refuse(why)
        return pool

    def _claim(self, waiter: _Waiter, started: float) -> None:
        with self._lock:
            waited = monotonic() - started
            self.longest_wait = max(self.longest_wait, waited)
            if waiter.granted:
                return
            if waiter in waiter.queue:
                waiter.queue.remove(waiter)
            if waiter.drained:
                raise self._draining()
            self._refuse(
                f"none came free in {waited:.1f} s (pool_timeout={self.timeout:g}). Shorten the "
                f"units of work (stats().longest_use){self._mend}"
            )

    def _abandon(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.granted:
                self.begun -= 1
                self._pass_on()
            elif waiter in waiter.queue:  # it is not, once its loop was found dead
                waiter.queue.remove(waiter)

    def _pass_on(self) -> None:
        """Hand a slot that has come free to the next in the queue."""
        while self._threads or self._tasks:
            queue = self._next_queue()
            waiter = queue.popleft()
            waiter.granted = waiter.wake()
            if waiter.granted:
                self.begun += 1
                self._thread_was_last = queue is self._threads
                return
        self.in_use = max(0, self.in_use - 1)  # a unit that was open across a fork is not ours
        if self._drains and not self.in_use:
            self._empty.set()

    def _next_queue(self) -> deque[_Waiter]:
        # Threads and tasks in turn. Threads first would be right for a framework whose
        # pool they are missing from, but those that loop would starve the tasks.
        if self._threads and not (self._tasks and self._thread_was_last):
            return self._threads
        return self._tasks

    def _refuse(self, why: str) -> None:
        self.refused += 1
        raise PoolBusy(
            f"No connection for a new unit of work: all {self.limit} are in use, and {why}."
        )

    def _draining(self) -> PoolBusy:
        self.refused += 1
        return PoolBusy("No new unit of work: it is shutting down (drain() was called).")


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()
_pools: weakref.WeakValueDictionary[PooledThreads, _ThreadPool] = weakref.WeakValueDictionary()


def _forget_all() -> None:
    for gate in _gates:
        gate.forget()
    for pool in _pools.values():
        pool.forget()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_all)
