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
# Bytes that are remembered, for a marker that is sent in pieces.
_LONGEST_MARKER = 1024


@dataclass
class _Weather:
    """What the proxy does to all of its connections now."""

    delay: float = 0.0
    slice: int = 0


@dataclass
class _Aim:
    """A fault for the next *times* connections on which *marker* is sent."""

    fault: Fault
    marker: bytes
    times: int


class FaultProxy:
    """Listen on a free port of 127.0.0.1, lead to *host* and *port*, and break what is asked.

    A context manager, on a thread of its own; its methods may be called from any thread::

        with FaultProxy("127.0.0.1", 5432) as proxy:
            database = Database(proxy.through(url))
            proxy.aim("cut after", b"COMMIT")

    It reads what passes by, so the database must be spoken to without TLS. While the database
    cannot be reached, each new connection is cut.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._weather = _Weather()
        self._aims: list[_Aim] = []
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="sessionscope-proxy", daemon=True
        )
        self._passing = asyncio.Event()
        self._passing.set()
        self.port = 0
        self.hits = 0

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._server: asyncio.Server = self._run(self._listen())
        except BaseException:
            self._stop()
            raise
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
        try:
            self._run(self._finish())
        finally:
            self._stop()

    def aim(self, fault: Fault, marker: bytes, *, times: int = 1) -> None:
        """Break the next *times* connections on which the client sends *marker*.

        ``"cut before"``: the server never sees the whole of it. ``"cut after"``: the server has
        answered, and the client never sees that. ``"hang"``: the server gets it, and the
        client no answer, over a connection that stays open, until :meth:`heal`. ``hits`` counts
        how often it was met.
        """
        if not 0 < len(marker) <= _LONGEST_MARKER:
            raise ValueError(f"The marker must have 1 to {_LONGEST_MARKER} bytes: {marker!r}")
        self._do(self._aims.append, _Aim(fault, marker, times))

    def set_delay(self, seconds: float) -> None:
        """Let everything that the client sends arrive *seconds* later."""
        self._weather.delay = seconds

    def set_slices(self, size: int) -> None:
        """Pass everything on in pieces of *size* bytes; 0: as it comes."""
        self._weather.slice = size

    def go_silent(self) -> None:
        """Be a black hole: pass nothing on, either way, on old and new connections.

        As in a network, it is on its way until :meth:`heal`, and then arrives late. Neither
        side learns of the other's end meanwhile.
        """
        self._do(self._passing.clear)

    def cut(self) -> None:
        """Cut all connections that there are."""
        self._do(self._cut)

    def heal(self) -> None:
        """Forget all faults. What connections that hang have not passed on arrives late."""
        self._do(self._heal)

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
        """Call *method* on the proxy's thread: neither sets nor events are for two."""

        async def call() -> None:
            method(*args)

        self._run(call())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(10)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        # As many may wait as all threads of a test can be.
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        link = _Link(self, reader, writer, *server)
        self._links.add(link)
        try:
            await link.relay()
        finally:
            self._links.discard(link)

    def _heal(self) -> None:
        self._weather = _Weather()
        self._aims.clear()
        self._passing.set()
        for link in self._links:
            link.go_on()

    def _cut(self) -> None:
        for link in self._links:
            link.cut()

    async def _finish(self) -> None:
        self._server.close()
        self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Send *data* on, when and as the weather allows."""
        await self._passing.wait()
        size = self._weather.slice or len(data)
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            if size < len(data):
                await asyncio.sleep(0)  # a step of the loop between two pieces, as between packets

    @property
    def delay(self) -> float:
        """Seconds by which everything that the client sends is late."""
        return self._weather.delay

    def strike(self, data: bytes, seen: int) -> Fault | None:
        """Return what is to happen to a connection whose client has sent *data*.

        Its first *seen* bytes were looked at before.
        """
        for aim in self._aims:
            if data.find(aim.marker, max(0, seen - len(aim.marker) + 1)) >= 0:
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
    struck: Fault | None = None
    recent: bytes = b""
    going_on: asyncio.Event = field(default_factory=asyncio.Event)
    directions: list["asyncio.Future[None]"] = field(default_factory=list["asyncio.Future[None]"])

    async def relay(self) -> None:
        """Pass everything on, until one side closes."""
        self.directions += [
            asyncio.ensure_future(self._to_server()),
            asyncio.ensure_future(self._to_client()),
        ]
        try:
            await asyncio.wait(self.directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.cut()
            await asyncio.gather(*self.directions, return_exceptions=True)

    def cut(self) -> None:
        """Cut both sides at once."""
        for direction in self.directions:  # which may wait for something else than the sides
            direction.cancel()
        self.client.transport.abort()
        self.server.transport.abort()

    def go_on(self) -> None:
        """Forget the fault that has struck."""
        self.struck = None
        self.going_on.set()

    async def _to_server(self) -> None:
        while data := await self.client_reader.read(_CHUNK):
            if self.proxy.delay:
                await asyncio.sleep(self.proxy.delay)
            if self.struck is None:
                self.struck = self._strike(data)
                self.going_on.clear()
            if self.struck == "cut before":
                return
            await self.proxy.pass_on(data, self.server)

    def _strike(self, data: bytes) -> Fault | None:
        sent = self.recent + data
        struck = self.proxy.strike(sent, len(self.recent))
        self.recent = sent[-_LONGEST_MARKER:]
        return struck

    async def _to_client(self) -> None:
        while data := await self.server_reader.read(_CHUNK):
            if self.struck == "cut after":
                return
            if self.struck == "hang":
                await self.going_on.wait()
            await self.proxy.pass_on(data, self.client)
