"""MQTT messages, from the payload to the readings on a node's disk; the same JSON as labels, and as inputs for
predictions."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
from paho.mqtt.client import MQTTMessage

from benchmarks.fuzz.target import Target
from sumus.node.formats import read_json
from sumus.node.intake import Intake
from sumus.node.mqtt import Broker, Subscription
from sumus.node.reading import BadReading, Form
from sumus.node.readings import Readings, Retention
from sumus.task import Data


class Acknowledged:
    """An MQTT client that records which messages were acknowledged."""

    def __init__(self) -> None:
        self.messages: list[int] = []

    def ack(self, message: int, qos: int) -> None:
        self.messages.append(message)


def check(data: bytes) -> None:
    """Check that each message is acknowledged once, whatever its payload is, and that a value has the form that is made
    for it."""
    subscription, intake = _node()
    client, message = Acknowledged(), MQTTMessage(7, b"home/hall/climate")
    message.payload = data
    subscription._came(client, None, message)
    assert client.messages == [7]
    try:
        found = read_json(data)
    except BadReading:
        return
    for each in found[:3]:
        with suppress(BadReading):
            intake.label(each)
        if isinstance(each, dict):
            _check_forms(each)
    with suppress(BadReading):
        assert intake.inputs(found).shape == (len(found), 2)


def _check_forms(raw: Mapping[str, Any]) -> None:
    for name, what in (("inputs", "input"), ("target", "target")):
        try:
            form = Form.of(raw.get(name), what)
            fitted = form.fit(raw.get(name), what)
        except BadReading:
            continue
        assert (fitted.shape, fitted.dtype.name) == (form.shape, form.dtype)
        assert form.fit(fitted, what).tobytes() == fitted.tobytes()


@functools.cache
def _node() -> tuple[Subscription, Intake]:
    """Return the subscription and the intake of a node that keeps ten readings, in a folder that is deleted with the
    process."""
    folder = tempfile.mkdtemp(prefix="sumus-fuzz-")
    kept = Readings(folder, Data((2,), "float32", (), "int64", 3), Retention(count=10))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(kept.close)
    intake = Intake(kept)
    return Subscription(Broker("mqtt://127.0.0.1", ("home/#",)), intake, "fuzz"), intake


def seeds() -> Mapping[str, bytes]:
    """Return messages with readings that fit, and with readings that do not."""
    readings: dict[str, Any] = {
        "one": {"inputs": [1, 2.5], "target": 0, "key": "hall/1"},
        "several": [{"inputs": [1, 2]}, {"inputs": [3, 4], "target": 2, "key": "hall/1"}, {"inputs": [1]}],
        "label": [{"inputs": [1, 2], "key": "hall/2"}, {"key": "hall/2", "target": 1}],
        "label-of-nothing": {"key": "hall/3", "target": 1},
        "label-that-does-not-fit": {"key": "hall/1", "target": "warm"},
        "no-object": [7],
        "no-inputs": {"t": 1},
        "no-input": {"inputs": None},
        "key-no-text": {"inputs": [1, 2], "key": 7},
        "key-long": {"inputs": [1, 2], "key": "k" * 201},
        "key-of-controls": {"inputs": [1, 2], "key": "a\n"},
        "text": {"inputs": ["a", "b"]},
        "of-many-lengths": {"inputs": [[1], [1, 2]]},
        "large": {"inputs": [2**64, 2**70]},
        "not-float32": {"inputs": [1e300, 1]},
        "target-of-half": {"inputs": [1, 2], "target": 0.5},
        "target-beyond": {"inputs": [1, 2], "target": 3},
        "target-ignored": {"inputs": [1, 2], "target": -100},
        "booleans": {"inputs": [True, False]},
        "whole": {"inputs": [1, 2], "target": 2**63},
        "objects": {"inputs": {"a": 1}},
        "deep": {"inputs": json_of_depth(70)},
    }
    found = {name: msgspec.json.encode(value) for name, value in readings.items()}
    found |= {"bare": b"21.5", "word": b"ON", "no-value": b"NaN", "long-word": b"x" * 1001}
    return found | {"empty": b"", "no-json": b"\xff", "too-long": b" " * (8 * 2**20 + 1)}


def json_of_depth(depth: int) -> Any:
    """Return nested lists of this depth."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


TARGET = Target(
    "mqtt",
    check,
    seeds,
    {
        "sumus.node.mqtt": ("Subscription._take", "_readings_of", "_bare"),
        "sumus.node.intake": ("as_it_came", "Intake.label"),
        "sumus.node.readings": ("Form.fit", "Form.of", "_array", "Readings.shaped", "Readings.label"),
    },
    (b'{"inputs":[1,2]}', b'"target":', b'"key":', b"[[", b"1e300", b"null", b"true", b"9" * 20, b"-100"),
)
