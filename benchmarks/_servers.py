"""A variant of the application, served by uvicorn in a process of its own."""

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks._load import healthy
from benchmarks._postgres import named
from benchmarks._settings import Settings

START_SECONDS = 30.0
STOP_SECONDS = 3.0
_numbers = itertools.count(1)


class DidNotStart(RuntimeError):
    """A server ended, or said nothing, before it answered for the first time."""

    def __init__(self, variant: str, log: str) -> None:
        super().__init__(f"The server of {variant} did not start:\n{log}")
        self.log = log


class Server:
    """One variant, ready to be asked while in a block, and certainly gone afterwards."""

    def __init__(
        self,
        variant: str,
        settings: Settings,
        *,
        python: str = sys.executable,
        program: str = "benchmarks._apps",
    ) -> None:
        self.variant = variant
        self._command = [python, "-m", program, variant]
        # Its own, so that the dying connections of an earlier server are not counted here.
        # Without spaces: SQLAlchemy writes them in URLs as `+`, which libpq reads as plus.
        self.application = f"bench-{next(_numbers)}-{variant.replace(' ', '-')}"
        self._settings = replace(settings, url=named(settings.url, self.application))

    def __enter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
            self.port: int = listening.getsockname()[1]
            self._start(listening.fileno())
        # The socket listens already, so the first request waits there until it is answered.
        if not healthy(self.port, START_SECONDS):
            self._stop()
            with self._log:
                raise DidNotStart(self.variant, self._tail())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        self._log.close()

    def processor_seconds(self) -> float:
        """Return how much processor time the server has used; 0 where the system does not tell."""
        statistics = Path(f"/proc/{self._process.pid}/stat")
        if not statistics.exists():
            return 0.0
        # The name, in parentheses, may contain spaces.
        fields = statistics.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self, descriptor: int) -> None:
        # Not in a `with`: it lives as long as the server, and is read when that does not start.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*self._command, self._settings.dumps(), str(descriptor)],
            pass_fds=[descriptor],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _stop(self) -> None:
        """End the server; one that is wedged does not end when asked to."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]
