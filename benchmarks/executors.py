"""The executors of sumus compared with each other and with a naive loop: does `auto` choose the fastest one?

    python -m benchmarks.executors                              w1, w2 and w3
    python -m benchmarks.executors --variants 3                 and three random variants of each: naive and auto alone
    python -m benchmarks.executors --workloads w2 w1/7          these; w1/7 is the variant of seed 7
    python -m benchmarks.executors --check                      also: do all get the same model?
    python -m benchmarks.executors --variants 3 --write         also put table and picture into docs/

The runners take turns, one round each, as in `benchmarks.peers`. `auto` makes its choice anew each time, since each
runner has a cache folder of its own. The exit status is 1 if the speed of `auto` is below 0.9 times the best.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import DOCS, bars, megabytes, reason, three_digits, times
from benchmarks.lockstep import Measured, Runner, keep_to, measure, over, save_rounds, times_faster
from benchmarks.peers import check
from benchmarks.results import write_table
from benchmarks.workloads import WORKLOADS, Workload, named

ROOT = Path(__file__).resolve().parents[1]
NAIVE, AUTO = "naive", "auto"
ALL = "all"  # cores
WAYS = {
    "autograd": ("autograd", "1"),
    "sequential": ("sequential", "1"),
    "vectorized": ("vectorized:16", "1"),
    "autograd, processes": ("autograd", ALL),
    "sequential, processes": ("sequential", ALL),
    "sequential+onednn, processes": ("sequential+onednn", ALL),
    "vectorized, processes": ("vectorized:16", ALL),
}
EXECUTORS = (*WAYS, AUTO)
ENOUGH = 0.9  # of the best executor's speed


def runner(name: str, asked: Sequence[str], further: Sequence[str] = ()) -> Runner:
    """Return the runner of the naive loop, or of sumus with an executor.

    Args:
        name: `NAIVE`, or the executor's name.
        asked: The workload, and the other arguments of all runners.
        further: Further arguments.
    """
    module = "runner_sumus" if name in EXECUTORS else "runner_naive"
    options: list[str] = []
    if name in WAYS:
        executor, workers = WAYS[name]
        options = [
            "--executor",
            executor,
            "--workers",
            str(len(os.sched_getaffinity(0))) if workers == ALL else workers,
        ]
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", *asked, *options, *further]
    return Runner(name, command, {"PYTHONPATH": str(ROOT)})


def names_for(workload: Workload) -> tuple[str, ...]:
    """Return all executors for a workload; for its variants the naive loop and `auto` alone."""
    return (NAIVE, AUTO) if "/" in workload.name else (NAIVE, *EXECUTORS)


def same_model(workload: Workload) -> dict[str, float | str]:
    """Return each executor's distance from the naive loop's model (`benchmarks.peers.check`)."""
    asked = check.asked(workload)
    ours = [runner(name, asked) for name in EXECUTORS]
    return check.same_model(workload, lambda name, further: runner(name, asked, further), ours, EXECUTORS, watch)


def auto_over_best(found: Mapping[str, Measured]) -> float | None:
    """Return the speed of `auto` over that of the fastest other executor; None if one of the two has none."""
    others = [one for name, one in found.items() if name not in (NAIVE, AUTO) and one.median("wall")]
    if not others or found[AUTO].error:
        return None
    best = min(others, key=lambda one: one.median("wall") or 0.0)
    return times_faster(found[AUTO], best)


def row(workload: Workload, found: Mapping[str, Measured], same: Mapping[str, float | str] | None) -> list[str]:
    """Return a row of the table."""
    naive, ratio = found[NAIVE], auto_over_best(found)
    wall = naive.median("wall")
    speeds = [
        times(times_faster(found[name], naive)) or reason(found[name].error or "") if name in found else ""
        for name in EXECUTORS
    ]
    sizes = [
        f"{megabytes(found[name].median('rss'))} / {megabytes(found[name].median('pss'))}" for name in (NAIVE, AUTO)
    ]
    figures = [away for away in (same or {}).values() if isinstance(away, float)]
    lost = same is not None and len(figures) < len(EXECUTORS)
    checked = check.shown("" if lost else max(figures) if figures else None)
    return [
        workload.name,
        workload.shape,
        three_digits(wall) if wall else reason(naive.error or ""),
        *speeds,
        "" if ratio is None else f"{ratio:.2f}" if ratio >= ENOUGH else f"**{ratio:.2f}**",
        *sizes,
        checked,
    ]


def main() -> int:
    """Measure and print; with --write also write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", nargs="+", type=named, default=list(WORKLOADS.values()), help="w1, w2, w3, or a variant as w1/7"
    )
    parser.add_argument("--variants", type=int, default=0, help="random variants of each (default 0)")
    parser.add_argument("--sweeps", type=int, default=9, help="timed rounds of each (default 9)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them (default 2)")
    parser.add_argument("--check", action="store_true", help="compare final models in float64")
    parser.add_argument("--cores", type=int, help="keep everything to so many cores (default: all)")
    parser.add_argument("--raw", type=Path, help="a file for the figures of every round, JSON")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    args = parser.parse_args()
    cores = keep_to(args.cores)
    plain = [workload.name.partition("/")[0] for workload in args.workloads]
    drawn = [named(f"{name}/{seed}") for name in dict.fromkeys(plain) for seed in range(1, args.variants + 1)]
    workloads = sorted({one.name: one for one in (*args.workloads, *drawn)}.values(), key=lambda one: one.name)
    measured: dict[str, dict[str, Measured]] = {}
    table: list[list[str]] = []
    for workload in workloads:
        watch(f"{workload.name}: {workload.shape}")
        runners = [runner(name, [workload.name]) for name in names_for(workload)]
        found = measure(runners, sweeps=args.sweeps, warm_up=args.warm_up, watch=watch)
        measured[workload.name] = found
        whole = workload.name in WORKLOADS
        table.append(row(workload, found, same_model(workload) if args.check and whole else None))
    if args.raw:
        save_rounds(args.raw, measured)
    header = ["workload", "model", "naive, seconds a round", *(f"{name}, × naive" for name in EXECUTORS), "auto / best"]
    header += [*(f"{name}, RSS / PSS MB" for name in (NAIVE, AUTO)), "same model"]
    caption = (
        f"`python -m benchmarks.executors`: one round of each in turn, {args.sweeps} sweeps in random order, medians of seconds "
        f"and of the sweeps' ratios, {cores} cores. Same model: the largest distance from the naive loop's in float64 over how "
        f"far that moved, {check.ROUNDS} rounds of {check.CLIENTS} clients."
    )
    write_table("executors", caption, header, table, args.write)
    panels = {name: over(found, NAIVE) for name, found in measured.items() if name in WORKLOADS}
    for ratios in panels.values():
        ratios.pop(NAIVE, None)
    if args.write and all(panels.values()):
        bars(DOCS / "executors.png", panels, "seconds a round / naive loop", [AUTO])
    slow = {name: ratio for name, found in measured.items() if (ratio := auto_over_best(found) or 1.0) < ENOUGH}
    for name, ratio in slow.items():
        watch(f"{name}: auto reaches {ratio:.2f} of the best executor, and should reach {ENOUGH}")
    return 1 if slow else 0


def watch(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
