"""The proxy that breaks connections: each fault does what it says, and nothing beside it."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from sessionscope.testing import Fault, FaultProxy

FAULTS: tuple[Fault, ...] = ("cut before", "cut after", "hang")


class Echo(socketserver.ThreadingTCPServer):
    """Answers each message with itself, and keeps what it has received."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.changed = threading.Condition()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def got(self, data: bytes) -> bool:
        """Wait until *data* has arrived, in however many pieces; return whether it has."""
        with self.changed:
            return self.changed.wait_for(lambda: data in b"".join(self.received), timeout=10)


class Answer(socketserver.BaseRequestHandler):
    server: Echo  # pyright: ignore[reportIncompatibleVariableOverride]  # it serves no other

    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                with self.server.changed:
                    self.server.received.append(data)
                    self.server.changed.notify_all()
                self.request.sendall(data)
        except ConnectionError:
            pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with connect(proxy) as client:
        yield client


def connect(proxy: FaultProxy) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def ask(client: socket.socket, data: bytes) -> bytes:
    """What comes back for *data*, as much of it as was sent, or nothing once it was cut."""
    try:
        client.sendall(data)
        answer = b""
        while len(answer) < len(data) and (more := client.recv(65536)):
            answer += more
    except ConnectionError:
        return b""
    return answer


def is_silent(client: socket.socket) -> bool:
    """Whether a connection is open, and nothing comes for a moment."""
    client.settimeout(0.1)
    try:
        return client.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)


def test_without_a_fault_all_passes(client: socket.socket, proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 256
    assert ask(client, data) == data
    assert proxy.connections == 1
    assert proxy.hits == 0


def test_cut_before(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """The server gets what was sent earlier, and never the marker."""
    proxy.aim("cut before", b"COMMIT")
    assert ask(client, b"INSERT;") == b"INSERT;"
    assert ask(client, b"COMMIT;") == b""
    assert b"".join(echo.received) == b"INSERT;"
    assert proxy.hits == 1


def test_cut_after(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """The server has the marker, and the client never hears of it."""
    proxy.aim("cut after", b"COMMIT")
    assert ask(client, b"COMMIT;") == b""
    assert echo.got(b"COMMIT;")


def test_hang(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """As cut after, but the client cannot tell it from a server that takes its time."""
    proxy.aim("hang", b"COMMIT")
    client.sendall(b"COMMIT;")
    assert echo.got(b"COMMIT;")
    assert is_silent(client)
    proxy.heal()
    assert client.recv(100) == b"COMMIT;"
    assert ask(client, b"?") == b"?"
    proxy.aim("hang", b"COMMIT")
    client.sendall(b"COMMIT;")
    assert is_silent(client)
    proxy.cut()
    assert ask(client, b"?") == b""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("pieces", [[b"COM", b"MIT;"], [b"C", b"O", b"M", b"M", b"I", b"T"]])
def test_a_marker_in_pieces_is_met(
    client: socket.socket, proxy: FaultProxy, echo: Echo, fault: Fault, pieces: list[bytes]
) -> None:
    """TCP has no messages: any byte may be the last one of a read."""
    proxy.aim(fault, b"COMMIT")
    *first, last = pieces
    for piece in first:
        assert ask(client, piece) == piece
    client.sendall(last)
    if fault == "hang":
        assert is_silent(client)
    else:
        assert ask(client, b"?") == b""
    assert proxy.hits == 1
    if fault == "cut before":
        assert b"COMMIT" not in b"".join(echo.received)
    else:
        assert echo.got(b"COMMIT")


def test_one_marker_is_met_once(client: socket.socket, proxy: FaultProxy) -> None:
    """What was looked at before does not meet the next aim."""
    assert ask(client, b"COMMIT;") == b"COMMIT;"
    proxy.aim("cut before", b"COMMIT")
    assert ask(client, b"INSERT;") == b"INSERT;"
    assert proxy.hits == 0


def test_as_often_as_was_asked(proxy: FaultProxy) -> None:
    proxy.aim("cut before", b"COMMIT", times=2)
    answers = []
    for _ in range(3):
        with connect(proxy) as client:
            answers.append(ask(client, b"COMMIT;"))
    assert answers == [b"", b"", b"COMMIT;"]
    assert proxy.hits == 2


def test_other_connections_are_not_touched(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.aim("cut before", b"COMMIT")
    with connect(proxy) as other:
        assert ask(other, b"COMMIT;") == b""
    assert ask(client, b"INSERT;") == b"INSERT;"


def test_a_black_hole_passes_nothing_on_until_it_is_over(
    client: socket.socket, proxy: FaultProxy, echo: Echo
) -> None:
    """On old and new connections; then all of it arrives, late, as in a network."""
    assert ask(client, b"first;") == b"first;"
    proxy.go_silent()
    client.sendall(b"second;")
    with connect(proxy) as other:
        other.sendall(b"third;")
        assert is_silent(client)
        assert is_silent(other)
        assert b"".join(echo.received) == b"first;"
        proxy.heal()
        assert client.recv(7) == b"second;"
        assert other.recv(6) == b"third;"


def test_a_black_hole_can_be_cut(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """What it holds is lost then."""
    proxy.go_silent()
    client.sendall(b"lost;")
    assert is_silent(client)
    proxy.cut()
    assert ask(client, b"?") == b""
    proxy.heal()
    with connect(proxy) as other:
        assert ask(other, b"next;") == b"next;"
    assert b"".join(echo.received) == b"next;"


def test_what_the_client_sends_can_be_late(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.set_delay(0.5)
    began = monotonic()
    assert ask(client, b"late;") == b"late;"
    assert monotonic() - began >= 0.5
    proxy.heal()
    began = monotonic()
    assert ask(client, b"soon;") == b"soon;"
    assert monotonic() - began < 0.5


def test_slices(client: socket.socket, proxy: FaultProxy, echo: Echo) -> None:
    """All of it arrives, in more pieces than it was sent in, unless the kernel joins them."""
    proxy.set_slices(3)
    data = bytes(range(256)) * 8
    sent = 0
    while len(echo.received) == sent < 100:
        assert ask(client, data) == data
        sent += 1
    assert b"".join(echo.received) == data * sent
    assert len(echo.received) > sent


def test_all_connections_are_cut(proxy: FaultProxy) -> None:
    clients = [connect(proxy) for _ in range(3)]
    assert [ask(client, b"hello;") for client in clients] == [b"hello;"] * 3
    assert proxy.connections == 3
    proxy.cut()
    assert [ask(client, b"hello;") for client in clients] == [b""] * 3
    for client in clients:
        client.close()


def test_a_server_that_is_away_cuts_who_comes(echo: Echo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with FaultProxy("127.0.0.1", port) as proxy, connect(proxy) as client:
        assert ask(client, b"hello;") == b""


@pytest.mark.parametrize("silent", [False, True])
def test_it_ends_with_its_block(echo: Echo, silent: bool) -> None:
    """Its thread, its port and its connections, whatever they wait for."""
    threads = set(threading.enumerate())
    with FaultProxy("127.0.0.1", echo.port) as proxy:
        client = connect(proxy)
        assert ask(client, b"hello;") == b"hello;"
        if silent:
            proxy.go_silent()
            client.sendall(b"more;")
    assert ask(client, b"?") == b""
    client.close()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert {t for t in threading.enumerate() if t.name == "sessionscope-proxy"} <= threads


def test_it_can_be_told_from_many_threads(proxy: FaultProxy) -> None:
    """What belongs to its own thread is touched there alone."""
    errors: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(50):
                with connect(proxy) as client:
                    ask(client, b"hello;")
                proxy.cut()
                proxy.heal()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


@pytest.mark.parametrize("marker", [b"", b"x" * 2000])
def test_a_marker_that_cannot_be_met_is_refused(proxy: FaultProxy, marker: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 1024 bytes"):
        proxy.aim("hang", marker)


def test_a_url_leads_through_it(proxy: FaultProxy) -> None:
    """Everything but the address stays as it is."""
    there = f"127.0.0.1:{proxy.port}"
    assert proxy.through("postgresql://db:5432/app") == f"postgresql://{there}/app"
    url = proxy.through("postgresql+asyncpg://me:p%40ss@db:5432/app?ssl=disable")
    assert url == f"postgresql+asyncpg://me:p%40ss@{there}/app?ssl=disable"
