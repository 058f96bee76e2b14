"""A node keeps, trains and answers; what goes wrong with one of these ends none of the others; and no reading leaves it."""

import json
import socket
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.device.conditions import AllConditionsMet
from sumus.device.device import Prediction
from sumus.device.options import Consent, DeviceProfile, DeviceSystem, ServerConnection
from sumus.errors import ExperimentError, UsageError
from sumus.node.node import Node
from sumus.node.options import NodeListening, NodeTraining, ReadingSchema, ReadingSources
from sumus.node.reading import BadReading
from sumus.node.readings import Retention
from sumus.node.readings_file import FILE
from sumus.node.status import NodeStatus
from sumus.operations.serve import bundles_of
from sumus.operations.service import open_service
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import MOST, PATIENCE, Answer, Unreachable
from sumus.wire.messages import CheckInAnswer, CheckInRequest, read, write
from tests.device.served import FREE, Served, a_task, refused

FORM = sumus.Data((4,), "float32", (1,), "float32")


def reading(number: int, **more: Any) -> dict[str, Any]:
    inputs = np.random.default_rng(number).normal(size=4).astype(np.float32)
    return {"inputs": inputs.tolist(), "target": [float(inputs.sum() > 0)], **more}


def until(node: Node, met: Any, seconds: float = 180.0) -> NodeStatus:
    """Where a node stands once that is met."""
    left = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if met(status := node.status):
            return status
        left.wait(0.02)
    raise AssertionError(node.status)


def a_node(folder: Path, server: Any = None, **more: Any) -> Node:
    """A node of a server in this process, whose conditions are met. more: options, by the names that their values give them."""
    given: dict[str, Any] = {
        "token": "token",
        "transport": server or Patient(releases=True),
        "floor": FREE,
        "sensors": AllConditionsMet(),
        "wait_s": 0.0,
        "executor": "autograd",
        "listen": None,
        **more,
    }

    def of(*names: str) -> dict[str, Any]:
        return {name: given.pop(name) for name in names if name in given}

    listen = of("access", "tls", "names", "insecure")
    system = DeviceSystem(**of("keys"))
    training = NodeTraining(
        consent=Consent(**of("floor", "requires")),
        connection=ServerConnection(**of("wait_s", "transport", "authority")),
        profile=DeviceProfile(system=system, **{"name": "this node"} | of("name", "sensors", "executor")),
        **of("token", "held_out", "least", "new", "news"),
    )
    retention = {
        name.removeprefix("keep_"): value for name, value in of("keep_days", "keep_count", "keep_bytes").items()
    }
    return Node(
        "https://example.org",
        given.pop("task", None) or a_task(data=FORM),
        folder,
        schema=ReadingSchema(**of("prepare", "label", "answer", "time")),
        sources=ReadingSources(**of("watch", "follow", "mqtt")),
        retention=Retention(**retention),
        listen=NodeListening(given.pop("listen"), **listen) if listen else given.pop("listen"),
        training=training,
        **given,
    )


class Patient(Served):
    """A server of one device, which comes back within a second, and is given work only where it takes some."""

    def _check_in(self, device: str, asked: CheckInRequest) -> Answer:
        works = self.works
        takes = self.kind in asked.kinds
        self.works = works if takes else 0
        answer = read(CheckInAnswer, super()._check_in(device, asked).body)
        self.works = self.works if takes else works
        return Answer(200, {}, write(msgspec.structs.replace(answer, retry_after_s=(0.0, 0.1))))


class Recorded:
    """A way to a server that remembers what went over it."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.sent = inner, list[bytes]()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        self.sent.append(f"{method} {path} {dict(headers)}".encode() + bytes(body))
        return self._inner.request(method, path, body, headers, patience, most)

    def close(self) -> None: ...


# ── with a server ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def network() -> Iterator[Recorded]:
    """A server for three, in this process."""
    plan = sumus.Plan(
        a_task(data=FORM),
        sumus.fedavg(sumus.sgd(lr=0.1, epochs=2, batch_size=5), sumus.clip_by_global_norm(5.0), weight="uniform"),
        sumus.Pacing(cohort=3, deadline=60),
        min_contributors=3,
    )
    with ExitStack() as stack:
        service = open_service(bundles_of([plan]))
        stack.callback(service.close)
        service.start()
        inside = stack.enter_context(InProcess(service.device_app))
        network = Recorded(inside)
        network.token = service.server.roll.new_token("default", service.server.clock(), uses=20)  # type: ignore[attr-defined]
        yield network


def test_it_trains_on_what_came_answers_offline_and_no_reading_leaves(network: Recorded, tmp_path: Path) -> None:
    marked = np.frombuffer(b"SECRETOFTHEHOUSE", np.float32)  # finite, and small
    assert np.isfinite(marked).all()
    given = {"server": network, "token": network.token, "floor": sumus.Floor(contributors=3), "wait_s": 1.0}  # type: ignore[attr-defined]
    with ExitStack() as stack:
        nodes = [stack.enter_context(a_node(tmp_path / str(number), **given)) for number in range(3)]
        for number, node in enumerate(nodes):
            taken = node.keep(*(reading(1000 * number + row, key=f"bedroom-window-{row}") for row in range(30)))
            assert taken.kept == 30
            node.keep({"inputs": (marked * 1e-20).tolist(), "target": [0.0], "room": "bedroom-of-the-children"})
        for node in nodes:
            status = until(node, lambda status: status.models.get("task", 0) >= 2 and status.rounds >= 2)
            assert (status.readings.kept, status.readings.labelled) == (31, 31)
            assert 31 * 16 < status.readings.bytes < 31 * 200
        network.sent.append(b"")
        everything = b"\n".join(network.sent)
        assert len(everything) > 10_000
        for secret in (b"bedroom", (marked * 1e-20).tobytes(), np.float32(reading(7)["inputs"]).tobytes(), b"inputs"):
            assert secret not in everything
        answer = nodes[0].predict(reading(5))
        assert (answer.task, answer.outputs.shape) == ("task", (1, 1))
        assert answer.version >= 2
    offline = a_node(tmp_path / "0", server=Away(), token=None)
    with offline:
        again = offline.predict(reading(5))
        assert again.version >= answer.version
        status = until(offline, lambda status: status.trouble)
        assert "away" in status.trouble["training"]
        assert status.models["task"] == again.version
        offline.keep(reading(1))
    assert stat.S_IMODE((tmp_path / "0").stat().st_mode) == 0o700


class Away:
    """A server that is not there."""

    def request(self, *given: Any, **more: Any) -> Answer:
        raise Unreachable("it is away")

    def close(self) -> None: ...


def test_the_model_is_that_of_a_device_with_the_same_examples(tmp_path: Path) -> None:
    """A node trains as `sumus.Device` does: the same report, byte for byte."""
    from sumus.device.keys import keyed
    from sumus.device.options import DeviceSystem

    rows = [reading(number) for number in range(12)]
    node_server, device_server = Patient(releases=True), Patient(releases=True)
    with a_node(tmp_path / "node", node_server, keys=keyed(7), name="alice", least=12) as node:
        node.keep(*rows)
        until(node, lambda status: status.rounds == 1 and status.models)
    examples = (
        np.array([row["inputs"] for row in rows], np.float32),
        np.array([row["target"] for row in rows], np.float32),
    )
    device = sumus.Device(
        "https://example.org",
        a_task(data=FORM),
        examples,
        token="token",
        consent=FREE,
        connection=sumus.ServerConnection(wait_s=0.0, transport=device_server),
        profile=sumus.DeviceProfile(
            "alice", sensors=AllConditionsMet(), executor="autograd", system=DeviceSystem(keyed(7))
        ),
    )
    with device:
        device.run(rounds=1)
    assert list(node_server.counted.values()) == list(device_server.counted.values())


# ── no labels, no form ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_labels_it_takes_models_and_no_work(tmp_path: Path) -> None:
    server = Patient(releases=True)
    with a_node(tmp_path, server) as node:
        with pytest.raises(ExperimentError, match="there is no model yet|no model to predict with yet"):
            node.predict({"inputs": [1, 2, 3, 4]})
        node.keep({"inputs": [1, 2, 3, 4], "key": "a"})
        status = until(node, lambda status: status.models)
        assert (status.readings.kept, status.readings.labelled, status.rounds) == (1, 0, 0)
        assert node.predict({"inputs": [1, 2, 3, 4]}).version == 3
        assert {one.kinds for one in server.named("check_in")} == {()}
        assert server.named("report") == []
        node.label("a", [1.0])
        with pytest.raises(BadReading, match="no reading has this key"):
            node.label("b", [1.0])
        assert until(node, lambda status: status.rounds and status.models).readings.labelled == 1


def test_where_nothing_says_what_readings_look_like_it_waits_for_one(tmp_path: Path) -> None:
    server = Patient(releases=True)
    with a_node(tmp_path, server, task=a_task()) as node:
        assert "waits for a reading with a target" in until(node, lambda status: status.trouble).trouble["training"]
        assert server.asked == []
        node.keep(reading(1))
        until(node, lambda status: status.rounds and status.models and status.trouble == {})
    with a_node(tmp_path, server, task=a_task(), keep_count=1) as node:
        node.keep({"inputs": [1, 2, 3, 4]})
        assert node.status.readings.labelled == 0, "the only one with a target has gone"
        assert node.predict({"inputs": [1, 2, 3, 4]}).version == 3, "and its form is known"


def test_a_tasks_preparation_and_a_files(tmp_path: Path) -> None:
    """`prepare(reading)` of the file makes a row of each; `prepare=` of the task makes examples of all rows."""
    task = a_task(prepare=lambda inputs, targets: (inputs[:, :4].astype(np.float32) / 10, targets))
    server = Patient(releases=True)

    def prepare(raw: Any) -> tuple[Any, Any]:
        return [*raw["climate"], raw["hour"]], raw.get("target")

    with a_node(tmp_path, server, task=task, prepare=prepare) as node:
        node.keep({"climate": [1.0, 2.0, 3.0, 4.0], "hour": 12, "target": [1.0]})
        until(node, lambda status: status.rounds and status.models)
        model = server.algorithm.release(server.state)
        expected = np.array([[0.1, 0.2, 0.3, 0.4]]) @ model["weight"].T + model["bias"]
        assert np.allclose(node.predict({"climate": [1, 2, 3, 4], "hour": 7}).outputs, expected)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_that_is_barred_says_so_and_the_rest_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    server = Patient(releases=True)
    with a_node(tmp_path, server, say=said.append, watch=tmp_path / "incoming") as node:
        node.keep(reading(1))
        until(node, lambda status: status.rounds and status.models)
        server.fates["check_in"] = [refused("revoked")] * 5
    with a_node(tmp_path, server, say=said.append, watch=tmp_path / "incoming") as node:
        until(node, lambda status: "barred this device" in status.trouble.get("training", ""))
        assert any(line.startswith("training: the server has barred this device") for line in said)
        assert node.predict(reading(2)).version == 3
        (tmp_path / "incoming" / "a.jsonl").write_text(json.dumps(reading(3)) + "\n")
        assert until(node, lambda status: status.readings.kept == 2).readings.labelled == 2
    assert "folder: a.jsonl: 1 kept" in said


def test_a_folder_that_is_gone_is_said_and_comes_back(tmp_path: Path) -> None:
    incoming = tmp_path / "incoming"
    with a_node(tmp_path / "node", watch=incoming) as node:
        for name in ("done", "refused", "."):
            (incoming / name).rmdir() if name != "." else incoming.rmdir()
        assert "cannot be watched" in until(node, lambda status: "folder" in status.trouble).trouble["folder"]
        (incoming / "done").mkdir(parents=True)
        (incoming / "refused").mkdir()
        until(node, lambda status: "folder" not in status.trouble)


def test_predictions_do_not_wait_for_training(tmp_path: Path) -> None:
    training, go_on = threading.Event(), threading.Event()

    def loss(outputs: Any, targets: Any) -> Any:
        if torch.is_grad_enabled() and len(outputs) > 2:
            training.set()
            assert go_on.wait(30.0)
        return sumus.losses.mean_squared_error(outputs, targets)

    server = Patient(releases=True, works=0)
    with a_node(tmp_path, server) as node:
        node.keep(*(reading(number) for number in range(5)))
        until(node, lambda status: status.models)
    server.works = 1
    with a_node(tmp_path, server, task=a_task(data=FORM, loss=loss)) as node:
        assert training.wait(30.0)
        assert node.predict(reading(1)).outputs.shape == (1, 1)
        go_on.set()
        until(node, lambda status: status.rounds and status.models)


def test_threads_of_torch_are_given_back_by_the_last() -> None:
    """A node's two models compute side by side: torch has one number of threads for both."""
    from sumus.device import training

    one_thread = vars(training)["_one_thread"]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"token": None}, ExperimentError, "this node is not enrolled: give it a link or a token"),
        ({"listen": "127.0.0.1"}, UsageError, "write HOST:PORT"),
        (
            {"listen": "0.0.0.0:0"},
            UsageError,
            "without TLS the traffic can be read: give --tls auto --tls-name HOSTNAME",
        ),
        ({"listen": "0.0.0.0:0", "insecure": True}, UsageError, "give --access-file FILE"),
        ({"access": "short"}, UsageError, "at least 16 ASCII characters"),
        ({"keep_days": -1}, UsageError, "give a finite number greater than 0"),
        ({"tls": "mine"}, UsageError, "--tls takes `auto`"),
    ],
)
def test_what_a_person_must_mend_is_said_at_the_start(given: Any, error: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=why):
        a_node(tmp_path / "node", **{"listen": "127.0.0.1:0", **given})
    a_node(tmp_path / "node").close()


def test_a_folder_is_one_nodes_and_nothing_elses(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "beach.jpg").touch()
    with pytest.raises(ExperimentError, match="is not a node's folder, and is not empty"):
        a_node(tmp_path / "photos")
    first = a_node(tmp_path / "node")
    with pytest.raises(ExperimentError, match="another process uses the readings"):
        a_node(tmp_path / "node")
    first.close()
    with a_node(tmp_path / "node") as node:
        node.keep(reading(1))
        until(node, lambda status: status.rounds and status.models)
    with pytest.raises(ExperimentError, match="this folder belongs to a device of https://example.org"):
        Node("https://example.net/#enrol=other", a_task(data=FORM), tmp_path / "node", listen=None)
    with pytest.raises(ExperimentError, match=r"float32\[4\], but the task's are float32\[5\]"):
        a_node(
            tmp_path / "node",
            task=a_task(model=lambda: nn.Linear(5, 1), data=sumus.Data((5,), "float32", (1,), "float32")),
        )
    with (
        pytest.raises(UsageError, match="cannot listen|nothing can listen") as refused_port,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        a_node(tmp_path / "node", listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert "--listen" in str(refused_port.value)


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────


def asked(url: str, body: Any = None, context: Any = None, **headers: str) -> Any:
    raw = None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with urllib.request.urlopen(urllib.request.Request(url, raw, given), timeout=30, context=context) as answer:
        return json.loads(answer.read())


def is_ready(url: str) -> bool:
    try:
        return asked(f"{url}/readyz") == {"ready": True}
    except urllib.error.HTTPError as no:
        no.close()
        return False


def test_the_same_over_http(tmp_path: Path) -> None:
    server = Patient()
    with a_node(tmp_path, server, listen="127.0.0.1:0", keep_count=2) as node:
        with pytest.raises(urllib.error.HTTPError) as no:
            asked(f"{node.url}/readyz")
        assert no.value.code == 503
        assert json.loads(no.value.read()) == {"ready": False, "why": "there is no model yet"}
        server.releases = True
        assert asked(f"{node.url}/v1/readings", [reading(n) for n in range(3)], idempotency_key="a")["kept"] == 3
        until(node, lambda status: status.rounds == 1 and status.models)
        until(node, lambda status: is_ready(node.url))  # which is looked at once a second
        status = asked(f"{node.url}/status")
        assert status["readings"]["kept"] == 2, "as many as are to be kept"
        assert (status["models"], status["rounds"], status["trouble"]) == ({"a": 3}, 1, {})
        answer = asked(f"{node.url}/predict", [reading(7), reading(8)])
        assert (answer["task"], answer["version"]) == ("a", 3)
        here: Prediction = node.predict(reading(7), reading(8))
        assert np.allclose(answer["outputs"], here.outputs)
    with pytest.raises(urllib.error.URLError):
        asked(f"{node.url}/healthz")


def test_other_machines_come_in_by_tls_with_a_token(tmp_path: Path) -> None:
    import ssl

    token = "x" * 32
    with a_node(tmp_path, listen="0.0.0.0:0", tls="auto", names=["localhost"], access=token) as node:
        assert node.url.startswith("https://localhost:")
        context = ssl.create_default_context(cafile=node.authority)
        assert asked(f"{node.url}/healthz", context=context) == {"ok": True}
        with pytest.raises(urllib.error.HTTPError) as no:
            asked(f"{node.url}/v1/readings", reading(1), context)
        assert no.value.code == 401
        no.value.close()
        assert asked(f"{node.url}/v1/readings", reading(1), context, Authorization=f"Bearer {token}")["kept"] == 1
    assert all(token.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / FILE).exists()
