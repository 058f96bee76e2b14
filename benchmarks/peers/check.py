"""Do all variants get the same model? They are compared with the naive loop, in float64, on a few clients.

In float32 they may differ: rounding alone can switch a ReLU or a max-pooling, and then trajectories part. Peers take
the examples in stored order. sumus draws its batches, so it is compared with a naive loop that takes the same batches.
The remaining difference is in the arithmetic of the sums: sumus adds fixed-point integers, pfl adds float32.
"""

from collections.abc import Callable, Container, Sequence

from benchmarks.lockstep import Runner, measure
from benchmarks.workloads import Workload, distance

CLIENTS, ROUNDS = 6, 2
STORED, DRAWN = "reference", "reference, sumus's batches"


def same_model(
    workload: Workload,
    runner_naive: Callable[[str, Sequence[str]], Runner],
    runners: Sequence[Runner],
    ours: Container[str],
    watch: Callable[[str], None],
) -> dict[str, float | str]:
    """Return each runner's distance from the reference's final model over how far that model moved; or the reason why
    there is none.

    Args:
        workload: The workload.
        runner_naive: (name, further arguments) → the naive loop.
        runners: The runners, which must have been given `asked(workload)` and ROUNDS.
        ours: The names of sumus's runners.
        watch: Called with lines of progress.
    """
    references = [runner_naive(STORED, ["--order", "stored"]), runner_naive(DRAWN, ["--order", "sumus"])]
    found = measure([*references, *runners], sweeps=ROUNDS, warm_up=0, watch=watch)
    start, away = workload.initial(), dict[str, float | str]()
    for runner in runners:
        one, reference = found[runner.name], found[DRAWN if runner.name in ours else STORED]
        if one.weights is None or reference.weights is None:
            away[runner.name] = one.error or f"{reference.error}"
        else:
            moved = distance(reference.weights, start)
            away[runner.name] = distance(one.weights, reference.weights) / moved
    return away


def asked(workload: Workload) -> list[str]:
    """Return the arguments of every runner in the check."""
    return [workload.name, "--double", "--clients", str(CLIENTS)]


def shown(away: float | str | None) -> str:
    """Return a distance as text for a table."""
    return "not checked" if away is None else "no figure" if isinstance(away, str) else f"{away:.0e}"
