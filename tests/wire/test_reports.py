"""A report's bytes: what was sent is what is counted, and whatever else a device sends is refused by one kind of error."""

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.aggregate import Part, Update
from sumus.errors import ParticipantError
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.types import Array
from sumus.wire.reports import decode_report, encode_report, most_bytes
from sumus.wire.tensors import decode_tree, encode_tree

PARTS = (Part("params"), Part("steps", content="scalar", weight="uniform"))
LAYOUTS = ((("fc.bias", (3,)), ("fc.weight", (3, 2))), (("", ()),))
HOP = FirstHop(PARTS, LAYOUTS, FixedPoint.fit(9), None, None, ("loss", "accuracy"))
CODED = replace(HOP, parts=PARTS[:1], layouts=LAYOUTS[:1], code_bits=8)


def an_update(seed: int = 0, dtype: str = "float32", **more: Any) -> Update:
    rng = np.random.default_rng(seed)
    parts = {
        "params": {"fc.weight": rng.normal(size=(3, 2)).astype(dtype), "fc.bias": rng.normal(size=3).astype(dtype)},
        "steps": {"": np.array(3.0, dtype)},
    }
    return replace(Update("alice", parts, 5, {"loss": (1.5, 5), "accuracy": (2.0, 4)}), **more)


def body_with(**changes: Array | None) -> bytes:
    """A report's body with slots that are changed, added or left out."""
    slots: dict[str, Any] = decode_tree(encode_report(an_update())) | changes
    return encode_tree({name: array for name, array in slots.items() if array is not None})


@given(st.integers(0, 99), st.sampled_from(["float32", "float64"]), st.integers(1, 2**53))
def test_what_was_sent_is_what_is_counted(seed: int, dtype: str, examples: int) -> None:
    update = an_update(seed, dtype, examples=examples)
    body = encode_report(update)
    read = decode_report(body, "alice", HOP)
    assert encode_report(read) == body
    mine, theirs = HOP.count_in(update).slots(), HOP.count_in(read).slots()
    assert {name: array.tobytes() for name, array in mine.items()} == {name: a.tobytes() for name, a in theirs.items()}


def test_narrow_codes_stay_narrow() -> None:
    codes = {"fc.weight": np.ones((3, 2), np.int8), "fc.bias": np.full(3, -127, np.int8)}
    body = encode_report(Update("bob", {"params": codes}, 2))
    assert len(body) < most_bytes(CODED)
    assert decode_report(body, "bob", CODED).parts["params"]["fc.bias"].tolist() == [-127] * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"examples": None}, "`examples` must be one int64"),
        ({"examples": np.array(-1)}, "`examples` must be one int64"),
        ({"examples": np.array(2**54)}, "`examples` must be one int64"),
        ({"examples": np.array(2.0)}, "`examples` must be one int64"),
        ({"metric/loss": np.array([np.nan, 5.0])}, "must be two finite float64"),
        ({"metric/loss": np.array([1.0, 2.5])}, "is 2.5: it must be a whole number"),
        ({"metric/loss": np.array([1.0, -2.0])}, "is -2.0: it must be a whole number"),
        ({"metric/loss": np.array([1.0, 2.0], np.float32)}, "must be two finite float64"),
        ({"metric/pulse": np.array([1.0, 2.0])}, "'pulse', which the plan does not measure"),
        ({"part/params/fc.bias": None}, r"has no `params\[fc.bias\]`"),
        ({"part/control/fc.bias": np.ones(3, np.float32)}, "`part/control/fc.bias` does not belong in a report"),
        ({"note": np.ones(1)}, "`note` does not belong in a report"),
        ({"part/params/fc.gain": np.ones(40_000_000, np.int8)}, "a report of this plan has at most"),
    ],
)
def test_what_is_not_of_the_plan_is_refused(changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ParticipantError, match=f"client 'mallory': .*{said}"):
        decode_report(body_with(**changes), "mallory", HOP)


@pytest.mark.parametrize(
    "changes",
    [{"part/params/fc.bias": np.ones(4, np.float32)}, {"part/params/fc.gain": np.ones(3, np.float32)}],
    ids=["another shape", "a leaf too many"],
)
def test_other_shapes_and_leaves_are_refused_where_they_would_be_counted(changes: Mapping[str, Any]) -> None:
    with pytest.raises(ParticipantError, match="shape"):
        HOP.count_in(decode_report(body_with(**changes), "mallory", HOP))


@given(st.binary(max_size=200))
def test_strange_bytes_are_refused(noise: bytes) -> None:
    for body in (noise, struct.pack("<Q", len(noise)) + noise, encode_report(an_update())[:-1] + noise):
        try:
            update = decode_report(body, "mallory", HOP)
        except ParticipantError:
            continue
        assert update.examples == 5


def test_a_header_of_very_many_tensors_is_refused_before_it_is_read() -> None:
    header = json.dumps(
        {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    ).encode()
    with pytest.raises(ParticipantError):
        decode_report(struct.pack("<Q", len(header)) + header, "mallory", HOP)
