"""Does it fit together? Data, one step, shapes, memory, bytes and legality, before anything long begins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sumus.aggregate import BUFFERS
from sumus.errors import DivergedError, ExperimentError, expect
from sumus.experiment import Examples, seed_of
from sumus.influence import Influence
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.population import as_population
from sumus.task import Data, Task
from sumus.training.cost import Cost, cost_of
from sumus.training.executor import Assignment, Trained
from sumus.training.program import Program, expect_gradients, one_thread, seeded, shapes_of
from sumus.training.sequential import SequentialExecutor
from sumus.tree import first_non_finite, nbytes
from sumus.update.clip import global_norm

MEASURED = 8
"""Clients whose updates are measured, to propose a clip."""


@dataclass(frozen=True)
class Updates:
    """Updates of a few clients' first round, before any clip.

    lengths: L2 norms of `params`, as a clip would see them, the shortest first.
    examples: how many each of these clients holds, the fewest first.
    """

    lengths: tuple[float, ...]
    examples: tuple[int, ...]

    @property
    def clip(self) -> float:
        """A norm that leaves all these updates alone: the longest, rounded up to two digits."""
        longest = max(self.lengths, default=0.0) or 1.0
        unit = 10.0 ** (math.floor(math.log10(longest)) - 1)
        return float(f"{math.ceil(longest / unit - 1e-9) * unit:.6g}")

    def proposal(self) -> str:
        """A clip and a weight for a plan that has none, in a sentence."""
        count, middle = len(self.lengths), self.examples[len(self.examples) // 2]
        who = "the first client's update is" if count == 1 else f"the updates of the first {count} clients are"
        lengths = "" if count == 1 else f"{self.lengths[0]:.3g} to "
        return (
            f"{who} {lengths}{self.lengths[-1]:.3g} long: clip_by_global_norm({self.clip:g}) leaves them as they are; half of "
            f'these clients hold at most {middle} examples: weight="uniform", or cap={middle}'
        )


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    data: the examples as the model sees them.
    outputs: shape of the model's output for one example; where the model gives several outputs, their shapes in the same tuple,
        list or mapping.
    parameters: numbers in the shared leaves.
    cost: of one local step.
    bytes_down, bytes_up: a client and round.
    bytes_kept: what each client keeps between rounds.
    loss: of the first client's round.
    updates: of the first few clients, measured to propose a clip.
    influence: what one device can do to a sum.
    deployable: rule → message for each rule that real devices would break.
    """

    data: Data
    examples: int
    outputs: Any
    parameters: int
    cost: Cost
    bytes_down: int
    bytes_up: int
    bytes_kept: int
    loss: float
    plan_id: str
    updates: Updates
    influence: Influence
    deployable: Mapping[str, str]


def check(plan: Plan, population: Mapping[Any, Examples], seed: int = 0) -> CheckReport:
    """Let the first client of a population do one round of a plan, and add its update up alone; measure a few more.

    Raises what a run would raise: TaskError, DataError, PlanError, DivergedError, with the same words.
    """
    expect(plan, Plan, "check()")
    expect_gradients("check()")
    if not isinstance(plan.task, Task):
        raise ExperimentError("this plan holds a task's description without its code; check the file it came from")
    people, seed = as_population(population), seed_of(seed)
    if not len(people):
        raise ExperimentError("the population is empty: give at least one client")
    client = people.pick(0)
    with one_thread(), seeded(seed):
        program = Program(plan.task, seed=seed)
        inputs, targets = program.reader.read(people, client)
        data = program.learn_schema(client, inputs, targets)
        executor = SequentialExecutor(program, plan.algorithm.client)
        broadcast = plan.algorithm.start(program.initial_shared, program.description).broadcast
        assignment = Assignment(client, inputs, targets, {}, key(seed, "check", client, "training"))
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
            Assignment(who, *program.reader.read(people, who), {}, key(seed, "check", who, "training")) for who in more
        ]
        updates = _measured(plan, [trained, *executor.run(broadcast, 0, work)])
    described = plan.with_data(data)
    return CheckReport(
        data=data,
        examples=len(inputs),
        outputs=outputs,
        parameters=sum(leaf.size for name in ("params", BUFFERS) for leaf in broadcast.get(name, {}).values()),
        cost=cost,
        bytes_down=sum(nbytes(tree) for tree in broadcast.values()),
        bytes_up=update.nbytes,
        bytes_kept=sum(nbytes(tree) for tree in trained.state.values()),
        loss=total.metric_means().get("loss", math.nan),
        plan_id=described.id,
        updates=updates,
        influence=described.influence,
        deployable=dict(described.violations("deployed")),
    )


def _measured(plan: Plan, trained: Sequence[Trained]) -> Updates:
    """How long these clients' updates are when the chain's clip sees them, and how many examples the clients hold."""
    cap = plan.algorithm.update.weight_cap
    for one in trained:
        if (leaf := first_non_finite(one.parts["params"])) is not None:
            raise DivergedError(one.client, "params", leaf)
    lengths = [global_norm(one.parts["params"]) * (1 if cap is None else min(one.examples, cap)) for one in trained]
    return Updates(tuple(sorted(lengths)), tuple(sorted(one.examples for one in trained)))
