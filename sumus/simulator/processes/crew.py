"""Who trains a round's clients: this process, processes beside it, or a cluster."""

from sumus.errors import ExperimentError, extra
from sumus.simulator.populations.population import Population
from sumus.simulator.processes.share import CannotTravel, Crew, RunSetting, Trainer


def crew_of(trainer: Trainer, setting: RunSetting, workers: int | str, insecure: bool) -> tuple[Crew, str | None]:
    """Start who trains a run's clients.

    Args:
        trainer: This process.
        setting: What the clients of the run are trained with.
        workers: How many processes train at once, or the Ray cluster that does.
        insecure: Whether a Ray cluster may be used that lets everyone in.

    Returns:
        The crew, and why it is this process alone if more was wanted; else None.
    """
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
    """Say where clients are trained."""
    if isinstance(workers, str):
        return f"on {'a Ray cluster here' if workers == 'ray' else workers}"
    return f"in {workers} {'process' if workers == 1 else 'processes'}"


def _together(setting: RunSetting) -> str | None:
    """Say why one process has to train all clients; None if it need not."""
    if setting.plan.algorithm.aggregator.one_by_one:
        return "each goes on from where the one before left the model"
    if type(setting.population).sent is not Population.sent:
        return "attackers know of each other"
    return None
