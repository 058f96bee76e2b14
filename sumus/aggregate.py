"""A device's update is an aggregate with one contributor.

    total = hop.count_in(alice).merge(hop.count_in(bob)).merge(edge.total)

Devices, edges and servers exchange values of one type, which can be added: the integers of each part, the number of
contributors, and metrics. This makes several things possible: edges of edges, replicas (each adds its share), crash safety
(a partial sum is a checkpoint) and asynchronous rounds (a buffer is a sum). Integer sums do not depend on order or topology,
so all of these give the same bits.

An `Update` is a device's report, in floats or in small integers (codes). The first hop (sumus/first_hop.py) turns it into an
`Aggregate` with one contributor, called an aggregate of one. A `Part` says how an update is weighted and what the sum
is divided by. The `Aggregator` divides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np

from sumus.errors import ParticipantError, PlanError, expect_number
from sumus.spec import Value, record, registered
from sumus.staleness import ONE, Staleness
from sumus.tree import flatten, layout, nbytes, size, tree_map, unflatten
from sumus.types import Array, Tree, hold_plain_numbers

METRIC_BITS = 20
BUFFERS = "buffers"
"""The part of shared leaves without a gradient (running statistics): averaged, outside of transforms and optimizers."""

WIDEST = 2.0**16
"""A part with a bound of at least this size counts as unbounded: such a bound keeps sums from overflowing, but is too wide to
limit what one device can do.
"""


# ── what is sent, and what it is divided by ──────────────────────────────────────────────────────────────────────────


@record("part/fixed")
@dataclass(frozen=True)
class Fixed:
    """A denominator that the plan fixes, as differential privacy needs: it does not reveal which clients took part."""

    count: int

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        if self.count < 1:
            raise PlanError("positive", f"{self}: a denominator must be at least 1")


@record("part")
@dataclass(frozen=True)
class Part:
    """One named piece of what an algorithm sends.

    FedAvg is `Part("params", weight="examples", denominator="weight")`.

    Attributes:
        name: The part's name.
        content: "leaves": a tree like the model's shared leaves with a gradient. "scalar": one number, as the tree
            `{"": number}`. "bins": vectors that hold a single 1, or only zeros.
        weight: The integer that multiplies a client's contribution: the number of its examples ("examples"), 1
            ("uniform"), or the weight from a rule of `sumus.staleness`, in units of 1/1024. Denominators are counted in
            the same units.
        denominator: What the sum is divided by: the sum of the weights ("weight"), the number of contributors ("count"), the
            number of devices ("population"), or a `Fixed` number.
        transformed: Whether leaves go through the algorithm's chain; scalars never do.
        bound: The largest |value| that is accepted; None to use the bound of the plan's sums.
        cap: The largest number of examples that counts towards a client's weight; None to use the limit of the plan's sums.
        least: The smallest value that is accepted; None for −bound. Only scalars may have a smallest value.
    """

    name: str
    content: Literal["leaves", "scalar", "bins"] = "leaves"
    weight: Literal["examples", "uniform"] | Staleness = "examples"
    denominator: Literal["weight", "count", "population"] | Fixed = "weight"
    transformed: bool = True
    bound: float | None = None
    cap: int | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        hold_plain_numbers(self)
        if not self.name or "/" in self.name:
            raise PlanError(
                "part-words",
                f"{self.name!r} cannot be the name of a part: give a text that is not empty and holds no slash",
            )
        for given, known, rule, other in (
            (self.content, ("leaves", "scalar", "bins"), (), ""),
            (self.weight, ("examples", "uniform"), Staleness, ", or a rule of sumus.staleness"),
            (self.denominator, ("weight", "count", "population"), Fixed, ", or Fixed(count)"),
        ):
            if given not in known and not isinstance(given, rule):
                raise PlanError(
                    "part-words", f"part {self.name!r} has {given!r}, which must be one of {', '.join(known)}{other}"
                )
        if self.bound is not None:
            if isinstance(self.bound, bool) or not 0 < self.bound < math.inf:
                raise PlanError(
                    "positive", f"part {self.name!r} has the bound {self.bound}: it must be positive and finite"
                )
            object.__setattr__(self, "bound", float(self.bound))
        if self.least is not None:
            expect_number(
                self.least, -math.inf, math.inf if self.bound is None else self.bound, f"Part({self.name!r}, least=)"
            )
            if self.content != "scalar":
                raise PlanError(
                    "part-words",
                    f"part {self.name!r} has least={self.least}, which only a scalar may have: leave it out",
                )
            object.__setattr__(self, "least", float(self.least))
        if self.cap is not None and not (self.weight == "examples" and self.cap >= 1):
            raise PlanError(
                "part-words",
                f"part {self.name!r} has cap={self.cap}: the cap is a number of examples, at least 1, and needs "
                'weight="examples"',
            )

    @property
    def is_bounded(self) -> bool:
        """Whether the part has its own bound, below `WIDEST`."""
        return self.bound is not None and self.bound < WIDEST

    @property
    def in_chain(self) -> bool:
        """Whether the algorithm's transforms apply to the part."""
        return self.transformed and self.content == "leaves"

    def weigh(self, examples: int, cap: int, staleness: int = 0) -> int:
        """Compute the integer weight of a client.

        Args:
            examples: The client's examples.
            cap: The largest number of examples that counts.
            staleness: How many versions old the model was that the client trained on.
        """
        if isinstance(self.weight, Staleness):
            return self.weight.weight(staleness)
        most = cap if self.cap is None else min(cap, self.cap)
        return min(examples, most) if self.weight == "examples" else 1

    def largest_weight(self, cap: int) -> int:
        """Return the largest weight that `weigh` can return."""
        return ONE if isinstance(self.weight, Staleness) else self.weigh(cap, cap)

    def divisor(self, weight: int, count: int, population: int) -> int:
        """Compute the number to divide this part's sum by.

        Args:
            weight: The sum of the part's weights.
            count: The number of contributors.
            population: The number of devices.
        """
        unit = ONE if isinstance(self.weight, Staleness) else 1
        if isinstance(self.denominator, Fixed):
            return self.denominator.count * unit
        return {"weight": weight, "count": count * unit, "population": population * unit}[self.denominator]


@dataclass(frozen=True)
class Update:
    """A device's report.

    Attributes:
        client: The device's id, for errors.
        parts: The tree of each part, after the transforms. Leaves are float32 or float64, or integer codes (int8 or int16).
        examples: The number of examples that the device has trained on.
        metrics: For each metric, the sum over predictions and the number of predictions.
    """

    client: object
    parts: Mapping[str, Tree]
    examples: int
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])

    @property
    def nbytes(self) -> int:
        """The size of the body that the device sends, in bytes."""
        return sum(nbytes(tree) for tree in self.parts.values())


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Aggregate:
    """A sum of updates. Every array is int64. `Aggregate()` is the empty sum.

    Attributes:
        sums: For each part, the integer sum of each leaf.
        weights: For each part, the sum of the weights, `()`.
        count: The number of contributors, `()`.
        metrics: For each metric, (Σ value · 2^20, Σ count), `(2,)`.
    """

    sums: Mapping[str, Tree] = field(default_factory=dict[str, Tree])
    weights: Tree = field(default_factory=dict[str, Array])
    count: Array = field(default_factory=lambda: np.zeros((), np.int64))
    metrics: Tree = field(default_factory=dict[str, Array])

    @property
    def empty(self) -> bool:
        """Whether nothing has been added to this sum yet."""
        return not self.sums

    def merge(self, other: "Aggregate") -> "Aggregate":
        """Add two sums. Addition is associative and commutative, and `Aggregate()` is its zero."""
        if self.empty or other.empty:
            return other if self.empty else self
        check_same_shape(self, other)
        return Aggregate(
            {part: tree_map(np.add, tree, other.sums[part]) for part, tree in self.sums.items()},
            tree_map(np.add, self.weights, other.weights),
            np.add(self.count, other.count),
            _merge_metrics(self.metrics, other.metrics),
        )

    def slots(self) -> dict[str, Array]:
        """Return the sum as one flat tree with the names `sum/PART/LEAF`, `weight/PART`, `count` and `metric/NAME`."""
        flat = {f"sum/{part}/{leaf}": array for part, tree in self.sums.items() for leaf, array in tree.items()}
        flat |= {f"weight/{part}": array for part, array in self.weights.items()}
        flat |= {f"metric/{name}": array for name, array in self.metrics.items()}
        return flat | {"count": self.count}

    @staticmethod
    def from_slots(slots: Tree) -> "Aggregate":
        """Make a sum from such a flat tree: the inverse of `slots`."""
        sums: dict[str, dict[str, Array]] = {}
        groups: dict[str, dict[str, Array]] = {"weight": {}, "metric": {}}
        for name, array in slots.items():
            kind, _, rest = name.partition("/")
            if kind == "sum":
                part, _, leaf = rest.partition("/")
                sums.setdefault(part, {})[leaf] = array
            elif kind in groups:
                groups[kind][rest] = array
        return Aggregate(sums, groups["weight"], slots["count"], groups["metric"])

    def metric_means(self) -> dict[str, float]:
        """Compute each metric's mean over the predictions that it counts; a metric without predictions is left out."""
        return {
            name: float(value) / 2**METRIC_BITS / int(count)
            for name, (value, count) in self.metrics.items()
            if int(count) > 0
        }


def check_same_shape(left: Aggregate, right: Aggregate) -> None:
    """Raise ParticipantError if two sums belong to different plans, because such sums must not be added."""
    mine, theirs = _layouts(left.sums), _layouts(right.sums)
    if mine != theirs:
        raise ParticipantError(
            None, f"the parts of two sums differ ({mine} and {theirs}): they do not belong to the same plan"
        )


def _merge_metrics(mine: Tree, theirs: Tree) -> dict[str, Array]:
    missing = {name: np.zeros_like(array) for name, array in theirs.items() if name not in mine}
    return {
        name: np.add(array, theirs[name]) if name in theirs else array for name, array in {**mine, **missing}.items()
    }


class RunningSum:
    """A sum that grows in place. A round needs the memory of one such sum, for any number of clients."""

    def __init__(self) -> None:
        self._total = Aggregate()
        self._vectors: dict[str, Array] = {}

    def add(self, other: Aggregate) -> None:
        """Add a sum. The first sum is copied."""
        if other.empty:
            return
        if self._total.empty:
            counts = (tree_map(np.array, other.weights), np.array(other.count), tree_map(np.array, other.metrics))
            vectors = {part: flatten(tree) for part, tree in other.sums.items()}
            self._hold(vectors, Aggregate(other.sums, *counts))
            return
        check_same_shape(self._total, other)
        for part, tree in self._total.sums.items():
            for leaf, array in tree.items():
                np.add(array, other.sums[part][leaf], out=array)
        self.add_counts(other)

    def vectors_for(self, trees: Mapping[str, Tree]) -> Mapping[str, Array]:
        """Return the sum's flat vectors by part, to which trees of these shapes can be added. The first call makes the vectors.

        Raises:
            ParticipantError: The trees have other leaves or shapes than the sum.
        """
        if self._total.empty:
            self._hold(zeros(trees), Aggregate(trees))
        mine, theirs = _layouts(self._total.sums), _layouts(trees)
        if mine != theirs:
            raise ParticipantError(
                None,
                f"the parts of an update differ from the sum's ({theirs} and {mine}): they do not belong to the same plan",
            )
        return self._vectors

    def add_counts(self, other: Aggregate) -> None:
        """Add the weights, count and metrics of a sum whose arrays have already been added to the vectors."""
        total = self._total
        weights = tree_map(np.add, total.weights, other.weights) if total.weights else other.weights
        metrics = _merge_metrics(total.metrics, other.metrics)
        self._total = Aggregate(total.sums, weights, np.add(total.count, other.count), metrics)

    def _hold(self, vectors: dict[str, Array], like: Aggregate) -> None:
        """Store these vectors as the sums, with the weights, the count and the metrics of an aggregate."""
        self._vectors, self._total = vectors, replace(like, sums=views(vectors, like.sums))

    @property
    def total(self) -> Aggregate:
        """The sum so far. It shares its arrays with the running sum, so copy it to keep it."""
        return self._total


def zeros(trees: Mapping[str, Tree]) -> dict[str, Array]:
    """Make a flat integer vector of the size of each of these trees."""
    return {part: np.zeros(size(layout(tree)), np.int64) for part, tree in trees.items()}


def views(vectors: Mapping[str, Array], like: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return views of flat vectors as trees with the same shapes as `like`, by part."""
    return {part: unflatten(vector, layout(like[part])) for part, vector in vectors.items()}


def _layouts(trees: Mapping[str, Tree]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {part: layout(tree) for part, tree in trees.items()}


# ── combining ────────────────────────────────────────────────────────────────────────────────────────────────────────


Contribution: TypeAlias = Mapping[str, Tree]
"""One client's parts as float64, with transforms undone, and not multiplied by weights."""
Centre: TypeAlias = Callable[[Sequence[Contribution], Mapping[str, Sequence[int]]], Contribution]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Aggregator(Value):
    """The rule by which the updates of a round are combined into one.

    Attributes:
        parts: The parts that clients send.
        combine: (sums by part, divisors by part) → combined trees by part, all float64.
        centre: (a list of every client's trees by part; for each part, every client's weight) → trees that are used in place
            of the weighted mean. An aggregator with a centre (median, Krum) needs each update on its own, and cannot work on
            a sum.
        longest: (for each part, the client's share of the weight and the largest L2 norm of its update) → the largest
            L2 norm by which the client can move the combined `params`. None if this is not known; a plan for devices is
            then refused.
        chosen: For an aggregator that chooses among updates, which has no `longest`: (contributors) → the largest share
            of the result that one update can have, and the largest ratio of the result's norm to the largest norm of an
            update. Both hold for any round with at least this number of contributors. Each single number of the result
            lies between the smallest and the largest number that was sent.
        least: The smallest number of contributors; a round with fewer makes no model.
        one_by_one: Whether the model travels from client to client: every update is a round of its own, and the next client
            continues from its result.
    """

    parts: tuple[Part, ...]
    combine: Callable[[Mapping[str, Tree], Mapping[str, int]], Mapping[str, Tree]]
    centre: Centre | None = None
    longest: Callable[[Mapping[str, tuple[float, float]]], float] | None = None
    chosen: Callable[[int], tuple[float, float]] | None = None
    least: int = 1
    one_by_one: bool = False

    @property
    def needs_each_update(self) -> bool:
        """Whether the aggregator cannot work on a sum."""
        return self.centre is not None

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if "params" not in names or BUFFERS in names or len(set(names)) < len(names):
            raise PlanError(
                "part-words",
                f"the parts are called {names}: use each name once, include `params`, and leave `{BUFFERS}` to sumus",
            )


@registered("aggregator/mean")
def mean(*parts: Part) -> Aggregator:
    """Divide each part's sum by its own denominator."""

    def combine(sums: Mapping[str, Tree], divisors: Mapping[str, int]) -> Mapping[str, Tree]:
        return {name: over(tree, divisors[name]) for name, tree in sums.items()}

    def longest(reaches: Mapping[str, tuple[float, float]]) -> float:
        return math.prod(reaches["params"])

    return Aggregator(parts=parts, combine=combine, longest=longest)


def times(tree: Tree, factor: float) -> dict[str, Array]:
    """Multiply every leaf by a number."""
    return tree_map(lambda leaf: leaf * factor, tree)


def over(tree: Tree, divisor: int) -> dict[str, Array]:
    """Divide every leaf by a number."""
    return tree_map(lambda leaf: leaf / divisor, tree)
