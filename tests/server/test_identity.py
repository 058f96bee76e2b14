"""Who may take part: enrolled once by a token, known by a key, out at once when revoked; hostile requests get a code each."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.errors import ExperimentError
from sumus.server.identity import CHALLENGE_S, TOKEN_S, DeviceRegister, count_enrolled
from sumus.server.membership import DAY
from sumus.storage.identities import Identities, Identity, IdentityRows, MemoryIdentities
from sumus.storage.sql import SqlStore
from sumus.wire.messages import STATUS, Enrolment, EnrolmentRequest, Refused, enrolment_text, signed_text
from sumus.wire.signing import device_id, public_key_of, sign, to_base64url

NOW = 10_000 * DAY + 3600
ALICE, BOB, CAROL = (bytes([number]) * 32 for number in (1, 2, 3))
"""Private keys."""
BODY = b'{"serial":1}'


def bytes_in_order() -> Callable[[int], bytes]:
    numbers = count(1)
    return lambda length: next(numbers).to_bytes(length, "big")


@pytest.fixture(params=["memory", "sqlite"])
def identities(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Identities]:
    if request.param == "memory":
        yield MemoryIdentities()
        return
    store = SqlStore.open(f"sqlite:///{tmp_path}/run.db")
    yield store.identities()
    store.close()


@pytest.fixture
def roll(identities: Identities) -> DeviceRegister:
    return DeviceRegister(identities, {"phones": 2, "edges": 10}, random=bytes_in_order())


def request_of(
    roll: DeviceRegister, secret: bytes, token: str, now: float = NOW, nonce: str | None = None
) -> EnrolmentRequest:
    nonce = roll.challenge(now).nonce if nonce is None else nonce
    key = to_base64url(public_key_of(secret))
    return EnrolmentRequest(token, key, nonce, to_base64url(sign(secret, enrolment_text(nonce, key, token))))


def enrol(roll: DeviceRegister, secret: bytes, token: str, now: float = NOW) -> tuple[Enrolment, bool]:
    return roll.enrol(request_of(roll, secret, token, now), now)


def code(asked: Callable[[], object]) -> str:
    with pytest.raises(Refused) as error:
        asked()
    assert error.value.problem.code in STATUS
    return error.value.problem.code


def text_of(device: str, body: bytes = BODY, population: str = "phones") -> bytes:
    return signed_text("POST", "/v1/checkins", population, device, body)


def ask(roll: DeviceRegister, secret: bytes, now: float = NOW) -> Identity:
    device = device_id(public_key_of(secret))
    return roll.authenticate(device, to_base64url(sign(secret, text_of(device))), text_of(device), now)


def uses_left(identities: Identities) -> list[int]:
    with identities.transaction() as rows:
        return [token.uses for token in rows.tokens()]


# ── coming in ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_lets_one_device_in(roll: DeviceRegister, identities: Identities) -> None:
    token = roll.new_token("phones", NOW)
    enrolment, new = enrol(roll, ALICE, token)
    assert (enrolment, new) == (Enrolment(device_id(public_key_of(ALICE)), "phones"), True)
    assert ask(roll, ALICE).population == "phones"
    assert uses_left(identities) == [0]
    assert code(lambda: enrol(roll, BOB, token)) == "token_used"
    assert count_enrolled(identities, "phones") == 1


def test_the_same_key_again_is_the_same_device_and_spends_nothing(roll: DeviceRegister, identities: Identities) -> None:
    token = roll.new_token("phones", NOW, uses=2)
    first, _ = enrol(roll, ALICE, token)
    assert enrol(roll, ALICE, token) == (first, False)
    assert uses_left(identities) == [1]
    enrol(roll, BOB, token)
    assert enrol(roll, ALICE, token, NOW + TOKEN_S + 1) == (first, False)
    assert enrol(roll, ALICE, roll.new_token("edges", NOW)) == (first, False)
    assert uses_left(identities) in ([0, 1], [1, 0])


def test_a_device_of_a_population_that_is_not_served_is_not_known(roll: DeviceRegister, identities: Identities) -> None:
    enrol(roll, ALICE, roll.new_token("phones", NOW))
    other = DeviceRegister(identities, {"tablets": 10}, random=bytes_in_order())
    device = device_id(public_key_of(ALICE))
    text = text_of(device, population="tablets")
    signature = to_base64url(sign(ALICE, text))
    assert code(lambda: other.authenticate(device, signature, text, NOW)) == "unknown_device"
    assert ask(roll, ALICE).id == device, "control"


def test_only_a_token_for_several_uses_ties_its_devices_together(roll: DeviceRegister, identities: Identities) -> None:
    enrol(roll, ALICE, roll.new_token("phones", NOW))
    shared = roll.new_token("phones", NOW, uses=2)
    enrol(roll, BOB, shared)
    assert roll.link_of(device_id(public_key_of(ALICE))) == ""
    assert len(roll.link_of(device_id(public_key_of(BOB)))) == 64
    roll.withdraw(device_id(public_key_of(BOB)))
    assert roll.link_of(device_id(public_key_of(BOB))) == "", "nothing ties a device that has left to others"


def test_of_a_token_its_hash_alone_is_kept(roll: DeviceRegister, identities: Identities) -> None:
    token = roll.new_token("phones", NOW)
    with identities.transaction() as rows:
        (row,) = rows.tokens()
    assert token not in repr(row)
    assert code(lambda: enrol(roll, ALICE, row.hash)) == "bad_token"
    assert len(token) == 43


def test_a_token_that_nobody_made_lets_nobody_in(roll: DeviceRegister) -> None:
    assert code(lambda: enrol(roll, ALICE, "A" * 43)) == "bad_token"


def test_a_token_ends_and_says_so_for_a_while(roll: DeviceRegister, identities: Identities) -> None:
    token = roll.new_token("phones", NOW, lasts=60.0)
    assert code(lambda: enrol(roll, ALICE, token, NOW + 61)) == "token_used"
    roll.new_token("phones", NOW + TOKEN_S)
    assert code(lambda: enrol(roll, ALICE, token, NOW + TOKEN_S)) == "token_used"
    roll.new_token("phones", NOW + 61 + TOKEN_S)
    assert code(lambda: enrol(roll, ALICE, token, NOW + 61 + TOKEN_S)) == "bad_token"
    assert len(uses_left(identities)) == 2


def test_a_full_population_takes_no_more_until_one_leaves(roll: DeviceRegister, identities: Identities) -> None:
    token = roll.new_token("phones", NOW, uses=5)
    enrol(roll, ALICE, token)
    bob, _ = enrol(roll, BOB, token)
    assert code(lambda: enrol(roll, CAROL, token)) == "quota"
    assert uses_left(identities) == [3]
    enrol(roll, CAROL, roll.new_token("edges", NOW))
    roll.withdraw(bob.device)
    enrol(roll, bytes(32), token)


@pytest.mark.parametrize(("uses", "lasts"), [(0, 60.0), (-1, 60.0), (1, 0.0), (1, float("nan")), (1, 1e12)])
def test_a_token_for_nobody_or_for_ever_is_not_made(roll: DeviceRegister, uses: int, lasts: float) -> None:
    with pytest.raises(ExperimentError):
        roll.new_token("phones", NOW, uses, lasts)


def test_a_token_for_no_population_is_not_made(roll: DeviceRegister) -> None:
    with pytest.raises(ExperimentError, match="has no population 'phone': give one of edges, phones"):
        roll.new_token("phone", NOW)


def test_a_challenge_ends(roll: DeviceRegister) -> None:
    token, nonce = roll.new_token("phones", NOW), roll.challenge(NOW).nonce
    late = NOW + CHALLENGE_S + 0.1
    assert code(lambda: roll.enrol(request_of(roll, ALICE, token, nonce=nonce), late)) == "old_nonce"
    assert roll.enrol(request_of(roll, ALICE, token, nonce=nonce), NOW + CHALLENGE_S)[1]


def test_a_restart_makes_devices_ask_again_and_replicas_may_share_the_secret(identities: Identities) -> None:
    one, restarted = DeviceRegister(identities, {"phones": 2}), DeviceRegister(identities, {"phones": 2})
    token = one.new_token("phones", NOW)
    assert code(lambda: restarted.enrol(request_of(one, ALICE, token), NOW)) == "old_nonce"
    left, right = (DeviceRegister(identities, {"phones": 2}, secret=b"shared") for _ in range(2))
    assert left.enrol(request_of(right, ALICE, token), NOW)[1]


def test_an_enrolment_is_signed_by_the_key_it_gives_over_all_that_it_says(roll: DeviceRegister) -> None:
    token, other = roll.new_token("phones", NOW), roll.new_token("phones", NOW)
    request = request_of(roll, ALICE, token)
    changes = [
        {"token": other},
        {"nonce": roll.challenge(NOW + 1).nonce},
        {"public_key": to_base64url(public_key_of(BOB))},
        {"signature": to_base64url(bytes(64))},
        {"signature": to_base64url(bytes(63))},
    ]
    for change in changes:
        fields = {name: getattr(request, name) for name in request.__struct_fields__} | change
        assert code(lambda fields=fields: roll.enrol(EnrolmentRequest(**fields), NOW + 1)) == "bad_signature"
    assert roll.enrol(request, NOW + 1)[1]


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), bytes(31), b"\xff" * 32])
def test_a_key_under_which_anybody_signs_is_malformed(roll: DeviceRegister, key: bytes) -> None:
    nonce, text = roll.challenge(NOW).nonce, to_base64url(key)
    request = EnrolmentRequest(roll.new_token("phones", NOW), text, nonce, to_base64url(b"\1" + bytes(63)))
    assert code(lambda: roll.enrol(request, NOW)) == "malformed"


WORD = st.text("ABCXYZabcxyz0189-_", min_size=1, max_size=100)


@given(token=WORD, key=WORD, nonce=WORD, signature=WORD)
def test_whatever_is_sent_is_refused_with_a_code(token: str, key: str, nonce: str, signature: str) -> None:
    roll = DeviceRegister(MemoryIdentities(), {"phones": 2})
    asked = EnrolmentRequest(token, key, nonce, signature)
    assert code(lambda: roll.enrol(asked, NOW)) in ("malformed", "old_nonce")
    good = request_of(roll, ALICE, token)
    assert code(lambda: roll.enrol(EnrolmentRequest(token, good.public_key, nonce, good.signature), NOW)) == "old_nonce"
    assert code(lambda: roll.enrol(good, NOW)) == "bad_token"


def test_many_at_once_spend_a_token_as_often_as_it_has_uses(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/run.db")
    roll = DeviceRegister(store.identities(), {"phones": 100})
    token, codes, start = roll.new_token("phones", NOW, uses=3), list[str](), threading.Barrier(8)

    def come(number: int) -> None:
        start.wait()
        try:
            enrol(roll, bytes([number]) * 32, token)
        except Refused as refused:
            codes.append(refused.problem.code)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["token_used"] * 5
    assert count_enrolled(store.identities(), "phones") == 3
    store.close()


# ── being in ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counting:
    """Identities of which is counted how often they are read; `then` happens after a read, before its reader goes on."""

    def __init__(self) -> None:
        self.inner = MemoryIdentities()
        self.reads = 0
        self.then: Callable[[], None] = lambda: None

    def transaction(self) -> AbstractContextManager[IdentityRows]:
        self.reads += 1
        return self.inner.transaction()

    def find(self, id: str) -> Identity | None:
        self.reads += 1
        row = self.inner.find(id)
        then, self.then = self.then, lambda: None
        then()
        return row


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def enrolled(counting: Counting) -> DeviceRegister:
    roll = DeviceRegister(counting, {"phones": 10}, fresh_s=60.0, remembered=2)
    token = roll.new_token("phones", NOW, uses=3)
    for secret in (ALICE, BOB, CAROL):
        enrol(roll, secret, token)
    return roll


def test_a_device_that_came_lately_costs_no_read(enrolled: DeviceRegister, counting: Counting) -> None:
    ask(enrolled, ALICE)
    before = counting.reads
    for later in range(60):
        ask(enrolled, ALICE, NOW + later)
    assert counting.reads == before
    ask(enrolled, ALICE, NOW + 61)
    assert counting.reads == before + 1


def test_memory_is_bounded_and_who_came_last_stays(enrolled: DeviceRegister, counting: Counting) -> None:
    for secret in (ALICE, BOB, ALICE, CAROL):
        ask(enrolled, secret)
    before = counting.reads
    ask(enrolled, ALICE)
    ask(enrolled, CAROL)
    assert counting.reads == before
    ask(enrolled, BOB)
    assert counting.reads == before + 1


def test_revoking_holds_at_once_here_and_in_a_minute_elsewhere(enrolled: DeviceRegister, counting: Counting) -> None:
    other = DeviceRegister(counting, {"phones": 10})
    device = ask(enrolled, ALICE).id
    ask(other, ALICE)
    enrolled.revoke(device)
    assert code(lambda: ask(enrolled, ALICE)) == "revoked"
    assert ask(other, ALICE, NOW + 59)
    assert code(lambda: ask(other, ALICE, NOW + 61)) == "revoked"


def test_who_is_revoked_while_being_read_is_not_remembered(enrolled: DeviceRegister, counting: Counting) -> None:
    device = device_id(public_key_of(ALICE))
    counting.then = lambda: enrolled.revoke(device)
    ask(enrolled, ALICE)  # it was read before
    assert code(lambda: ask(enrolled, ALICE)) == "revoked"


def test_who_is_revoked_does_not_come_back(enrolled: DeviceRegister) -> None:
    device = device_id(public_key_of(ALICE))
    enrolled.revoke(device)
    enrolled.revoke(device)
    enrolled.withdraw(device)
    token = enrolled.new_token("phones", NOW)
    assert code(lambda: enrol(enrolled, ALICE, token)) == "revoked"
    assert code(lambda: enrolled.revoke("00" * 32)) == "not_found"


def test_who_withdrew_is_a_stranger_whose_key_is_erased(enrolled: DeviceRegister, counting: Counting) -> None:
    device = ask(enrolled, ALICE).id
    enrolled.withdraw(device)
    enrolled.withdraw(device)
    enrolled.withdraw("00" * 32)
    assert code(lambda: ask(enrolled, ALICE)) == "unknown_device"
    enrolled.write_seen()
    with counting.transaction() as rows:
        row = rows.identity(device)
    assert row is not None
    assert (row.state, row.public_key, row.seen) == ("withdrawn", b"", 0.0)


def test_a_key_that_withdrew_does_not_come_back_and_its_owner_does_with_another(enrolled: DeviceRegister) -> None:
    device = ask(enrolled, ALICE).id
    enrolled.withdraw(device)
    token = enrolled.new_token("phones", NOW)
    assert code(lambda: enrol(enrolled, ALICE, token)) == "revoked"
    assert enrol(enrolled, bytes(range(32)), token)[1]


def test_a_request_is_taken_as_it_was_signed_or_not_at_all(enrolled: DeviceRegister) -> None:
    device, other = (device_id(public_key_of(secret)) for secret in (ALICE, BOB))
    signature = to_base64url(sign(ALICE, text_of(device)))
    assert enrolled.authenticate(device, signature, text_of(device), NOW)
    for text in (text_of(device, b"{}"), text_of(device, population="edges"), text_of(other), b""):
        assert code(lambda text=text: enrolled.authenticate(device, signature, text, NOW)) == "bad_signature"
    assert code(lambda: enrolled.authenticate(other, signature, text_of(device), NOW)) == "bad_signature"


@given(device=st.text(max_size=70) | st.from_regex("[0-9a-f]{64}", fullmatch=True), signature=st.text(max_size=100))
def test_whatever_a_stranger_shows_is_refused_with_a_code(device: str, signature: str) -> None:
    roll = DeviceRegister(MemoryIdentities(), {"phones": 2})
    enrolment, _ = enrol(roll, ALICE, roll.new_token("phones", NOW))
    assert code(lambda: roll.authenticate(device, signature, b"", NOW)) == "unknown_device"
    assert code(lambda: roll.authenticate(enrolment.device, signature, b"", NOW)) == "bad_signature"


def test_an_id_that_can_be_nobodys_is_not_looked_up(enrolled: DeviceRegister, counting: Counting) -> None:
    before = counting.reads
    for device in ("", "00" * 31, "0A" * 32, "00" * 32 + "\n", "alice"):
        assert code(lambda device=device: enrolled.find(device, NOW)) == "unknown_device"
    assert counting.reads == before


def test_when_a_device_was_heard_of_is_kept_by_the_day(identities: Identities) -> None:
    roll = DeviceRegister(identities, {"phones": 10})
    device = enrol(roll, ALICE, roll.new_token("phones", NOW))[0].device

    def seen() -> float:
        with identities.transaction() as rows:
            row = rows.identity(device)
        assert row is not None
        return row.seen

    assert seen() == 10_000 * DAY
    ask(roll, ALICE, NOW + 60)
    assert roll.write_seen() == 0
    for later in (DAY, DAY + 30, DAY + 5000):
        assert ask(roll, ALICE, NOW + later).seen == 10_001 * DAY
    assert roll.write_seen() == 1
    assert seen() == 10_001 * DAY
    ask(roll, ALICE, NOW + DAY + 6000)
    assert roll.write_seen() == 0
    ask(roll, ALICE, NOW)  # a clock that went back
    assert roll.write_seen() == 0


def test_writing_who_was_seen_undoes_no_revocation(enrolled: DeviceRegister, counting: Counting) -> None:
    device = ask(enrolled, ALICE, NOW + DAY).id
    with counting.transaction() as rows:
        row = rows.identity(device)
        assert row is not None
        rows.put_identity(replace(row, state="revoked"))
    enrolled.write_seen()
    with counting.transaction() as rows:
        row = rows.identity(device)
    assert row is not None
    assert (row.state, row.seen) == ("revoked", 10_000 * DAY)


def test_threads_may_ask_and_revoke_at_once(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/run.db")
    roll = DeviceRegister(store.identities(), {"phones": 100}, remembered=3, fresh_s=0.0)
    token, start, defects = roll.new_token("phones", NOW, uses=8), threading.Barrier(5), list[BaseException]()
    secrets = [bytes([number]) * 32 for number in range(8)]
    devices = [enrol(roll, secret, token)[0].device for secret in secrets]

    def act(number: int) -> None:
        start.wait()
        try:
            for secret in secrets[number:]:
                with suppress(Refused):
                    ask(roll, secret)
            if number == 4:
                for device in devices[::2]:
                    roll.revoke(device)
        except BaseException as error:
            defects.append(error)

    threads = [threading.Thread(target=act, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert defects == []
    for secret in secrets[::2]:
        assert code(lambda secret=secret: ask(roll, secret)) == "revoked"
    store.close()
