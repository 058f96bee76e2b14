"""Bundles: zip files of a plan and its model. An input that begins with `{` is the plan's JSON, `BREAK`, and the model."""

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from benchmarks.fuzz.framing import BREAK, readable, tensors
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.plans import tiny
from sumus.errors import UsageError
from sumus.wire.bundle import Bundle

MEMBERS = ("plan.json", "model.safetensors")


def check(data: bytes) -> None:
    """Check that a bundle that is read can be written, and that it is then read again unchanged."""
    try:
        bundle = Bundle.from_bytes(_zipped(data))
    except UsageError:
        return
    written = bundle.to_bytes()
    again = Bundle.from_bytes(written)
    assert again.plan == bundle.plan
    assert again.to_bytes() == written


def _zipped(data: bytes) -> bytes:
    if data[:1] != b"{":
        return data
    plan, _, model = data.partition(BREAK)
    return _archive({"plan.json": plan, "model.safetensors": tensors(model)})


def _archive(bodies: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, body in bodies.items():
            archive.writestr(zipfile.ZipInfo(name), body, method)
    return out.getvalue()


def seeds() -> Mapping[str, bytes]:
    """Return a bundle, and archives that are no bundles."""
    whole = Bundle(tiny(), {"w": np.zeros(2, np.float32)})
    raw = whole.to_bytes()
    plan, model = _archive_read(raw)
    directory = raw.rindex(b"PK\x01\x02")
    return {
        "bundle": raw,
        "readable": plan + BREAK + readable(model),
        "another-model": plan + BREAK + readable(model).replace(b'"w"', b'"v"'),
        "no-plan": b"{}" + BREAK + readable(model),
        "no-model": plan + BREAK + b"{",
        "no-text": b'{"\xff"}' + BREAK,
        "compressed": _archive({"plan.json": plan, "model.safetensors": model}, zipfile.ZIP_DEFLATED),
        "with-more": _archive({"plan.json": plan, "model.safetensors": model, "more": b""}),
        "twice": raw.replace(b"model.safetensors", b"plan.json".ljust(17, b"/")),
        "too-large": raw[: directory + 24] + b"\xfe\xff\xff\xff" + raw[directory + 28 :],
        "too-large-together": _of_64_bits({"plan.json": plan, "model.safetensors": model}),
        "another-sum": raw.replace(model, model[:-1] + b"\1"),
        "encrypted": raw[: directory + 8] + b"\1\0" + raw[directory + 10 :],
        "version": raw[: directory + 6] + b"\xff\0" + raw[directory + 8 :],
        "cut": raw[: len(raw) // 2],
        "only-the-end": raw[-22:],
        "empty": b"",
    }


def _of_64_bits(bodies: Mapping[str, bytes]) -> bytes:
    """Return an archive that gives each of its members 2^40 bytes."""
    out, size = io.BytesIO(), 2**32 - 1
    with zipfile.ZipFile(out, "w") as archive:
        for name, body in bodies.items():
            info = zipfile.ZipInfo(name)
            info.extra = struct.pack("<HHQ", 1, 8, 2**40)
            archive.writestr(info, body)
    raw = out.getvalue()
    at = raw.index(b"PK\x01\x02")
    while at >= 0:
        raw = raw[: at + 24] + struct.pack("<I", size) + raw[at + 28 :]
        at = raw.find(b"PK\x01\x02", at + 4)
    return raw


def _archive_read(raw: bytes) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        plan, model = (archive.read(name) for name in MEMBERS)
    return plan, model


TARGET = Target(
    "bundles",
    check,
    seeds,
    {"sumus.wire.bundle": ()},
    (
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"PK\x06\x07",
        b"plan.json",
        b"model.safetensors",
        BREAK,
    ),
)
