"""Reports of devices and sums of edges, for two plans: one of floats and one of codes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.fuzz.framing import readable, tensors
from benchmarks.fuzz.target import Target
from sumus.aggregate import Aggregate, Part, RunningSum, Update
from sumus.errors import ParticipantError
from sumus.evaluation import evaluation_hop
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.metrics import Range
from sumus.task import Description
from sumus.types import Array
from sumus.wire.reports import decode_report, decode_sum, encode_report, encode_sum
from sumus.wire.tensors import encode_tree

MOST = 3
_SHAPES = (("b", ()), ("w", (2,)))
FLOATS = FirstHop(
    (Part("params"), Part("steps", content="scalar", weight="uniform", bound=100.0)),
    (_SHAPES, (("", ()),)),
    FixedPoint(10, 8.0, 100, 10),
    None,
    None,
    ("loss",),
    (5.0, None),
    (Range(0.0, 100.0),),
)
CODES = FirstHop((Part("params"),), (_SHAPES,), FixedPoint(0, 128.0, 100, 10), 100, 4, ("loss",), (9.0,), metric_cap=4)
WIDE_CODES = FirstHop((Part("params"),), (_SHAPES,), FixedPoint(0, 2.0**10, 1, 10), 1, 12, ())
BINS = evaluation_hop(Description("tiny", (), "loss", (), None), 10)
SITE = replace(FLOATS, rounds=3)
HOPS = (FLOATS, CODES, WIDE_CODES, BINS, SITE)


def check(data: bytes) -> None:
    """Check that a report that is read can be written, and is counted or refused; a sum that is read can be written,
    and added."""
    body = tensors(data)
    for hop in HOPS:
        try:
            update = decode_report(body, "somebody", hop)
        except ParticipantError:
            pass
        else:
            _check_report(update, hop)
        try:
            sessions, checked = decode_sum(body, "somebody", hop, MOST)
        except ParticipantError:
            continue
        written = encode_sum(sessions, checked.total, hop)
        again, same = decode_sum(written, "somebody", hop, MOST)
        assert again == sessions
        assert encode_sum(again, same.total, hop) == written
        assert checked.total.merge(same.total).count == 2 * len(sessions)


def _check_report(update: Update, hop: FirstHop) -> None:
    written = encode_report(update)
    assert encode_report(decode_report(written, "somebody", hop)) == written
    try:
        hop.check(update)
    except ParticipantError:
        return
    running = RunningSum()
    hop.count_in(update, into=running)
    hop.check_sum(running.total, "an edge", 1)


def _slots(codes: Any = None) -> dict[str, Array]:
    dtype = np.float32 if codes is None else codes
    slots: dict[str, Array] = {
        "examples": np.array(5, np.int64),
        "metric/loss": np.array([1.5, 5]),
        "part/params/b": np.array(1, dtype),
        "part/params/w": np.array([1, -2], dtype),
    }
    return slots | ({"part/steps/": np.array(3, np.float32)} if codes is None else {})


def _sum(hop: FirstHop, slots: Mapping[str, Array] | None = None, sessions: str = f"{'0' * 64}/s1") -> dict[str, Array]:
    """Return the slots of an edge's sum of one session."""
    parts: dict[str, dict[str, Array]] = {
        part.name: {leaf: np.ones(shape, np.int64) for leaf, shape in shapes}
        for part, shapes in zip(hop.parts, hop.layouts, strict=True)
    }
    weights = {part.name: np.array(1, np.int64) for part in hop.parts}
    metrics = {name: np.array([1, 1], np.int64) for name in hop.metrics}
    total = dict(Aggregate(parts, weights, np.array(1, np.int64), metrics).slots())
    for part, shapes in zip(hop.parts, hop.layouts, strict=True):
        for leaf, _ in shapes:
            name = f"sum/{part.name}/{leaf}"
            total[name] = total[name].astype(hop.sum_dtype(part, 1))
    return total | {"sessions": np.frombuffer(sessions.encode(), np.int8)} | dict(slots or {})


def seeds() -> Mapping[str, bytes]:
    """Return a report and a sum of each plan, and some that are wrong in one way each."""
    good, codes = _slots(), _slots(np.int8)
    sums, who = _sum(FLOATS), "0" * 64
    wide = sums["sum/params/w"].dtype
    without = {f"without-{name.replace('/', '-')}": _less(good, name) for name in good}
    sums_without = {f"sum-without-{name.replace('/', '-')}": _less(sums, name) for name in sums}
    trees: dict[str, Mapping[str, Array]] = {
        "report": good,
        "report-of-codes": codes,
        "report-of-wide-codes": _less(_slots(np.int16), "metric/loss"),
        "report-of-codes-beyond": {**_less(_slots(np.int16), "metric/loss"), "part/params/b": np.array(2000, np.int16)},
        "report-that-is-long": {**good, "part/params/w": np.array([7, 1], np.float32)},
        "report-of-long-codes": {**codes, "part/params/w": np.array([7, 7], np.int8)},
        "report-of-a-metric-of-nothing": {**good, "metric/loss": np.array([1.0, 0])},
        "report-of-a-metric-beyond": {**good, "metric/loss": np.array([1e6, 1])},
        "report-of-many-predictions": {**codes, "metric/loss": np.array([1e6, 1e6])},
        "sum-that-is-long": _sum(FLOATS, {"sum/params/w": np.array([7000, 7000], wide)}),
        "sum-of-long-codes": _sum(CODES, {"sum/params/w": np.array([7, 7], _sum(CODES)["sum/params/w"].dtype)}),
        "sum-of-a-metric-out-of-range": _sum(FLOATS, {"metric/loss": np.array([2**40, 1], np.int64)}),
        "sum-of-bins": _sum(BINS),
        "sum-of-bins-that-owe": _sum(BINS, _bins(-1)),
        "report-of-bins": _ones(1),
        "report-of-halves-of-bins": _ones(0.5),
        "report-beyond-a-part": {**good, "part/steps/": np.array(101, np.float32)},
        "report-of-doubles": {**good, "part/params/w": np.ones(2)},
        "report-of-halves": {**good, "part/params/w": np.ones(2, np.float16)},
        "report-that-is-not-finite": {**good, "part/params/w": np.array([np.nan, 1], np.float32)},
        "report-that-is-infinite": {**good, "part/params/b": np.array(np.inf, np.float32)},
        "report-beyond-the-bound": {**good, "part/params/w": np.array([9, 1], np.float32)},
        "report-of-large-codes": {**codes, "part/params/w": np.array([-128, 127], np.int8)},
        "report-of-another-shape": {**good, "part/params/w": np.ones(3, np.float32)},
        "report-of-another-leaf": {**good, "part/params/v": np.ones(2, np.float32)},
        "report-with-more": {**good, "more": np.array(1)},
        "report-of-another-part": {**good, "part/control/w": np.array(1.0)},
        "report-of-another-metric": {**good, "metric/other": np.array([1.0, 1])},
        "report-of-part-of-a-person": {**good, "metric/loss": np.array([1.0, 1.5])},
        "report-of-a-metric-that-owes": {**good, "metric/loss": np.array([1.0, -1])},
        "report-of-a-metric-that-is-nan": {**good, "metric/loss": np.array([np.nan, 1])},
        "report-of-half-examples": {**good, "examples": np.array(1.5)},
        "report-of-fewer-than-no-examples": {**good, "examples": np.array(-1)},
        "report-of-too-many-examples": {**good, "examples": np.array(2**53 + 1)},
        "report-with-too-many-bytes": {**good, "more": np.zeros(2**20 + 2**18, np.int8)},
        "sum": sums,
        "sum-of-codes": _sum(CODES),
        "sum-of-wide-codes": _sum(WIDE_CODES),
        "sum-of-two": _sum(FLOATS, {"count": np.array(2, np.int64)}, f"{who}/s1\n{who}/s2"),
        "sum-of-one-session-twice": _sum(FLOATS, {"count": np.array(2, np.int64)}, f"{who}/s1\n{who}/s1"),
        "sum-of-too-many": _sum(FLOATS, {}, "\n".join(f"{who}/s{n}" for n in range(4))),
        "sum-of-nobody": _sum(FLOATS, {"sessions": np.zeros(0, np.int8)}),
        "sum-of-no-session": _sum(FLOATS, {}, "é"),
        "sum-of-another-count": _sum(FLOATS, {"count": np.array(2, np.int64)}),
        "sum-that-weighs-too-much": _sum(FLOATS, {"weight/params": np.array(101, np.int64)}),
        "sum-beyond": _sum(FLOATS, {"sum/params/w": np.array([np.iinfo(wide).max, 0], wide)}),
        "sum-of-a-metric-beyond": _sum(FLOATS, {"metric/loss": np.array([2**62, 1], np.int64)}),
        "sum-of-a-metric-that-owes": _sum(FLOATS, {"metric/loss": np.array([1, -1], np.int64)}),
        "sum-of-other-integers": _sum(FLOATS, {"sum/params/w": np.ones(2, np.int64)}),
        "sum-of-another-shape": _sum(FLOATS, {"sum/params/w": np.ones(3, wide)}),
    }
    return {name: readable(encode_tree(tree)) for name, tree in {**trees, **without, **sums_without}.items()}


def _bins(value: int) -> dict[str, Array]:
    """Return the bins of an edge's sum, each with this value."""
    return {name: np.full_like(slot, value) for name, slot in _sum(BINS).items() if name.startswith("sum/")}


def _ones(value: float) -> dict[str, Array]:
    """Return the slots of a report of bins, with this value in the first of each."""
    found: dict[str, Array] = {"examples": np.array(5, np.int64)}
    for part, shapes in zip(BINS.parts, BINS.layouts, strict=True):
        for leaf, shape in shapes:
            bins = np.zeros(shape, np.float32)
            bins.flat[:1] = value
            found[f"part/{part.name}/{leaf}"] = bins
    return found


def _less(slots: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {other: array for other, array in slots.items() if other != name}


TARGET = Target(
    "reports",
    check,
    seeds,
    {
        "sumus.wire.reports": (),
        "sumus.first_hop": (
            "FirstHop.check",
            "FirstHop.check_sum",
            "FirstHop._check_form",
            "FirstHop._check_numbers",
            "FirstHop._check_lengths",
            "FirstHop._check_sum_length",
            "FirstHop._check_metrics",
            "FirstHop._check_summed_metrics",
        ),
        "sumus.fixed_point": ("FixedPoint.check", "FixedPoint._reach", "FixedPoint._limit", "FixedPoint._refusal"),
    },
    (
        b"part/params/",
        b"metric/loss",
        b"examples",
        b"sum/params/",
        b"weight/params",
        b"sessions",
        b'"F32"',
        b'"I64"',
        b'"I8"',
    ),
)
