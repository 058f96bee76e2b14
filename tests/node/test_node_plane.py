"""A node over HTTP: acknowledged is on the disk, who has no token learns nothing, and nothing is read that is too long."""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sumus.errors import DataError, ExperimentError
from sumus.node.formats import MOST_TEXT, Raw
from sumus.node.intake import Intake
from sumus.node.plane import JSON, MOST_LABELS, MOST_TENSORS, TENSORS, plane_app
from sumus.node.reading import BadReading
from sumus.node.readings import Readings
from sumus.text import amount
from sumus.transport.inprocess import InProcess
from sumus.wire.tensors import encode_tree

TOKEN = "a token that nobody guesses".replace(" ", "-")


@dataclass
class Said:
    """A prediction."""

    outputs: Any
    task: str = "signs"
    version: int = 7
    answers: tuple[Any, ...] = ()


class Clock:
    """Seconds, which stand still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Here:
    """A node's plane, without sockets."""

    def __init__(self, folder: Path, token: str | None = None) -> None:
        self.readings, self.clock = Readings(folder), Clock()
        self.intake = Intake(self.readings)
        self.models: dict[str, int] = {}
        names = () if token is None else ("node.lan",)
        app = plane_app(self.intake, self.predict, lambda: {"models": self.models}, token, self.clock, names)
        self.network = InProcess(app)

    def predict(self, raws: list[Raw | BadReading]) -> Said:
        if not self.models:
            raise ExperimentError("there is no model yet")
        inputs = self.intake.inputs(raws)
        if inputs.shape[1:] != (2,):
            raise DataError("the inputs", "they are of another shape")
        return Said(inputs.sum(1, keepdims=True))

    def ask(self, method: str, path: str, body: Any = b"", **headers: str) -> tuple[int, Any]:
        """Status, and what is said. headers: with _ for -; None leaves one out."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = (
            {"content_type": JSON, "host": "127.0.0.1:8070", **headers}
            if method == "POST"
            else {"host": "127.0.0.1", **headers}
        )
        given = {name.replace("_", "-"): value for name, value in names.items() if value is not None}
        answer = self.network.request(method, path, raw, given)
        return answer.status, json.loads(answer.body)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.ask("POST", path, body, **headers)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    here = Here(tmp_path)
    yield here
    here.network.close()
    here.readings.close()
    assert here.network.failures == []


ONE = {"inputs": [1, 2], "target": 0}


def all_well(kept: int = 0, labelled: int = 0, again: int = 0) -> tuple[int, Mapping[str, Any]]:
    return 200, {"kept": kept, "labelled": labelled, "again": again, "refused": []}


def test_one_reading_or_many(here: Here) -> None:
    assert here.post("/v1/readings", ONE) == all_well(kept=1)
    assert here.post("/v1/readings", [ONE, {"inputs": [3, 4]}]) == all_well(kept=2)
    arrays = {"inputs": np.ones((5, 2), np.float32), "target": np.arange(5)}
    assert here.post("/v1/readings", encode_tree(arrays), content_type=TENSORS) == all_well(kept=5)
    assert here.readings.examples()[0].tolist() == [[1, 2], [1, 2], *[[1, 1]] * 5]


def test_a_body_may_be_packed(here: Here) -> None:
    packed = gzip.compress(json.dumps([ONE, ONE]).encode())
    assert here.post("/v1/readings", packed, content_encoding="gzip") == all_well(kept=2)
    bomb = gzip.compress(b" " * (MOST_TEXT + 1))
    status, said = here.post("/v1/readings", bomb, content_encoding="gzip")
    assert (status, said["error"]) == (422, "bad_reading")
    assert f"more than {amount(MOST_TEXT)}" in said["detail"]


def test_something_else_under_a_key_that_is_here_is_refused(here: Here) -> None:
    other = {"inputs": [3, 4], "target": 0}
    for first, second in ((ONE, other), ([ONE, ONE], [ONE, other]), (ONE, [ONE, ONE]), (ONE, {**ONE, "target": 1})):
        key = json.dumps([first, second])
        here.post("/v1/readings", first, idempotency_key=key)
        kept = here.readings.kept.count
        status, said = here.post("/v1/readings", second, idempotency_key=key)
        assert status == 422
        assert "its key is already in use, with another" in said["refused"][-1]["why"]
        assert here.readings.kept.count == kept
    assert here.post("/v1/readings", {**ONE, "key": "own"}) == all_well(kept=1)
    assert here.post("/v1/readings", {**other, "key": "own"})[0] == 422


def test_metrics_say_what_the_status_says(here: Here) -> None:
    here.models['si"gns'] = 7
    answer = here.network.request("GET", "/metrics", b"", {"host": "127.0.0.1"})
    assert answer.status == 200
    assert 'sumus_node_model_version{task="si\\"gns"} 7' in answer.body.decode().splitlines()


def test_the_status_waits_for_no_work(here: Here) -> None:
    """Readings are being kept, and the database is in use."""
    lock: Any = vars(here.readings)["_lock"]
    with lock:
        assert here.readings.kept.count == 0
        assert here.ask("GET", "/status")[0] == 200
        assert here.ask("GET", "/readyz")[0] == 503


def test_what_is_sent_again_is_kept_once(here: Here) -> None:
    for path, key in ((ONE, "a"), ([ONE, ONE], "b")):
        many = len(path) if isinstance(path, list) else 1
        assert here.post("/v1/readings", path, idempotency_key=key) == all_well(kept=many)
        assert here.post("/v1/readings", path, idempotency_key=key) == all_well(again=many)
    assert here.post("/v1/readings", {**ONE, "key": "c"}) == all_well(kept=1)
    assert here.post("/v1/readings", {**ONE, "key": "c"}) == all_well(again=1)
    assert here.readings.kept.count == 4
    for wrong in ("", "k" * 200, "a\tb"):
        assert here.post("/v1/readings", ONE, idempotency_key=wrong)[0] == 400


def test_the_bad_ones_are_named_and_the_others_kept(here: Here) -> None:
    body = [ONE, {"inputs": [1]}, 7, {"inputs": [1, None]}, {"inputs": [5, 6]}]
    status, said = here.post("/v1/readings", body, idempotency_key="a")
    assert (status, said["kept"]) == (422, 2)
    assert said["refused"] == [
        {"reading": 1, "why": "its input has the shape [1], but all others here have [2]"},
        {"reading": 2, "why": "it is not a JSON object: send each reading as an object with values by name"},
        {"reading": 3, "why": "its input is not an array of numbers: it has the dtype object"},
    ]
    body[1:4] = [ONE, ONE, ONE]
    assert here.post("/v1/readings", body, idempotency_key="a") == all_well(kept=3, again=2), "mended, and sent again"


def test_labels_come_later(here: Here) -> None:
    here.post("/v1/readings", [{"inputs": [n, n], "key": f"k{n}"} for n in range(3)])
    assert here.post("/v1/labels", {"key": "k1", "target": 1}) == (200, {"labelled": 1, "refused": []})
    status, said = here.post("/v1/labels", [{"key": "k2", "target": 0}, {"key": "gone", "target": 0}, {"key": "k0"}])
    assert (status, said["labelled"]) == (422, 1)
    assert said["refused"] == [
        {"reading": 1, "why": "no reading has this key, or the reading was deleted"},
        {"reading": 2, "why": "it is not a label: give a key (a text) and a target"},
    ]
    assert here.readings.examples()[1].tolist() == [1, 0]
    assert here.post("/v1/labels", [{}] * (MOST_LABELS + 1))[0] == 422


def test_a_prediction_says_which_model_it_is_of(here: Here) -> None:
    assert here.post("/predict", {"inputs": [1, 2]}) == (503, {"error": "no_model", "detail": "there is no model yet"})
    here.models["signs"] = 7
    assert here.post("/predict", {"inputs": [1, 2]}) == (200, {"task": "signs", "version": 7, "outputs": [[3]]})
    tensors = encode_tree({"inputs": np.array([[1, 2], [3, 4]], np.float32)})
    assert here.post("/predict", tensors, content_type=TENSORS)[1]["outputs"] == [[3], [7]]
    assert here.post("/predict", [{"inputs": [1, 2]}, {"x": 1}])[1]["detail"].startswith(
        "reading 1: it has no 'inputs'"
    )
    assert here.post("/predict", {"inputs": [1]})[0] == 422
    assert here.readings.kept.count == 0, "what is asked is not kept"


def test_what_there_is_to_see(here: Here) -> None:
    assert here.ask("GET", "/healthz") == (200, {"ok": True})
    assert here.ask("GET", "/readyz") == (503, {"ready": False, "why": "there is no model yet"})
    here.models["signs"] = 7
    assert here.ask("GET", "/readyz")[0] == 503, "it is looked at once a second"
    here.clock.now += 1.0
    assert here.ask("GET", "/readyz") == (200, {"ready": True})
    assert here.ask("GET", "/status") == (200, {"models": {"signs": 7}})
    assert here.ask("GET", "/nothing")[0] == here.ask("GET", "/predict")[0] == 404


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"body": b"nonsense"}, 422, "bad_reading"),
        ({"body": b"[" * 10_000}, 422, "bad_reading"),
        ({"body": b""}, 422, "bad_reading"),
        ({"content_type": "text/plain"}, 415, "encoding"),
        ({"content_type": "application/x-www-form-urlencoded"}, 415, "encoding"),
        ({"content_type": None}, 415, "encoding"),
        ({"content_encoding": "br"}, 415, "encoding"),
        ({"content_encoding": "gzip"}, 422, "bad_reading"),
        ({"content_length": ""}, 411, "length_required"),
        ({"content_length": "-1"}, 411, "length_required"),
        ({"content_length": str(MOST_TEXT + 1)}, 413, "too_large"),
        ({"content_length": str(MOST_TENSORS + 1), "content_type": TENSORS}, 413, "too_large"),
        ({"content_length": "5"}, 400, "malformed"),
        ({"content_type": TENSORS}, 422, "bad_reading"),
        ({"host": "node.attacker.example"}, 421, "wrong_host"),
        ({"host": "192.168.0.7:8070"}, 421, "wrong_host"),
    ],
)
def test_what_is_not_taken(changed: dict[str, Any], status: int, code: str, here: Here) -> None:
    headers = {name: value for name, value in changed.items() if name != "body"}
    found, said = here.post("/v1/readings", changed.get("body", json.dumps(ONE).encode()), **headers)
    assert (found, said["error"]) == (status, code)
    assert here.readings.kept.count == 0


def test_a_name_of_this_machine_is_this_machine(here: Here) -> None:
    for host in ("localhost", "localhost:8070", "[::1]:8070", "127.0.0.1"):
        assert here.ask("GET", "/status", host=host)[0] == 200


def test_who_has_no_token_learns_nothing(tmp_path: Path) -> None:
    here = Here(tmp_path, TOKEN)
    shown = {"authorization": f"Bearer {TOKEN}", "host": "node.lan"}
    try:
        assert here.post("/v1/readings", ONE, **shown) == all_well(kept=1)
        for wrong in (None, "", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer ä"):
            for method, path in (
                ("POST", "/v1/readings"),
                ("POST", "/v1/labels"),
                ("POST", "/predict"),
                ("GET", "/status"),
            ):
                here.clock.now += 10.0
                headers = {**shown, "authorization": wrong, "content_length": str(2**40) if method == "POST" else None}
                status, said = here.ask(method, path, **headers)  # type: ignore[arg-type]
                assert (status, said["error"]) == (401, "bad_token")
                assert TOKEN not in json.dumps(said)
        assert here.ask("GET", "/healthz") == (200, {"ok": True})
        assert here.ask("GET", "/readyz")[0] == 503
        assert here.readings.kept.count == 1
        for _ in range(20):
            status, said = here.ask("GET", "/status", authorization="Bearer guess")
        assert (status, said["error"]) == (429, "rate")
        assert here.ask("GET", "/status", **shown)[0] == 200, "who has it is not disturbed by others' guesses"
    finally:
        here.network.close()
        here.readings.close()


def test_who_asks_too_often_waits(here: Here) -> None:
    answers = [here.ask("GET", "/status")[0] for _ in range(1001)]
    assert answers == [200] * 1000 + [429]
    here.clock.now += 1.0
    assert here.ask("GET", "/status")[0] == 200


def test_where_nothing_can_be_kept_it_is_not_acknowledged(here: Here) -> None:
    database: Any = vars(here.readings)["_file"].database
    database.execute("PRAGMA query_only = ON")
    status, said = here.post("/v1/readings", ONE)
    assert (status, said["error"]) == (503, "not_kept")
    database.execute("PRAGMA query_only = OFF")
    assert here.post("/v1/readings", ONE) == all_well(kept=1)


def test_a_defect_is_in_the_log_and_not_in_the_answer(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    here.intake.take = lambda raws, key=None: 1 // 0  # type: ignore[method-assign]
    assert here.post("/v1/readings", ONE) == (
        500,
        {"error": "failed", "detail": "the request failed because of a defect in the node; its log has the details"},
    )
    assert "ZeroDivisionError" in caplog.text
