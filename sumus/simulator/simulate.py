"""The simulator's two entrances: an experiment, or what it takes to make one."""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sumus.algorithm import Algorithm
from sumus.errors import ExperimentError, expect
from sumus.experiment import Evaluate, Examples, Experiment, expect_population, seed_of
from sumus.fleet import PERFECT, Fleet
from sumus.pacing import Pacing
from sumus.plan import ADDING, Plan
from sumus.simulator.choice import Choice
from sumus.simulator.crew import check_workers
from sumus.simulator.history import History
from sumus.simulator.progress import Progress, progress_of
from sumus.simulator.simulation import Simulation
from sumus.site import Edges
from sumus.storage.client_states import ClientStates, DirectoryClientStates, MemoryClientStates
from sumus.task import Task
from sumus.training.program import expect_gradients, one_thread, seeded
from sumus.types import plain_number

_Through: TypeAlias = Literal["memory", "wire"]


def simulate(
    task: Task,
    algorithm: Algorithm,
    population: Mapping[Any, Examples],
    rounds: int,
    pacing: Pacing | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    fleet: Fleet = PERFECT,
    sites: int | Callable[[Any], Hashable] = 0,
    edges: Edges = ADDING,
    **options: Any,
) -> History:
    """Train `task` by `algorithm` on `population`. `options` are those of `run`.

    Without `pacing`, every client takes part in every round, up to 100 of them. sites, edges: the edges that clients report
    through (`Experiment`), and what these do (`Plan`).
    """
    expect_population(population)
    seed = seed_of(seed)
    pacing = pacing or Pacing(cohort=max(1, min(len(population), 100)))
    least = max(2, min(10, pacing.cohort)) if options.get("through") == "wire" else 10  # a server asks for it
    with seeded(seed):  # it may make the model
        plan = Plan(task, algorithm, pacing, least, edges=edges)
    return run(Experiment(plan, population, rounds, evaluate or Evaluate(), seed, fleet, sites), **options)


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    checkpoint_every: int = 10,
    restart: bool = False,
    device: Any = "cpu",
    progress: Progress | bool | None = None,
    client_states: ClientStates | str | Path | None = None,
    executor: str = "auto",
    workers: int | str | None = None,
    insecure: bool = False,
    through: _Through = "memory",
) -> History:
    """Run an experiment.

    out: a folder for checkpoint, model, history and plot. If it holds an earlier part of the same run, that run goes on
        to the same final model as without the break; `restart` starts over instead.
    checkpoint_every: rounds between checkpoints; the last round, and Ctrl-C, write one too.
    device: "cpu" or "cuda", or a torch.device.
    progress: True for a bar in the terminal, False for none; by default, a bar where there is a terminal, else a line now and
        then. A run with `out` also writes where it is into progress.json there.
    client_states: where control variates and personal leaves are kept; by default in memory, and in the checkpoint.
        A folder takes more of them than memory holds.
    executor: "auto" tries them on this model and these clients, unless the run is short, and remembers what was fastest;
        else "autograd", "sequential", "sequential+onednn" or "vectorized:K". They agree to rounding. `history.executor` says
        which it was, and why.
    workers: processes that train at once, this one among them; by default one for each core, where that saves time. Or
        "ray" for a Ray cluster on this machine, or the address of one that runs. The result is the same, bit for bit. Where
        it takes one process, a note of the history says why.
    insecure: whether a cluster may be one that lets everyone in: who reaches it can run code on it.
    through: "wire" lets each client be a device of a real server, in this process: slower, and the same bits.

    Raises ExperimentError and its like for what you can mend, DivergedError when training runs to NaN, Interrupted on
    Ctrl-C (its `history` is what there was).
    """
    expect(experiment, Experiment, "run()")
    expect_gradients("the simulation")
    device, workers, checkpoint_every = str(device), plain_number(workers), plain_number(checkpoint_every)
    check_workers(workers, device)
    expect(checkpoint_every, int, "checkpoint_every=")
    for name, given in (("out", out), ("client_states", client_states)):
        is_store = name == "client_states" and hasattr(given, "propose")
        if not (given is None or is_store or isinstance(given, str | Path)):
            raise ExperimentError(f"{name}={given!r:.80}: give a folder, as text or as a Path")
    if through not in get_args(_Through):
        raise ExperimentError(f"through={through!r:.80}: give one of {', '.join(get_args(_Through))}")
    wanted = None if executor == "auto" else Choice.parse(executor)
    with one_thread(), seeded(experiment.seed):
        states = MemoryClientStates() if client_states is None else client_states
        if isinstance(states, str | Path):
            states = DirectoryClientStates(states)
        kind: type[Simulation] = Simulation
        if through == "wire":
            from sumus.simulator.wire import WireSimulation as kind  # needs what servers and devices need
        simulation = kind(experiment, device, Path(out) if out is not None else None, restart, states)
        return simulation.run(checkpoint_every, progress_of(progress), wanted, workers, insecure)
