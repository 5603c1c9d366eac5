"""Watchdog: the one thread that ends the units of work of threads when their time is over."""

import heapq
import logging
import os
import threading
from time import monotonic
from typing import Protocol

# Units that have ended, after which their entries are dropped.
_MANY = 1000

_log = logging.getLogger("sessionscope")


class _Watched(Protocol):
    @property
    def has_ended(self) -> bool: ...

    def expire(self) -> None: ...


class _Watchdog:
    """One thread for all units of this process that threads wait for."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Watched]] = []
        # Re-entrant: the garbage collector may end an abandoned unit while this thread is in here.
        self._changed = threading.Condition(threading.RLock())
        self._count = 0
        self._ended = 0  # of those in the heap, about
        self._thread: threading.Thread | None = None

    def forget_one(self) -> None:
        """Count one that need not be watched any more, and drop such ones when they are many."""
        self._ended += 1
        if self._ended < _MANY:
            return
        with self._changed:
            if 2 * self._ended > len(self._heap):
                self._heap = [entry for entry in self._heap if not entry[2].has_ended]
                heapq.heapify(self._heap)
                self._ended = 0

    def watch(self, watched: _Watched, seconds: float) -> None:
        """Call ``watched.expire()`` in so many *seconds*."""
        with self._changed:
            self._count += 1
            entry = (monotonic() + seconds, self._count, watched)
            heapq.heappush(self._heap, entry)
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name="sessionscope-deadlines", daemon=True
                )
                thread.start()
                self._thread = thread  # not before: if it cannot start, the next unit tries again
            elif self._heap[0] is entry:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            watched = self._next()
            try:
                watched.expire()
            except Exception:  # the others must not suffer
                _log.exception("A unit of work could not be ended at its deadline")

    def _next(self) -> _Watched:
        """Wait for the next deadline, and return whose it is."""
        with self._changed:
            while True:
                wait = self._heap[0][0] - monotonic() if self._heap else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(wait)


_watchdog = _Watchdog()


def watch(watched: _Watched, seconds: float) -> None:
    """Call ``watched.expire()`` in so many *seconds*, in a thread, if it has not ended by then."""
    _watchdog.watch(watched, seconds)


def forget_one() -> None:
    """Note that one that is watched has ended."""
    _watchdog.forget_one()


def _forget() -> None:
    global _watchdog  # noqa: PLW0603  # a forked child has none of its parent's threads
    _watchdog = _Watchdog()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget)
