"""Turns: the one connection of a sandbox is used by one thread or task at a time."""

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import copy_context

from sqlalchemy.util import await_only

# Seconds after which whoever waits for a turn is told that it will not come.
PATIENCE = 10.0


class _Waiter:
    """Someone who waits in line; ``granted`` is written by those who have the turn."""

    def __init__(self, is_possible: Callable[[], bool]) -> None:
        self.granted = False
        self._is_possible = is_possible
        self._context = copy_context()

    def may_go(self) -> bool:
        """Ask what may depend on who asks, on behalf of the one who waits."""
        return self._context.run(self._is_possible)

    def wake(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        raise NotImplementedError


class _ThreadWaiter(_Waiter):
    def __init__(self, is_possible: Callable[[], bool]) -> None:
        super().__init__(is_possible)
        self._signal = threading.Event()
        self.wake = self._signal.set  # type: ignore[method-assign]  # the same, one call less

    def wait(self) -> None:
        self._signal.wait(PATIENCE)


class _TaskWaiter(_Waiter):
    def __init__(self, is_possible: Callable[[], bool]) -> None:
        super().__init__(is_possible)
        self._signal = asyncio.Event()
        self.wake = self._signal.set  # type: ignore[method-assign]  # the same, one call less

    def wait(self) -> None:
        with suppress(TimeoutError):
            await_only(asyncio.wait_for(self._signal.wait(), PATIENCE))


class Turns:
    """Turns of threads, or of the tasks of one event loop: first come, first served."""

    def __init__(self, *, is_async: bool) -> None:
        self._waiter = _TaskWaiter if is_async else _ThreadWaiter
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self._line: list[_Waiter] = []
        self._is_taken = False

    @property
    def is_inside(self) -> bool:
        """Whether this thread has the turn, or is about to, or is in the way of who has it.

        It does so in the garbage collector, which may find an abandoned session at any line, those
        under the lock included.
        """
        return threading.get_ident() in self._inside

    @contextmanager
    def turn(
        self, is_possible: Callable[[], bool], too_late: Callable[[], Exception]
    ) -> Generator[None]:
        """Wait until no one has the turn and *is_possible*, else raise what *too_late* returns."""
        with self.inside():
            waiter = self._take_or_queue(is_possible)
            if waiter is not None:
                self._wait(waiter, too_late)
            try:
                yield
            finally:
                self._pass_on()

    @contextmanager
    def inside(self) -> Generator[None]:
        """Let what the garbage collector finds meanwhile in this thread not wait for a turn."""
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            yield
        finally:
            self._inside.discard(thread)

    def look_again(self) -> None:
        """Let in who waited for one that has given up without a turn, if no one has it."""
        with self.inside(), self._lock:
            if not self._is_taken:
                self._give_to_the_first()

    def _take_or_queue(self, is_possible: Callable[[], bool]) -> _Waiter | None:
        with self._lock:
            if not self._is_taken and is_possible():
                self._is_taken = True
                return None
            waiter = self._waiter(is_possible)
            self._line.append(waiter)
            return waiter

    def _wait(self, waiter: _Waiter, too_late: Callable[[], Exception]) -> None:
        try:
            waiter.wait()
        except BaseException:  # cancelled: a turn granted meanwhile is ours to pass on
            if self._leave(waiter):
                self._pass_on()
            raise
        if not self._leave(waiter):
            raise too_late()

    def _leave(self, waiter: _Waiter) -> bool:
        """Leave the line; return whether the turn was granted."""
        with self._lock:
            if not waiter.granted:
                self._line.remove(waiter)
            return waiter.granted

    def _pass_on(self) -> None:
        with self._lock:
            self._give_to_the_first()

    def _give_to_the_first(self) -> None:
        """Give the turn to the first in line who can use it now."""
        following = next((waiter for waiter in self._line if waiter.may_go()), None)
        self._is_taken = following is not None
        if following is not None:
            self._line.remove(following)
            following.granted = True
            following.wake()
