"""Converts trees and aggregates to bytes and back: safetensors with sorted names, so that equal values give equal bytes.

Incoming bytes are untrusted: the header's length is limited, and the caller gives the names, dtypes and shapes that it
expects.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from sumus.aggregate import Aggregate
from sumus.errors import ParticipantError
from sumus.types import Array, Tree

MAX_HEADER = 1 << 20
_DTYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The dtypes that may be sent, in the order in which their leaves are written."""
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}


def encode_tree(tree: Tree) -> bytes:
    """Encode a tree as canonical bytes: safetensors with the leaves in the order of docs/wire.md."""
    return b"".join(tree_pieces(tree))


def tree_pieces(tree: Tree) -> list[bytes | memoryview]:
    """Encode a tree like `encode_tree`, but in pieces that need no copy: the header, and then each leaf's bytes."""
    order, leaves = list(_DTYPES), {name: _little(np.asarray(leaf)) for name, leaf in tree.items()}
    names = sorted(leaves, key=lambda name: (order.index(leaves[name].dtype.name), name))
    header, until = dict[str, Any](), 0
    for name in names:
        leaf, at = leaves[name], until
        until += leaf.nbytes
        header[name] = {"dtype": _DTYPES[leaf.dtype.name], "shape": leaf.shape, "data_offsets": (at, until)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *(leaves[name].reshape(-1).view(np.uint8).data for name in names)]


def _little(leaf: Array) -> Array:
    """Return an array in little-endian and row-major order."""
    return leaf.astype(leaf.dtype.newbyteorder("<"), order="C", copy=False)


def decode_tree(body: bytes, expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> dict[str, Array]:
    """Decode a tree.

    Args:
        body: The bytes.
        expected: The name of the dtype and the shape of each leaf; None accepts any leaves.

    Raises:
        ParticipantError: The bytes are not safetensors, or the leaves are not the expected ones.
    """
    _check_header(body)
    try:
        tree = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ParticipantError(None, f"not safetensors: {error}") from error
    if strange := {leaf.dtype.name for leaf in tree.values()} - set(_DTYPES):
        raise ParticipantError(
            None, f"a leaf has the dtype {min(strange)}, which cannot be sent: use one of {', '.join(_DTYPES)}"
        )
    if expected is not None:
        found = {name: (leaf.dtype.name, leaf.shape) for name, leaf in tree.items()}
        if found != dict(expected):
            wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
            raise ParticipantError(
                None, f"leaf `{wrong}` is {found.get(wrong)}, but this plan expects {expected.get(wrong)}"
            )
    return tree


def view_tree(body: bytes | memoryview) -> dict[str, Array]:
    """Decode a tree without a copy: the arrays are read-only views of the body, and keep it alive.

    This function is stricter than `decode_tree`: it accepts only signed integers and floats, and neither metadata nor a
    repeated name.

    Raises:
        ParticipantError: The bytes are not such safetensors.
    """
    _check_header(body)
    begin = 8 + struct.unpack("<Q", body[:8])[0]
    tree: dict[str, Array] = {}
    try:
        text = str(body[8:begin], "utf-8")
        header: Any = json.loads(text, object_pairs_hook=_once, parse_int=_natural) if text[0] == "{" else None
        at = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            name.encode()  # raises UnicodeEncodeError for a lone surrogate
            dtype, shape = np.dtype(_NUMBERS[entry["dtype"]]), _numbers(entry["shape"])
            until = at + math.prod(shape) * dtype.itemsize
            if len(entry) != 3 or _numbers(entry["data_offsets"]) != [at, until] or begin + until > len(body):
                raise ValueError(f"leaf `{name}` has the wrong offsets, or more entries than dtype, shape and offsets")
            tree[name] = np.ndarray(shape, dtype, body, begin + at)
            tree[name].flags.writeable = False
            at = until
        if begin + at != len(body):
            raise ValueError(f"the body has {len(body)} bytes, but its leaves end at {begin + at}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ParticipantError(None, f"not safetensors: {error!s:.200}") from error
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in the header")
    return found


def _natural(digits: str) -> int:
    if len(digits) > 15 or digits[0] == "-":
        raise ValueError(f"{digits:.20} is not a size")
    return int(digits)


def _numbers(found: Any) -> list[int]:
    numbers = cast(list[Any], found if type(found) is list else [None])
    if len(numbers) > 32 or not all(type(each) is int for each in numbers):
        raise ValueError("shapes and offsets must be short lists of whole numbers")
    return numbers


def _check_header(body: bytes | memoryview) -> None:
    length = struct.unpack("<Q", body[:8])[0] if len(body) >= 8 else 0
    if not 0 < length <= min(MAX_HEADER, len(body) - 8):
        raise ParticipantError(
            None, f"the tensor header is missing, or longer than {MAX_HEADER} bytes: the body was not made by sumus"
        )


def encode_aggregate(aggregate: Aggregate) -> bytes:
    """Encode a sum as canonical bytes: a tree of its slots (its named arrays)."""
    return b"".join(aggregate_pieces(aggregate))


def aggregate_pieces(aggregate: Aggregate) -> list[bytes | memoryview]:
    """Encode a sum in pieces, like `tree_pieces`."""
    return tree_pieces(aggregate.slots())


def decode_aggregate(body: bytes) -> Aggregate:
    """Decode a sum, and check that all slots are int64 and every part has a weight.

    Raises:
        ParticipantError: The bytes are not a sum.
    """
    slots = decode_tree(body)
    if "count" not in slots or slots["count"].shape != ():
        raise ParticipantError(None, "the slot `count` is missing or not a single number, so this is not a sum")
    dtypes = {slot.dtype.name for slot in slots.values()}
    if dtypes != {"int64"}:
        raise ParticipantError(
            None, f"the slots have the dtypes {sorted(dtypes)}, but every slot of a sum must be int64"
        )
    aggregate = Aggregate.from_slots(slots)
    _check_whole(slots, aggregate)
    return aggregate


def _check_whole(slots: Tree, aggregate: Aggregate) -> None:
    parts = set(aggregate.sums)
    counts = {"count": aggregate.count} | {f"weight/{part}": weight for part, weight in aggregate.weights.items()}
    for name, slot in slots.items():
        kind, _, rest = name.partition("/")
        known = name == "count" or (kind, bool(rest)) == ("metric", True) or (kind == "sum" and rest.find("/") > 0)
        if not (known or (kind == "weight" and rest in parts)):
            raise ParticipantError(None, f"slot `{name}` does not belong in a sum")
        if kind in ("count", "weight", "metric") and slot.shape != ((2,) if kind == "metric" else ()):
            raise ParticipantError(None, f"slot `{name}` has the shape {slot.shape}, which does not fit a sum")
    if set(aggregate.weights) != parts or (not parts and (int(aggregate.count) or aggregate.metrics)):
        raise ParticipantError(
            None,
            f"the weights are of {sorted(aggregate.weights)}, but the sums of {sorted(parts)}: both must be of the same parts",
        )
    for name, number in counts.items():
        if number < 0:
            raise ParticipantError(None, f"`{name}` is {number}: it must not be negative")
