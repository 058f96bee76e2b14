"""The simulator's two entrances: an experiment, or what it takes to make one."""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

from sumus.algorithm import Algorithm
from sumus.errors import ExperimentError, expect
from sumus.executors.choice import ExecutorChoice
from sumus.experiment import Evaluate, Examples, Experiment, expect_population, seed_of
from sumus.fleet import PERFECT, Fleet
from sumus.pacing import Pacing
from sumus.plan import ADDING, Plan
from sumus.simulator.after_round import AfterRound
from sumus.simulator.history import History
from sumus.simulator.processes.crew import check_workers
from sumus.simulator.progress import Progress, progress_of
from sumus.simulator.simulation import Simulation
from sumus.site import Edges
from sumus.storage.client_states import ClientStates, DirectoryClientStates, MemoryClientStates
from sumus.task import Task
from sumus.training.hidden import generators_seeded
from sumus.training.program import expect_gradients, one_thread, seeded
from sumus.types import plain_number

_Through: TypeAlias = Literal["memory", "wire"]
_Failures: TypeAlias = Literal["refuse", "skip"]


class RunOptions(TypedDict, total=False):
    """How a run is computed, kept and shown: see `run`."""

    out: str | Path | None
    checkpoint_every: int
    restart: bool
    client_states: ClientStates | str | Path | None
    progress: Progress | bool | None
    after_round: AfterRound | None
    failures: _Failures
    device: Any
    executor: str
    workers: int | str | None
    insecure: bool
    through: _Through


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
    **options: Unpack[RunOptions],
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


def run(experiment: Experiment, **options: Unpack[RunOptions]) -> History:
    """Run an experiment. All options are given by name.

    out: a folder for checkpoint, model, history and plot. If it holds an earlier part of the same run, that run goes on
        to the same final model as without the break; `restart` starts over instead.
    checkpoint_every: rounds between checkpoints; the last round, and Ctrl-C, write one too.
    client_states: where control variates and personal leaves are kept; by default in memory, and in the checkpoint.
        A folder takes more of them than memory holds.
    progress: True for a bar in the terminal, False for none; by default, a bar where there is a terminal.
    after_round: a function that is called with a `RoundOutcome` after each round, and after the measurement before round 1. It
        gives "stop" to end the run, or nothing. The round is kept whatever it does, and no number of later rounds changes.
    failures: "refuse" ends the run if the part of a client in a round fails: its examples cannot be read, its training runs to
        NaN. "skip" leaves that client out of that round, and names it in a note and in the round's record.
    device: "cpu" or "cuda", or a torch.device.
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
    if unknown := sorted(set(options) - set(RunOptions.__annotations__)):
        raise TypeError(
            f"run() got an unexpected keyword argument {unknown[0]!r}; it takes {', '.join(RunOptions.__annotations__)}"
        )
    expect(experiment, Experiment, "run()")
    expect_gradients("the simulation")
    out, client_states = options.get("out"), options.get("client_states")
    restart, through, failures = (
        options.get("restart", False),
        options.get("through", "memory"),
        options.get("failures", "refuse"),
    )
    device, workers = str(options.get("device", "cpu")), plain_number(options.get("workers"))
    executor, checkpoint_every = options.get("executor", "auto"), plain_number(options.get("checkpoint_every", 10))
    check_workers(workers, device)
    expect(checkpoint_every, int, "checkpoint_every=")
    for name, given in (("out", out), ("client_states", client_states)):
        is_store = name == "client_states" and hasattr(given, "propose")
        if not (given is None or is_store or isinstance(given, str | Path)):
            raise ExperimentError(f"{name}={given!r:.80}: give a folder, as text or as a Path")
    for name, given, known in (
        ("through", through, get_args(_Through)),
        ("failures", failures, get_args(_Failures)),
    ):
        if given not in known:
            raise ExperimentError(f"{name}={given!r:.80}: give one of {', '.join(known)}")
    wanted = None if executor == "auto" else ExecutorChoice.parse(executor)
    with one_thread(), seeded(experiment.seed), generators_seeded(experiment.seed):
        states = MemoryClientStates() if client_states is None else client_states
        if isinstance(states, str | Path):
            states = DirectoryClientStates(states)
        kind: type[Simulation] = Simulation
        if through == "wire":
            from sumus.simulator.wire import WireSimulation as kind  # needs what servers and devices need
        folder = Path(out) if out is not None else None
        simulation = kind(experiment, device, folder, restart, states, failures == "skip")
        shown, insecure = progress_of(options.get("progress")), options.get("insecure", False)
        try:
            return simulation.run(checkpoint_every, shown, wanted, workers, insecure, options.get("after_round"))
        finally:
            simulation.end()
