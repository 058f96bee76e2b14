"""The crew that trains a round's clients: this process, several processes, or a cluster."""

from sumus.errors import ExperimentError, extra
from sumus.simulator.populations.population import Population
from sumus.simulator.processes.share import CannotTravel, Crew, RunSetting, Trainer


def crew_of(trainer: Trainer, setting: RunSetting, workers: int | str, insecure: bool) -> tuple[Crew, str | None]:
    """Start the crew that trains a run's clients.

    Args:
        trainer: The trainer of this process.
        setting: The setting in which the clients of the run are trained.
        workers: The number of processes that train at once, or the address of a Ray cluster.
        insecure: Whether to accept a Ray cluster without access control.

    Returns:
        The crew, and the reason why it is only this process although more were wanted; None if the crew is as wanted.
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
    """Describe where clients are trained."""
    if isinstance(workers, str):
        return f"on {'a Ray cluster here' if workers == 'ray' else workers}"
    return f"in {workers} {'process' if workers == 1 else 'processes'}"


def _together(setting: RunSetting) -> str | None:
    """Return the reason why one process must train all clients; None if several may."""
    if setting.plan.algorithm.aggregator.one_by_one:
        return "each client trains the model that the previous client has trained"
    if type(setting.population).sent is not Population.sent:
        return "attackers cooperate"
    return None
