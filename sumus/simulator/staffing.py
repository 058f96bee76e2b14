"""How the clients of a run are trained: by which executor, and in how many processes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from sumus.errors import DataError
from sumus.executors.choice import AUTOGRAD, ExecutorChoice, ExecutorChosen, RunLength, checked, choose, processes
from sumus.executors.executor import ClientAssignment
from sumus.executors.recall import recall_of_this_user
from sumus.rng import key
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.options import Compute
from sumus.simulator.prepared import PreparedRun
from sumus.simulator.processes.crew import crew_of, described
from sumus.simulator.processes.share import Crew, Trainer
from sumus.types import Broadcast


@dataclass(frozen=True)
class Staff:
    """The executor and the processes that train the clients of a run.

    Attributes:
        trainer: Trains clients in this process.
        crew: Trains the clients of a round: the trainer alone, or with other processes.
        executor: The name of the executor.
        how: A sentence on how clients are trained, and why.
    """

    trainer: Trainer
    crew: Crew
    executor: str
    how: str


def wanted_executor(compute: Compute) -> ExecutorChoice | None:
    """Return the executor that the user wants; None to choose one. Raises ExperimentError if it does not exist."""
    return None if compute.executor == "auto" else ExecutorChoice.parse(compute.executor)


def staff(prepared: PreparedRun, at: Checkpoint, compute: Compute, left: int) -> Staff:
    """Choose the executor and the number of processes, and start the processes.

    Args:
        prepared: The experiment; notes for the user are added to its notes.
        at: The state of the run.
        compute: The user's options.
        left: The number of client trainings that are left.
    """
    plan, notes, program = prepared.plan, prepared.notes, prepared.program
    cohort = 1 if plan.algorithm.aggregator.one_by_one else plan.pacing.cohort
    tried = partial(_tried, prepared)
    run = RunLength.of(program, plan.algorithm.client, *tried(1, 1), clients=left)
    wanted = wanted_executor(compute)
    chosen = _chosen(prepared, at, wanted, partial(tried, cohort), run)
    if at.executor not in ("", str(chosen.choice)):
        notes[f"earlier rounds were trained by {at.executor}, these by {chosen.choice}"] = None
    if wanted not in (None, chosen.choice):
        notes[f"trained by {chosen.choice}, {chosen.reason}"] = None
    count = compute.workers or processes(run.seconds_with(chosen), cohort, program.device.type)
    if isinstance(count, int):
        count = min(count, plan.pacing.cohort)  # further processes would have no work
    clients = left // count if isinstance(count, int) else 0
    setting = replace(prepared.setting, executor=chosen.choice.executor, clients=clients)
    trainer = Trainer(setting, program)
    crew, alone = crew_of(trainer, setting, count, compute.insecure)
    if alone:
        notes[alone] = None
    how = f"{chosen.choice} {described(1 if alone else count)}: {chosen.reason}"
    return Staff(trainer, crew, str(chosen.choice), how)


def _chosen(
    prepared: PreparedRun,
    at: Checkpoint,
    wanted: ExecutorChoice | None,
    tried: Callable[[int], list[ClientAssignment]],
    run: RunLength,
) -> ExecutorChosen:
    """Return the requested executor, or a similar one that can train the model.

    Without a request, return the executor of the run's earlier rounds, or the fastest one in a new run.
    """
    program, work = prepared.program, prepared.plan.algorithm.client
    broadcast: Broadcast = at.state.broadcast
    if wanted == AUTOGRAD:
        return ExecutorChosen(AUTOGRAD, "as asked for")
    if wanted is not None:
        return checked(wanted, program, work, tried(4), broadcast)
    if at.executor:
        return ExecutorChosen(ExecutorChoice.parse(at.executor), "as in the rounds before")
    return choose(program, work, tried, broadcast, run, recall_of_this_user())


def _tried(prepared: PreparedRun, cohort: int, most: int) -> list[ClientAssignment]:
    """Return the work of the first clients, to try executors on it; clients whose examples cannot be read are left out."""
    assignments: list[ClientAssignment] = []
    population, first = prepared.population, prepared.setting.first
    last = min(first + min(cohort, most), len(population))
    for client in (population.pick(position) for position in range(first, last)):
        with suppress(DataError):  # the round that picks the client reports the error
            examples = prepared.program.reader.read(population, client)
            assignments.append(ClientAssignment(client, *examples, {}, key("tried", client)))
    return assignments
