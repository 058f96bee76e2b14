"""A node's /metrics: its status in Prometheus's format."""

from collections.abc import Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(status: Mapping[str, Any]) -> bytes:
    """Write a status in Prometheus's text format.

    Args:
        status: The status, in the form of /status.
    """
    return "".join(f"{line}\n" for line in _lines(status)).encode()


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    readings, folder, mqtt = status.get("readings", {}), status.get("folder", {}), status.get("mqtt", {})
    yield from _of("readings", "gauge", "Readings that are kept.", {"": readings.get("kept")})
    yield from _of("readings_labelled", "gauge", "Readings with a target.", {"": readings.get("labelled")})
    yield from _of(
        "readings_new",
        "gauge",
        "Readings with a target that is new since the last round that counted.",
        {"": readings.get("new")},
    )
    yield from _of("readings_bytes", "gauge", "Bytes of the readings.", {"": readings.get("bytes")})
    yield from _of("readings_oldest_seconds", "gauge", "Age of the oldest reading.", {"": readings.get("oldest_s")})
    left = {"": status.get("certificate_s")}
    yield from _of("certificate_left_seconds", "gauge", "Seconds until the node's certificate expires.", left)
    yield from _of("rounds", "counter", "Rounds that counted this node's report.", {"": status.get("rounds")})
    models = {f'{{task="{_escaped(task)}"}}': version for task, version in status.get("models", {}).items()}
    yield from _of("model_version", "gauge", "Version of the model with which the node predicts.", models)
    troubles = {f'{{part="{_escaped(part)}"}}': 1 for part in status.get("trouble", {})}
    yield from _of("trouble", "gauge", "Parts of the node that have a problem.", troubles)
    yield from _of("folder_refused", "counter", "Files and lines that were refused.", {"": folder.get("refused")})
    for what, help in (("waiting", "Files that wait to be read."), ("left_alone", "Files that are not read.")):
        yield from _of(f"folder_{what}", "gauge", help, {"": folder.get(what, {}).get("files")})
    yield from _of("mqtt_messages", "counter", "Messages that came from the broker.", {"": mqtt.get("messages")})
    yield from _of("mqtt_refused", "counter", "Messages with refused readings.", {"": mqtt.get("refused")})
    yield from _of("mqtt_ended", "counter", "Connections to the broker that have ended.", {"": mqtt.get("ended")})


def _of(name: str, kind: str, help: str, values: Mapping[str, Any]) -> Iterator[str]:
    there = {label: value for label, value in values.items() if value is not None}
    if there:
        name = f"sumus_node_{name}{'_total' if kind == 'counter' else ''}"
        yield from (f"# HELP {name} {help}", f"# TYPE {name} {kind}")
        yield from (f"{name}{label} {value}" for label, value in there.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
