"""Does it fit together? Data, one step, shapes, memory, bytes and legality, before anything long begins."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sumus.aggregate import BUFFERS
from sumus.errors import ExperimentError
from sumus.experiment import Examples
from sumus.plan import Plan
from sumus.rng import generator, key
from sumus.simulator.population import as_population
from sumus.task import Data, Task
from sumus.training.cost import Cost, cost_of
from sumus.training.executor import Assignment
from sumus.training.program import Program, one_thread, seeded
from sumus.training.sequential import SequentialExecutor
from sumus.tree import nbytes


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    data: the examples as the model sees them.  outputs: shape of the model's output for the first client's examples.
    parameters: numbers in the shared leaves.  cost: of one local step.  bytes_down, bytes_up: a client and round.
    bytes_kept: what each client keeps between rounds.
    loss: of the first client's round.  deployable: rule → message for each rule that real devices would break.
    """

    data: Data
    examples: int
    outputs: tuple[int, ...]
    parameters: int
    cost: Cost
    bytes_down: int
    bytes_up: int
    bytes_kept: int
    loss: float
    plan_id: str
    deployable: Mapping[str, str]


def check(plan: Plan, population: Mapping[Any, Examples], seed: int = 0) -> CheckReport:
    """Let the first client of a population do one round of a plan, and add its update up alone.

    Raises what a run would raise: TaskError, DataError, PlanError, DivergedError, with the same words.
    """
    if not isinstance(plan.task, Task):
        raise ExperimentError("this plan holds a task's description without its code; check the file it came from")
    people = as_population(population)
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
        outputs = tuple(program.predict(inputs[:2]).shape[1:])
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
        deployable=dict(described.violations("deployed")),
    )
