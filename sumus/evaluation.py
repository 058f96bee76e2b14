"""Evaluation on devices: a sum of metrics, and of histograms that show how the metrics differ between people.

    hop = evaluation_hop(description, most=100)                   the first hop of such a sum
    update = evaluation_report(client, program.evaluate(...), examples)
    means, histograms = evaluation_of(total, hop)                 the results over all devices

A device reports each metric as (sum, count), together with the bin, out of twenty, in which the device's own mean lies.
These reports are added like updates. If the sum has enough contributors, nobody learns what a single device measured.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sumus.aggregate import METRIC_BITS, Aggregate, Part, Update
from sumus.errors import ParticipantError
from sumus.figures import check_slots, counts, figure_names, figures
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.metrics import Range, pooled
from sumus.task import Description
from sumus.types import Floats

BINS = 20
LOSS_EDGES: Floats = np.concatenate([[0.0], 2.0 ** np.linspace(-8, 6, BINS - 1), [math.inf]])
"""The bin edges of the loss, float64 `(BINS + 1,)`: from 2^−8 to 2^6, each 1.7 times the one before. The first and the
last bin also hold all values outside.
"""
EDGES: Floats = np.linspace(0.0, 1.0, BINS + 1)
"""The bin edges of every other metric, as a share from 0 to 1. The first and the last bin also hold the values outside."""

HISTOGRAM = Part("histogram", content="bins", weight="uniform", denominator="count", transformed=False, bound=1.0)


def evaluation_hop(description: Description, most: int, metric_cap: int | None = None) -> FirstHop:
    """Return the first hop of an evaluation's sum.

    Args:
        description: The description of the task.
        most: The largest number of contributors to one sum.
        metric_cap: The largest number of predictions that counts in a client's metrics; None for any number.
    """
    names = ("loss", *description.metrics)
    layout = tuple(sorted((name, (BINS,)) for name in figure_names(names)))
    return FirstHop(
        parts=(HISTOGRAM,),
        layouts=(layout,),
        sums=FixedPoint.fit(most, max_weight=1, bound=1.0),
        weight_cap=None,
        code_bits=None,
        metrics=names,
        ranges=description.ranges,
        metric_cap=metric_cap,
    )


def evaluation_report(client: object, measured: Mapping[str, tuple[float, int]], examples: int) -> Update:
    """Make the report of one device's measurement.

    Args:
        client: The device's id.
        measured: (sum, count) by metric, including the loss.
        examples: The number of examples that were measured.
    """
    own = pooled(measured)
    bins = {name: _in_bin(name, own.get(name, math.nan)) for name in figure_names(measured)}
    return Update(client, {HISTOGRAM.name: bins}, examples, dict(measured))


def evaluation_of(total: Aggregate, hop: FirstHop) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Return the value of each figure over all its predictions, and the number of devices in each bin of each figure.

    Args:
        total: The sum of the devices' reports.
        hop: The first hop of the evaluation.
    """
    counted = hop.sums.decode(HISTOGRAM, total.sums[HISTOGRAM.name])
    return figures(total.metric_means()), {name: [round(n) for n in leaf.tolist()] for name, leaf in counted.items()}


def medians_of(histograms: Mapping[str, Sequence[int]], hop: FirstHop) -> dict[str, tuple[float | None, float | None]]:
    """Return for each figure the edges of the bin that contains the median device.

    An edge is None if the bin is open on that side. The first and the last bin are open, since they also hold all
    values outside. Such a bin is closed if the metric's range ends at its edge.

    A device with a wrong figure moves the mean by its share of the sum times the error of its figure. It moves the
    median by at most one position in the order of the devices.

    Args:
        histograms: The number of devices in each bin, by figure.
        hop: The first hop of the evaluation.
    """
    found: dict[str, tuple[float | None, float | None]] = {}
    for name, bins in histograms.items():
        if total := sum(bins):
            middle = int(np.searchsorted(np.cumsum(bins), (total + 1) // 2))
            low, high = (float(edge) for edge in edges_of(name)[middle : middle + 2])
            within = hop.range_of.get(name, Range())
            found[name] = (
                None if middle == 0 and within.low != low else low,
                None if middle == BINS - 1 and within.high != high else high,
            )
    return found


def edges_of(name: str) -> Floats:
    """Return the bin edges of a metric, float64 `(BINS + 1,)`."""
    return LOSS_EDGES if name == "loss" else EDGES


def check_measured(update: Update, trains: bool) -> None:
    """Refuse a report that claims a measurement without predictions. Otherwise a mean over few devices would be
    published as a mean over many.

    Args:
        update: The report.
        trains: Whether the report comes from training. Such a report must contain its loss. The report of an evaluation
            may leave a metric out, but then must not be in a bin of that metric's histogram, which counts the metric's
            contributors.

    Raises:
        ParticipantError: The report does not contain its loss, or is in the histogram of a metric that it did not measure.
    """
    if trains and update.metrics.get("loss", (0.0, 0))[1] < 1:
        raise ParticipantError(
            update.client, "a report of training must contain its loss, over at least one prediction"
        )
    check_slots(update.client, update.metrics)
    counted = counts({name: count for name, (_, count) in update.metrics.items()})
    for name, bins in update.parts.get(HISTOGRAM.name, {}).items():
        if counted.get(name, 0) < 1 and bins.any():
            raise ParticipantError(
                update.client, f"it has a 1 in the histogram of {name!r}, but measured {name!r} on no example"
            )


def check_sum_measured(total: Aggregate, hop: FirstHop, sender: object, least: int) -> None:
    """Refuse an edge's sum that claims measurements without predictions.

    Args:
        total: The sum.
        hop: The first hop. Its `check_sum` has already accepted the sum, so no bin is below 0.
        sender: The edge, for errors.
        least: The smallest number of reports that must contain their loss; 0 for an evaluation.

    Raises:
        ParticipantError: The loss counts fewer predictions than there are reports, or a metric's histogram counts more
            devices than the metric counts predictions.
    """
    nothing = np.zeros(2, np.int64)
    if int(total.metrics.get("loss", nothing)[1]) < least:
        raise ParticipantError(
            sender, f"its loss counts fewer predictions than {least}, but each report counts at least one"
        )
    one = 2 ** hop.sums.bits(HISTOGRAM)
    pairs = {name: (math.ldexp(float(pair[0]), -METRIC_BITS), int(pair[1])) for name, pair in total.metrics.items()}
    check_slots(sender, pairs)
    counted = counts({name: count for name, (_, count) in pairs.items()})
    for name, bins in total.sums.get(HISTOGRAM.name, {}).items():
        if int(bins.sum()) > counted.get(name, 0) * one:
            raise ParticipantError(
                sender, f"the bins of {name!r} count more devices than the metric counts predictions"
            )


def _in_bin(name: str, mean: float) -> Floats:
    """Return a float32 vector with a 1 in the bin in which `mean` lies; all zeros if `mean` is NaN."""
    one = np.zeros(BINS, np.float32)
    if not math.isnan(mean):
        one[min(max(int(np.searchsorted(edges_of(name), mean, side="right")) - 1, 0), BINS - 1)] = 1.0
    return one
