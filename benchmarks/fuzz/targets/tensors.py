"""Safetensors, read in four ways: as new arrays, as views of the body, as the slots of a sum, and as a node's readings."""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.fuzz.framing import readable, tensors, text
from benchmarks.fuzz.target import Target
from sumus.aggregate import Aggregate, Part, Update
from sumus.errors import ParticipantError
from sumus.fixed_point import FixedPoint
from sumus.node.formats import read_safetensors
from sumus.node.reading import BadReading
from sumus.types import Array, Tree
from sumus.wire.tensors import decode_aggregate, decode_tree, encode_aggregate, encode_tree, view_tree

PARTS = (Part("params"), Part("steps", content="scalar", weight="uniform"))
EXPECTED = {"w": ("float32", (2,))}
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64", "F8_E4M3"]


def check(data: bytes) -> None:
    """Check that a tree that is read can be written and is read again unchanged, and that a view has the same tree."""
    body = tensors(data)
    tree = _read(decode_tree, body)
    if tree is not None:
        assert same(decode_tree(encode_tree(tree)), tree)
    expected = _read(lambda bytes: decode_tree(bytes, EXPECTED), body)
    if expected is not None:
        assert {name: (leaf.dtype.name, leaf.shape) for name, leaf in expected.items()} == EXPECTED
    view = _read(view_tree, body)
    if view is not None:
        assert tree is not None
        assert same(view, tree)
        assert not any(leaf.flags.writeable for leaf in view.values())
    rows = _read(read_safetensors, body)
    assert rows is None or len(rows) == len(next(iter((tree or {}).values())))
    total = _read(decode_aggregate, body)
    if total is not None:
        written = encode_aggregate(total)
        assert encode_aggregate(decode_aggregate(written)) == written


def same(one: Tree, two: Tree) -> bool:
    """Return whether two trees are the same bit for bit."""
    return _bits(one) == _bits(two)


def _bits(tree: Tree) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in tree.items()}


def _read(how: Any, body: bytes) -> Any:
    try:
        return how(body)
    except (ParticipantError, BadReading):
        return None


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def an_aggregate() -> Aggregate:
    """Return a sum of one update."""
    parts: dict[str, dict[str, Array]] = {
        "params": {"a": np.array([[1.0, -2.0]]), "b": np.zeros(0)},
        "steps": {"": np.array(3.0)},
    }
    return FixedPoint.fit(9).encode(Update("c", parts, 5, {"loss": (1.5, 5)}), PARTS)


def seeds() -> Mapping[str, bytes]:
    """Return trees of every dtype, sums, and headers that are wrong in one way each."""
    found: dict[str, bytes] = {}
    for name in DTYPES:
        size = 1 if name in ("BOOL", "F8_E4M3", "I8", "U8") else int(name.lstrip("BFIUC")) // 8
        found[f"dtype-{name}"] = text({"w": _entry(name, [2], 0, 2 * size)}) + b"\n" + b"\1" * 2 * size
    whole = readable(encode_tree({"w": np.ones(2, np.float32)}))
    found |= {
        "tree": readable(encode_tree({"w": np.ones((2, 1), np.float32), "b": np.zeros((), np.int8)})),
        "expected": whole,
        "raw": encode_tree({"w": np.ones(2, np.float32)}),
        "empty-tree": b"{}\n",
        "empty": b"",
        "no-header": struct.pack("<Q", 0),
        "header-too-long": struct.pack("<Q", 2**63),
        "header-no-json": struct.pack("<Q", 2) + b"[]",
        "header-no-text": b'{"\xff":1}\n',
        "cut": whole[:-1],
        "too-long": whole + b"\0",
        "twice": b'{"w":' + text(_entry("I8", [1], 0, 1)) + b',"w":' + text(_entry("I8", [1], 0, 1)) + b"}\n\1",
        "metadata": text({"__metadata__": {"a": "b"}, "w": _entry("I8", [1], 0, 1)}) + b"\n\1",
        "hole": text({"w": _entry("I8", [1], 1, 2)}) + b"\n\1\1",
        "overlap": text({"w": _entry("I8", [2], 0, 2), "v": _entry("I8", [2], 0, 2)}) + b"\n\1\1",
        "more-said": text({"w": {**_entry("I8", [1], 0, 1), "x": 1}}) + b"\n\1",
        "no-entry": text({"w": 7}) + b"\n",
        "no-shape": text({"w": {**_entry("I8", [1], 0, 1), "shape": 1}}) + b"\n\1",
        "negative": text({"w": _entry("I8", [-1], 0, 1)}) + b"\n\1",
        "true": text({"w": _entry("I8", [True], 0, 1)}) + b"\n\1",
        "huge": text({"w": _entry("I8", [2**62, 4, 0], 0, 0)}) + b"\n",
        "many-digits": b'{"w":{"dtype":"I8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}\n\1',
        "many-sides": text({"w": _entry("I8", [1] * 40, 0, 1)}) + b"\n\1",
        "deep": b'{"w":' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "half-a-letter": b'{"\\ud800":' + text(_entry("I8", [1], 0, 1)) + b"}\n\1",
    }
    slots = dict(an_aggregate().slots())
    changes: dict[str, Mapping[str, Array]] = {
        "sum": slots,
        "sum-uint16": {name: slot.astype(np.uint16) for name, slot in slots.items()},
        "sum-of-nothing": dict(Aggregate().slots()),
        "sum-without-count": {name: slot for name, slot in slots.items() if name != "count"},
        "sum-of-two-dtypes": {**slots, "count": np.array(1, np.int32)},
        "sum-of-floats": {name: slot.astype(np.float32) for name, slot in slots.items()},
        "sum-with-more": {**slots, "more": np.array(1)},
        "sum-with-a-long-metric": {**slots, "metric/loss": np.zeros(3, np.int64)},
        "sum-without-weight": {name: slot for name, slot in slots.items() if name != "weight/params"},
        "sum-that-owes": {**slots, "weight/params": np.array(-1)},
        "sum-of-metrics": {"count": np.array(1), "metric/loss": np.zeros(2, np.int64)},
    }
    return found | {name: readable(encode_tree(tree)) for name, tree in changes.items()}


TARGET = Target(
    "tensors",
    check,
    seeds,
    {"sumus.wire.tensors": ()},
    (
        b'"dtype":',
        b'"shape":[',
        b'"data_offsets":[0,',
        b'"F32"',
        b'"I64"',
        b"count",
        b"weight/",
        b"metric/",
        b"sum/params/",
    ),
)
