"""The sites, each in a process of its own, behind a real server on loopback."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Site:
    """A framework and a style of writing for it, and the server that serves it."""

    name: str
    module: str
    session: str
    server: str = "uvicorn"


SITES = [
    Site("FastAPI, `def`", "fastapi_def", "dependency"),
    Site("FastAPI, `async def`", "fastapi_async", "dependency"),
    Site("Starlette, `def`", "starlette_def", "`with_session`"),
    Site("Starlette, `async def`", "starlette_async", "`with_session`"),
    Site("Litestar, `def`", "litestar_def", "dependency"),
    Site("Litestar, `async def`", "litestar_async", "dependency"),
    Site("Flask, waitress", "flask_views", "`with_session`", "waitress"),
    Site("Flask, gunicorn", "flask_views", "`with_session`", "gunicorn"),
]


class RunningSite:
    """One site, ready to be asked while in a block, and certainly gone afterwards."""

    def __init__(self, site: Site, url: str) -> None:
        self.site = site
        self._url = url

    def __enter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listening:
            self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            self._start(listening.fileno())
        # A server may close a connection after a 500: none is used twice.
        once = httpx2.Limits(max_keepalive_connections=0)
        self.client = httpx2.Client(base_url=self.address, limits=once, timeout=60)
        try:
            # The socket listens already: the request waits there until the server is up.
            self.client.get("/hooked/nothing", timeout=START_SECONDS).raise_for_status()
        except httpx2.HTTPError as error:
            self._stop()
            raise RuntimeError(f"{self.site.name} did not start:\n{self._said()}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()
        self._stop()
        self._log.close()

    def get(self, path: str) -> httpx2.Response:
        return self.client.get(path)

    def _start(self, descriptor: int) -> None:
        # Not in a `with`: it lives as long as the server, and is read when that does not start.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command(descriptor),
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
                "SITE": self.site.module,
                "SITE_URL": self._url,
            },
            pass_fds=[descriptor],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _command(self, descriptor: int) -> list[str]:
        python = [sys.executable, "-W", "error", "-m"]
        if self.site.server == "gunicorn":
            options = ["--bind", f"fd://{descriptor}", "-k", "gthread", "--threads", "40"]
            return [*python, "gunicorn", *options, "tests.contract.serve:wsgi()"]
        module, server = self.site.module, self.site.server
        return [*python, "tests.contract.serve", server, module, self._url, str(descriptor)]

    def _stop(self) -> None:
        """End the server; one that is wedged does not end when asked to."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]
