"""A flood of bad signatures in the name of a device that is honest.

At a375cc0 each was checked as it came: 2,400 a second took nine tenths of a core, and every other device waited three times as
long as at a server that checks nothing.
"""

from collections.abc import Iterator

import pytest

from sumus.http.room import near
from sumus.server.doubt import Doubt
from sumus.wire.messages import CheckInRequest, write
from tests.attacks.besieged import ELSEWHERE, Besieged, besieged, code_of, head_of, heard
from tests.server.devices import ScriptedDevice, tiny

HERE = "127.0.0.1"


@pytest.fixture
def server() -> Iterator[Besieged]:
    with besieged(tiny(3, concurrency=1000)) as found:
        yield found


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Requests that have waited in line for their turn: device and neighbourhood."""
    found = list[tuple[str, str]]()
    before = Doubt.turn

    async def turn(doubt: Doubt, device: str, neighbourhood: str) -> None:
        if doubt.has(device, neighbourhood):
            found.append((device, neighbourhood))
        await before(doubt, device, neighbourhood)

    monkeypatch.setattr(Doubt, "turn", turn)
    return found


def asked(server: Besieged, device: ScriptedDevice, source: str = HERE, **headers: str) -> str:
    """The code, or the status, that a check-in of this device is answered with."""
    device.serial += 1
    body = write(CheckInRequest(device.serial, f"s{device.serial}", (server.bundle.plan.description.fingerprint,)))
    with server.connect(source) as connection:
        connection.sendall(head_of(device, "POST", "/v1/checkins", body, **headers) + body)
        return code_of(heard(connection))


def test_bad_signatures_wait_in_line_and_nobody_else_does(server: Besieged, turns: list[tuple[str, str]]) -> None:
    victim, other = server.device(), server.device()
    for _ in range(5):
        assert asked(server, victim, Sumus_Signature="A" * 86) == "bad_signature"
    assert turns == [(victim.id, near(HERE))] * 4  # the first was of nobody who was in doubt
    turns.clear()
    assert asked(server, other) == "200"
    assert asked(server, victim, ELSEWHERE) == "200"
    assert turns == []


def test_whose_name_is_misused_is_answered(server: Besieged, turns: list[tuple[str, str]]) -> None:
    victim = server.device()
    assert asked(server, victim, Sumus_Signature="A" * 86) == "bad_signature"
    assert asked(server, victim) == "200"
    assert turns == [(victim.id, near(HERE))]
    server.whole_round()


def test_nothing_of_a_body_is_read_while_its_sender_waits(server: Besieged, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, work = server.working()
    head, body = server.report(victim, work)
    assert asked(server, victim, Sumus_Signature="A" * 86) == "bad_signature"
    seen = list[int]()
    before = Doubt.turn

    async def turn(doubt: Doubt, device: str, neighbourhood: str) -> None:
        await before(doubt, device, neighbourhood)
        seen.append(server.service.room.lent)

    monkeypatch.setattr(Doubt, "turn", turn)
    with server.connect() as connection:
        connection.sendall(head + body)
        assert code_of(heard(connection)) == "200"
    assert seen == [0]
    server.whole_round()
