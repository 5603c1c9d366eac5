"""Signal: waiting for something to change, in a thread or in a task."""

import asyncio
import threading

from sqlalchemy.util import await_only

from sessionscope._loops import call_soon


class Signal:
    """Wakes the threads that wait when something has changed."""

    def __init__(self) -> None:
        self.changes = 0
        self.forget()

    def forget(self) -> None:
        """Start anew with no one waiting: what a forked child must do."""
        self._waiting = 0
        # Re-entrant: the garbage collector may return a connection while this thread is in here.
        self._changed = threading.Condition(threading.RLock())

    def notify(self) -> None:
        """Wake all who wait."""
        # Without the lock: who waits has said so before it looks at the count.
        self.changes += 1
        if self._waiting:
            with self._changed:
                self._changed.notify_all()

    def wait(self, seen: int, timeout: float) -> bool:
        """Wait for a change after the *seen* one; return False at the timeout."""
        with self._changed:
            self._waiting += 1
            try:
                return timeout > 0 and self._changed.wait_for(lambda: self.changes != seen, timeout)
            finally:
                self._waiting -= 1


class AsyncSignal(Signal):
    """Wakes the tasks that wait, on whichever event loop; called from SQLAlchemy's greenlets."""

    def forget(self) -> None:
        """Start anew with no one waiting: what a forked child must do."""
        super().forget()
        self._futures: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wake all who wait, from any thread."""
        self.changes += 1
        if self._futures:
            with self._changed:
                futures, self._futures = self._futures, set()
            for future in futures:
                call_soon(future.get_loop(), _resolve, future)

    def wait(self, seen: int, timeout: float) -> bool:
        """Wait for a change after the *seen* one; return False at the timeout."""
        return timeout > 0 and await_only(self._wait(seen, timeout))

    async def _wait(self, seen: int, timeout: float) -> bool:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._changed:
            self._futures.add(future)
        timer = loop.call_later(timeout, _resolve, future)
        try:
            if self.changes == seen:
                await future
        finally:
            timer.cancel()
            with self._changed:
                self._futures.discard(future)
        return self.changes != seen


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
