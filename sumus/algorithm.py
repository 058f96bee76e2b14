"""The algorithm: answers to four questions, and the device's and the server's half of a round that follow from them.

    what does a client do?                     client       `ClientWork`        sumus/work.py
    what happens to its update on the way?     update       `Transform`         sumus/update/
    how are updates combined?                  aggregator   `Aggregator`        sumus/aggregate.py
    what does the server do with the result?   server       `ServerOptimizer`   sumus/optimizers.py

A round has the same steps in the simulator and in a deployment (`…` stands for further arguments, see the docstrings):

    device      parts    = executor.run(broadcast, …)            trees of floats by name        sumus/training/
                update   = algorithm.report(client, parts, …)    floats, or narrow codes
    first hop   one      = hop.count_in(update)                  integers: an aggregate of one  sumus/first_hop.py
    anywhere    total    = one.merge(another)                    any order, any tree            sumus/aggregate.py
    server      combined = algorithm.combine(total, …)           floats again, divided
                state    = algorithm.step(combined, state, …)    the next broadcast
                model    = algorithm.release(state)              the next model

An edge that runs rounds of its own (a site) also combines. It sends a sum of how far its model has moved: see
sumus/site.py.

*Who takes part, and when* is decided by `Pacing`, which belongs to the plan and not to the algorithm. Shared leaves
without a gradient (running statistics) are a part of their own, `buffers`. This part is averaged; it is never
transformed, and the server optimizer does not see it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sumus.aggregate import BUFFERS, Aggregate, Aggregator, Part, Update, over, times
from sumus.errors import (
    BeyondBoundError,
    DivergedError,
    ParticipantError,
    PlanError,
    UsageError,
    at_client,
    expect,
    own_code,
)
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerOptimizer, ServerState
from sumus.spec import record
from sumus.task import Description
from sumus.tree import first_non_finite, narrowed, tree_map
from sumus.types import Array, Layout, Tree
from sumus.update.clip import global_norm, held_within
from sumus.update.transform import Context, Transform, laid_out
from sumus.work import ClientWork

LEAST_POSITIVE = 2.0**-24
"""The smallest number that a step of the model leaves in a positive buffer. Half precision can hold this number. It is
far below the 1e-5 that BatchNorm adds to a variance, so an honest model whose variance falls to it computes the same up
to 0.3%.
"""


@record("algorithm")
@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm: the four values that answer the four questions of this module."""

    client: ClientWork
    update: Transform
    aggregator: Aggregator
    server: ServerOptimizer

    def __post_init__(self) -> None:
        expect(self.client, ClientWork, "client=")
        expect(self.update, Transform, "update=")
        expect(self.aggregator, Aggregator, "aggregator=")
        expect(self.server, ServerOptimizer, "server=")
        parts, rules = {part.name for part in self.aggregator.parts}, self.client.rules
        for what, wanted, given in (
            ("the client sends {1}, but the aggregator combines {0}", parts, rules.sends),
            ("the server optimizer needs {0}, but the aggregator combines {1}", self.server.takes, parts),
            ("the client needs {0}, but the server broadcasts {1}", rules.receives, self.server.broadcasts),
        ):
            if not set(wanted) <= set(given):
                raise PlanError("parts-match", what.format(sorted(wanted), sorted(given)) + ": these must match")

    def parts(self, task: Description) -> tuple[Part, ...]:
        """Return the parts that a client sends: the aggregator's, and `buffers`, weighted like `params`, if there are any."""
        params = next(part for part in self.aggregator.parts if part.name == "params")
        bound = self.update.buffer_bound
        buffers = replace(params, name=BUFFERS, denominator="weight", transformed=False, bound=bound, least=None)
        return (*self.aggregator.parts, buffers) if task.buffer_layout else self.aggregator.parts

    def first_hop(
        self, task: Description, sums: FixedPoint, rounds: int = 1, metric_cap: int | None = None
    ) -> FirstHop:
        """Return the first hop: what an edge or a server needs in order to check and count updates.

        Args:
            rounds: The number of an edge's own rounds that one of its sums covers.
            metric_cap: The largest number of predictions that counts in a client's metrics; None for any number.
        """
        parts, metrics = self.parts(task), ("loss", *task.metrics)
        layouts = tuple(tuple(sorted(self._sent(part, task).items())) for part in parts)
        length, _ = self.update.reach(task.trained_layout)
        norms = tuple(length if part.in_chain else None for part in parts)
        return FirstHop(
            parts,
            layouts,
            sums,
            self.update.weight_cap,
            self.update.code_bits,
            metrics,
            norms if any(norm is not None for norm in norms) else (),
            task.ranges,
            metric_cap,
            rounds,
        )

    # ── the device's half ────────────────────────────────────────────────────────────────────────────────────────────

    def report(
        self,
        client: object,
        parts: Mapping[str, Tree],
        examples: int,
        metrics: Mapping[str, tuple[float, int]],
        seed: bytes,
        rng: np.random.Generator | None,
    ) -> Update:
        """Make a client's update after training: transform each part, and leave out parts that the aggregator does not combine.

        Raise DivergedError if a part is not finite before the transforms, since integer codes would hide this.

        Args:
            parts: The parts that the client's work returned, as floats.
            metrics: (sum, count) by metric name.
            seed: The round's public seed.
            rng: The client's private random generator; only transforms use it.
        """
        combined = {BUFFERS, *(part.name for part in self.aggregator.parts)}
        in_chain = {part.name for part in self.aggregator.parts if part.in_chain and self.update.links}
        sent = {
            name: self._transform(client, name, tree, examples, seed, rng) if name in in_chain else tree
            for name, tree in parts.items()
            if name in combined
        }
        if (bound := self.update.buffer_bound) is not None and BUFFERS in sent:
            _check_finite(client, BUFFERS, sent[BUFFERS])
            sent[BUFFERS] = held_within(sent[BUFFERS], bound)
        return Update(client, sent, examples, metrics)

    # ── the server's half ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, params: Tree, task: Description) -> ServerState:
        """Return the server's state before the first round. `params` are the initial shared leaves, including buffers."""
        trained, buffers = (
            {name: params[name] for name in shapes} for shapes in (task.trained_layout, task.buffer_layout)
        )
        with own_code("init", self.server, "it must return a ServerState, from the shared leaves"):
            state = self.server.init(trained)
        expect(state, ServerState, f"the init of {self.server!r}")
        return replace(state, broadcast={**state.broadcast, BUFFERS: buffers}) if buffers else state

    def combine(
        self, total: Aggregate, task: Description, sums: FixedPoint, seed: bytes, population: int
    ) -> Mapping[str, Tree]:
        """Undo the transforms on the sum, and divide each part by its denominator.

        Raise ParticipantError if the sum has more contributors than planned.

        Args:
            total: The sum of a round.
            sums: The conversion of the plan's floats into integers.
            seed: The round's public seed.
            population: The number of clients, for parts that are divided by it.

        Returns:
            Float64 trees by part; empty if there are too few contributors, or if a divisor is zero.
        """
        if self.aggregator.needs_each_update:
            raise UsageError(f"{self.aggregator!r} cannot work on a sum: give each update separately, to combine_each")
        if int(total.count) > sums.max_count:
            raise ParticipantError(
                None,
                f"a sum has {int(total.count)} contributors, but the plan allows {sums.max_count}: it may have overflowed",
            )
        if total.empty or int(total.count) < self.aggregator.least:
            return {}
        values = self._values(total, task, sums, seed)
        return self._divided(values, total.weights, int(total.count), task, population)

    def combine_each(
        self, ones: Sequence[Aggregate], task: Description, sums: FixedPoint, seed: bytes, population: int
    ) -> Mapping[str, Tree]:
        """Combine the updates of a round as `combine` does, for an aggregator that needs each update separately. The
        aggregator's `centre` replaces the weighted mean. It is multiplied by the summed weight, and divided like a sum.
        """
        centre = self.aggregator.centre
        if centre is None or len(ones) < max(1, self.aggregator.least):
            return {}
        weights = {part: np.sum([one.weights[part] for one in ones], axis=0) for part in ones[0].weights}
        contributions = [
            {part: over(tree, int(one.weights[part])) for part, tree in self._values(one, task, sums, seed).items()}
            for one in ones
        ]
        with own_code("centre", self.aggregator, "it must return trees by part, of the leaves of one contribution"):
            chosen = dict(centre(contributions, {part: [int(one.weights[part]) for one in ones] for part in weights}))
        if set(chosen) != set(weights):
            raise UsageError(
                f"the centre of {self.aggregator!r} returned {sorted(chosen)}, but must return {sorted(weights)}"
            )
        totals = {part: times(tree, int(weights[part])) for part, tree in chosen.items()}
        return self._divided(totals, weights, len(ones), task, population)

    def as_sum(
        self,
        moved: Mapping[str, Tree],
        weights: Mapping[str, int],
        count: int,
        metrics: Tree,
        task: Description,
        sums: FixedPoint,
        seed: bytes,
        rounds: int,
        rounding: Mapping[str, Tree],
    ) -> Aggregate:
        """Make the sum that a site sends. `combine` computes `moved` from this sum, up to rounding.

        A value that exceeds its bound only by its rounding is reduced to the bound. Each integer code is limited, as on
        a device. Raise BeyondBoundError if the sum is larger than `count` reports can add up to.

        Args:
            moved: How far the site's model has moved, as float64 trees by part.
            metrics: The sums of the metrics, as integers.
            seed: The public seed of the round of the server above.
            rounds: The number of the site's rounds that have moved the model.
            rounding: For each number of the model, the largest amount by which rounding has changed it.
        """
        hop = self.first_hop(task, sums, rounds)
        summed: dict[str, Tree] = {}
        for part in self.parts(task):
            by = part.divisor(weights[part.name], count, 0)
            values = times(moved[part.name], by)
            if part.in_chain:
                length = by * global_norm(rounding[part.name])
                lifted = self._lifted(part, values, length, by * rounds, hop, task, seed)
                values = hop.without_rounding(part, *lifted, weights[part.name], count)
                room = dict.fromkeys(values, math.inf if hop.code_bits is not None else 0.0)
            else:
                unit = 2.0 ** sums.bits(part)
                values, room = times(values, unit), _room(rounding[part.name], by, unit, rounds)
            summed[part.name] = _whole(part, values, hop.largest(part, count), room)
        whole = {name: np.array(weight, np.int64) for name, weight in weights.items()}
        total = Aggregate(summed, whole, np.array(count, np.int64), metrics)
        hop.check_sum(total, None, count, least=0)  # a site's later rounds may have fewer devices than its first
        return total

    def step(self, combined: Mapping[str, Tree], state: ServerState, task: Description) -> ServerState:
        """Take the server optimizer's step, and average the buffers. If nothing was combined, the state does not change.

        The step lowers no number of a `positive` buffer below `LEAST_POSITIVE`, and lowers none that is already below it.
        Raise UsageError if the next broadcast would not be finite, or would have other leaves, shapes or dtypes.
        """
        if not combined:
            return state
        seen = replace(state, broadcast=_without_buffers(state.broadcast))
        ignored = np.errstate(over="ignore", invalid="ignore")  # an error below names the leaf instead
        with (
            ignored,
            own_code("update", self.server, "it must return a ServerState, from combined parts and a ServerState"),
        ):
            after = self.server.update(_without_buffers(combined), seen)
        expect(after, ServerState, f"the update of {self.server!r}")
        for part, tree in after.broadcast.items():
            if (found := _forms(tree)) != (before := _forms(seen.broadcast.get(part, {}))):
                raise UsageError(
                    f"the update of {self.server!r} made {part!r} {found}, but it was {before}: keep leaves, shapes and dtypes"
                )
        if (leaf := first_non_finite(after.broadcast["params"])) is not None:
            raise UsageError(f"the server optimizer {self.server!r} gave NaN or infinity at `{leaf}`: lower its rate")
        if BUFFERS in combined:
            averaged = _averaged(state.broadcast[BUFFERS], combined[BUFFERS], task.positive)
            after = replace(after, broadcast={**after.broadcast, BUFFERS: averaged})
        for part, tree in after.broadcast.items():
            if (leaf := first_non_finite(tree)) is not None:
                raise UsageError(f"`{part}[{leaf}]` became NaN or infinite: lower the clients' learning rate")
        return after

    def release(self, state: ServerState) -> Tree:
        """Return the model to publish: every shared leaf, including buffers."""
        with own_code("release", self.server, "it must return the model to publish: a tree of the shared leaves"):
            released = dict(self.server.release(state))
        return {**released, **state.broadcast.get(BUFFERS, {})}

    # ── a part's transforms ───────────────────────────────────────────────────────────────────────────────────────────

    def _transform(
        self, client: object, part: str, tree: Tree, examples: int, seed: bytes, rng: np.random.Generator | None
    ) -> Tree:
        _check_finite(client, part, tree)
        shapes = {name: leaf.shape for name, leaf in tree.items()}
        body = np.result_type(*(leaf.dtype for leaf in tree.values()))
        with at_client(client):
            with own_code("apply", self.update, "it must return a tree of arrays by name"):
                sent = dict(self.update.apply(tree, Context(shapes, seed, examples=examples, rng=rng)))
            _check_layout(sent, laid_out(self.update, shapes), lambda: f"{self.update!r} returned")
        return tree_map(lambda leaf: leaf if leaf.dtype.kind == "i" else narrowed(leaf, body), sent)

    def _sent(self, part: Part, task: Description) -> Layout:
        """Return the layout of a part as it is sent."""
        if part.content == "scalar":
            return {"": ()}
        shapes = task.buffer_layout if part.name == BUFFERS else task.trained_layout
        return laid_out(self.update, shapes) if part.in_chain else shapes

    def _divided(
        self, values: Mapping[str, Tree], weights: Tree, count: int, task: Description, population: int
    ) -> Mapping[str, Tree]:
        """Divide each part's sum by its denominator. The result is empty if a denominator is zero."""
        divisors = {p.name: p.divisor(int(weights[p.name]), count, population) for p in self.parts(task)}
        if not all(divisors.values()):
            return {}
        buffers = {BUFFERS: over(values[BUFFERS], divisors[BUFFERS])} if BUFFERS in values else {}
        with own_code("combine", self.aggregator, "it must return trees by part, from their sums and their divisors"):
            combined = dict(self.aggregator.combine(_without_buffers(values), divisors))
        return {**combined, **buffers}

    def _values(self, total: Aggregate, task: Description, sums: FixedPoint, seed: bytes) -> dict[str, Tree]:
        """Convert the sum of every part to floats, in the shapes of the model's leaves."""
        parts = self.parts(task)
        if set(total.sums) != {part.name for part in parts}:
            raise ParticipantError(
                None,
                f"a sum has the parts {sorted(total.sums)}, but the plan has the parts {sorted(p.name for p in parts)}",
            )
        return {part.name: self._inverted(part, total.sums[part.name], task, sums, seed) for part in parts}

    def _lifted(
        self, part: Part, values: Tree, rounding: float, rounds: int, hop: FirstHop, task: Description, seed: bytes
    ) -> tuple[Tree, float]:
        """Convert a part of a site's model into a part of its sum, by `lift`. Return the part, and the largest L2 norm that
        rounding has added to it, in units of the sum.

        Args:
            rounding: The L2 norm that rounding has added to `values`, in parameters.
            rounds: The number of rounds in which devices' numbers were rounded to integers, times the divisor.
        """
        bits = 0 if hop.code_bits is not None else hop.sums.bits(part)
        with own_code("lift", self.update, "it must return a tree of arrays by name"):
            lifted = times(self.update.lift(values, Context(task.trained_layout, seed)), 2.0**bits)
        unit = self.update.reach(task.trained_layout)[1] / 2.0**bits
        return lifted, rounding / unit + rounds * 0.5 * math.sqrt(sum(leaf.size for leaf in lifted.values()))

    def _inverted(self, part: Part, total: Tree, task: Description, sums: FixedPoint, seed: bytes) -> Tree:
        if not part.in_chain:
            return sums.decode(part, total)
        values = tree_map(_as_float64, total) if self.update.code_bits else sums.decode(part, total)
        with own_code("invert", self.update, "it must return a tree of arrays by name"):
            inverted = dict(self.update.invert(values, Context(task.trained_layout, seed)))
        _check_layout(inverted, task.trained_layout, lambda: f"invert of {self.update!r} returned")
        return inverted


def _averaged(buffers: Tree, moved: Tree, positive: Sequence[str]) -> dict[str, Array]:
    """Subtract from each buffer how far it has moved. Positive buffers stay large enough to divide by."""
    averaged: dict[str, Array] = {}
    for name, leaf in buffers.items():
        before = leaf.astype(np.float64)
        after = before - moved[name]
        if name in positive:
            held = np.maximum(after, np.minimum(before, LEAST_POSITIVE))
            after = np.where(np.isfinite(after), held, after)  # keep NaN and infinity, so that the step refuses them
        with np.errstate(over="ignore"):  # the step's error names the leaf instead
            averaged[name] = after.astype(leaf.dtype)
    return averaged


def _check_finite(client: object, part: str, tree: Tree) -> None:
    """Raise DivergedError if a part is not finite. Call this before transforms, whose output would hide it."""
    if (leaf := first_non_finite(tree)) is not None:
        raise DivergedError(client, part, leaf)


def _check_layout(tree: Tree, expected: Layout, what: Callable[[], str]) -> None:
    """Raise UsageError if a transform returned other leaves or shapes than its layout says."""
    found = {name: getattr(leaf, "shape", None) for name, leaf in tree.items()}
    if found != {name: tuple(shape) for name, shape in expected.items()}:
        raise UsageError(f"{what()} {found}, but its layout says {dict(expected)}: correct the transform or its layout")


def _room(rounding: Tree, by: int, unit: float, rounds: int) -> Tree:
    """Return the largest amount by which rounding has changed each number of a site's sum, for a part outside the chain.

    The amounts are in units of the sum.

    In each round, rounding also moved the mean of the devices' numbers, by half a unit. One more unit covers the
    rounding of these amounts and of the sum's own whole numbers.
    """
    return tree_map(lambda leaf: by * (leaf * unit + 0.5 * rounds + 1.0), rounding)


def _whole(part: Part, values: Tree, largest: int, room: Mapping[str, Any]) -> Tree:
    """Round values to integers of at most `largest`. A value that exceeds `largest` by at most `room` is reduced to it.

    Raises:
        BeyondBoundError: A value exceeds `largest` by more than `room`.
    """
    whole: dict[str, Array] = {}
    for name, leaf in values.items():
        scaled = np.rint(leaf)
        if not (np.abs(scaled) <= largest + room[name]).all():
            raise BeyondBoundError(
                None, f"`{part.name}[{name}]` has moved further than the reports of this sum can move it"
            )
        # clip the integers again: as a float, `largest` may have been rounded up
        whole[name] = np.clip(np.clip(scaled, -largest, largest).astype(np.int64), -largest, largest)
    return whole


def _forms(tree: Tree) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (np.shape(leaf), np.asarray(leaf).dtype.name) for name, leaf in tree.items()}


def _without_buffers(trees: Mapping[str, Tree]) -> dict[str, Tree]:
    return {name: tree for name, tree in trees.items() if name != BUFFERS}


def _as_float64(leaf: Array) -> Array:
    return leaf.astype(np.float64)
