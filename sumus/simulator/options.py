"""The options of `simulate` and `run` that do not change the model: how a run is computed, and what is kept and shown of it.

simulate(..., compute="autograd")                                  short for Compute(executor="autograd")
simulate(..., compute=Compute(workers=4, failures="skip"))
simulate(..., out="runs/first")                                    short for Output(folder="runs/first")
simulate(..., out=Output("runs/first", restart=True, progress=False))
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sumus.errors import ExperimentError, expect
from sumus.storage.client_states import ClientStates
from sumus.types import plain_number

if TYPE_CHECKING:
    from sumus.simulator.progress import Progress

Through = Literal["memory", "wire"]
Failures = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Compute:
    """How a run is computed. All choices give the same model, up to rounding; with the same executor they give the same bits.

    Attributes:
        executor: The name of the executor that trains a client: "autograd", "sequential", "sequential+onednn" or
            "vectorized:K". "auto" tries them on this model and these clients, unless the run is short, and remembers which was
            fastest; the history names it, and the reason.
        device: "cpu" or "cuda", or a torch.device.
        workers: The number of processes that train at once, including this one; None for one per core, if that saves time. Or
            "ray" for a Ray cluster on this machine, or the address of a running Ray cluster. If the run takes only one process,
            a note of the history says why.
        insecure: Whether to accept a Ray cluster without access control: anyone who reaches it can run code on it.
        through: "memory", or "wire" to make each client a device of a real server in this process, which is slower.
        failures: "refuse" to end the run if a client fails in a round (its examples cannot be read, or its training runs to
            NaN); "skip" to leave that client out of the round, and to name it in a note and in the round's record.
    """

    executor: str = "auto"
    device: Any = "cpu"
    workers: int | str | None = None
    insecure: bool = False
    through: Through = "memory"
    failures: Failures = "refuse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", str(self.device))
        object.__setattr__(self, "workers", plain_number(self.workers))
        check_workers(self.workers, self.device)
        for name, given, known in (
            ("through", self.through, get_args(Through)),
            ("failures", self.failures, get_args(Failures)),
        ):
            if given not in known:
                raise ExperimentError(f"{name}={given!r:.80}: give one of {', '.join(known)}")

    @property
    def skips(self) -> bool:
        """Whether a client that fails in a round is left out of that round."""
        return self.failures == "skip"


@dataclass(frozen=True)
class Output:
    """What a run keeps, and what it shows while it goes on.

    Attributes:
        folder: The folder for checkpoint, model, history and plot; None to keep nothing. If the folder holds an earlier part of
            the same run, that run continues. The final model is the same as without the interruption.
        checkpoint_every: The number of rounds between checkpoints. The last round also writes one, and so does Ctrl-C.
        restart: Whether to start over, even if the folder holds an earlier part of the run.
        client_states: The folder for clients' control variates and personal leaves, for more of them than fit in memory; None
            to keep them in memory and in the checkpoint.
        progress: True for a bar in the terminal, False for none, None for a bar if there is a terminal; or an object of your
            own, whose `watching(experiment, done)` returns a context manager for a function that is called with each round's
            record.
    """

    folder: str | Path | None = None
    checkpoint_every: int = 10
    restart: bool = False
    client_states: ClientStates | str | Path | None = None
    progress: "Progress | bool | None" = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint_every", plain_number(self.checkpoint_every))
        expect(self.checkpoint_every, int, "checkpoint_every=")
        for name, given in (("out", self.folder), ("client_states", self.client_states)):
            is_store = name == "client_states" and hasattr(given, "propose")
            if not (given is None or is_store or isinstance(given, str | Path)):
                raise ExperimentError(f"{name}={given!r:.80}: give a folder, as a string or as a Path")

    @property
    def path(self) -> Path | None:
        """The folder as a path."""
        return None if self.folder is None else Path(self.folder)


def as_compute(given: Compute | str) -> Compute:
    """Return the options of the computation; a string is taken as the name of an executor."""
    if isinstance(given, str):
        return Compute(executor=given)
    expect(given, Compute, "compute=")
    return given


def as_output(given: Output | str | Path | None) -> Output:
    """Return the options of the output; a string or path is taken as the folder."""
    return given if isinstance(given, Output) else Output(folder=given)


def check_workers(workers: object, device: str) -> None:
    """Refuse a value that is neither a number of processes nor a cluster; None leaves the choice open."""
    processes = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    cluster = isinstance(workers, str) and re.fullmatch(r"ray|[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+", workers)
    if not (workers is None or processes or cluster):
        raise ExperimentError(
            f"workers={workers!r}: give a number of processes from 1, 'ray', or HOST:PORT of a running Ray cluster"
        )
    if workers not in (None, 1) and device != "cpu":
        raise ExperimentError(
            f"workers={workers!r} with device={device!r}: processes cannot share a GPU; leave workers= out, or train on the CPU"
        )
