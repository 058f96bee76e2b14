"""Converts reports to bytes and back. A device sends a report after training, and an edge sends the sum of reports. One
signature covers the whole body.

    body   = encode_report(update)                     on the device
    update = decode_report(body, device, hop)          at the first hop (the server or edge that gets the device's report)

    body = encode_sum(sessions, total, hop)            on an edge
    sessions, total = decode_sum(body, edge, hop, 10)  at the next hop (the server that gets the edge's sum)


A report is a safetensors file with the names `part/PART/LEAF`, `examples` (int64) and `metric/NAME` (float64: sum and count). A
sum has the slots (named arrays) of an aggregate. Its `sum/PART/LEAF` has the smallest of the types int8, int16, int32 and int64
that can hold every possible sum of that number of reports. Its slot `sessions` is the list of the sessions in the sum: ASCII
text as int8, with one `DEVICE/SESSION` per line.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sumus.aggregate import Aggregate, Update
from sumus.errors import ParticipantError
from sumus.first_hop import CheckedSum, FirstHop
from sumus.types import Array, Tree
from sumus.wire.tensors import MAX_HEADER, encode_tree, view_tree

MOST_EXAMPLES = 2**53
"""The largest number of examples in a report: up to this integer, JavaScript's numbers are exact."""
_SESSIONS = "sessions"
_NAME = 65
"""The largest number of characters in a device's id or a session's id, including the one character that follows the id."""
_SESSION = re.compile(r"[0-9a-f]{64}/[A-Za-z0-9_-]{1,64}")


def encode_report(update: Update) -> bytes:
    """Encode an update as canonical bytes: equal updates give equal bytes, and different updates give different bytes."""
    slots: dict[str, Array] = {
        f"part/{part}/{leaf}": array for part, tree in update.parts.items() for leaf, array in tree.items()
    }
    slots |= {f"metric/{name}": np.array(pair, np.float64) for name, pair in update.metrics.items()}
    return encode_tree(slots | {"examples": np.array(update.examples, np.int64)})


def decode_report(body: bytes | memoryview, device: object, hop: FirstHop) -> Update:
    """Decode an update that has the plan's parts, leaves, shapes and metrics.

    The update's arrays are views of the body. This function does not check the numbers; `hop.check` does.

    Args:
        body: The bytes.
        device: The sender, for error messages.
        hop: The plan's first hop.

    Raises:
        ParticipantError: The bytes are not a report for this plan.
    """
    try:
        if len(body) > most_bytes(hop):
            raise ParticipantError(
                None, f"the body has {len(body)} bytes, but a report of this plan has at most {most_bytes(hop)}"
            )
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
                raise ParticipantError(None, f"slot `{name}` does not belong in a report of this plan")
    except ParticipantError as error:
        raise ParticipantError(device, str(error)) from error
    return Update(device, _whole(parts, hop, device), examples, metrics)


def most_bytes(hop: FirstHop) -> int:
    """Return the length of the longest report that is accepted, in bytes. A float may have eight bytes."""
    return 2 * hop.nbytes + 16 * len(hop.metrics) + 8 + MAX_HEADER


def encode_sum(sessions: Sequence[str], total: Aggregate, hop: FirstHop) -> bytes:
    """Encode the sum of these sessions' reports as canonical bytes."""
    slots = dict(total.slots())
    for part, shapes in zip(hop.parts, hop.layouts, strict=True):
        narrow = hop.sum_dtype(part, len(sessions))
        for name in (f"sum/{part.name}/{leaf}" for leaf, _ in shapes):
            slots[name] = slots[name].astype(narrow)
    return encode_tree(slots | {_SESSIONS: np.frombuffer("\n".join(sessions).encode("ascii"), np.int8)})


def decode_sum(
    body: bytes | memoryview, edge: object, hop: FirstHop, most: int, least: int | None = None
) -> tuple[tuple[str, ...], CheckedSum]:
    """Read the sum that an edge sent.

    Args:
        body: The sum's bytes.
        edge: The edge, for errors.
        hop: The plan's first hop, which the sum must fit.
        most: The largest number of sessions in a sum.
        least: The smallest weight that a site's sum may have if it has more sessions than reports; None for an edge that only
            adds.

    Returns:
        The sessions in the sum, and the sum.

    Raises:
        ParticipantError: The bytes are not a sum for this plan.
    """
    try:
        slots = view_tree(body)
        sessions = _sessions(slots.pop(_SESSIONS, None), most)
        total = Aggregate.from_slots(_widened(slots, sessions, hop))
    except ParticipantError as error:
        raise ParticipantError(edge, str(error)) from error
    count = len(sessions)
    return sessions, hop.check_sum(total, edge, count, count if least is None else min(count, least))


def most_sum_bytes(hop: FirstHop, most: int) -> int:
    """Return the length of the longest body of a sum of at most `most` reports, in bytes."""
    fixed = 8 + 8 * len(hop.parts) + 16 * len(hop.metrics) + 2 * _NAME * most + MAX_HEADER
    return fixed + hop.sum_nbytes(most)


def _sessions(slot: Array | None, most: int) -> tuple[str, ...]:
    if slot is None or slot.dtype != np.int8 or slot.ndim != 1 or not 0 < slot.size <= 2 * _NAME * most:
        raise ParticipantError(None, f"`{_SESSIONS}` must name from 1 to {most} sessions")
    sessions = tuple(slot.tobytes().decode("ascii", "replace").split("\n"))
    if len(set(sessions)) != len(sessions) or len(sessions) > most or not all(map(_SESSION.fullmatch, sessions)):
        raise ParticipantError(None, f"`{_SESSIONS}` must name from 1 to {most} sessions, each once, as DEVICE/SESSION")
    return sessions


def _widened(slots: Tree, sessions: Sequence[str], hop: FirstHop) -> Tree:
    """Return the slots of an aggregate in int64, after checking that each has the planned dtype and shape."""
    planned: dict[str, tuple[Any, tuple[int, ...]]] = {"count": (np.int64, ())}
    for part, shapes in zip(hop.parts, hop.layouts, strict=True):
        narrow = hop.sum_dtype(part, len(sessions))
        planned |= {f"sum/{part.name}/{leaf}": (narrow, shape) for leaf, shape in shapes}
        planned[f"weight/{part.name}"] = (np.int64, ())
    metrics = {f"metric/{name}": (np.int64, (2,)) for name in hop.metrics if f"metric/{name}" in slots}
    found = {name: (slot.dtype, slot.shape) for name, slot in slots.items()}
    if wrong := sorted(set(found) ^ set(planned | metrics)):
        raise ParticipantError(None, f"slot `{wrong[0]}` is missing, or does not belong in a sum of this plan")
    for name, (dtype, shape) in (planned | metrics).items():
        if slots[name].dtype != dtype or slots[name].shape != shape:
            raise ParticipantError(
                None, f"slot `{name}` is {found[name]}, but this plan needs {np.dtype(dtype)}, {shape}"
            )
    return {name: slot.astype(np.int64) for name, slot in slots.items()}


def _examples(slot: Array | None) -> int:
    if slot is None or slot.dtype != np.int64 or slot.shape != () or not 0 <= int(slot) <= MOST_EXAMPLES:
        raise ParticipantError(None, f"`examples` must be one int64 from 0 to {MOST_EXAMPLES}")
    return int(slot)


def _metric(name: str, slot: Array, hop: FirstHop) -> tuple[float, int]:
    if name not in hop.metrics:
        raise ParticipantError(None, f"the report has the metric {name!r}, which the plan does not measure")
    if slot.dtype != np.float64 or slot.shape != (2,) or not np.isfinite(slot).all():
        raise ParticipantError(None, f"`metric/{name}` must be two finite float64: the sum, and the count")
    value, count = slot.tolist()
    if not count.is_integer() or not 0 <= count <= MOST_EXAMPLES:
        raise ParticipantError(
            None, f"the count of `metric/{name}` is {count}: it must be a whole number of at least 0"
        )
    return value, int(count)


def _whole(parts: Mapping[str, Tree], hop: FirstHop, device: Any) -> Mapping[str, Tree]:
    for part, shapes in zip(hop.parts, hop.layouts, strict=True):
        if missing := {leaf for leaf, _ in shapes} - set(parts[part.name]):
            raise ParticipantError(device, f"the report has no `{part.name}[{min(missing)}]`, which this plan requires")
    return parts
