"""Check that a plan works: data, one step, shapes, memory, bytes and legality, before any long work begins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sumus.aggregate import BUFFERS
from sumus.errors import DivergedError, ExperimentError, at_client, expect
from sumus.executors.choice import AUTOGRAD
from sumus.executors.executor import ClientAssignment, Trained
from sumus.experiment import Examples, seed_of
from sumus.influence import Influence
from sumus.plan import Plan
from sumus.protocol.consent import hurdles, missing
from sumus.rng import generator, key
from sumus.simulator.populations.population import as_population
from sumus.task import Data, Task
from sumus.training.cost import Cost, cost_of
from sumus.training.observed import expect_means, note_of
from sumus.training.program import Program, expect_gradients, one_thread, seeded, shapes_of
from sumus.tree import first_non_finite, nbytes
from sumus.types import Tree
from sumus.update.clip import global_norm

MEASURED = 8
"""The number of clients whose updates are measured, to propose a clip."""


@dataclass(frozen=True)
class Updates:
    """The updates of a few clients' first round, before any clip.

    Attributes:
        lengths: The L2 norms of `params`, as a clip would measure them, in ascending order.
        examples: The number of examples of each of these clients, in ascending order.
        beside: For each part of leaves that no transform changes (averaged buffers, SCAFFOLD's control), the largest |number|
            of each client's part, in ascending order. A control that its algorithm already bounds is left out.
        variance: The smallest number in a positive buffer (`Description.positive`) of these clients' models; None if the model
            has no such buffer.
        variance_move: The largest amount by which one dishonest device can change such a number in a round, under the plan's
            bound; if the plan has no bound, under the proposed one.
    """

    lengths: tuple[float, ...]
    examples: tuple[int, ...]
    beside: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    variance: float | None = None
    variance_move: float = 0.0

    @property
    def clip(self) -> float:
        """A bound of the norm that clips none of these updates: their largest norm, rounded up to two digits."""
        return _rounded_up(max(self.lengths, default=0.0))

    def proposal(self) -> str:
        """Return a sentence that proposes a clip, a weight, and bounds for the parts outside the chain."""
        count, middle = len(self.lengths), self.examples[len(self.examples) // 2]
        who = "the first client's update has a norm" if count == 1 else f"the first {count} clients' updates have norms"
        said = [
            f"{who} of {_span(self.lengths)}: clip_by_global_norm({self.clip:g}) leaves them unchanged; half of "
            f'these clients hold at most {middle} examples: weight="uniform", or cap={middle}'
        ]
        for name, largest in self.beside.items():
            # a client moves statistics and gradients further in some later round than in its first
            bound = _PROPOSALS.get(name, f"Part({name!r}, bound={{0:g}})").format(_proposed(largest))
            said.append(
                f"the largest number in `{name}` is {_span(largest)}: {bound} leaves numbers up to {ROOM:g} times as "
                "large unchanged"
            )
        if self.variance is not None and self.variance_move > self.variance:
            said.append(
                f"one dishonest device can change a variance by {self.variance_move:.3g} per round, and the smallest variance "
                f"of these clients is {self.variance:.3g}: the device can reduce it to the smallest value that the server "
                "allows; use a model without averaged buffers (GroupNorm instead of BatchNorm), keep the buffers on the device "
                '(leaves={"*running_*": "personal"}), or enlarge the cohort and min_contributors'
            )
        return "; ".join(said)


ROOM = 2.0
"""The proposed bound of a part that no transform changes, as a multiple of the largest number in the first round."""
_PROPOSALS = {BUFFERS: "clip_buffers({0:g})", "control": "scaffold(control_bound={0:g})"}


def _proposed(largest: Sequence[float]) -> float:
    """Return the bound to propose for a part that no transform changes, from the largest number of each client."""
    return _rounded_up(ROOM * max(largest))


def _rounded_up(largest: float) -> float:
    """Return a number rounded up to two digits; for 0, return 1."""
    largest = largest or 1.0
    unit = 10.0 ** (math.floor(math.log10(largest)) - 1)
    return float(f"{math.ceil(largest / unit - 1e-9) * unit:.6g}")


def _span(numbers: Sequence[float]) -> str:
    """Return the first and the last of sorted numbers, as text."""
    return f"{numbers[0]:.3g} to {numbers[-1]:.3g}" if len(numbers) > 1 else f"{numbers[0]:.3g}"


@dataclass(frozen=True)
class FirstClient:
    """The number of examples of a plan's first client, and the loss of its local training."""

    examples: int
    loss: float


@dataclass(frozen=True)
class CheckedModel:
    """The facts of a model, from a first trial.

    Attributes:
        parameters: The number of values in the shared leaves.
        outputs: The shape of the model's output for one example; if the model gives several outputs, their shapes in the same
            tuple, list or mapping.
        cost: The memory of one local step.
    """

    parameters: int
    outputs: Any
    cost: Cost


@dataclass(frozen=True)
class ClientBytes:
    """The bytes that a client receives and sends in a round, and keeps between rounds."""

    down: int
    up: int
    kept: int


@dataclass(frozen=True)
class CheckReport:
    """The results of a check.

    Attributes:
        plan_id: The id of the plan, which includes the shapes and dtypes of its data.
        data: The examples as the model sees them.
        first: The first client.
        model: The model.
        bytes: The bytes that a client receives, sends and keeps.
        updates: The updates of the first few clients, measured to propose a clip.
        influence: The influence of one device on a sum.
        deployable: The rules that forbid the plan on real devices: each rule's name and message. Empty if no rule does.
        notes: State that the code keeps outside the leaves, which is therefore reset for every client.
        warnings: Reasons why real devices would take part rarely or never although no rule is broken; each with a remedy.
    """

    plan_id: str
    data: Data
    first: FirstClient
    model: CheckedModel
    bytes: ClientBytes
    updates: Updates
    influence: Influence
    deployable: Mapping[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check(plan: Plan, population: Mapping[Any, Examples], seed: int = 0) -> CheckReport:
    """Train the first client of a population for one round of a plan, and measure the updates of a few more clients.

    The first client's update is aggregated alone.

    Args:
        plan: The plan.
        population: The clients: a mapping from each client's id to its examples.
        seed: The seed of everything random.

    Raises:
        SumusError: The errors that a run would raise (TaskError, DataError, PlanError, DivergedError), with the same messages.
    """
    expect(plan, Plan, "check()")
    expect_gradients("check()")
    if not isinstance(plan.task, Task):
        raise ExperimentError(
            "this plan holds a task's description but not its code: check the plan of the Python file from which it was made"
        )
    people, seed = as_population(population), seed_of(seed)
    if not len(people):
        raise ExperimentError("the population is empty: give at least one client")
    client = people.pick(0)
    with one_thread(), seeded(seed):
        program = Program(plan.task, seed=seed)
        inputs, targets = program.reader.read(people, client)
        data = program.learn_schema(client, inputs, targets)
        with at_client(client):
            expect_means(program, inputs, targets)
        executor = AUTOGRAD.executor(program, plan.algorithm.client)
        broadcast = plan.algorithm.start(program.initial_shared, program.description).broadcast
        assignment = ClientAssignment(client, inputs, targets, {}, key(seed, "check", client, "training"))
        (trained,) = executor.run(broadcast, 0, [assignment])
        update = plan.algorithm.report(
            client,
            trained.parts,
            trained.examples,
            trained.metrics,
            key(seed, "check"),
            generator(seed, "check", client),
        )
        total = plan.first_hop.count_in(update)
        cost = cost_of(program, plan.algorithm.client, inputs, targets)
        outputs = shapes_of(program.outputs(inputs[:2]))
        more = [people.pick(index) for index in range(1, min(MEASURED, len(people)))]
        work = [
            ClientAssignment(who, *program.reader.read(people, who), {}, key(seed, "check", who, "training"))
            for who in more
        ]
        described = plan.with_data(data)
        updates = _measured(described, broadcast.get(BUFFERS, {}), [trained, *executor.run(broadcast, 0, work)])
        program.end()
    return CheckReport(
        plan_id=described.id,
        data=data,
        first=FirstClient(len(inputs), total.metric_means().get("loss", math.nan)),
        model=CheckedModel(
            parameters=sum(leaf.size for name in ("params", BUFFERS) for leaf in broadcast.get(name, {}).values()),
            outputs=outputs,
            cost=cost,
        ),
        bytes=ClientBytes(
            down=sum(nbytes(tree) for tree in broadcast.values()),
            up=update.nbytes,
            kept=sum(nbytes(tree) for tree in trained.state.values()),
        ),
        updates=updates,
        influence=described.influence,
        deployable=dict(described.violations("deployed")),
        notes=tuple(map(note_of, program.moved)),
        warnings=(
            *hurdles(described, plan.algorithm.client.step_count(updates.examples[-1]), cost.total),
            *(missing(described, len(people)) if len(people) > 1 else ()),  # a single client is one device's own data
        ),
    )


def _measured(plan: Plan, buffers: Tree, trained: Sequence[Trained]) -> Updates:
    """Measure the norms of these clients' updates before the chain of transforms, and count the clients' examples.

    `buffers` are the values that were broadcast.
    """
    cap = plan.algorithm.update.weight_cap
    parts = {part.name: part for part in plan.algorithm.parts(plan.description)}
    beside = [
        name
        for name, part in parts.items()
        if part.content == "leaves"
        and not part.in_chain
        and name != "params"
        and (name == BUFFERS or not part.is_bounded)
    ]
    for one in trained:
        for name in ("params", *beside):
            if (leaf := first_non_finite(one.parts[name])) is not None:
                raise DivergedError(one.client, name, leaf)
    lengths = [global_norm(one.parts["params"]) * (1 if cap is None else min(one.examples, cap)) for one in trained]
    largest = {name: tuple(sorted(_largest(one.parts[name]) for one in trained)) for name in beside}
    variances = [
        float(np.min(buffers[name] - one.parts[BUFFERS][name]))
        for one in trained
        for name in plan.description.positive
        if buffers[name].size
    ]
    return Updates(
        tuple(sorted(lengths)),
        tuple(sorted(one.examples for one in trained)),
        largest,
        min(variances, default=None),
        _buffer_move(plan, _proposed(largest[BUFFERS])) if variances else 0.0,
    )


def _buffer_move(plan: Plan, proposed: float) -> float:
    """Return how far one device can move a number of the buffers in a round.

    The plan's bound is used; if the plan has none, the proposed bound.
    """
    moved, bound = plan.influence.others[BUFFERS], plan.algorithm.update.buffer_bound
    return moved if bound is not None else moved / plan.sums.bound * proposed


def _largest(tree: Tree) -> float:
    """Return the largest |number| of a tree."""
    return max((float(np.max(np.abs(leaf), initial=0.0)) for leaf in tree.values()), default=0.0)
