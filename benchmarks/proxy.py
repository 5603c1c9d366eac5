"""A TCP proxy between client and database that counts waited round trips and delays them.

A round trip is *waited* when the server's answer arrives after the client has sent something:
the client had to wait for it. What is sent in one go counts once, however many messages it has;
what gets no answer (closing a connection) does not count. A client that goes on sending while
answers already come back is counted once per change of direction.

The proxy is a process of its own, so that it takes no time from the process it measures. It
obeys lines on its standard input and ends with it.
"""

import argparse
import asyncio
import selectors
import subprocess
import sys
from types import TracebackType
from typing import Self


class Proxy:
    """The proxy's handle in the process that measures."""

    def __init__(self, host: str, port: int, *, delay: float = 0.0) -> None:
        command = [sys.executable, "-m", "benchmarks.proxy", host, str(port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self._answer())
        self.set_delay(delay)

    def waited(self) -> int:
        """Return how many round trips clients have waited for since the start."""
        return int(self._ask("waited"))

    def set_delay(self, seconds: float) -> None:
        """Make every round trip from now on take *seconds* longer."""
        self._ask(f"delay {seconds}")

    def close(self) -> None:
        """End the proxy and its connections."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The benchmarks' proxy has ended; see its error above.")
        return line


class _Relay:
    """The proxy itself: where it leads, what it adds, what it has counted."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.delay = 0.0
        self.waited = 0

    async def serve(self) -> None:
        """Listen on a free port, announce it, and obey commands until they end."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _ClientSide(self), "127.0.0.1", 0)
        commands = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        print(server.sockets[0].getsockname()[1], flush=True)
        while line := (await commands.readline()).decode().split():
            print(self._obey(line), flush=True)

    def _obey(self, line: list[str]) -> str:
        if line[0] == "delay":
            self.delay = float(line[1])
            return "ok"
        return str(self.waited)


class _ClientSide(asyncio.Protocol):
    """One client's connection; it opens the connection to the server."""

    def __init__(self, relay: _Relay) -> None:
        self.relay = relay
        self.asked = False
        self._early: list[bytes] = []
        self._server: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._opening = asyncio.ensure_future(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        relay = self.relay
        try:
            server, _ = await loop.create_connection(
                lambda: _ServerSide(self), relay.host, relay.port
            )
        except OSError:
            self.transport.abort()
            return
        self._server = server
        for data in self._early:
            server.write(data)

    def data_received(self, data: bytes) -> None:
        self.asked = True
        if self.relay.delay:
            asyncio.get_running_loop().call_later(self.relay.delay, self._forward, data)
        else:
            self._forward(data)

    def _forward(self, data: bytes) -> None:
        if self._server is None:
            self._early.append(data)
        else:
            self._server.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._server is not None:
            self._server.close()


class _ServerSide(asyncio.Protocol):
    """The connection to the server that belongs to one client's."""

    def __init__(self, client: _ClientSide) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        client = self._client
        if client.asked:
            client.asked = False
            client.relay.waited += 1
        client.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.transport.close()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    relay = _Relay(arguments.host, arguments.port)
    # epoll and poll round a delay up to whole milliseconds, select does not.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(relay.serve())


if __name__ == "__main__":
    _main()
