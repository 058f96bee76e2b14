"""A device against a server that is told what to answer: whatever is lost, and wherever it restarts, a report is settled once,
and what the client keeps with it; and nothing is done that its owner has not agreed to."""

import itertools
import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.aggregate import RunningSum
from sumus.device.conditions import AllConditionsMet, NoConditionKnown
from sumus.device.device import Device
from sumus.device.keys import keyed
from sumus.device.news import DeviceNews
from sumus.device.options import DeviceProfile, DeviceSystem, ServerConnection
from sumus.device.rounds import SPREAD
from sumus.device.store import DeviceStore, FolderDeviceStore, MemoryDeviceStore, Record
from sumus.device.training import Training
from sumus.errors import ExperimentError
from sumus.evaluation import evaluation_hop, evaluation_of
from sumus.pacing import Conditions
from sumus.protocol.session import Floor
from sumus.rng import generator, key
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.transport import Answer, Unreachable
from sumus.tree import nested
from sumus.wire.messages import CheckInAnswer, CheckInRequest, Released, write
from sumus.wire.reports import decode_report
from sumus.wire.tensors import decode_tree, encode_tree
from tests.device.served import FREE, SCAFFOLD, SEED, Clock, Served, a_device, a_task, refused, some_examples

LOST = Unreachable("lost")


def words(news: list[DeviceNews]) -> list[str]:
    return [one.what for one in news if one.what not in ("waiting", "model")]


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_as_it_should_be() -> None:
    server, news = Served(), list[DeviceNews]()
    device = a_device(server, watch=news.append)
    device.run(rounds=1)
    assert [name for name, _ in server.asked] == ["challenge", "enrol", "check_in", "object", "object", "report"]
    assert words(news) == ["enrolled", "training", "trained", "counted"]
    assert (news[2].examples, news[2].version, set(news[2].measured)) == (12, 3, {"loss"})
    status = device.status
    assert (status.population, status.phase, status.trouble) == ("people", "idle", "")
    assert status.counts == {"trained": 1, "counted": 1, "in sums": 1}


def test_a_function_is_asked_for_examples_once_a_round_and_anew_in_the_next() -> None:
    asked = list[int]()

    def examples() -> Any:
        asked.append(len(asked))
        return some_examples()

    server = Served(works=3)
    device = a_device(server, examples=examples)
    device.run(rounds=1)
    first = len(asked)  # its task is tried on them too, at the start
    device.run(rounds=2)
    assert len(asked) - first == 2


def test_what_it_reports_is_what_the_simulator_would_count() -> None:
    """The same words make the same keys, and these the same bits."""
    server = Served(version=0)
    a_device(server).run(rounds=1)
    (body,) = server.counted.values()
    reported = decode_report(body, "alice", server.plan.first_hop)
    task = a_task(model=lambda: _as_broadcast(server))
    history = sumus.simulate(
        task,
        server.algorithm,
        {"alice": some_examples()},
        1,
        sumus.Pacing(cohort=1),
        seed=7,
        compute="autograd",
        out=sumus.Output(progress=False),
    )
    after = {name: tensor.numpy() for name, tensor in history.model.items()}
    total = RunningSum()
    hop = replace(server.plan, pacing=sumus.Pacing(cohort=1), sums=sumus.FixedPoint.fit(1, max_weight=2**16)).first_hop
    hop.count_in(reported, into=total)
    combined = server.algorithm.combine(total.total, server.plan.description, hop.sums, SEED, 1)
    mine = server.algorithm.release(server.algorithm.step(combined, server.state, server.plan.description))
    assert {name: leaf.tobytes() for name, leaf in mine.items()} == {n: leaf.tobytes() for n, leaf in after.items()}


def _as_broadcast(server: Served) -> nn.Module:
    module = nn.Linear(4, 1)
    module.load_state_dict(
        {name: torch.from_numpy(np.array(leaf)) for name, leaf in server.state.broadcast["params"].items()}
    )
    return module


def test_an_evaluation_is_of_its_own_examples_or_of_those_held_out() -> None:
    for held_out, count in ((None, 12), (some_examples(5, 7), 7)):
        server = Served(kind="evaluate")
        device = a_device(server, held_out=held_out, trains=False)
        device.run(rounds=1)
        (asked,) = server.named("check_in")
        assert asked.kinds == ("evaluate",)
        hop = evaluation_hop(server.plan.description, 10)
        (body,) = server.counted.values()
        update = decode_report(body, "alice", hop)
        means, histograms = evaluation_of(hop.count_in(update), hop)
        assert (update.examples, set(means)) == (count, {"loss", "error"})
        assert sum(histograms["error"]) == 1
        assert device.status.counts == {"evaluated": 1, "counted": 1}


def test_where_there_is_no_work_it_comes_back_within_the_window() -> None:
    server = Served(works=0)
    device = a_device(server)
    assert 5.0 <= device.wake() <= 10.0
    assert len(server.named("check_in")) == 1
    assert device.wake() > 0
    assert len(server.named("check_in")) == 1, "nothing is due yet"


def test_many_devices_of_a_process_share_one_program() -> None:
    made = itertools.count()

    def model() -> nn.Module:
        next(made)
        return nn.Linear(4, 1)

    task = a_task(model=model)
    training = Training(task, some_examples(), "autograd")
    before, server = next(made), Served(works=20)
    server.tokens = {f"token{client}" for client in range(20)}
    for client in range(20):
        device = a_device(
            server,
            task=training,
            examples=lambda client=client: some_examples(client),
            name=client,
            token=f"token{client}",
            folder=MemoryDeviceStore(),
        )
        device.run(rounds=1)
    assert next(made) == before + 1
    assert len(server.counted) == len(set(server.counted.values())) == 20


# ── what is lost ─────────────────────────────────────────────────────────────────────────────────────────────────────


def lose_the_answer(usual: Callable[[], Answer]) -> Any:
    usual()
    return LOST


@pytest.mark.parametrize(
    "fates",
    [
        [LOST, LOST],
        [lose_the_answer],
        [
            refused("busy", (30.0, 60.0)),
            refused("rate"),
            refused("failed"),
            refused("slow"),
            Answer(502, {}, b"<html>"),
        ],
        [LOST] * 5,
        [lose_the_answer] * 5,
        [Answer(200, {}, b"")],
        [refused("bad_signature")],
    ],
    ids=[
        "lost",
        "unanswered",
        "busy",
        "lost for long",
        "unanswered for long",
        "answered with nothing",
        "garbled on the way",
    ],
)
def test_a_report_is_sent_until_it_is_answered(fates: list[Any]) -> None:
    server, news = Served(works=2), list[DeviceNews]()
    server.fates["report"] = list(fates)
    device = a_device(server, watch=news.append)
    device.run(rounds=2)
    assert not server.fates["report"]
    assert [one.what for one in news if one.what in ("counted", "discarded")] == ["counted", "counted"]
    assert len(server.counted) == 2


@pytest.mark.parametrize("code", ["closed", "stale", "phase", "bad_report", "not_finite", "out_of_bounds", "too_large"])
def test_a_report_that_is_refused_is_over(code: str) -> None:
    server, news = Served(works=2), list[DeviceNews]()
    server.fates["report"] = [refused(code)]
    device = a_device(server, watch=news.append)
    device.run(rounds=1)
    assert words(news)[1:] == ["training", "trained", "trouble", "discarded", "training", "trained", "counted"]
    assert len(server.named("report")) == 2


def test_a_session_that_nobody_knows_is_asked_for_and_its_report_not_sent_again() -> None:
    server = Served(works=2)
    server.fates["report"] = [refused("unknown_session")]
    device = a_device(server)
    server.on_report = lambda session: None
    device.wake()
    server.sessions.clear()  # the server was set back
    device.run(rounds=1)
    assert [name for name, _ in server.asked].count("report") == 2
    asked = server.named("check_in")
    assert asked[1].previous.session == asked[0].session
    assert device.status.counts["discarded"] == 1


@pytest.mark.parametrize("outcome", ["counted", "discarded"])
def test_a_check_in_brings_the_end_of_the_last_session_and_then_work(outcome: str) -> None:
    server, news = Served(works=2, algorithm=SCAFFOLD), list[DeviceNews]()
    server.fates["report"] = [LOST] * 4
    device = a_device(server, watch=news.append)
    device.wake()
    session = server.named("check_in")[0].session
    if outcome == "counted":
        server.fates["report"] = [lose_the_answer, LOST, LOST]
    else:
        server.sessions[session] = "discarded"
    device.run(rounds=1 + (outcome == "counted"))
    assert [one.what for one in news if one.what in ("counted", "discarded")] == [outcome, "counted"]
    assert len(server.named("report")) == 5


def test_a_check_in_that_is_lost_is_another_one_the_next_time() -> None:
    server = Served()
    server.fates["check_in"] = [LOST, lose_the_answer]
    server.works = 2
    device = a_device(server)
    device.run(rounds=1)
    asked: list[CheckInRequest] = server.named("check_in")
    assert [request.serial for request in asked] == [1, 2, 3]
    assert len({request.session for request in asked}) == 3


def test_a_memory_older_than_the_servers_goes_beyond_it() -> None:
    server = Served()
    device = a_device(server)
    device.enrol()
    server.serials[device.status.device] = 500
    device.run(rounds=1)
    first, second = [request.serial for request in server.named("check_in")]
    assert first == 1
    assert 501 < second <= 502 + SPREAD
    assert "this device's key is in use elsewhere" in device.status.trouble


def test_what_the_server_gives_must_be_what_its_hash_says() -> None:
    server = Served(works=2)
    server.fates["object"] = [Answer(200, {}, b"{}")] * 3 + [None, Answer(200, {}, b"{}"), Answer(200, {}, b"x"), None]
    device = a_device(server)
    device.run(rounds=1)
    assert len(server.named("object")) == 3 + 4
    assert device.status.counts["counted"] == 1


FAULTS = Faults(lost=0.1, unanswered=0.15, twice=0.1, cut=0.05, answer_cut=0.1)


@pytest.mark.parametrize("seed", range(6))
def test_over_a_bad_network_every_report_is_settled_once_and_the_state_with_it(seed: int, tmp_path: Path) -> None:
    """SCAFFOLD's server keeps the mean of all controls: a client must hold that of its last counted report, and no other."""
    server = Served(works=10**6, algorithm=SCAFFOLD)
    network = FaultyTransport(server, FAULTS, generator(seed, "network"))
    held = Tracked(MemoryDeviceStore())
    device = a_device(network, folder=held)
    device.run(rounds=12)
    assert len(server.counted) >= 12
    assert sum(network.met.values()) > 10
    held.check(server)


class Tracked:
    """A `DeviceStore` that notes which state goes with which report."""

    def __init__(self, inner: DeviceStore, proposed: dict[str, str] | None = None) -> None:
        self.inner, self.proposed = inner, {} if proposed is None else proposed

    def write(self, record: Record) -> None:
        if record.pending is not None and record.work is not None:
            self.proposed[record.work.session] = record.pending.object
        self.inner.write(record)

    def check(self, server: Served) -> None:
        """It holds what goes with the last report that was counted, and was told all of them."""
        record, last = self.inner.read(), list(server.counted)[-1]
        assert record.states["a"].object == self.proposed[last]
        assert record.counts["counted"] == len(server.counted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Crash(BaseException):
    """The process ends here."""


class Crashing:
    """A `DeviceStore` that ends the process before or after its nth write."""

    def __init__(self, inner: DeviceStore, at: int, before: bool) -> None:
        self.inner, self._left, self._before = inner, at, before

    def write(self, record: Record) -> None:
        self._crash(lambda: self.inner.write(record))

    def put(self, body: bytes) -> str:
        name: list[str] = []
        self._crash(lambda: name.append(self.inner.put(body)))
        return name[0]

    def put_key(self, key: bytes) -> None:
        self._crash(lambda: self.inner.put_key(key))

    def _crash(self, write: Callable[[], Any]) -> None:
        self._left -= 1
        if not self._left and self._before:
            raise Crash
        write()
        if not self._left:
            raise Crash

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_it_may_crash_at_every_write_and_every_session_is_settled_once(kind: str, before: bool, tmp_path: Path) -> None:
    task = Training(a_task(), some_examples(), "autograd")
    for at in range(1, 100):
        server, memory = Served(works=10**6, algorithm=SCAFFOLD, releases=True), MemoryDeviceStore()
        proposed: dict[str, str] = {}

        def opened(memory: MemoryDeviceStore = memory, folder: Path = tmp_path / f"{at}") -> DeviceStore:
            return memory if kind == "memory" else FolderDeviceStore(folder)

        store, crashed = opened(), False
        try:
            a_device(server, task=task, folder=Crashing(Tracked(store, proposed), at, before)).run(rounds=2)
        except Crash:
            crashed = True
        store.close()
        store = Tracked(opened(), proposed)
        a_device(server, task=task, folder=store).run(until=lambda status: status.counts.get("counted", 0) >= 3)
        store.check(server)
        assert len(server.keys) == 1, "it enrolled once, with one key"
        store.close()
        if not crashed:
            assert at > 15
            return
    raise AssertionError("it writes and writes")


def test_the_report_of_a_process_that_ended_is_sent_by_the_next(tmp_path: Path) -> None:
    server = Served()
    server.fates["report"] = [lose_the_answer]
    first = a_device(server, folder=tmp_path)
    first.wake()
    assert first.status.phase == "reporting"
    first.close()
    news = list[DeviceNews]()
    clock = Clock()
    with a_device(server, folder=tmp_path, watch=news.append, clock=clock) as second:
        second.run(rounds=1)
        assert clock() < 1.0, "whoever starts it waits for a word"
    assert words(news) == ["counted"]
    reports = server.named("report")
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "told",
    [
        None,
        Answer(200, {}, write(CheckInAnswer(retry_after_s=(200.0, 300.0)))),
        refused("busy", (1000.0, 2000.0)),
        LOST,
    ],
    ids=["nothing", "a window", "busy", "nobody there"],
)
def test_a_process_that_begins_asks_at_once_whatever_the_one_before_was_told(tmp_path: Path, told: Any) -> None:
    server = Served(works=1)
    server.fates["check_in"] = [] if told is None else [told]
    with a_device(server, folder=tmp_path) as device:
        device.wake()
        before = len(server.named("check_in"))
    with a_device(server, folder=tmp_path) as device:
        assert device.wake() <= 0.1
        device._sleep(0.1)
        device.wake()
        assert len(server.named("check_in")) == before + 1


def test_an_error_in_the_same_process_is_no_start(tmp_path: Path) -> None:
    """Else a full disk would be asked for work again and again."""
    server = Served(works=2)

    class Full(FolderDeviceStore):
        def put(self, body: bytes) -> str:
            raise ExperimentError("no room on the disk")

    device = a_device(server, folder=Full(tmp_path))
    with pytest.raises(ExperimentError, match="no room"):
        device.run(rounds=1)
    assert device.wake() >= 1.0
    device.close()


def test_it_says_at_once_what_it_waits_for_and_until_when() -> None:
    server, news = Served(works=0), list[DeviceNews]()
    server.fates["check_in"] = [
        Answer(200, {}, write(CheckInAnswer(retry_after_s=(5.0, 9.0), reason=reason)))
        for reason in ("few", "pace", "charging", "unmetered", "nothing to do", "asking", "parent", "version")
    ]
    device = a_device(server, watch=news.append, wait_s=20.0)
    while server.fates["check_in"]:
        device._sleep(device.wake())
    asked: list[CheckInRequest] = server.named("check_in")
    assert [request.wait_s for request in asked] == [0.5] + [20.0] * 7, "the first is not held"
    waits = [one for one in news if one.what == "waiting"]
    assert [one.again_s for one in waits] == [9.0] * 8
    for one in waits:
        assert re.match(r"(for|until) [a-z: ]{10}", one.said), one.said


def test_ctrl_c_in_mid_training_is_told(tmp_path: Path) -> None:
    class Interrupted(Training):
        def train(self, *arguments: Any) -> Any:
            raise KeyboardInterrupt

    server = Served()
    device = a_device(server, task=Interrupted(a_task(), some_examples(), "autograd"))
    with pytest.raises(KeyboardInterrupt):
        device.run()
    assert server.named("abort") == ["stopped"]
    assert device.status.phase == "idle"


def test_it_ends_when_it_is_told_to() -> None:
    server = Served(works=0)
    waiting = threading.Event()
    device = a_device(server, sleep=None, watch=lambda news: waiting.set() if news.what == "waiting" else None)
    thread = threading.Thread(target=device.run)
    thread.start()
    assert waiting.wait(20)
    device.stop()
    thread.join(20)
    assert not thread.is_alive()


# ── consent ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("floor", "reason", "said"),
    [
        (
            Floor(contributors=11),
            "floor-contributors",
            "the server's sums have at least 10 contributors, but you consent to no fewer than 11: join "
            "with --floor contributors=10",
        ),
        (
            Floor(steps=5),
            "floor-steps",
            "the round takes 6 local steps, but you consent to 5: join with --floor steps=6",
        ),
        (
            Floor(bytes=100),
            "floor-bytes",
            r"the round takes [0-9.]+ kB .*, but you consent to 100 bytes: join with --floor bytes=\d+",
        ),
        (Floor(memory=10), "floor-memory", r"a local step takes at least (\d+) bytes .* --floor memory=\1"),
        (Floor(rounds=0), "floor-rounds", "you consent to 0 rounds a day, .* or join with a higher --floor rounds=N"),
    ],
)
def test_whatever_the_server_asks_for_the_floor_holds(floor: Floor, reason: str, said: str) -> None:
    server, news = Served(), list[DeviceNews]()
    device = a_device(server, floor=floor, watch=news.append)
    device.wake()
    assert server.named("abort") == [reason]
    (aborted,) = (one.said for one in news if one.what == "aborted")
    assert re.fullmatch(f"{reason}: {said}", aborted)
    assert not server.counted
    assert device.status.counts == {"aborted": 1}
    if reason == "floor-bytes":
        assert not server.named("object"), "nothing was fetched"


def test_a_server_that_promises_more_people_than_its_plan_asks_for_is_not_believed() -> None:
    server = Served(contributors=1000)
    device = a_device(server, floor=Floor(contributors=11))
    device.wake()
    assert server.named("abort") == ["floor-contributors"]


def test_rounds_a_day_are_counted_by_the_devices_own_calendar() -> None:
    server, day = Served(works=6), [1]
    device = a_device(server, floor=replace(FREE, rounds=2), today=lambda: day[0])
    device.run(until=lambda status: status.checkins == 4)
    assert (len(server.counted), server.named("abort")) == (2, ["floor-rounds"] * 2)
    day[0] = -3650
    device.run(rounds=1)
    assert len(server.counted) == 3


def test_who_is_asked_for_too_much_again_and_again_comes_less_and_less_often() -> None:
    server = Served(works=8)
    device, waits = a_device(server, floor=Floor(steps=5)), list[float]()
    for _ in range(8):
        waits.append(device.wake())
        device._sleep(waits[-1])
    assert len(server.named("abort")) == 8
    assert waits[-1] >= 1800


def test_a_server_that_names_many_tasks_does_not_fill_the_disk() -> None:
    server = Served(works=0)
    device = a_device(server)
    for first in (0, 100):
        released = {f"t{first + number}": Released(1, server.model) for number in range(40)}
        server.fates["check_in"] = [Answer(200, {}, write(CheckInAnswer(None, None, (1.0, 2.0), "", released)))]
        device._sleep(100)
        device.wake()
        assert set(device.status.models) == {f"t{first + number}" for number in range(16)}


def test_a_plan_of_another_model_is_refused() -> None:
    server = Served(task=a_task(model=lambda: nn.Linear(4, 1, bias=False)))
    own = a_device(server)
    server.plan = replace(server.plan, task=Training(a_task(), some_examples()).description)  # what it pretends
    own.wake()
    assert server.named("abort") == ["floor-task"]
    assert "for another model, or other data" in own.status.trouble


@pytest.mark.parametrize(("body", "reason"), [(b"{}", "plan"), (b"\xff", "plan"), (b"[1, 2", "plan")])
def test_a_plan_that_is_none_is_refused(body: bytes, reason: str) -> None:
    server = Served()
    server.plan_body = server.keep(body)
    device = a_device(server)
    device.wake()
    assert server.named("abort") == [reason]


@pytest.mark.parametrize("broadcast", ["another shape", "another leaf", "no tensors"])
def test_a_broadcast_that_is_not_the_plans_is_refused(broadcast: str) -> None:
    server = Served()
    trees: dict[str, Any] = {
        "another shape": {"params/weight": np.zeros((2, 4), np.float32), "params/bias": np.zeros(1, np.float32)},
        "another leaf": {"params/weights": np.zeros((1, 4), np.float32), "params/bias": np.zeros(1, np.float32)},
    }
    body = encode_tree(trees[broadcast]) if broadcast in trees else b"no tensors at all"
    server.broadcast = server.keep(body)
    device = a_device(server)
    device.wake()
    assert server.named("abort") == ["plan"]


def test_conditions_of_the_plan_are_looked_at_before_anything_is_trained() -> None:
    pacing = sumus.Pacing(cohort=10, requires=Conditions(charging=True))
    for sensors, aborted in ((AllConditionsMet(), []), (NoConditionKnown(), ["conditions"])):
        server = Served(pacing=pacing)
        device = a_device(server, sensors=sensors)
        device.wake()
        assert server.named("abort") == aborted
        (asked,) = server.named("check_in")
        assert asked.conditions.charging == (not aborted)


def test_without_its_own_conditions_it_says_nothing_to_anyone() -> None:
    server, news = Served(), list[DeviceNews]()
    device = a_device(server, sensors=NoConditionKnown(), requires=Conditions(idle=True), watch=news.append)
    assert device.wake() > 0
    assert server.asked == []
    assert news == [
        DeviceNews(
            "waiting",
            "until nobody uses the machine, as you require (give --always if nobody ever uses it)",
            again_s=300.0,
        )
    ]


# ── what goes wrong on the device ────────────────────────────────────────────────────────────────────────────────────


def failing(kind: type[Exception]) -> Callable[[Any, Any], Any]:
    def loss(outputs: Any, targets: Any) -> Any:
        if outputs.requires_grad:  # in training
            raise kind("mine")
        return ((outputs - targets) ** 2).mean(1)

    return loss


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        (
            {"task": a_task(loss=lambda outputs, targets: (outputs - targets).mean(1) * 1e38 * 1e38)},
            "diverged",
            "diverged",
        ),
        ({"task": a_task(loss=failing(RuntimeError))}, "task", "RuntimeError: mine"),
    ],
)
def test_an_error_in_training_ends_its_round_and_not_the_device(
    changes: dict[str, Any], reason: str, said: str
) -> None:
    server, news = Served(works=4), list[DeviceNews]()
    device = a_device(server, watch=news.append, **changes)
    waits = []
    for _ in range(4):
        waits.append(device.wake())
        device._sleep(waits[-1])
    assert server.named("abort") == [reason] * 4
    assert said in device.status.trouble
    assert 15 <= waits[0] <= 60
    assert waits[-1] > 100, "no crash loop"


def test_examples_that_cannot_be_loaded_are_said_to_be() -> None:
    given = [some_examples()]

    def examples() -> Any:
        if given:
            return given.pop()
        raise OSError("the disk is gone")

    server = Served()
    device = a_device(server, task=Training(a_task(), examples()), examples=examples)
    device.wake()
    assert server.named("abort") == ["data"]
    assert "loading its examples failed: OSError: the disk is gone" in device.status.trouble


def test_examples_that_do_not_fit_the_task_are_an_error_before_anything_is_asked() -> None:
    server = Served()
    device = a_device(server, examples=(np.zeros((3, 5), np.float32), np.zeros((3, 1), np.float32)))
    with pytest.raises(sumus.TaskError):
        device.run()
    assert server.named("check_in") == []


# ── enrolment ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_enrolment_is_done_once_and_lasts(tmp_path: Path) -> None:
    server = Served(works=0)
    with a_device(server, folder=tmp_path) as device:
        first = device.enrol()
        assert device.enrol() == first
    with a_device(server, folder=tmp_path, token=None) as device:
        assert device.enrol() == first
    assert len(server.named("enrol")) == 1


def test_an_enrolment_whose_answer_was_lost_is_repeated_with_the_same_key() -> None:
    server = Served(works=0)
    server.fates["enrol"] = [lose_the_answer, refused("rate")]
    device = a_device(server)
    assert device.wake() >= 15
    device.run(until=lambda status: status.checkins == 1)
    assert len(server.keys) == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [("bad_token", "ask for a new link"), ("token_used", "used already"), ("quota", "no more devices")],
)
def test_an_enrolment_that_is_refused_says_what_to_do(code: str, said: str) -> None:
    server = Served()
    server.fates["enrol"] = [refused(code)]
    with pytest.raises(ExperimentError, match=said):
        a_device(server).run()


def test_without_a_token_it_is_said_to_need_one() -> None:
    with pytest.raises(ExperimentError, match="not enrolled: give it a link or a token"):
        a_device(Served(), token=None).wake()


@pytest.mark.parametrize("code", ["revoked", "wrong_task", "old_protocol"])
def test_what_a_person_must_mend_is_an_error_and_waits(code: str) -> None:
    server = Served()
    server.fates["check_in"] = [refused(code)]
    device = a_device(server)
    with pytest.raises(ExperimentError, match="said so"):
        device.run()
    assert device.wake() > 0, "and who calls again waits"


def test_a_server_that_has_forgotten_it_is_asked_again_with_its_token() -> None:
    server = Served()
    device = a_device(server)
    device.enrol()
    server.keys.clear()
    server.tokens = {"token"}
    device.run(rounds=1)
    assert len(server.named("enrol")) == 2
    server.keys.clear()
    device = a_device(server, token=None, folder=device._memory.store)
    with pytest.raises(ExperimentError, match="does not know this device"):
        device.run()


def test_a_device_of_one_server_gives_nothing_to_another(tmp_path: Path) -> None:
    server, other = Served(), Served()
    server.fates["report"] = [LOST]
    with a_device(server, folder=tmp_path) as device:
        device.wake()
    before = FolderDeviceStore(tmp_path, look=True).read()
    assert before.row.unsettled
    for where, token in (("https://other.example/#enrol=token", None), ("https://other.example", "token")):
        with pytest.raises(ExperimentError, match="a device of https://example.org: give another --folder"):
            at(other, where, tmp_path, token)
    assert other.asked == []
    assert FolderDeviceStore(tmp_path, look=True).read() == before
    with a_device(server, folder=tmp_path) as device:  # with the token still in the environment, and the folder let go
        device.run(rounds=1)
    assert len(server.counted) == 1


def test_a_server_that_has_moved_is_followed_once_it_knows_the_device(tmp_path: Path) -> None:
    server, other = Served(works=0), Served(works=0)
    with a_device(server, folder=tmp_path) as device:
        device.wake()
    with at(other, "https://other.example", tmp_path, None) as device:
        with pytest.raises(ExperimentError, match="does not know this device"):
            device.run()
    kept = FolderDeviceStore(tmp_path, look=True)
    assert kept.read().membership.server == "https://example.org"  # type: ignore[union-attr]
    with at(server, "https://moved.example", tmp_path, None) as device:
        device.run(until=lambda status: status.checkins >= 3)
    assert kept.read().membership.server == "https://moved.example"  # type: ignore[union-attr]
    assert len(server.keys) == 1


def test_a_device_moves_to_another_edge_with_its_key_once_it_knows_what_became_of_its_report(tmp_path: Path) -> None:
    one, other = Served(), Served()
    one.fates["report"] = [LOST]
    with a_device(one, folder=tmp_path) as device:
        device.wake()
    link = "https://other.example/#enrol=token"
    with pytest.raises(
        ExperimentError, match="only https://example.org knows whether this device's last report was counted"
    ):
        at(other, link, tmp_path, None, moves=True)
    with a_device(one, folder=tmp_path) as device:
        device.run(rounds=1)
    with at(other, link, tmp_path, None, moves=True) as device:
        device.run(rounds=1)
    assert (len(one.counted), len(other.counted)) == (1, 1)
    assert one.keys == other.keys, "it is the same device"
    assert FolderDeviceStore(tmp_path, look=True).read().membership.server == "https://other.example"  # type: ignore[union-attr]


def at(server: Served, where: str, folder: Path, token: str | None, moves: bool = False) -> Device:
    """A device that is told where its server is."""
    clock = Clock()
    system = DeviceSystem(keyed(7), clock, clock.sleep)
    return Device(
        where,
        a_task(),
        some_examples(),
        folder=folder,
        token=token,
        consent=FREE,
        connection=ServerConnection(moves=moves, transport=server),
        profile=DeviceProfile("alice", sensors=AllConditionsMet(), executor="autograd", system=system),
    )


# ── predicting, and leaving ──────────────────────────────────────────────────────────────────────────────────────────


def centred(inputs: Any, targets: Any) -> tuple[Any, Any]:
    return np.asarray(inputs) - 1.0, targets


def test_it_predicts_with_the_last_model_also_offline_and_in_another_process(tmp_path: Path) -> None:
    task = a_task(prepare=centred)
    server = Served(works=0, releases=True, task=task)
    with a_device(server, folder=tmp_path, task=task) as device:
        with pytest.raises(ExperimentError, match="no model to predict with yet"):
            device.predict(some_examples()[0])
        device.wake()
        assert device.status.models == {"a": 3}
    later = Device(None, task, some_examples(), folder=FolderDeviceStore(tmp_path, look=True))
    inputs = some_examples(9, 1100)[0]
    model = server.state.broadcast["params"]
    np.testing.assert_allclose(
        later.predict(inputs), (inputs - 1.0) @ model["weight"].T + model["bias"], rtol=1e-5, atol=1e-6
    )


def test_a_newer_model_takes_the_place_of_the_last_and_a_broken_one_does_not() -> None:
    server, news = Served(works=0, releases=True), list[DeviceNews]()
    device = a_device(server, watch=news.append)
    device.wake()
    first = device.predict(some_examples()[0])
    broken = {name: np.full_like(leaf, np.nan) for name, leaf in server.state.broadcast["params"].items()}
    for version, tree in (
        (4, broken),
        (5, {name: leaf + 1 for name, leaf in server.state.broadcast["params"].items()}),
    ):
        server.version, server.model = version, server.keep(encode_tree(tree))
        device._sleep(100)
        device.wake()
        assert np.array_equal(device.predict(some_examples()[0]), first) == (version == 4)
    assert device.status.models == {"a": 5}
    assert "the model contains NaN or infinity" in next(n.said for n in news if n.what == "trouble")


def test_personal_leaves_are_kept_here_and_predict_here() -> None:
    task = a_task(model=lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), leaves={"1.*": "personal"})
    server = Served(works=2, releases=True, task=task)
    device = a_device(server, task=task)
    device.wake()
    before = device.predict(some_examples()[0])
    record = device._memory.store.read()
    kept = nested(decode_tree(device._memory.store.get(record.states["a"].object)))
    assert set(kept) == {"personal"}
    decode_report(next(iter(server.counted.values())), "alice", server.plan.first_hop)
    device.run(rounds=1)
    assert not np.array_equal(device.predict(some_examples()[0]), before), "the shared model is the same one"


def test_it_is_forgotten_there_and_here_and_what_is_not_is_said(tmp_path: Path) -> None:
    server = Served(releases=True)
    with a_device(server, folder=tmp_path) as device:
        device.run(rounds=1)
        done = device.forget()
        assert server.keys == {}
        assert device.status.counts == {}
        assert any("1 report of this device" in line for line in done.remains)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"lock"}


def test_what_the_server_has_not_heard_is_not_forgotten_here(tmp_path: Path) -> None:
    server = Served()
    server.fates["withdraw"] = [LOST, refused("not_ready"), lose_the_answer]
    with a_device(server, folder=tmp_path) as device:
        device.run(rounds=1)
        for _ in range(3):
            with pytest.raises(Unreachable):
                device.forget()
            assert (tmp_path / "key").exists()
        device.forget()
        assert not (tmp_path / "key").exists()


def test_news_are_json_and_hold_no_secret() -> None:
    server, news = Served(works=2), list[DeviceNews]()
    server.fates["report"] = [LOST]
    a_device(server, watch=news.append).run(rounds=1)
    text = json.dumps([vars(one) for one in news])
    assert "token" not in text
    assert key(7, "device", "alice").hex() not in text
    assert not math.isnan(news[2].measured.get("loss", math.nan))


# ── a folder that was put back ───────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_from_a_backup_says_what_happened_and_goes_on(tmp_path: Path) -> None:
    server, news = Served(works=2), list[DeviceNews]()
    with a_device(server, folder=tmp_path / "now") as device:
        device.enrol()
    shutil.copytree(tmp_path / "now", tmp_path / "backup")
    with a_device(server, folder=tmp_path / "now") as device:
        device.run(rounds=1)
    server.serials[device.status.device] = 500
    with a_device(server, folder=tmp_path / "backup", watch=news.append) as old:
        old.run(rounds=1)
    (said,) = (one.said for one in news if one.what == "trouble")
    assert "do nothing: the device continues by itself" in said
    assert old.status.trouble == said


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (
            "key",
            r"is enrolled but has no key, .*: restore its `key` too, or delete the folder and enrol the device again",
        ),
        ("objects", r"objects/[0-9a-f]+ is gone or damaged: delete .*, and enrol this device again with another token"),
    ],
)
def test_a_folder_that_was_put_back_in_part_says_what_is_missing(tmp_path: Path, left_out: str, said: str) -> None:
    server = Served(works=1, releases=True)
    with a_device(server, folder=tmp_path) as device:
        device.run(rounds=1)
    path = tmp_path / left_out
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "objects").mkdir(exist_ok=True)

    def again() -> None:
        with a_device(server, folder=tmp_path) as device:
            device.predict(some_examples()[0])

    with pytest.raises(ExperimentError, match=said):
        again()
    with pytest.raises(ExperimentError, match=said):
        again()


def test_a_server_that_was_put_back_from_before_this_device_is_said_to_be(tmp_path: Path) -> None:
    server = Served()
    with a_device(server, folder=tmp_path) as device:
        device.enrol()
    server.fates["check_in"] = [refused("unknown_device")]
    with a_device(server, folder=tmp_path, token=None) as device:
        with pytest.raises(
            ExperimentError, match="restored from a backup that is older than the device; enrol it again"
        ):
            device.run(rounds=1)
