"""The server above's description, for an edge, of how reports become integers."""

from collections.abc import Mapping

import numpy as np

from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.plans import tiny
from benchmarks.fuzz.targets.reports import HOPS
from sumus.aggregate import Update
from sumus.errors import ParticipantError, PlanError
from sumus.first_hop import FirstHop
from sumus.spec import canonical_json, to_json
from sumus.wire.reports import most_bytes, most_sum_bytes

MOST_TRIED = 4096
"""Bytes of the longest update that is tried on a hop."""


def check(data: bytes) -> None:
    """Check that a hop that is read has one text, which is read as the same hop, and that it gives the lengths of
    reports and sums."""
    try:
        hop = FirstHop.from_json(data.decode("utf-8", "replace"))
    except PlanError:
        return
    written = canonical_json(to_json(hop))
    assert canonical_json(to_json(FirstHop.from_json(written))) == written
    assert most_bytes(hop) > 0
    assert most_sum_bytes(hop, hop.sums.max_count) > 0
    if hop.nbytes < MOST_TRIED:
        for value in (0.0, 1.0):
            _check_counts(hop, value)


def _check_counts(hop: FirstHop, value: float) -> None:
    """Assert that an update of a hop's form is counted or refused."""
    dtype = np.float32 if hop.code_bits is None else np.int8 if hop.code_bits <= 8 else np.int16
    parts = {
        part.name: {leaf: np.full(shape, value, dtype if part.in_chain else np.float32) for leaf, shape in shapes}
        for part, shapes in zip(hop.parts, hop.layouts, strict=True)
    }
    try:
        hop.count_in(Update("somebody", parts, 3, dict.fromkeys(hop.metrics, (1.5, 3))))
    except ParticipantError:
        return


def seeds() -> Mapping[str, bytes]:
    """Return hops of plans, and texts that are no hops."""
    hops = [*HOPS, tiny().first_hop]
    whole = {f"hop-{number}": canonical_json(to_json(hop)).encode() for number, hop in enumerate(hops)}
    first = whole["hop-0"]
    return whole | {
        "empty": b"",
        "no-object": b"[]",
        "number": b"7",
        "another-value": b'{"name":"pacing","with":{"cohort":3}}',
        "mapping": b'{"name":"mapping"}',
        "deep": b'{"name":"first-hop","with":{"parts":' + b"[" * 3000 + b"]" * 3000 + b"}}",
        "layouts-missing": first.replace(b',[["",[]]]]', b"]"),
        "norm-negative": whole["hop-1"].replace(b'"norms":[', b'"norms":[-').replace(b'"norms":[]', b'"norms":[-1.0]'),
        "norm-huge": whole["hop-1"].replace(b'"norms":[9.0]', b'"norms":[1e300]'),
        "range-huge": first.replace(b'"low":0.0', b'"low":' + b"9" * 400),
        "metric-cap-zero": first.replace(b'"metric_cap":null', b'"metric_cap":0'),
        "rounds-zero": first.replace(b'"rounds":1', b'"rounds":0'),
        "norms-missing": first.replace(b'"norms":[5.0,null]', b'"norms":[5.0]'),
        "cap-negative": first.replace(b'"weight_cap":null', b'"weight_cap":-1'),
        "part-that-does-not-fit": first.replace(b'"bound":100.0', b'"bound":1e18'),
        "sums-too-wide": whole["hop-2"]
        .replace(b'"code_bits":12', b'"code_bits":16')
        .replace(b'"max_count":10', b'"max_count":4503599627370495'),
        "shape-negative": first.replace(b'["w",[2]]', b'["w",[-2]]'),
        "shape-huge": first.replace(b'["w",[2]]', b'["w",[' + b"9" * 400 + b"]]"),
        "bits-negative": first.replace(b'"code_bits":null', b'"code_bits":-1'),
        "bits-many": first.replace(b'"code_bits":null', b'"code_bits":100000'),
        "without-parts": b'{"name":"first-hop","with":{}}',
        "half-a-letter": first.replace(b'"loss"', b'"\\ud800"'),
    }


TARGET = Target(
    "hops",
    check,
    seeds,
    {"sumus.first_hop": ("FirstHop.from_json", "FirstHop.__post_init__", "FirstHop.largest", "FirstHop.sum_dtype")},
    (b'"name":', b'"with":{', b'"layouts":[', b'"code_bits":', b'"weight_cap":', b"-1", b"9" * 30, b"null"),
)
