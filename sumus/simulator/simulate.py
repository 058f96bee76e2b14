"""The simulator's two entry points: `run` takes an experiment, and `simulate` takes the parts of an experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sumus.algorithm import Algorithm
from sumus.errors import ExperimentError, expect
from sumus.experiment import Evaluation, Examples, Experiment, expect_population, seed_of
from sumus.pacing import Pacing
from sumus.plan import Plan
from sumus.simulator.after_round import AfterRound, RoundListener
from sumus.simulator.history import History
from sumus.simulator.local_clients import LocalClients
from sumus.simulator.options import Compute, Output, as_compute, as_output
from sumus.simulator.participants import Participants
from sumus.simulator.prepared import PreparedRun, prepare
from sumus.simulator.progress import progress_of
from sumus.simulator.run_folder import RunFolder
from sumus.simulator.simulation import Simulation
from sumus.simulator.staffing import wanted_executor
from sumus.storage.client_states import ClientStates, DirectoryClientStates, MemoryClientStates
from sumus.task import Task
from sumus.training.hidden import generators_seeded
from sumus.training.program import expect_gradients, one_thread, seeded

_COHORT = 100
"""The largest number of clients in a round, if no pacing is given."""


def simulate(
    task: Task,
    algorithm: Algorithm,
    population: Mapping[Any, Examples],
    rounds: int,
    pacing: Pacing | None = None,
    evaluate: Evaluation | None = None,
    seed: int = 0,
    compute: Compute | str = "auto",
    out: Output | str | Path | None = None,
    after_round: AfterRound | None = None,
) -> History:
    """Train `task` with `algorithm` on `population`.

    To simulate a fleet of devices, or edges, use an `Experiment` and `run`.

    Args:
        task: The task to learn.
        algorithm: The algorithm that learns it.
        population: The clients: a mapping from each client's id to its examples.
        rounds: The number of rounds.
        pacing: Which clients take part in a round, and when; None for all clients in every round, but at most 100.
        evaluate: The measurements, and how often they are taken; None for only the loss of local training.
        seed: The seed of everything random. Two runs with the same seed give the same model, bit for bit.
        compute: How the run is computed (`Compute`), or the name of an executor.
        out: What the run keeps and shows (`Output`), or the folder in which it is kept.
        after_round: Function that is called with a `RoundOutcome` after each round, and after the measurement before round 1.
            It returns "stop" to end the run, or None. It can neither lose the round nor change the numbers of later rounds.

    Returns:
        The history of the run, round by round, and the model.

    Raises:
        ExperimentError: The arguments do not fit together. Other SumusErrors concern a task, a plan or a client's examples.
        DivergedError: The training of a client produced NaN.
        Interrupted: The user stopped the run; the exception holds the history so far.
    """
    expect_population(population)
    seed, compute = seed_of(seed), as_compute(compute)
    pacing = pacing or Pacing(cohort=max(1, min(len(population), _COHORT)))
    least = max(2, min(10, pacing.cohort)) if compute.through == "wire" else 10  # a server enforces it
    with seeded(seed):  # Plan may build the model
        plan = Plan(task, algorithm, pacing, least)
    return run(Experiment(plan, population, rounds, evaluate or Evaluation(), seed), compute, out, after_round)


def run(
    experiment: Experiment,
    compute: Compute | str = "auto",
    out: Output | str | Path | None = None,
    after_round: AfterRound | None = None,
) -> History:
    """Run an experiment.

    Args:
        experiment: The experiment.
        compute: How the run is computed (`Compute`), or the name of an executor.
        out: What the run keeps and shows (`Output`), or the folder in which it is kept. If the folder holds an earlier part of
            the same run, that run continues.
        after_round: Function that is called after each round; see `simulate`.

    Returns:
        The history of the run, round by round, and the model.

    Raises:
        ExperimentError: The options do not fit the experiment. Other SumusErrors concern a task, a plan or a client.
        DivergedError: The training of a client produced NaN.
        Interrupted: The user stopped the run; the exception holds the history so far.
    """
    expect(experiment, Experiment, "run()")
    expect_gradients("the simulation")
    compute, output = as_compute(compute), as_output(out)
    wanted_executor(compute)  # refuses an unknown executor before any long work begins
    with one_thread(), seeded(experiment.seed), generators_seeded(experiment.seed):
        if compute.through == "wire":
            from sumus.simulator.wire import check_for_wire  # imports the packages of servers and devices

            check_for_wire(experiment, compute.skips)
        states = _client_states(output)
        prepared = prepare(experiment, compute.device, compute.skips)
        folder = RunFolder(output.path, output.restart, experiment.rounds)
        simulation = Simulation(prepared, folder, states)
        participants = _participants(prepared, states, compute, simulation.done == 0, output.path)
        try:
            progress, listener = progress_of(output.progress), RoundListener(after_round)
            return simulation.run(participants, listener, progress, output.checkpoint_every)
        finally:
            prepared.end()
            participants.end()


def _client_states(output: Output) -> ClientStates:
    """Return the store of clients' states."""
    given = output.client_states
    if given is None:
        return MemoryClientStates()
    return DirectoryClientStates(given) if isinstance(given, str | Path) else given


def _participants(
    prepared: PreparedRun, states: ClientStates, compute: Compute, is_fresh: bool, folder: Path | None
) -> Participants:
    """Return the participants: clients in memory, or devices of a server."""
    if compute.through == "memory":
        return LocalClients(prepared, states, compute)
    from sumus.simulator.wire import DeviceClients  # imports the packages of servers and devices

    if compute.workers not in (None, 1):
        raise ExperimentError("with through='wire', clients train one after the other: leave out workers=")
    executor = str(wanted_executor(compute) or "auto")
    return DeviceClients(prepared, states, executor, is_fresh, folder)
