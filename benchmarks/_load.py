"""HTTP load: keep-alive clients that cost little, and what they were answered."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

T = TypeVar("T")

LOST = 0
REFUSED = 503


class Answer(NamedTuple):
    """What one request came to; status `LOST` if nothing came in time."""

    status: int
    seconds: float
    finished: float
    retry_after: bool = False


def request(path: str) -> bytes:
    """Return the bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()


class Client:
    """One keep-alive connection with one request at a time, opened anew after a failure."""

    def __init__(self, port: int, timeout: float) -> None:
        self._port = port
        self._timeout = timeout
        self._connection: _Connection | None = None

    async def connect(self) -> None:
        """Open the connection, unless it is open."""
        if self._connection is None or self._connection.closed:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)

    async def ask(self, data: bytes) -> Answer:
        """Send a request and wait for its answer, at most for the client's timeout."""
        start = time.perf_counter()
        try:
            await self.connect()
            assert self._connection is not None
            head = await self._connection.exchange(data, self._timeout)
        except OSError:
            self.close()
            head = b""
        finished = time.perf_counter()
        status = int(head[9:12]) if head else LOST
        return Answer(status, finished - start, finished, b"\r\nretry-after:" in head)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.abort()


class _Connection(asyncio.Protocol):
    """Just enough HTTP for answers with a content-length, which is what the servers send."""

    def __init__(self) -> None:
        self.closed = False
        self._received = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def exchange(self, data: bytes, timeout: float) -> bytes:
        """Send *data* and return the head of the answer."""
        loop = asyncio.get_running_loop()
        self._received = b""
        answer: asyncio.Future[bytes] = loop.create_future()
        self._answer = answer
        self._transport.write(data)
        timer = loop.call_later(timeout, self._fail, TimeoutError())
        try:
            return await answer
        finally:
            timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.lower().partition(b"\r\n\r\n")
        if found and len(body) >= _content_length(head):
            answer, self._answer = self._answer, None
            if answer is not None and not answer.done():
                answer.set_result(head)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._fail(ConnectionResetError())

    def abort(self) -> None:
        """Close without waiting for what is still to be sent."""
        self.closed = True
        self._transport.abort()

    def _fail(self, error: OSError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _content_length(head: bytes) -> int:
    _, found, rest = head.partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


@dataclass
class Tally:
    """What a number of requests came to."""

    wall: float
    answers: list[Answer]
    health: list[Answer] = field(default_factory=list)
    wedged: bool = False
    sent: int = 0
    """How many requests there were, with those that are not counted."""

    def count(self, status: int) -> int:
        """Return how many requests were answered with *status*."""
        return sum(answer.status == status for answer in self.answers)

    @property
    def ok(self) -> int:
        """Return how many requests succeeded."""
        return self.count(200)

    @property
    def failed(self) -> int:
        """Return how many requests were answered with neither 200 nor 503."""
        return len(self.answers) - self.ok - self.count(REFUSED) - self.count(LOST)

    @property
    def rate(self) -> float:
        """Return the successful requests per second."""
        return self.ok / self.wall

    @property
    def refusals(self) -> list[Answer]:
        """Return the answers that refused."""
        return [answer for answer in self.answers if answer.status == REFUSED]


def quantile(answers: Sequence[Answer], share: float, status: int = 200) -> float:
    """Return the milliseconds within which *share* of the answers with *status* came."""
    times = sorted(answer.seconds for answer in answers if answer.status == status)
    return times[min(len(times) - 1, int(share * len(times)))] * 1e3 if times else float("nan")


def burst(port: int, paths: Sequence[str], clients: int, timeout: float) -> Tally:
    """Let *clients* send one request each at the same moment."""
    return asyncio.run(_burst(port, paths, clients, timeout))


async def _burst(port: int, paths: Sequence[str], clients: int, timeout: float) -> Tally:
    crowd = [Client(port, timeout) for _ in range(clients)]
    await asyncio.gather(*(client.connect() for client in crowd))
    start = time.perf_counter()
    requests = itertools.cycle(map(request, paths))
    answers = await asyncio.gather(*(client.ask(next(requests)) for client in crowd))
    wall = time.perf_counter() - start
    for client in crowd:
        client.close()
    return Tally(wall, answers, sent=clients)


def in_turn(port: int, paths: Sequence[str], timeout: float) -> list[int]:
    """Ask for *paths* one after the other, on new connections; return the statuses."""

    async def ask(path: str) -> int:
        client = Client(port, timeout)
        answer = await client.ask(request(path))
        client.close()
        return answer.status

    async def ask_all() -> list[int]:
        return [await ask(path) for path in paths]

    return asyncio.run(ask_all())


def in_series(port: int, paths: Sequence[str], *, settle: float = 0.0) -> list[Answer]:
    """Ask for *paths* one after the other, on one connection, and wait *settle* seconds."""

    async def ask_all() -> list[Answer]:
        client = Client(port, 5.0)
        answers = [await client.ask(request(path)) for path in paths]
        await asyncio.sleep(settle)
        client.close()
        return answers

    return asyncio.run(ask_all())


def while_streaming(port: int, path: str, clients: int, then: Callable[[], T]) -> T:
    """Call *then*, in a thread, while *clients* wait for the rest of an answer that has begun.

    Those whose answer has not begun within a second have gone.
    """

    async def hold() -> T:
        crowd = [Client(port, 1.0) for _ in range(clients)]
        await asyncio.gather(*(client.ask(request(path)) for client in crowd))
        try:
            return await asyncio.to_thread(then)
        finally:
            for client in crowd:
                client.close()

    return asyncio.run(hold())


@dataclass(frozen=True)
class Pace:
    """How long a load lasts, and how long one of its clients waits for an answer."""

    seconds: float
    timeout: float = 5.0
    warm_up: float = 0.5


def sustain(port: int, paths: Sequence[str], clients: int, pace: Pace) -> Tally:
    """Let *clients* send one request after the other; what comes in the warm-up is not counted."""

    async def load(tally: list[Answer], end: float) -> None:
        requests = itertools.cycle(map(request, paths))
        await asyncio.gather(
            *(_insist(port, next(requests), pace, tally, end) for _ in range(clients))
        )

    return asyncio.run(_watched(port, load, pace))


async def _insist(port: int, data: bytes, pace: Pace, tally: list[Answer], end: float) -> None:
    client = Client(port, pace.timeout)
    while time.perf_counter() < end:
        tally.append(await client.ask(data))
    client.close()


def flood(port: int, path: str, rate: float, pace: Pace) -> Tally:
    """Send *rate* requests per second, however slowly they are answered."""

    async def load(tally: list[Answer], end: float) -> None:
        idle: list[Client] = []
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for turn in itertools.count():
                due = start + turn / rate
                if due >= end:
                    break
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(_once(port, request(path), pace, tally, idle))
        for client in idle:
            client.close()

    return asyncio.run(_watched(port, load, pace))


async def _once(
    port: int, data: bytes, pace: Pace, tally: list[Answer], idle: list[Client]
) -> None:
    client = idle.pop() if idle else Client(port, pace.timeout)
    tally.append(await client.ask(data))
    idle.append(client)


async def _watched(
    port: int, load: Callable[[list[Answer], float], Awaitable[None]], pace: Pace
) -> Tally:
    """Run *load*, ask for `/health` meanwhile, and keep what came after the warm-up."""
    begin = time.perf_counter() + pace.warm_up
    end = begin + pace.seconds
    answers: list[Answer] = []
    health: list[Answer] = []
    probing = asyncio.ensure_future(_probe(port, health, end))
    await load(answers, end)
    await probing
    # Requests that were under way at the end have been answered by now, or given up.
    late = [answer for answer in answers if begin <= answer.finished]
    counted = [answer for answer in late if answer.finished <= end or answer.status != 200]
    half = begin + pace.seconds / 2
    wedged = not any(answer.status == 200 and answer.finished > half for answer in counted)
    return Tally(pace.seconds, counted, health, wedged, len(answers))


async def _probe(port: int, health: list[Answer], end: float) -> None:
    client = Client(port, 2.0)
    while time.perf_counter() < end:
        health.append(await client.ask(request("/health")))
        await asyncio.sleep(0.02)
    client.close()


def healthy(port: int, timeout: float) -> bool:
    """Return whether `/health` answers 200 within *timeout*."""
    return burst(port, ["/health"], 1, timeout).ok == 1
