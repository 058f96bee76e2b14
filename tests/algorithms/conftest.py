"""A whole run, with what its server and its clients hold at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sumus
from sumus.optimizers import ServerState
from sumus.simulator.checkpoint import Checkpoint
from sumus.storage.client_states import ClientStates


@dataclass(frozen=True)
class Finished:
    history: sumus.History
    server: ServerState
    clients: ClientStates


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    def run(
        task: sumus.Task,
        algorithm: sumus.Algorithm,
        people: Mapping[Any, Any],
        rounds: int,
        cohort: int,
        lost: float = 0.0,
    ) -> Finished:
        out: Path = tmp_path_factory.mktemp("run")
        states = sumus.MemoryClientStates()
        experiment = sumus.Experiment(
            sumus.Plan(task, algorithm, sumus.Pacing(cohort)), people, rounds, fleet=sumus.Fleet(lost=lost)
        )
        history = sumus.run(
            experiment, out=sumus.Output(out, checkpoint_every=rounds, progress=False, client_states=states)
        )
        written = Checkpoint.read(out)
        assert written is not None
        return Finished(history, written.state, states)

    return run
