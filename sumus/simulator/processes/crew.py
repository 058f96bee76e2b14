"""Who trains a round's clients: this process, processes beside it, or a cluster."""

import re

from sumus.errors import ExperimentError, extra
from sumus.simulator.populations.population import Population
from sumus.simulator.processes.share import CannotTravel, Crew, RunSetting, Trainer


def check_workers(workers: object, device: str) -> None:
    """Refuse what is no number of processes and no cluster; None leaves it open."""
    processes = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    cluster = isinstance(workers, str) and re.fullmatch(r"ray|[\w.-]+:\d+|\[[\da-fA-F:]+\]:\d+", workers)
    if not (workers is None or processes or cluster):
        raise ExperimentError(
            f"workers={workers!r}: give a number of processes from 1, 'ray', or HOST:PORT of a Ray cluster that runs"
        )
    if workers not in (None, 1) and device != "cpu":
        raise ExperimentError(
            f"workers={workers!r} with device={device!r}: processes share no GPU; leave workers= out, or train on the CPU"
        )


def crew_of(trainer: Trainer, setting: RunSetting, workers: int | str, insecure: bool) -> tuple[Crew, str | None]:
    """A crew as wanted, and None; or this process alone, and why."""
    if workers == 1:
        return trainer, None
    if reason := _together(setting):
        return trainer, f"all clients train in one process: {reason}"
    try:
        if isinstance(workers, str):
            from sumus.simulator.processes.cluster import Cluster

            return Cluster(trainer, setting, workers, insecure), None
        from sumus.simulator.processes.workers import Workers

        return Workers(trainer, setting, workers), None
    except CannotTravel as reason:
        return trainer, f"all clients train in one process: {reason}"
    except ModuleNotFoundError as error:
        of = "ray" if error.name == "ray" else "train"
        raise ExperimentError(f"workers={workers!r} needs {error.name}: {extra(of)}") from error


def described(workers: int | str) -> str:
    """Where clients are trained, in words."""
    if isinstance(workers, str):
        return f"on {'a Ray cluster here' if workers == 'ray' else workers}"
    return f"in {workers} {'process' if workers == 1 else 'processes'}"


def _together(setting: RunSetting) -> str | None:
    """Why one process has to train everyone, if it has to."""
    if setting.plan.algorithm.aggregator.one_by_one:
        return "each goes on from where the one before left the model"
    if type(setting.population).sent is not Population.sent:
        return "attackers know of each other"
    return None
