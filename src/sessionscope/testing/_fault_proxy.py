"""A TCP proxy between client and database that breaks connections at a chosen moment."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

Fault = Literal["cut before", "cut after", "hang"]

_CHUNK = 65536


@dataclass
class _Weather:
    """What the proxy does to all of its connections now."""

    delay: float = 0.0
    slice: int = 0
    silent: bool = False


@dataclass
class _Aim:
    """A fault for the next *times* messages that contain *marker*."""

    fault: Fault
    marker: bytes
    times: int


class FaultProxy:
    """Listen on a free port of 127.0.0.1, lead to *host* and *port*, and break what is asked.

    A context manager, on a thread of its own; its methods may be called from any thread::

        with FaultProxy("127.0.0.1", 5432) as proxy:
            database = Database(proxy.through(url))
            proxy.aim("cut after", b"COMMIT")

    It reads what passes by, so the database must be spoken to without TLS.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self.weather = _Weather()
        self._aims: list[_Aim] = []
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0
        self.hits = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and stop listening."""
        self._do(self._server.close)
        self.cut()
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def aim(self, fault: Fault, marker: bytes, *, times: int = 1) -> None:
        """Break the next *times* connections on which the client sends *marker*.

        ``"cut before"``: the server never sees it. ``"cut after"``: the server has answered, and
        the client never sees that. ``"hang"``: the server gets it, and the client no
        answer, over a connection that stays open.
        """
        self._do(self._aims.append, _Aim(fault, marker, times))

    def set_delay(self, seconds: float) -> None:
        """Let everything that the client sends arrive *seconds* later."""
        self.weather.delay = seconds

    def set_slices(self, size: int) -> None:
        """Pass everything on in pieces of *size* bytes; 0: as it comes."""
        self.weather.slice = size

    def go_silent(self) -> None:
        """Take what is sent, on old and new connections, and pass nothing on, either way."""
        self.weather.silent = True

    def cut(self) -> None:
        """Cut all connections that there are."""
        self._do(self._cut)

    def heal(self) -> None:
        """Forget all faults. What is lost stays lost."""
        self.weather = _Weather()
        self._do(self._aims.clear)

    def through(self, url: str) -> str:
        """Return the database *url* with the proxy's address in it."""
        scheme, _, rest = url.partition("://")
        login, at, place = rest.rpartition("@")
        _, slash, path = place.partition("/")
        return f"{scheme}://{login}{at}127.0.0.1:{self.port}{slash}{path}"

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._links)

    def _do(self, method: Any, *args: Any) -> None:
        async def call() -> None:
            method(*args)

        self._run(call())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(self, reader, writer, *server)
        self._links.add(link)
        try:
            await link.relay()
        finally:
            self._links.discard(link)

    def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    async def _finish(self) -> None:
        await self._server.wait_closed()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def strike(self, data: bytes) -> Fault | None:
        """Return what is to happen to a connection on which the client has sent *data*."""
        for aim in self._aims:
            if aim.marker in data:
                aim.times -= 1
                self.hits += 1
                if not aim.times:
                    self._aims.remove(aim)
                return aim.fault
        return None


@dataclass(eq=False)
class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    proxy: FaultProxy
    client_reader: asyncio.StreamReader
    client: asyncio.StreamWriter
    server_reader: asyncio.StreamReader
    server: asyncio.StreamWriter
    struck: Fault | None = field(default=None)

    async def relay(self) -> None:
        """Pass everything on, until one side closes."""
        directions = [
            asyncio.ensure_future(self._to_server()),
            asyncio.ensure_future(self._to_client()),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            self.cut()
            await asyncio.gather(*directions, return_exceptions=True)

    def cut(self) -> None:
        """Cut both sides at once."""
        self.client.transport.abort()
        self.server.transport.abort()

    async def _to_server(self) -> None:
        while data := await self.client_reader.read(_CHUNK):
            if self.proxy.weather.delay:
                await asyncio.sleep(self.proxy.weather.delay)
            self.struck = self.struck or self.proxy.strike(data)
            if self.struck == "cut before":
                return
            await self._pass_on(data, self.server)

    async def _to_client(self) -> None:
        while data := await self.server_reader.read(_CHUNK):
            if self.struck == "cut after":
                return
            if self.struck != "hang":
                await self._pass_on(data, self.client)

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        weather = self.proxy.weather
        if weather.silent:
            return
        size = weather.slice or len(data)
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
