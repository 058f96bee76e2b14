"""Attacks on the memory for bodies: uploads that are cut, refused, announced, doubled or never end, so that there is none left.

At 7adab1e a body whose upload was cut stayed in memory until a full collection found it: an error, its traceback and the body
held each other. Memory was lent to whoever named a device, before the signature was looked at. No attacker was needed for
the first: a phone that loses its signal does it.
"""

import gc
import socket
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from select import select

import numpy as np
import pytest

from sumus.aggregate import Update
from sumus.wire.messages import Assignment
from sumus.wire.reports import encode_report
from tests.attacks.besieged import ELSEWHERE, Besieged, besieged, code_of, comes_true, head_of, heard
from tests.server.devices import ScriptedDevice, path_of, tiny

SIZE = 2**16
BODIES = 8
"""Reports that there is memory for, and a little."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Besieged]:
    """With memory for eight reports of 256 KiB; its plan makes a model of three, and many may be at work."""
    monkeypatch.setattr("sumus.server.senders.STRANGERS", 2**20, raising=False)
    with besieged(tiny(3, size=SIZE, concurrency=1000), memory=2 * 2**20 + 2**19) as found:
        yield found


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without collections: what is freed here, counting references frees."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@contextmanager
def sent(server: Besieged, piece: bytes, source: str = "127.0.0.1") -> Generator[socket.socket, None, None]:
    """A connection on which this was sent."""
    with server.connect(source) as connection:
        connection.sendall(piece)
        yield connection


def lends(server: Besieged, many: int) -> Callable[[], bool]:
    """Whether so many reports are in lent memory."""
    return lambda: server.service.room.lent >= many * SIZE * 4


def nothing_lent(server: Besieged) -> bool:
    return comes_true(lambda: server.service.room.lent == 0, 10.0)


# ── uploads that end badly ───────────────────────────────────────────────────────────────────────────────────────────


def test_uploads_that_are_cut_leave_nothing_behind(server: Besieged, uncollected: None) -> None:
    for _ in range(2 * BODIES):
        device, work = server.working()
        head, body = server.report(device, work)
        with sent(server, head + body[: len(body) // 2]):
            assert comes_true(lends(server, 1))
    assert nothing_lent(server)
    server.whole_round()


def others(server: Besieged, device: ScriptedDevice, work: Assignment) -> dict[str, bytes]:
    """Requests with a whole body that are refused after it was read, by the code."""
    right = encode_report(Update(device.id, {"params": {"w": np.ones(SIZE, np.float32)}}, 10, {"loss": (5.0, 10)}))
    wrong = encode_report(Update(device.id, {"params": {"w": np.ones(SIZE + 1, np.float32)}}, 10, {"loss": (5.0, 10)}))
    bad = encode_report(
        Update(device.id, {"params": {"w": np.full(SIZE, np.nan, np.float32)}}, 10, {"loss": (5.0, 10)})
    )
    long_over = path_of(work).replace(work.session, "never-given")
    return {
        "bad_report": head_of(device, "PUT", path_of(work), wrong) + wrong,
        "not_finite": head_of(device, "PUT", path_of(work), bad) + bad,
        "unknown_session": head_of(device, "PUT", long_over, right) + right,
        "bad_digest": head_of(device, "PUT", path_of(work), right) + right[:-1] + b"x",
    }


@pytest.mark.parametrize("what", ["bad_report", "not_finite", "unknown_session", "bad_digest"])
def test_uploads_that_are_refused_leave_nothing_behind(server: Besieged, uncollected: None, what: str) -> None:
    for _ in range(2 * BODIES):
        device, work = server.working()
        with sent(server, others(server, device, work)[what]) as connection:
            assert code_of(heard(connection)) == what
    assert nothing_lent(server)
    server.whole_round((device, work))


def test_uploads_that_stop_are_refused_and_leave_nothing_behind(
    server: Besieged, uncollected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with monkeypatch.context() as patch, ExitStack() as stack:
            pieces = [server.report(*server.working()) for _ in range(BODIES // 2)]
            patch.setattr("sumus.http.bodies.WINDOW_S", 0.3)
            stopped = [stack.enter_context(sent(server, head + body[:1000])) for head, body in pieces]
            assert [code_of(heard(each)) for each in stopped] == ["slow"] * len(stopped)
            assert nothing_lent(server)
    server.whole_round()


# ── memory that is not theirs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Sumus_Signature": "A" * 86}, "bad_signature"),
        ({"Sumus_Signature": "A" * 86, "Sumus_Digest": ""}, "digest_required"),
        ({"Sumus_Device": "0" * 64}, "unknown_device"),
        ({"Sumus_Digest": "0" * 64}, "bad_signature"),
        ({"Sumus_Digest": "A" * 64}, "malformed"),
    ],
)
def test_announcing_bodies_of_others_takes_no_memory(server: Besieged, headers: dict[str, str], code: str) -> None:
    victim, work = server.working()
    _, body = server.report(victim, work)
    with ExitStack() as stack:
        for _ in range(2 * BODIES):
            head = head_of(victim, "PUT", path_of(work), body, **headers)
            connection = stack.enter_context(sent(server, head + body[:1000]))
            assert code_of(heard(connection)) == code
        assert server.service.room.lent == 0
        server.whole_round((victim, work))


def test_a_device_that_uploads_on_many_connections_has_one_body(server: Besieged) -> None:
    device, work = server.working()
    head, body = server.report(device, work)
    with sent(server, head + body[: len(body) // 2]) as first:
        assert comes_true(lends(server, 1))
        for _ in range(2 * BODIES):
            with sent(server, head + body[: len(body) // 2]) as again:
                assert code_of(heard(again)) == "busy"
        assert not lends(server, 2)()
        first.sendall(body[len(body) // 2 :])
        assert code_of(heard(first)) == "200"
    server.whole_round((device, work))


def answered(connection: socket.socket) -> bool:
    """Whether an answer is there to be read."""
    return bool(select([connection], [], [], 0)[0])


def either(one: Callable[[], bool], other: Callable[[], bool]) -> bool:
    return one() or other()


def test_one_neighbourhood_leaves_memory_for_others(server: Besieged) -> None:
    with ExitStack() as stack:
        lent = refused = 0
        for head, body in [server.report(*server.working()) for _ in range(BODIES + 1)]:
            connection = stack.enter_context(sent(server, head + body[: len(body) // 2]))
            one_more = lends(server, lent + 1)
            assert comes_true(partial(either, one_more, partial(answered, connection)))
            if one_more():
                lent += 1
            else:
                assert code_of(heard(connection)) == "busy"
                refused += 1
        assert refused
        assert lent >= 5, "with nobody else here, they have most of it"
        head, body = server.report(*server.working())
        with sent(server, head + body, ELSEWHERE) as honest:
            assert code_of(heard(honest)) == "200"


def test_strangers_who_send_bodies_leave_memory_for_those_who_are_known(server: Besieged) -> None:
    body = b'{"token":"' + b"a" * 60_000
    head = f"POST /v1/enrolments HTTP/1.1\r\nSumus-Protocol: 1\r\nContent-Length: {2**16}\r\n\r\n".encode()
    with ExitStack() as stack:
        crowd = [stack.enter_context(sent(server, head + body)) for _ in range(20)]
        assert comes_true(lambda: any(map(answered, crowd)))
        (first, *_) = filter(answered, crowd)
        assert code_of(heard(first)) == "busy"
        server.whole_round()  # their check-ins are short
        with sent(server, head + b'{"token":"' + b"a" * (2**16 - 10), ELSEWHERE) as honest:
            assert code_of(heard(honest)) == "malformed", "it was read"
