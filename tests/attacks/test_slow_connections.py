"""Attacks by connections: that say little, read nothing, say more than they are asked, or are simply many.

At 7adab1e a head behind a request that was held had no bound (150 MiB in 0.3 s), nor had a body behind one; whoever did not
read an answer held it in memory for ever; a connection that never began its TLS stayed for a minute,
uncounted.
"""

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sumus.http.certificates import Certificate
from sumus.http.tls import issue
from sumus.wire.messages import CheckInRequest, write
from tests.attacks.besieged import (
    ELSEWHERE,
    Besieged,
    besieged,
    code_of,
    comes_true,
    floods,
    head_of,
    heard,
    is_ended,
    listening,
)
from tests.server.devices import tiny

MIB = 2**20
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: besieged\r\n\r\n"
SIZE = 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Besieged]:
    """With a model of 4 MiB, and a plan that takes two of a round."""
    with besieged(tiny(2, size=SIZE)) as found:
        yield found


def shortened(monkeypatch: pytest.MonkeyPatch, *names: str, to: float = 0.3) -> None:
    """Let these times be short."""
    for name in names:
        monkeypatch.setattr(f"sumus.http.connections.{name}", to, raising=False)


def held(server: Besieged) -> socket.socket:
    """A connection whose request waits for its answer."""
    device = server.device()
    asked = write(CheckInRequest(1, "s1", (server.bundle.plan.description.fingerprint,), ("evaluate",), wait_s=20.0))
    connection = server.connect()
    before = server.service.server.held
    connection.sendall(head_of(device, "POST", "/v1/checkins", asked) + asked)
    assert comes_true(lambda: server.service.server.held > before)
    return connection


def counted(server: Besieged) -> Any:
    """Where the server's connections are counted."""
    return server.planes._planes[0][1]._connections  # pyright: ignore[reportPrivateUsage]


def stands(server: Besieged, address: tuple[str, int]) -> bool:
    """Whether the server has a connection from an address."""
    return any(one.client == address for one in list(counted(server).open))


# ── who says more than it is asked ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("piece", [b"GET / HTTP/1.1\r\nA: ", b"GET /", b"X" * 1000])
def test_a_head_without_end_behind_a_held_request_is_not_kept(server: Besieged, piece: bytes) -> None:
    with held(server) as connection:
        connection.sendall(piece)
        assert not floods(connection, b"a" * MIB, 48 * MIB)
    server.whole_round()


def test_requests_behind_a_held_one_are_not_kept(server: Besieged) -> None:
    with held(server) as connection:
        assert not floods(connection, ALIVE * 1000, 48 * MIB)
    server.whole_round()


def test_bodies_behind_a_held_request_are_not_kept(server: Besieged) -> None:
    with held(server) as connection:
        connection.sendall(b"PUT /v1/tasks/tiny/train/s1 HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n")
        assert not floods(connection, b"a" * MIB, 48 * MIB)


def test_headers_without_end_behind_a_chunked_body_are_not_kept(server: Besieged) -> None:
    with server.connect() as connection:
        connection.sendall(b"PUT /v1/tasks/tiny/train/s1 HTTP/1.1\r\nSumus-Protocol: 1\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n0\r\n")
        assert not floods(connection, b"A: b\r\n" * 2**17, 48 * MIB)


def test_a_refused_body_is_not_read_for_ever(server: Besieged, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"PUT /v1/tasks/tiny/train/s1 HTTP/1.1\r\nSumus-Protocol: 1\r\nContent-Length: 10000000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head)
        assert code_of(heard(connection)) == "too_large", "the answer arrives, though the body does not end"
        assert not floods(connection, b"a" * MIB, 48 * MIB)
    shortened(monkeypatch, "LINGER_S")
    with server.connect() as connection:
        connection.sendall(head + b"a")
        assert code_of(heard(connection)) == "too_large"
        assert is_ended(connection)


def test_a_head_of_many_headers_is_too_long_like_one_of_a_long_one(server: Besieged) -> None:
    many = b"".join(b"A%d: b\r\n" % number for number in range(6000))
    with server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n" + many + b"\r\n")
        assert heard(connection) == b""


@pytest.mark.parametrize(
    "upgrade",
    [
        b"GET /healthz HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"CONNECT other:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_another_protocol_is_not_spoken(server: Besieged, upgrade: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(upgrade)
        heard(connection)
        assert not floods(connection, b"a" * MIB, 48 * MIB)


def test_a_body_that_waits_to_be_asked_for_is_asked_for_once_its_sender_is_known(server: Besieged) -> None:
    device, work = server.working()
    head, body = server.report(device, work)
    asking = head.replace(b"Host:", b"Expect: 100-continue\r\nHost:")
    with server.connect() as connection:
        connection.sendall(asking.replace(b"Sumus-Signature: ", b"Sumus-Signature: A"))
        assert code_of(heard(connection)) == "bad_signature"
        assert is_ended(connection)
    with server.connect() as connection:
        connection.sendall(asking)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert code_of(heard(connection)) == "200"
    server.whole_round((device, work))


def test_requests_one_after_the_other_share_a_connection(server: Besieged) -> None:
    """The control of all of these."""
    with server.connect() as connection:
        for _ in range(5):
            connection.sendall(ALIVE)
            assert code_of(heard(connection)) == "200"
        unwanted = b"PUT /v1/tasks/tiny/train/s1 HTTP/1.1\r\nSumus-Protocol: 1\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(unwanted + b"a" * 100_000)
        assert code_of(heard(connection)) == "digest_required"
        connection.sendall(ALIVE)
        assert code_of(heard(connection)) == "200"


# ── who says little, or reads nothing ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("begun", [b"", b"GET /heal", b"\r\n", ALIVE + b"GET"])
def test_a_head_that_does_not_come_ends_its_connection(
    server: Besieged, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    shortened(monkeypatch, "HEAD_S", "LINGER_S")
    with server.connect() as connection:
        connection.sendall(begun)
        if begun.startswith(ALIVE):
            assert code_of(heard(connection)) == "200"
        assert is_ended(connection)
    server.whole_round()


def asks_for_a_model(server: Besieged, headers: bytes = b"") -> bytes:
    """A request whose answer is long."""
    sha256 = server.service.server.tasks[0].training.objects
    long = max(sha256, key=lambda each: server.service.blobs.size(each) or 0)
    return f"GET /v1/objects/{long} HTTP/1.1\r\nHost: besieged\r\n".encode() + headers + b"\r\n"


@pytest.mark.parametrize("headers", [b"", b"Range: bytes=1-\r\n"])
def test_readers_who_do_not_read_are_given_up(
    server: Besieged, monkeypatch: pytest.MonkeyPatch, headers: bytes
) -> None:
    shortened(monkeypatch, "STALLED_S")
    with ExitStack() as stack:
        many: list[socket.socket] = []
        for _ in range(10):
            many.append(lazy := stack.enter_context(socket.socket()))
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", server.port))
            lazy.sendall(asks_for_a_model(server, headers))
        addresses = [lazy.getsockname() for lazy in many]
        assert comes_true(lambda: not any(stands(server, each) for each in addresses))
        shortened(monkeypatch, "STALLED_S", to=10.0)  # as it is: a loaded machine stops honest readers for a moment
        with server.connect() as honest:
            honest.sendall(asks_for_a_model(server, headers))
            assert len(heard(honest)) > 4 * SIZE
    server.whole_round()


def test_a_reader_who_reads_a_little_is_given_up(server: Besieged, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened(monkeypatch, "STALLED_S", to=1.0)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(asks_for_a_model(server))

        def given_up() -> bool:
            with suppress(ConnectionError):
                reader.recv(10)
            return not stands(server, mine)

        mine = reader.getsockname()
        assert comes_true(lambda: stands(server, mine))
        assert comes_true(given_up)


def test_a_reader_who_is_slow_is_waited_for(server: Besieged, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened(monkeypatch, "STALLED_S", to=2.0)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(asks_for_a_model(server))
        got = 0
        while got < 4 * SIZE:
            read = len(reader.recv(2**16))
            assert read
            got += read
            comes_true(lambda: False, 0.02)


# ── who is many ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Besieged]:
    """A server of thirty-two connections."""
    monkeypatch.setattr("sumus.http.listening.MOST", (32, 32), raising=False)
    with besieged(tiny(2)) as found:
        yield found


def test_many_connections_of_one_neighbourhood_leave_places_for_others(
    small: Besieged, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(monkeypatch, "UNUSED_S", to=0.0)
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(small.connect()).sendall(b"GET /heal")
        with small.connect(ELSEWHERE) as honest:
            honest.sendall(ALIVE)
            assert code_of(heard(honest)) == "200"
        assert counted(small).shares.taken <= 32
        with small.connect() as neighbour:  # who waits longest gives way
            neighbour.sendall(ALIVE)
            assert code_of(heard(neighbour)) == "200"
        small.whole_round()


def test_connections_that_come_and_go_are_counted_out(small: Besieged) -> None:
    def answers() -> bool:
        with small.connect() as connection:
            connection.sendall(ALIVE)
            return code_of(heard(connection)) == "200"

    for begun in (b"", b"GET", ALIVE, ALIVE * 3, b"nonsense\r\n\r\n"):
        for _ in range(50):
            with small.connect() as connection:
                connection.sendall(begun)
        assert comes_true(answers), "once it is, those before were accepted too"
    assert comes_true(lambda: counted(small).shares.taken == 0)
    small.whole_round()


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


def test_connections_that_never_begin_their_tls_are_counted_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(monkeypatch, "HANDSHAKE_S")
    made = issue(tmp_path, ["localhost"], datetime.now(UTC))
    trusting = ssl.create_default_context(cafile=str(made.authority))
    with listening(answering, Certificate(made.chain, made.key)) as (port, planes), ExitStack() as stack:
        places: Callable[[], int] = lambda: planes._planes[0][1]._connections.shares.taken  # noqa: E731 # pyright: ignore
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        for each in silent[:10]:
            each.sendall(b"\x16\x03\x01")
        assert all(map(is_ended, silent))
        assert comes_true(lambda: places() == 0)
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100):
            with socket.create_connection(("127.0.0.1", port)) as other:
                other.sendall(nonsense)
                heard(other)
        shortened(monkeypatch, "HANDSHAKE_S", to=10.0)  # as it is: a handshake takes a while on a loaded machine
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            trusting.wrap_socket(plain, server_hostname="localhost") as honest,
        ):
            honest.sendall(ALIVE)
            assert code_of(heard(honest)) == "200"
        assert comes_true(lambda: places() == 0)
