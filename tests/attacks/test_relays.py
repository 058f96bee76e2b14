"""One party speaks as an edge for devices that do not ask it: devices that it invented, or somebody else's.

An edge's token says for how many devices it may speak. The attacker has one for a single device, relays twelve ids, and is the
whole cohort; or it relays the id of another's device, to move that device's serial, to take its place or to end its work.
"""

from pathlib import Path

import msgspec
import pytest

from sumus.http.limits import Limits, Rate
from sumus.operations.stores import Storage
from sumus.server.membership import MEMBER_S
from sumus.wire.messages import EndedSession, RelayRequest
from tests.attacks.parties import given, parties, refused
from tests.server.devices import tiny, update_of

ROUND = tiny(cohort=4, least=4)


def test_an_edge_for_one_device_is_not_a_cohort_of_twelve() -> None:
    with parties(tiny(cohort=12, least=12)) as them:
        edge = them.edge(speaks_for=1)
        answers = edge.relay(*(them.stranger() for _ in range(12)))
        assert given(answers) == [True] + [False] * 11
        assert {each.code for each in answers[1:]} == {"not_edge"}
        assert them.run.coordinator.current.given == 1


def test_an_edge_for_one_device_does_not_bring_twelve_one_after_the_other() -> None:
    """Each gives its work back before the next one asks."""
    with parties(tiny(cohort=12, least=12)) as them:
        edge, told = them.edge(speaks_for=1), list[bool]()
        for device in (them.stranger() for _ in range(4)):
            told += given(edge.relay(device))
            ended = EndedSession("tiny", "train", device.id, "s1", "other")
            edge.requests.relay(RelayRequest(1, (), (ended,)))
        assert told == [True, False, False, False]


def test_control_an_edge_brings_as_many_devices_as_its_token_says() -> None:
    with parties(ROUND) as them:
        edge, behind = them.edge(speaks_for=3), [them.stranger() for _ in range(3)]
        assert given(edge.relay(*behind)) == [True] * 3
        assert not edge.send([f"{each.id}/s1" for each in behind]).duplicate
        (last,) = [them.device()]
        last.report(them.works([last])[0], update_of(them.plan, last.id))
        assert (them.settled(), them.run.model(1).contributors) == (1, 4)
        assert given(edge.relay(*behind, serial=2)) == [True] * 3, "the same devices again"


def test_a_sum_is_of_no_more_reports_than_the_token_says() -> None:
    with parties(ROUND) as them:
        edge, (one, two) = them.edge(speaks_for=1), (them.stranger(), them.stranger())
        edge.relay(one)
        assert refused(lambda: edge.send([f"{one.id}/s1", f"{two.id}/s1"])) == "not_edge"
        assert not edge.send([f"{one.id}/s1"]).duplicate, "control"


# ── ids of others ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("whose", ["a device of the server", "a device of another edge"])
def test_an_edge_does_not_bring_a_device_that_did_not_ask_it(whose: str) -> None:
    with parties(ROUND) as them:
        thief, honest = them.edge(speaks_for=4), them.edge(speaks_for=4)
        victim = them.device() if whose == "a device of the server" else them.stranger()
        own = them.stranger().relayed(them.plan, serial=2**40)
        forged = msgspec.structs.replace(own, device=victim.id)
        answers = thief.requests.relay(RelayRequest(1, (forged,))).answers
        assert [each.code for each in answers] == ["bad_signature"]
        if whose == "a device of the server":
            assert victim.work(them.plan) is not None, "control: its serial is where it was, and its place is its own"
        else:
            assert given(honest.relay(victim)) == [True], "control: it asks through its own edge"


@pytest.mark.parametrize("changed", ["check_in", "public_key", "signature", "device"])
def test_nothing_of_a_check_in_is_changed_on_its_way(changed: str) -> None:
    with parties(ROUND) as them:
        edge, (mine, other) = them.edge(speaks_for=4), (them.stranger(), them.stranger())
        genuine, another = mine.relayed(them.plan), other.relayed(them.plan, serial=7)
        mixed = msgspec.structs.replace(genuine, **{changed: getattr(another, changed)})
        (told,) = edge.requests.relay(RelayRequest(1, (mixed,))).answers
        assert told.code == "bad_signature"
        assert given(edge.requests.relay(RelayRequest(1, (genuine,))).answers) == [True], "control"


def test_what_a_device_signed_for_its_edge_before_it_moved_is_of_no_use(tmp_path: Path) -> None:
    with parties(ROUND, Storage(tmp_path)) as them:
        left, right, mover = them.edge(speaks_for=1), them.edge(speaks_for=1), them.stranger()
        (told,) = left.relay(mover, serial=1)
        ended = EndedSession("tiny", "train", mover.id, "s1", "other")
        left.requests.relay(RelayRequest(1, (), (ended,)))
        them.let_rest(mover)
        assert given(right.relay(mover, serial=2)) == [True], "control: a device that moves is given work"
        right.requests.relay(RelayRequest(1, (), (msgspec.structs.replace(ended, session="s2"),)))
        them.server.replica.leases.forget_serial(mover.id)  # as after a restart of the server
        (told,) = left.relay(mover, serial=1)
        assert told.code == "replayed"
        assert given(left.relay(them.stranger())) == [True], "control: its place there is free again"


def test_control_a_device_that_enrols_at_the_server_itself_leaves_its_place_at_the_edge(tmp_path: Path) -> None:
    with parties(ROUND, Storage(tmp_path)) as them:
        edge, mover = them.edge(speaks_for=1), them.stranger()
        edge.relay(mover, serial=1)
        edge.requests.relay(RelayRequest(1, (), (EndedSession("tiny", "train", mover.id, "s1", "other"),)))
        mover.enrol(them.token())
        mover.serial = 1
        them.let_rest(mover)
        assert mover.work(them.plan) is not None
        assert given(edge.relay(them.stranger())) == [True]


def test_a_device_with_work_through_one_edge_stays_there(tmp_path: Path) -> None:
    with parties(ROUND, Storage(tmp_path)) as them:
        left, right, mover = them.edge(speaks_for=1), them.edge(speaks_for=1), them.stranger()
        left.relay(mover, serial=1)
        (told,) = right.relay(mover, serial=2)
        assert told.answer is not None
        assert told.answer.reason == "parent"
        assert given(left.relay(them.stranger())) == [False], "its place at the first edge is not free"
        assert given(right.relay(them.stranger())) == [True], "control: nor does it hold one at the second"


def test_an_edge_ends_the_work_of_its_own_devices_alone() -> None:
    with parties(ROUND) as them:
        honest, thief, behind, victim = them.edge(1), them.edge(1), them.stranger(), them.device()
        honest.relay(behind)
        (work,) = them.works([victim])
        for device, session in ((behind, "s1"), (victim, work.session)):
            thief.requests.relay(RelayRequest(1, (), (EndedSession("tiny", "train", device.id, session, "other"),)))
        assert not victim.report(work, update_of(them.plan, victim.id)).duplicate
        assert not honest.send([f"{behind.id}/s1"]).duplicate


# ── who left, or was shut out ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["it withdraws", "it is shut out"])
def test_who_left_the_server_does_not_come_back_behind_an_edge(how: str) -> None:
    with parties(ROUND) as them:
        edge, device = them.edge(speaks_for=2), them.device()
        assert given(edge.relay(them.stranger())) == [True], "control"
        if how == "it withdraws":
            device.withdraw()
        else:
            them.server.roll.revoke(device.id)
        (told,) = edge.relay(device, serial=5)
        assert told.code == "revoked"


@pytest.mark.parametrize("when", ["before the sum goes up", "before it is sent again"])
@pytest.mark.parametrize("how", ["withdraws", "is shut out"])
def test_who_works_by_way_of_an_edge_and_leaves_the_server_spoils_no_sum(how: str, when: str) -> None:
    """The device has a link of the server's too. If the server forgot the session, the report of its neighbour would be lost."""
    with parties(ROUND) as them:
        link = them.token(uses=3)
        edge, attacker, neighbour = them.edge(speaks_for=2), them.device(link), them.stranger()
        assert given(edge.relay(attacker, neighbour, members=2)) == [True, True]
        sessions = [f"{each.id}/s1" for each in (attacker, neighbour)]

        def leave() -> None:
            if how == "withdraws":
                attacker.withdraw()
            else:
                them.server.roll.revoke(attacker.id)
                link_of = them.server.roll.link_of(attacker.id)
                them.server.ask_to_do(lambda now: them.server.forget(attacker.id, link_of, now, "revoked")).result()

        if when == "before the sum goes up":
            leave()
            assert not edge.send(sessions).duplicate
        else:
            assert not edge.send(sessions).duplicate
            leave()
            assert edge.send(sessions).duplicate, "it is told the truth, that the sum is counted"
        assert them.run.coordinator.current.counted == 2
        with them.run.store.transaction() as rows:
            assert rows.device(attacker.id) is None, "nothing more is kept of it"
        again = them.device(link)
        assert again.check_in(them.plan).reason == "left", "it is in the sum, and does not come again under a new key"
        (told,) = edge.relay(attacker, serial=5)
        assert told.code == "revoked"


def test_who_leaves_the_server_is_in_no_sum_by_way_of_two_edges() -> None:
    """A check-in by way of another edge may arrive while the device is leaving."""
    with parties(ROUND) as them:
        one, other, device = them.edge(speaks_for=2), them.edge(speaks_for=2), them.device()
        assert given(one.relay(device, serial=5)) == [True]
        link = them.server.roll.link_of(device.id)
        them.server.ask_to_do(lambda now: them.server.forget(device.id, link, now)).result()
        assert given(other.relay(device, serial=7)) == [False], "it has work by way of the first edge"
        them.server.roll.withdraw(device.id)
        them.server.ask_to_do(lambda now: them.server.forget(device.id, link, now)).result()
        assert not one.send([f"{device.id}/s5"]).duplicate
        assert them.run.coordinator.current.counted == 1
        assert them.device().work(them.plan) is not None, "control: others are given work"


def test_an_edge_that_a_device_has_left_uses_up_nothing_of_it() -> None:
    """The edge sends again and again what the device signed before it moved to the server."""
    limits = Limits(device=Rate(1e-3, 5), edge=Rate(1e3, 1000))
    with parties(ROUND, limits=limits) as them:
        edge, device = them.edge(speaks_for=500), them.stranger()
        old = device.relayed(them.plan, serial=1)
        ended = EndedSession("tiny", "train", device.id, "s1", "edge")
        edge.requests.relay(RelayRequest(1, (old,)))
        edge.requests.relay(RelayRequest(1, (), (ended,)))
        device.enrol(them.token())
        device.serial = 1
        (work,) = them.works([device])
        edge.requests.relay(RelayRequest(1, (old,) * 100))
        assert them.report(device, work) == "counted"


def test_invented_devices_use_up_what_their_edge_may_ask_and_not_what_the_population_may() -> None:
    limits = Limits(device=Rate(1e-3, 2), population=Rate(1e-3, 20), edge=Rate(1e3, 1000))
    with parties(ROUND, limits=limits) as them:
        edge = them.edge(speaks_for=2)
        for serial in range(1, 4):
            edge.relay(*(them.stranger() for _ in range(20)), serial=serial)
        assert them.device().work(them.plan) is not None, (
            "of twenty check-ins the edge took four: two for each of two devices"
        )
        (told,) = edge.relay(them.stranger())
        assert told.answer is not None
        assert told.answer.reason == "rate"


def test_control_an_edges_devices_ask_as_often_as_others() -> None:
    limits = Limits(device=Rate(1e-3, 2), population=Rate(1e-3, 20))
    with parties(ROUND, limits=limits) as them:
        edge, behind = them.edge(speaks_for=2), [them.stranger() for _ in range(2)]
        for serial in (1, 2):
            assert [each.answer is not None and each.answer.reason for each in edge.relay(*behind, serial=serial)] == [
                "",
                "",
            ]


def test_an_edge_that_is_shut_out_loses_its_places_and_its_work_at_once() -> None:
    with parties(ROUND) as them:
        edge, behind = them.edge(speaks_for=4), [them.stranger() for _ in range(4)]
        assert given(edge.relay(*behind)) == [True] * 4
        them.server.roll.revoke(edge.id)
        them.server.ask_to_do(lambda now: them.server.forget(edge.id, "", now, "revoked")).result()
        assert refused(lambda: edge.send([f"{each.id}/s1" for each in behind])) == "revoked"
        assert refused(lambda: edge.relay(*behind, serial=2)) == "revoked"
        with them.run.store.transaction() as rows:
            assert rows.sessions_out() == []
        other = them.edge(speaks_for=4)
        told = other.relay(*behind, serial=2)
        assert [each.code for each in told] == [""] * 4, "control: its devices may ask through another edge"


def test_a_place_at_an_edge_is_free_once_its_device_has_not_asked_for_long() -> None:
    with parties(ROUND) as them:
        edge, roll = them.edge(speaks_for=1), them.server.roll
        identity, now = roll.find(edge.id, them.server.clock()), them.server.clock()
        one, two = "1" * 64, "2" * 64
        assert roll.members.speak_for(identity, {one: 1}, now) == {}
        assert roll.members.speak_for(identity, {two: 1}, now + MEMBER_S / 2) == {two: "not_edge"}
        assert roll.members.speak_for(identity, {two: 1}, now + 2 * MEMBER_S) == {}


# ── tokens of one kind, used as another ──────────────────────────────────────────────────────────────────────────────


def test_who_enrolled_as_an_edge_does_no_work_itself() -> None:
    """Else a token for N devices would be N + 1 contributors."""
    with parties(ROUND) as them:
        device = them.device(them.token(speaks_for=1))
        assert refused(lambda: device.check_in(them.plan)) == "not_device"
        (told,) = them.edge(speaks_for=1).relay(device)
        assert told.code == "not_device"
        assert them.device().work(them.plan) is not None, "control"


def test_who_enrolled_as_a_device_speaks_for_nobody() -> None:
    with parties(ROUND) as them:
        edge = them.edge(0, them.token())
        assert refused(lambda: edge.relay(them.stranger())) == "not_edge"
        assert refused(lambda: edge.send([f"{'1' * 64}/s1"])) == "not_edge"
