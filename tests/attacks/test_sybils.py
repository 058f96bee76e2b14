"""One party is several contributors, so that a sum of many is one victim's update.

A plan's `min_contributors` says that no model is made of fewer reports. The attacker holds keys of its own, sends reports of
them that weigh nothing, and waits for one honest device: the published mean is then that device's update. Or the attacker is
counted, leaves, and comes again under a new key from the same link.

docs/threat-model.md says what these tests cannot show: an attacker who holds as many links as the plan asks for contributors, and
sends reports that weigh something, is as many contributors.
"""

import numpy as np
import pytest

from sumus.aggregate import Update
from sumus.device.requests import Requests
from sumus.evaluation import HISTOGRAM, evaluation_report
from sumus.server.evaluation import Evaluating
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Assignment
from sumus.wire.reports import encode_report, encode_sum
from tests.attacks.parties import Parties, code_of, parties, refused
from tests.server.devices import ScriptedDevice, path_of, tiny

ROUND = tiny(cohort=4, least=4)
BUFFER = tiny(cohort=4, least=4, concurrency=8)


def sybils(them: Parties, count: int) -> list[ScriptedDevice]:
    """Keys of one party, from one link for several devices."""
    token = them.token(uses=count)
    return [them.device(token) for _ in range(count)]


@pytest.mark.parametrize("bundle", [ROUND, BUFFER], ids=["round", "buffer"])
def test_reports_of_no_examples_do_not_make_a_victims_update_the_model(bundle: Bundle) -> None:
    with parties(bundle) as them:
        victim, attackers = them.device(), sybils(them, 3)
        works = them.works([victim, *attackers])
        assert them.report(victim, works[0], value=0.5, examples=37) == "counted"
        said = [them.report(each, work, examples=0) for each, work in zip(attackers, works[1:], strict=True)]
        assert said == ["empty"] * 3
        assert them.settled() == 0


@pytest.mark.parametrize("bundle", [ROUND, BUFFER], ids=["round", "buffer"])
def test_control_reports_of_one_example_each_make_a_model(bundle: Bundle) -> None:
    with parties(bundle) as them:
        devices = [them.device() for _ in range(4)]
        works = them.works(devices)
        said = [them.report(each, work, examples=1) for each, work in zip(devices, works, strict=True)]
        assert (said, them.settled(), them.run.model(1).contributors) == (["counted"] * 4, 1, 4)


def test_a_round_whose_devices_all_have_no_examples_makes_no_model() -> None:
    with parties(ROUND) as them:
        attackers = sybils(them, 4)
        said = [
            them.report(each, work, examples=0) for each, work in zip(attackers, them.works(attackers), strict=True)
        ]
        assert (said, them.settled()) == (["empty"] * 4, 0)


def test_an_edges_sum_weighs_something_for_each_of_its_reports() -> None:
    """One report of its own, under the names of three."""
    with parties(ROUND) as them:
        edge, behind = them.edge(speaks_for=3), [them.stranger() for _ in range(3)]
        edge.relay(*behind)
        sessions = [f"{each.id}/s1" for each in behind]
        hop, update = (
            them.plan.first_hop,
            Update(edge.id, {"params": {"w": np.ones(4, np.float32)}}, 2, {"loss": (1.0, 3)}),
        )
        total = hop.count_in(update)
        total.count[...] = 3
        body = encode_sum(sessions, total, hop)
        assert refused(lambda: edge.requests.report_sum("tiny", "train", body)) == "empty"
        assert not edge.send(sessions, examples=1).duplicate, "control: each of one example"


def test_a_device_is_in_no_histogram_of_what_it_did_not_measure() -> None:
    """The mean over one victim would be published as one over four: the histogram counts them."""
    with parties(ROUND, evaluate=Evaluating(4)) as them:
        victim, *attackers = [them.device() for _ in range(4)]
        works = [each.check_in(them.plan, kinds=("evaluate",)).assignment for each in (victim, *attackers)]

        def measured(device: ScriptedDevice, work: Assignment | None, count: int) -> str:
            honest = evaluation_report(device.id, {"loss": (0.5, 1)}, 1)
            update = Update(device.id, {HISTOGRAM.name: honest.parts[HISTOGRAM.name]}, 1, {"loss": (0.0, count)})
            body = encode_report(update)
            assert work is not None
            answer = device.request("PUT", path_of(work), body)
            return "counted" if answer.status == 200 else "refused"

        assert [measured(each, work, 0) for each, work in zip(attackers, works[1:], strict=True)] == ["refused"] * 3
        assert measured(victim, works[0], 1) == "counted", "control"


# ── who leaves, and comes again ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bundle", [ROUND, BUFFER], ids=["round", "buffer"])
@pytest.mark.parametrize("how", ["it withdraws", "it is shut out"])
def test_who_was_counted_and_left_is_not_in_the_same_sum_under_a_new_key(bundle: Bundle, how: str) -> None:
    with parties(bundle) as them:
        link = them.token(uses=5)
        first, honest, others = them.device(link), them.device(), [them.device() for _ in range(3)]
        (work,) = them.works([first])
        assert them.report(first, work) == "counted"
        if how == "it withdraws":
            first.withdraw()
        else:
            them.server.roll.revoke(first.id)
            them.server.ask_to_do(
                lambda now: them.server.forget(first.id, them.server.roll.link_of(first.id), now, "revoked")
            ).result()
        again = them.device(link)
        answer = again.check_in(them.plan)
        assert (answer.assignment, answer.reason) == (None, "left")
        works = them.works(
            [honest, *others[:2]]
        )  # control: who came with another link is given work, and the round ends
        for device, work in zip([honest, *others[:2]], works, strict=True):
            assert them.report(device, work) == "counted"
        assert (them.settled(), them.run.model(1).contributors) == (1, 4)
        assert again.work(them.plan) is not None, "control: the next sum takes it"


def test_control_who_left_before_it_was_counted_keeps_nobody_out() -> None:
    with parties(ROUND) as them:
        link = them.token(uses=5)
        first = them.device(link)
        them.works([first])
        first.withdraw()
        assert them.device(link).work(them.plan) is not None


def test_an_edge_that_was_counted_and_left_brings_nobody_to_the_same_sum_under_a_new_key() -> None:
    with parties(ROUND) as them:
        link = them.token(uses=2, speaks_for=2)
        edge, behind = them.edge(2, link), [them.stranger() for _ in range(2)]
        edge.relay(*behind)
        edge.send([f"{each.id}/s1" for each in behind])
        edge.withdraw()
        (told,) = them.edge(2, link).relay(them.stranger())
        assert told.answer is not None
        assert (told.answer.assignment, told.answer.reason) == (None, "left")
        (told,) = them.edge(2).relay(them.stranger())
        assert told.answer is not None
        assert told.answer.assignment is not None, "control: an edge with a link of its own"


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_link_for_one_device_lets_in_one_key() -> None:
    with parties(ROUND) as them:
        token = them.token()
        them.device(token)
        assert refused(lambda: them.device(token)) == "token_used"


def test_control_of_several_links_a_device_spends_one_that_is_not_used() -> None:
    with parties(ROUND) as them:
        links = " ".join(them.token() for _ in range(3))
        said = [code_of(lambda n=n: Requests(them.transport, bytes([n]) * 32).enrol(links)) for n in range(1, 5)]
        assert said == ["counted"] * 3 + ["token_used"]
