"""Trees and aggregates as bytes: safetensors with sorted names, so that equal values give equal bytes.

What comes in is untrusted: the header is capped, and the caller says which names, dtypes and shapes it expects.
"""

import json
import struct
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sumus.aggregate import Aggregate
from sumus.errors import ParticipantError
from sumus.types import Array, Tree

MAX_HEADER = 1 << 20


def encode_tree(tree: Tree, metadata: Mapping[str, str] | None = None) -> bytes:
    """Canonical bytes of a tree: safetensors, leaves in sorted order."""
    ordered = {name: np.array(tree[name], order="C") for name in sorted(tree)}
    return save(ordered, dict(metadata or {}) or None)


def decode_tree(body: bytes, expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None) -> dict[str, Array]:
    """The tree of these bytes. expected: leaf → (dtype name, shape); anything else is refused."""
    if len(body) < 8 or not 0 < struct.unpack("<Q", body[:8])[0] <= MAX_HEADER:
        raise ParticipantError("body", f"the tensor header is missing or over {MAX_HEADER} bytes: not a body of ours")
    try:
        tree = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ParticipantError("body", f"not safetensors: {error}") from error
    if expected is not None:
        found = {name: (leaf.dtype.name, leaf.shape) for name, leaf in tree.items()}
        if found != dict(expected):
            wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
            raise ParticipantError(
                "body", f"leaf `{wrong}` is {found.get(wrong)}, expected {expected.get(wrong)}: not of this plan"
            )
    return tree


def metadata_of(body: bytes) -> dict[str, str]:
    """The text that travels in a body's header."""
    if len(body) < 8 or not 0 < (length := struct.unpack("<Q", body[:8])[0]) <= MAX_HEADER:
        raise ParticipantError("body", "the tensor header is missing or too long: not a body of ours")
    try:
        return dict(json.loads(body[8 : 8 + length]).get("__metadata__", {}))
    except (ValueError, AttributeError) as error:
        raise ParticipantError("body", f"the tensor header is not JSON: {error}") from error


def encode_aggregate(aggregate: Aggregate) -> bytes:
    """Canonical bytes of a sum: its slots."""
    return encode_tree(aggregate.slots())


def decode_aggregate(body: bytes) -> Aggregate:
    """The sum of these bytes; every slot must have one integer dtype."""
    slots = decode_tree(body)
    if "count" not in slots or slots["count"].shape != ():
        raise ParticipantError("body", "the sum has no count: not an aggregate of ours")
    dtypes = {slot.dtype.name for slot in slots.values()}
    if len(dtypes) != 1 or dtypes - {"int64", "uint16", "uint32"}:
        raise ParticipantError("body", f"slots of dtypes {sorted(dtypes)}; a sum is int64, or a ring of uint16 or uint32")
    return Aggregate.from_slots(slots)
