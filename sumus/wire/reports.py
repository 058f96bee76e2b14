"""A report as bytes: what a device sends after training, in one body that its signature covers.

    body   = encode_report(update)                     on the device
    update = decode_report(body, device, hop)          at the first hop; whatever else it holds is refused

The body is safetensors with the names `part/PART/LEAF`, `examples` (int64) and `metric/NAME` (float64: sum and count).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sumus.aggregate import Update
from sumus.errors import ParticipantError
from sumus.first_hop import FirstHop
from sumus.types import Array, Tree
from sumus.wire.tensors import MAX_HEADER, encode_tree, view_tree

MOST_EXAMPLES = 2**53
"""What a JavaScript number counts to."""


def encode_report(update: Update) -> bytes:
    """Canonical bytes of an update: equal updates, and only they, give equal bytes."""
    slots: dict[str, Array] = {
        f"part/{part}/{leaf}": array for part, tree in update.parts.items() for leaf, array in tree.items()
    }
    slots |= {f"metric/{name}": np.array(pair, np.float64) for name, pair in update.metrics.items()}
    return encode_tree(slots | {"examples": np.array(update.examples, np.int64)})


def decode_report(body: bytes | memoryview, device: object, hop: FirstHop) -> Update:
    """The update of these bytes, of a plan's parts, leaves, shapes and metrics. device: who sent it, for errors.

    Its arrays lie in the body. Raises ParticipantError; whether the numbers can be counted is for `hop.count_in` to say.
    """
    try:
        if len(body) > most_bytes(hop):
            raise ParticipantError(None, f"{len(body)} bytes, and a report of this plan has at most {most_bytes(hop)}")
        slots = view_tree(body)
        examples = _examples(slots.pop("examples", None))
        parts: dict[str, dict[str, Array]] = {part.name: {} for part in hop.parts}
        metrics: dict[str, tuple[float, int]] = {}
        for name, array in slots.items():
            kind, _, rest = name.partition("/")
            part, slash, leaf = rest.partition("/")
            if kind == "metric":
                metrics[rest] = _metric(rest, array, hop)
            elif kind == "part" and slash and part in parts:
                parts[part][leaf] = array
            else:
                raise ParticipantError(None, f"slot `{name}` is none of a report's: not of this plan")
    except ParticipantError as error:
        raise ParticipantError(device, str(error)) from error
    return Update(device, _whole(parts, hop, device), examples, metrics)


def most_bytes(hop: FirstHop) -> int:
    """The longest body that is read: floats may have eight bytes."""
    return 2 * hop.nbytes + 16 * len(hop.metrics) + 8 + MAX_HEADER


def _examples(slot: Array | None) -> int:
    if slot is None or slot.dtype != np.int64 or slot.shape != () or not 0 <= int(slot) <= MOST_EXAMPLES:
        raise ParticipantError(None, f"`examples` must be one int64 from 0 to {MOST_EXAMPLES}")
    return int(slot)


def _metric(name: str, slot: Array, hop: FirstHop) -> tuple[float, int]:
    if name not in hop.metrics:
        raise ParticipantError(None, f"it reports {name!r}, which the plan does not measure")
    if slot.dtype != np.float64 or slot.shape != (2,) or not np.isfinite(slot).all():
        raise ParticipantError(None, f"`metric/{name}` must be two finite float64: the sum, and on how many")
    value, count = slot.tolist()
    if not count.is_integer() or not 0 <= count <= MOST_EXAMPLES:
        raise ParticipantError(None, f"`metric/{name}` is counted on {count}: give a whole number")
    return value, int(count)


def _whole(parts: Mapping[str, Tree], hop: FirstHop, device: Any) -> Mapping[str, Tree]:
    for part, shapes in zip(hop.parts, hop.layouts, strict=True):
        if missing := {leaf for leaf, _ in shapes} - set(parts[part.name]):
            raise ParticipantError(device, f"it sends no `{part.name}[{min(missing)}]`: not of this plan")
    return parts
