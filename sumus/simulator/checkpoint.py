"""A run's folder: what it takes to go on, and what there is to look at.

checkpoint.safetensors   server state, client states, and the record of the rounds: all of a run, in one file
model.safetensors        the published model, as a state dict
history.jsonl            a line a round
plot.png
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save  # pyright: ignore[reportUnknownVariableType]

from sumus.errors import ExperimentError
from sumus.optimizers import ServerState
from sumus.simulator.history import RoundRecord
from sumus.types import Array, Tree

CHECKPOINT = "checkpoint.safetensors"

ClientState: TypeAlias = Mapping[str, Tree]
"""What a client keeps between rounds: its personal leaves under `personal`, an algorithm's trees under their names."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after a whole round: the one value that a round replaces, and that a file can hold.

    identity: what must be equal to go on (plan id, seed, population size).
    clients: each client's state, by its id as text.
    """

    identity: Mapping[str, Any]
    state: ServerState
    clients: Mapping[str, ClientState] = field(default_factory=dict[str, ClientState])
    rounds: Sequence[RoundRecord] = ()

    def write(self, folder: Path) -> Path:
        """Replace the folder's checkpoint in one step: a crash leaves the old one or the new one, whole."""
        head = {
            "identity": dict(self.identity),
            "rounds": [record.to_json() for record in self.rounds],
            "clients": list(self.clients),
        }
        tensors: dict[str, Array] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        for kind, tree in (("broadcast", self.state.broadcast), ("memory", self.state.memory)):
            tensors |= {f"{kind}/{name}": array for name, array in _flat(tree).items()}
        for index, state in enumerate(self.clients.values()):
            tensors |= {f"client/{index}/{name}": array for name, array in _flat(state).items()}
        folder.mkdir(parents=True, exist_ok=True)
        path, new = folder / CHECKPOINT, folder / (CHECKPOINT + ".new")
        with new.open("wb") as file:
            file.write(save({name: np.array(array, order="C") for name, array in tensors.items()}))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        return path

    @staticmethod
    def read(folder: Path) -> "Checkpoint | None":
        """The folder's checkpoint, or None where there is none."""
        path = folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            return _decoded(load_file(path))
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
            raise ExperimentError(f"{path} is not a checkpoint ({error}); move it away to start anew") from error

    def check_same(self, identity: Mapping[str, Any], folder: Path, rounds: int) -> None:
        """Refuse to go on with another experiment's run, or with one that is past the rounds that are wanted."""
        if len(self.rounds) > rounds:
            raise ExperimentError(
                f"{folder} holds {len(self.rounds)} rounds, and {rounds} are asked for: ask for more, give another folder, or "
                "restart=True (--restart) to start over there"
            )
        for name, value in identity.items():
            if self.identity.get(name) != value:
                raise ExperimentError(
                    f"{folder} holds a run with another {name} ({self.identity.get(name)}, now {value}): give another "
                    "folder, or restart=True (--restart) to start over there"
                )


def _decoded(tensors: dict[str, Array]) -> Checkpoint:
    head = json.loads(tensors.pop("head").tobytes())
    trees: dict[str, dict[str, Array]] = {"broadcast": {}, "memory": {}}
    clients: list[dict[str, Array]] = [{} for _ in head["clients"]]
    for name, array in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "client":
            index, _, leaf = rest.partition("/")
            clients[int(index)][leaf] = array
        else:
            trees[kind][rest] = array
    state = ServerState(_nested(trees["broadcast"]), _nested(trees["memory"]))
    states = {client: _nested(flat) for client, flat in zip(head["clients"], clients, strict=True)}
    return Checkpoint(head["identity"], state, states, [RoundRecord.from_json(r) for r in head["rounds"]])


def _flat(trees: ClientState) -> dict[str, Array]:
    return {f"{name}/{leaf}": array for name, tree in trees.items() for leaf, array in tree.items()}


def _nested(flat: Tree) -> ClientState:
    trees: dict[str, dict[str, Array]] = {}
    for path, array in flat.items():
        name, _, leaf = path.partition("/")
        trees.setdefault(name, {})[leaf] = array
    return trees
