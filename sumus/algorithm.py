"""The platform in one page: four answers, and the two halves of a round that follow from them.

    what does a client do?                     client       `ClientWork`        sumus/work.py
    what happens to its update on the way?     update       `Transform`         sumus/update/
    how are updates combined?                  aggregator   `Aggregator`        sumus/aggregate.py
    what does the server do with the result?   server       `ServerOptimizer`   sumus/optimizers.py

A round, wherever it runs:

    device      parts = executor(client, broadcast, examples)        sumus/training/
                update = algorithm.report(parts)                          floats, or narrow codes
    first hop   aggregate = algorithm.count_in(update, sums)              integers: an aggregate of one
    anywhere    total = aggregate.merge(another)                          any order, any tree
    server      state = algorithm.finish(total, state)                    the next model
                model = algorithm.release(state)

*Who takes part, and when* is `Pacing`; it belongs to the round and not to the algorithm.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sumus.aggregate import Aggregate, Aggregator, RunningSum, Update
from sumus.errors import DivergedError, PlanError
from sumus.fixed_point import FixedPoint
from sumus.optimizers import ServerOptimizer, ServerState
from sumus.spec import record
from sumus.task import Description
from sumus.tree import first_non_finite, tree_map
from sumus.types import Array, Tree
from sumus.update.clip import narrowed
from sumus.update.transform import Context, Transform
from sumus.work import ClientWork


@record("algorithm")
@dataclass(frozen=True)
class Algorithm:
    """Four answers, and nothing else."""

    client: ClientWork
    update: Transform
    aggregator: Aggregator
    server: ServerOptimizer

    def __post_init__(self) -> None:
        expected = tuple(part.name for part in self.aggregator.parts)
        if set(expected) != set(self.client.sends):
            raise PlanError(
                "parts-match",
                f"the client sends {sorted(self.client.sends)} and the aggregator combines {sorted(expected)}; name the same",
            )

    def report(
        self,
        client: object,
        parts: Mapping[str, Tree],
        examples: int,
        metrics: Mapping[str, tuple[float, int]],
        seed: bytes,
        rng: np.random.Generator,
    ) -> Update:
        """The device's half, after training: transform each part. seed is the round's, public; rng the client's, private.

        Raises DivergedError for what is not finite: codes could not tell.
        """
        for part, tree in parts.items():
            if self.update.links and (leaf := first_non_finite(tree)) is not None:
                raise DivergedError(client, part, leaf)
        sent = {part: self._transform(part, tree, examples, seed, rng) for part, tree in parts.items()}
        return Update(client, sent, examples, metrics)

    def count_in(self, update: Update, sums: FixedPoint, into: RunningSum | None = None) -> Aggregate:
        """The first hop's: floats become integers, weights multiply; an aggregate of one, or added `into` a running sum.

        Refuses what is not finite or beyond the bound.
        """
        return sums.encode(update, self.aggregator.parts, self.update.weight_cap, into)

    def start(self, params: Tree, task: Description) -> ServerState:
        """The server's state before the first round. params: the initial shared leaves."""
        trained = {name: leaf for name, leaf in params.items() if name in task.trained_leaves}
        return _with_buffers(self.server.init(trained), params)

    def finish(
        self, total: Aggregate, state: ServerState, task: Description, sums: FixedPoint, seed: bytes, population: int
    ) -> ServerState:
        """The server's half: undo the transforms on the sum, divide each part by its denominator, step the optimizer.

        population: how many clients there are, for parts that divide by it. Shared buffers (running statistics) are
        averaged, whatever the optimizer: it sees only leaves that have gradients.
        Where nobody is in the sum, or every weight is zero, there is nothing to learn from and the state stays.
        """
        if total.empty:
            return state
        combined: dict[str, Tree] = {}
        for part in self.aggregator.parts:
            divisor = part.divisor(int(total.weights[part.name]), int(total.count), population)
            if divisor == 0:
                return state
            values: Tree = total.sums[part.name]
            if part.content == "scalar":
                values = sums.decode(values)
            else:
                values = tree_map(_as_float64, values) if self.update.code_bits else sums.decode(values)
                values = self.update.invert(values, Context(task.shared_layout, seed))
            combined[part.name] = self.aggregator.combine(part, values, divisor)
        buffers = {
            name: (leaf.astype(np.float64) - combined["params"][name]).astype(leaf.dtype)
            for name, leaf in state.broadcast["params"].items()
            if name not in task.trained_leaves
        }
        return _with_buffers(self.server.update(combined, _without_buffers(state, task)), buffers)

    def release(self, state: ServerState, task: Description) -> Tree:
        """The model to publish: what the server optimizer releases, with the latest buffers."""
        return {**state.broadcast["params"], **self.server.release(_without_buffers(state, task))}

    def _transform(self, part: str, tree: Tree, examples: int, seed: bytes, rng: np.random.Generator) -> Tree:
        if next(p for p in self.aggregator.parts if p.name == part).content == "scalar":
            return tree
        shapes = {name: leaf.shape for name, leaf in tree.items()}
        body = np.result_type(*(leaf.dtype for leaf in tree.values()))
        sent = self.update.apply(tree, Context(shapes, seed, examples=examples, rng=rng))
        return tree_map(lambda leaf: leaf if leaf.dtype.kind == "i" else narrowed(leaf, body), sent)


def _without_buffers(state: ServerState, task: Description) -> ServerState:
    """The state as a server optimizer sees it: leaves that have gradients."""
    params = {name: leaf for name, leaf in state.broadcast["params"].items() if name in task.trained_leaves}
    return ServerState({**state.broadcast, "params": params}, state.memory)


def _with_buffers(state: ServerState, buffers: Tree) -> ServerState:
    """A server optimizer's state, with the shared leaves that it does not see."""
    return ServerState({**state.broadcast, "params": {**buffers, **state.broadcast["params"]}}, state.memory)


def _as_float64(leaf: Array) -> Array:
    return leaf.astype(np.float64)
