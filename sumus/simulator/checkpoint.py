"""A run's folder: the files that it needs to continue, and files to look at.

checkpoint.safetensors   server state, client states, and the records of the rounds: a whole run in one file
model.safetensors        the published model, as a state dict
history.jsonl            one line per round
progress.json            the progress of the run
plot.png                 the run as a picture
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from sumus.aggregate import Aggregate
from sumus.errors import ExperimentError
from sumus.optimizers import ServerState
from sumus.simulator.kept import BestSoFar
from sumus.simulator.records import RoundRecord, RoundTally
from sumus.storage.files import write_whole
from sumus.text import many
from sumus.tree import nested, unnested
from sumus.types import Array, Tree

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a complete round. Each round replaces it with a new value, which a file can hold.

    Attributes:
        identity: The values that must be equal to continue a run (plan id, seed, population, fleet).
        state: The server's state.
        clients: A snapshot of the clients' states, taken when a file is written.
        rounds: The record of each round.
        executor: The executor's name; another executor would round differently.
        version: The number of models published.
        pending: Sums of later rounds that already hold reports, by the round's number. Only asynchronous rounds have such sums,
            because they also accept reports on earlier models.
        tallies: The tallies of these sums.
        start: The record of the measurement before round 1.
        best: The best model so far.
        code: Digests of the user's code (`sumus.simulator.task_code`); empty in checkpoints of older versions.
    """

    identity: Mapping[str, Any]
    state: ServerState
    clients: Tree = field(default_factory=dict[str, Array])
    rounds: Sequence[RoundRecord] = ()
    executor: str = ""
    version: int = 0
    pending: Mapping[int, Aggregate] = field(default_factory=dict[int, Aggregate])
    tallies: Mapping[int, RoundTally] = field(default_factory=dict[int, RoundTally])
    start: RoundRecord | None = None
    best: BestSoFar | None = None
    code: Mapping[str, str] = field(default_factory=dict[str, str])

    def write(self, folder: Path) -> Path:
        """Replace the folder's checkpoint in one step: after a crash, the folder holds the old checkpoint or the new one."""
        rounds = [record.to_json() for record in self.rounds]
        head: dict[str, Any] = {
            "identity": dict(self.identity),
            "rounds": rounds,
            "executor": self.executor,
            "version": self.version,
            "code": dict(self.code),
            "tallies": [(number, dataclasses.asdict(tally)) for number, tally in self.tallies.items()],
        }
        if self.start is not None:
            head["start"] = self.start.to_json()
        if self.best is not None:
            head["best"] = [self.best.metric, self.best.round, self.best.value]
        tensors: dict[str, Array] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        for kind, tree in (
            ("broadcast", unnested(self.state.broadcast)),
            ("memory", unnested(self.state.memory)),
            ("clients", self.clients),
            ("best", {} if self.best is None else self.best.model),
            ("pending", unnested({str(number): total.slots() for number, total in self.pending.items()})),
        ):
            tensors |= {f"{kind}/{name}": array for name, array in tree.items()}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / CHECKPOINT
        write_whole(path, save({name: np.array(array, order="C") for name, array in tensors.items()}), lasting=True)
        return path

    @staticmethod
    def read(folder: Path) -> "Checkpoint | None":
        """Read the folder's checkpoint; None if there is none."""
        path = folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            return _decoded(load_file(path))
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise ExperimentError(f"{path} is not a checkpoint ({error}): move it away to start a new run") from error

    def check_same(self, identity: Mapping[str, Any], folder: Path, rounds: int) -> None:
        """Refuse to continue another experiment's run, or a run that has more rounds than requested."""
        if len(self.rounds) > rounds:
            raise ExperimentError(
                f"{folder} holds {many(len(self.rounds), 'round')}, but only {rounds} are requested: request more, give "
                "another folder, or restart=True (--restart) to start over there"
            )
        for name, value in identity.items():
            if self.identity.get(name) != value:
                raise ExperimentError(
                    f"{folder} holds a run with another {name} ({self.identity.get(name)}, now {value}): give another "
                    "folder, or restart=True (--restart) to start over there"
                )


def _decoded(tensors: dict[str, Array]) -> Checkpoint:
    head = json.loads(tensors.pop("head").tobytes())
    trees: dict[str, dict[str, Array]] = {"broadcast": {}, "memory": {}, "clients": {}, "best": {}, "pending": {}}
    for name, array in tensors.items():
        kind, _, rest = name.partition("/")
        trees[kind][rest] = array
    state = ServerState(nested(trees["broadcast"]), nested(trees["memory"]))
    rounds = [RoundRecord.from_json(record) for record in head["rounds"]]
    pending = {int(number): Aggregate.from_slots(slots) for number, slots in nested(trees["pending"]).items()}
    tallies = {number: RoundTally.from_json(fields) for number, fields in head["tallies"]}
    start = RoundRecord.from_json(head["start"]) if "start" in head else None
    best = BestSoFar(*cast(tuple[str, int, float], tuple(head["best"])), trees["best"]) if "best" in head else None
    executor, version, code = head["executor"], head["version"], head.get("code", {})
    return Checkpoint(
        head["identity"], state, trees["clients"], rounds, executor, version, pending, tallies, start, best, code
    )
