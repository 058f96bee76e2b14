"""A worker elsewhere is used as one that is here, by whoever has its token, each for themselves."""

import gc
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import sumus
from sumus.cli import app as command_line
from sumus.errors import ExperimentError, ParticipantError
from sumus.rng import generator
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import MOST, PATIENCE, Answer, Unreachable
from sumus.virtual import Policy, VirtualWorker, Worker, WorkerRefused, connect, get, move, send, serve
from sumus.virtual.commands import load_tensors, token_of
from sumus.virtual.messages import (
    OVERHEAD,
    STATUS,
    BeginAnswer,
    BeginRequest,
    CountHeld,
    RefusalAnswer,
    WorkerAnswer,
    WorkerRequest,
    read,
    write,
)
from sumus.virtual.remote import read_token
from sumus.virtual.serving import ASK, BEGIN, END, worker_app
from tests.virtual.owned import FILE, TOKEN, owners

OWN = {"inputs": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
HERE = "http://127.0.0.1"


class Clock:
    """Time that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A worker of its owner's, and the way to it."""

    def __init__(self, **policy: Any) -> None:
        self.clock = Clock()
        self.app = worker_app(
            "dora", OWN, Policy(**{"fetch": "parameters", "idle_s": 100.0, **policy}), TOKEN, self.clock
        )
        self.network = InProcess(self.app)

    @property
    def callers(self) -> int:
        return len(self.app.state.callers)

    def caller(self, transport: Any = None) -> Worker:
        return connect(HERE, TOKEN, transport=transport or Way(self.network))

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Status and answer of a request."""
        shown = {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
        answer = self.network.request("POST", path, body, shown)
        return answer.status, read(WorkerAnswer, answer.body)[0].answer


class Way:
    """A transport that several callers may each close."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        return self._inner.request(method, path, body, headers, patience, most)

    def close(self) -> None: ...


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.network.close()


def learn(worker: Worker) -> dict[str, torch.Tensor]:
    """A model that has learnt at a worker."""
    torch.manual_seed(0)
    model = send(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), worker)
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    targets = send(torch.tensor([[0.0], [1.0]]), worker)
    for _ in range(3):
        steps.zero_grad()
        F.mse_loss(model(worker["inputs"]), targets).backward()
        steps.step()
    return get(model).state_dict()


def test_it_is_used_as_one_that_is_here(device: Device) -> None:
    there = device.caller()
    assert (there.name, there.names) == ("dora", ("inputs",))
    assert repr(there) == "<worker 'dora' at http://127.0.0.1>"
    here = VirtualWorker("dora", OWN, Policy(fetch="parameters"))
    learnt, again = learn(here), learn(there)
    assert all(torch.equal(leaf, again[name]) for name, leaf in learnt.items())
    with pytest.raises(WorkerRefused, match="'dora' refuses: this tensor depends on the owner's data"):
        get(there["inputs"])
    with pytest.raises(WorkerRefused, match="offers no tensor 'secrets'; the tensors on offer are: inputs"):
        there["secrets"]


def test_a_bad_network_changes_no_bit(device: Device) -> None:
    faults = Faults(lost=0.1, unanswered=0.15, twice=0.1)
    bad = FaultyTransport(Way(device.network), faults, generator(0, "network"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sumus.virtual.remote.ATTEMPTS", 20)
        learnt = learn(device.caller(bad))
    assert min(bad.met[fault] for fault in ("lost", "unanswered", "twice")) > 3
    plain = learn(device.caller())
    assert all(torch.equal(leaf, learnt[name]) for name, leaf in plain.items())


def test_callers_are_apart(device: Device) -> None:
    first, second = device.caller(), device.caller()
    x, y = send(torch.ones(2), first), send(torch.zeros(3), second)
    assert x.id == y.id
    assert (get(x).tolist(), get(y).tolist()) == ([1.0, 1.0], [0.0, 0.0, 0.0])
    another = send(torch.ones(1), first)
    second._let_go.append(another.id)  # pyright: ignore[reportPrivateUsage]
    assert second.held().tensors == 1
    assert get(another).tolist() == [1.0]
    with pytest.raises(sumus.UsageError, match="move one of them"):
        x + y
    first.close()
    assert get(y).tolist() == [0.0, 0.0, 0.0]
    assert device.callers == 1


def test_each_has_limits_of_its_own() -> None:
    device = Device(tensors=2)
    first, second = device.caller(), device.caller()
    held = [send(torch.ones(1), first) for _ in range(2)]
    with pytest.raises(WorkerRefused, match="you hold 2 tensors here"):
        send(torch.ones(1), first)
    send(torch.ones(1), second)
    assert len(held) == 2
    device.network.close()


def test_between_two_devices_tensors_go_by_way_of_the_caller(device: Device) -> None:
    other = Device()
    one, two = device.caller(), other.caller()
    assert get(move(send(torch.ones(2), one), two) + 1).tolist() == [2.0, 2.0]
    with pytest.raises(WorkerRefused, match="depends on the owner's data"):
        move(one["inputs"], two)
    other.network.close()


def test_what_is_let_go_of_is_deleted_there(device: Device) -> None:
    there = device.caller()
    kept = [send(torch.ones(2), there) + 1 for _ in range(3)]
    gc.collect()
    assert there.held().tensors == 3
    kept.clear()
    gc.collect()
    assert there.held().tensors == 0


def test_as_many_callers_as_the_policy_says() -> None:
    device = Device(callers=2)
    first, _ = device.caller(), device.caller()
    with pytest.raises(
        WorkerRefused, match="this worker has 2 callers, the maximum: close one, or try later"
    ) as caught:
        device.caller()
    assert caught.value.code == "busy"
    first.close()
    device.caller()
    device.network.close()


def test_who_asks_nothing_for_long_is_forgotten(device: Device) -> None:
    idle, busy = device.caller(), device.caller()
    x = send(torch.ones(2), idle)
    device.clock.now = 60.0
    busy.held()
    device.clock.now = 120.0
    busy.held()
    assert device.callers == 1
    with pytest.raises(WorkerRefused, match="forgot it after 100 s without a request; connect") as caught:
        get(x)
    assert caught.value.code == "unknown_caller"
    device.clock.now = 1000.0
    device.app.state.callers.sweep()
    assert device.callers == 0


# ── who is let in, and what is read ──────────────────────────────────────────────────────────────────────────────────


def test_without_the_token_nobody_is_let_in(device: Device) -> None:
    with pytest.raises(WorkerRefused, match="this is not the worker's token: ask") as caught:
        connect(HERE, "another-token-entirely", transport=Way(device.network))
    assert caught.value.code == "bad_token"
    caller = device.post(BEGIN, write(BeginRequest()))[1].caller
    for path in (BEGIN, ASK, END):
        for headers in (
            {},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer é"},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            assert device.post(path, b"", {**headers, "Sumus-Caller": caller}) == (401, refusal("bad_token"))
    assert device.callers == 1


class refusal:
    """Equal to any refusal of a code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefusalAnswer) and other.code == self.code

    __hash__ = None  # type: ignore[assignment]


def test_a_token_alone_is_no_caller(device: Device) -> None:
    status, said = device.post(ASK, write(WorkerRequest(1, CountHeld())))
    assert (status, said) == (401, refusal("unknown_caller"))
    assert device.post(END, b"")[0] == 200


def test_bodies_are_refused_by_their_length_before_they_are_read(device: Device) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Sumus-Caller": device.post(BEGIN, write(BeginRequest()))[1].caller}
    for path, length, status, code in (
        (ASK, str(2**26 + OVERHEAD + 1), 413, "too_large"),
        (BEGIN, "2000", 413, "too_large"),
        (ASK, "-1", 400, "malformed"),
        (ASK, "1e3", 400, "malformed"),
        (ASK, "7", 400, "malformed"),
    ):
        assert device.post(path, b"eight by", {**headers, "Content-Length": length}) == (status, refusal(code))
    assert device.post(BEGIN, b"eight by")[1] == refusal("malformed")
    assert device.post("/v1/run", b"")[1] == refusal("not_found")
    assert STATUS["not_found"] == device.network.request("GET", ASK).status


def test_a_slow_body_holds_nobody_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sumus.http.bodies.WINDOW_S", 0.0)
    status, said = device.post(BEGIN, b"", {"Authorization": f"Bearer {TOKEN}", "Content-Length": "8"})
    assert (status, said) in [(408, refusal("slow")), (400, refusal("malformed"))]


@pytest.mark.parametrize("token", ["short", "with a blank in it", "nöt-ascii-nöt-ascii", ""])
def test_a_token_that_can_be_guessed_is_refused(token: str) -> None:
    with pytest.raises(sumus.UsageError, match="a token must have at least 16 ASCII characters"):
        worker_app("dora", OWN, Policy(), token)


def test_other_machines_reach_it_only_where_that_is_said() -> None:
    with pytest.raises(
        sumus.UsageError, match=r"other machines can reach 0\.0\.0\.0, and without TLS they can read the traffic"
    ):
        serve(OWN, token=TOKEN, host="0.0.0.0")
    with pytest.raises(sumus.UsageError, match=r"nothing\.pem cannot be read: No such file"):
        serve(OWN, token=TOKEN, tls=("nothing.pem", "nothing.key"))
    with pytest.raises(ExperimentError, match=r"cannot listen on 127\.0\.0\.1:1.*--listen|cannot listen on 192"):
        serve(OWN, token=TOKEN, host="192.0.2.1", port=1, insecure=True)


def test_a_caller_is_told_what_is_no_worker(device: Device) -> None:
    with pytest.raises(ExperimentError, match="is not encrypted"):
        connect("http://worker.example.org:8090", TOKEN)
    with pytest.raises(ExperimentError, match="not a worker's address"):
        connect("worker", TOKEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="does not answer"):
            connect(f"http://127.0.0.1:{taken.getsockname()[1]}", TOKEN)

    async def another(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"<html>"})

    with InProcess(another) as network, pytest.raises(ParticipantError, match="sent an unexpected response"):
        connect(HERE, TOKEN, transport=network)


# ── over sockets ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owner") / "dora.py"
    path.write_text(FILE)
    return path


def test_another_process_gives_the_same_and_its_end_is_told(file: Path) -> None:
    with owners(str(file)) as ((url, process),):
        there = connect(url, TOKEN)
        assert there.names == ("inputs",)
        here = VirtualWorker("dora", OWN, Policy(fetch="parameters"))
        learnt, again = learn(here), learn(there)
        assert all(torch.equal(leaf, again[name]) for name, leaf in learnt.items())
        with pytest.raises(WorkerRefused, match="the tensor has 120000 bytes, but at most 100000 are allowed here"):
            send(torch.ones(30_000), there)
        x = send(torch.ones(2), there)
        process.kill()
        process.wait()
        with pytest.raises(
            Unreachable, match="the last operation may or may not have been done.*connect again, and send them again"
        ):
            x + 1
        there.close()
        del x
        gc.collect()


def test_a_worker_that_is_killed_while_it_computes_is_told(file: Path) -> None:
    with owners(str(file)) as ((url, process),):
        there = connect(url, TOKEN)
        x = send(torch.ones(64, 64), there)
        started, failed = threading.Event(), list[Exception]()

        def compute() -> None:
            try:
                while True:
                    x @ x
                    started.set()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=compute)
        thread.start()
        assert started.wait(60)
        process.kill()
        thread.join(60)
        assert [type(error) for error in failed] == [Unreachable]
        assert "worker 'dora' does not answer" in str(failed[0])


def test_ctrl_c_ends_it(file: Path) -> None:
    with owners(str(file)) as ((_, process),):
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_offers_tensors_and_a_policy(file: Path, tmp_path: Path) -> None:
    tensors, policy = load_tensors(str(file))
    assert list(tensors) == ["inputs"]
    assert policy == Policy(fetch="parameters", largest=100_000)
    other = tmp_path / "plain.py"
    other.write_text("def mine():\n    return {'a': 1}\n\npolicy = 'all'\ntensors = 3\n")
    with pytest.raises(ExperimentError, match="`policy` in .* is a str, not a sumus.virtual.Policy"):
        load_tensors(f"{other}:mine")
    with pytest.raises(ExperimentError, match="defines no `tensors`: add `tensors = "):
        load_tensors(str(other))


def test_a_token_comes_from_a_file_or_the_environment_and_never_from_a_command(tmp_path: Path) -> None:
    made = tmp_path / "TOKEN"
    token = token_of(str(made), {})
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert len(token) == 43
    assert token_of(str(made), {}) == read_token(made) == token
    assert token_of(None, {"SUMUS_WORKER_TOKEN": TOKEN}) == TOKEN
    with pytest.raises(sumus.UsageError, match="the worker needs a token for its callers: give --token-file FILE"):
        token_of(None, {})
    made.chmod(0o644)
    with pytest.raises(ExperimentError, match="holds a secret, and other users may read it: run chmod 600"):
        token_of(str(made), {})
    with pytest.raises(ExperimentError, match="cannot be read"):
        read_token(tmp_path / "nothing")
    shown = CliRunner().invoke(command_line, ["worker", "--help"])
    assert "--token " not in shown.output


def test_a_token_may_come_from_standard_input() -> None:
    code = "from sumus.virtual.commands import token_of; print(token_of('-', {}))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=f"{TOKEN}\n", capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert run.stdout.strip() == TOKEN


def test_a_caller_reads_its_token_from_a_file(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "TOKEN"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    with connect(HERE, file, transport=Way(device.network)) as worker:
        assert worker.held().tensors == 0
    assert device.callers == 0


def test_what_begins_is_told_once() -> None:
    device = Device()
    status, said = device.post(BEGIN, write(BeginRequest()))
    assert status == 200
    assert isinstance(said, BeginAnswer)
    assert len(said.caller) == 43
    assert TOKEN not in repr(said)
    device.network.close()
