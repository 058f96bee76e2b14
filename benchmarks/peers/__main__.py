"""sumus compared with other simulators of federated learning, on one machine, one round of each in turn.

    python -m benchmarks.peers                                 everything, 9 sweeps (about half an hour on two cores)
    python -m benchmarks.peers --workloads w2 --sweeps 3       a first look (a minute)
    python -m benchmarks.peers --check                         also: do all get the same model?
    python -m benchmarks.peers --check --sweeps 0              only that
    python -m benchmarks.peers --check --write                 also put table and picture into docs/

Each peer is installed once, with pinned versions, into an environment of its own (--environments). This takes some
minutes and about 4 GB. A peer that cannot be installed, or fails, gets a row with the reason. No run evaluates; all
train on the same examples from the same initial weights. Run nothing else on the machine meanwhile: a sweep distributes
disturbances over all peers, but does not remove them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bound
from benchmarks.figures import DOCS, bars, megabytes, reason, three_digits, times
from benchmarks.lockstep import Measured, Runner, keep_to, measure, over, save_rounds, times_faster
from benchmarks.peers import check
from benchmarks.peers.environments import (
    FEDJAX,
    FLOWER,
    KEPT,
    PFL,
    TORCH,
    Environment,
    EnvironmentAbsent,
    prepare,
    versions,
)
from benchmarks.results import write_table
from benchmarks.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]
NAIVE, OURS = "naive loop", "sumus"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
HEADER = (
    "workload",
    "variant",
    "cores in use",
    "seconds a round",
    "× naive (wall)",
    "sumus is … times faster",
    "GFLOP a CPU second",
    "of the bound",
    "RSS, MB",
    "same model",
)


@dataclass(frozen=True)
class Peer:
    """A variant of the table.

    Attributes:
        name: Its name.
        command: The words after its environment's Python; {cores} and {rounds} are filled in.
        environment: Its environment; None for this one.
    """

    name: str
    command: str
    environment: Environment | None = None


PEERS = {
    "naive": Peer(NAIVE, "-m benchmarks.peers.runner_naive"),
    "naive-all": Peer("naive loop, {cores} processes", "-m benchmarks.peers.runner_naive --processes {cores}"),
    "sumus": Peer(OURS, "-m benchmarks.peers.runner_sumus"),
    "sumus-one": Peer(
        "sumus, sequential, 1 process", "-m benchmarks.peers.runner_sumus --executor sequential --workers 1"
    ),
    "pfl": Peer("pfl", "-m benchmarks.peers.runner_pfl --rounds {rounds}", PFL),
    "pfl-all": Peer(
        "pfl, {cores} processes",
        "-m torch.distributed.run --standalone --nproc-per-node {cores} "
        "-m benchmarks.peers.runner_pfl --rounds {rounds}",
        PFL,
    ),
    "flower": Peer("Flower", "-m benchmarks.peers.runner_flower", FLOWER),
    "fedjax": Peer("FedJAX", "-m benchmarks.peers.runner_fedjax", FEDJAX),
}


@dataclass(frozen=True)
class Bench:
    """What all measurements of one command share.

    Attributes:
        cores: The number of cores.
        pythons: Environment → its Python.
        absent: Environment → why it is missing.
        versions: The versions that are installed.
        watch: Called with lines of progress.
    """

    cores: int
    pythons: Mapping[str, str]
    absent: Mapping[str, str]
    versions: Sequence[str]
    watch: Callable[[str], None]

    def runner(self, peer: Peer, rounds: int, asked: Sequence[str]) -> Runner:
        """Return a peer's runner. asked: the runner's own arguments."""
        words = [word.format(cores=self.cores, rounds=rounds) for word in peer.command.split()]
        python = self.pythons[peer.environment.name] if peer.environment else sys.executable
        return Runner(peer.name, [python, *words, *asked], {**QUIET, "PYTHONPATH": str(ROOT)})

    def present(self, peers: Sequence[Peer]) -> list[Peer]:
        """Return the peers that can be run here."""
        return [peer for peer in peers if peer.environment is None or peer.environment.name in self.pythons]

    def timed(self, workload: Workload, peers: Sequence[Peer], sweeps: int, warm_up: int) -> dict[str, Measured]:
        """Time the rounds of all peers in turn; peers that are missing get an error."""
        self.watch(f"{workload.name}: {workload.shape}")
        found = {
            peer.name: Measured(peer.name, error=f"not installed: {self.absent[peer.environment.name]}")
            for peer in peers
            if peer.environment and peer.environment.name in self.absent
        }
        runners = [self.runner(peer, warm_up + sweeps, [workload.name]) for peer in self.present(peers)]
        return found | (measure(runners, sweeps=sweeps, warm_up=warm_up, watch=self.watch) if sweeps else {})

    def checked(self, workload: Workload, peers: Sequence[Peer]) -> dict[str, float | str]:
        """Return whether peers get the same model (`benchmarks.peers.check`)."""
        asked = check.asked(workload)

        def naive(name: str, further: Sequence[str]) -> Runner:
            return self.runner(Peer(name, PEERS["naive"].command), check.ROUNDS, [*asked, *further])

        others = [peer for peer in self.present(peers) if peer.name != NAIVE]
        runners = [self.runner(peer, check.ROUNDS, asked) for peer in others]
        ours = [peer.name for peer in others if peer.name.startswith(OURS)]
        return check.same_model(workload, naive, runners, ours, self.watch)


def install(peers: Sequence[Peer], folder: Path, cores: int, watch: Callable[[str], None]) -> Bench:
    """Make the environments that these peers need."""
    pythons, absent, shown = dict[str, str](), dict[str, str](), list[str]()
    for environment in dict.fromkeys(peer.environment for peer in peers if peer.environment):
        try:
            python = prepare(environment, folder, watch)
        except EnvironmentAbsent as error:
            watch(f"{environment.name}: {error}")
            absent[environment.name] = f"{error}"
            continue
        pythons[environment.name] = str(python)
        shown += versions(environment, python)
    return Bench(cores, pythons, absent, [TORCH.replace("==", " "), *shown], watch)


def row(
    workload: Workload, one: Measured, found: Mapping[str, Measured], same: float | str | None, peak: float
) -> list[str]:
    """Return a row of the table. same: the result of the check. peak: GFLOP/s of one core."""
    wall, cpu, rss = one.median("wall"), one.median("cpu"), one.median("rss")
    checked = "reference" if one.name == NAIVE else check.shown(same)
    if wall is None or cpu is None:
        return [workload.name, one.name, "", reason(one.error or "not timed"), *[""] * 5, checked]
    gflop = workload.flops / cpu / 1e9
    share = gflop / peak
    return [
        workload.name,
        one.name,
        f"{cpu / wall:.1f}",
        three_digits(wall),
        times(times_faster(one, found[NAIVE])),
        times(times_faster(found[OURS], one)) if OURS in found and one.name != OURS else "",
        three_digits(gflop),
        f"{share:.0%}" if share >= 0.1 else f"{share:.1%}",
        megabytes(rss),
        checked,
    ]


def main() -> None:
    """Install, measure and print; with --write also write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=list(PEERS),
        help=f"of {', '.join(PEERS)}; the naive loop is always there",
        metavar="PEER",
    )
    parser.add_argument("--sweeps", type=int, default=9, help="timed rounds of each (default 9)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them (default 2)")
    parser.add_argument("--check", action="store_true", help="compare final models in float64")
    parser.add_argument("--cores", type=int, help="keep everything to so many cores (default: all)")
    parser.add_argument("--environments", type=Path, default=KEPT, help="the peers' Pythons (default: in ~/.cache)")
    parser.add_argument("--raw", type=Path, help="a file for the figures of every round, JSON")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    args = parser.parse_args()
    cores = keep_to(args.cores)
    wanted = {"naive", *args.peers}
    peers = [dataclasses.replace(p, name=p.name.format(cores=cores)) for key, p in PEERS.items() if key in wanted]
    bench = install(peers, args.environments, cores, lambda line: print(line, file=sys.stderr, flush=True))
    workloads = [WORKLOADS[name] for name in args.workloads]
    before = bound.in_a_process()
    measured = {one.name: bench.timed(one, peers, args.sweeps, args.warm_up) for one in workloads}
    peak = max(*before.values(), *bound.in_a_process().values())
    same = {one.name: bench.checked(one, peers) if args.check else {} for one in workloads}
    if args.raw:
        save_rounds(args.raw, measured)
    table = [
        row(
            one,
            measured[one.name].get(peer.name, Measured(peer.name)),
            measured[one.name],
            same[one.name].get(peer.name),
            peak,
        )
        for one in workloads
        for peer in peers
    ]
    caption = (
        f"`python -m benchmarks.peers`: one round of each variant in turn, {args.sweeps} sweeps in random order, medians; a "
        f"ratio is the median of the sweeps' ratios. {cores} cores; those in use are CPU over wall seconds. The bound: "
        f"{peak:.0f} GFLOP/s a core, the fastest product in single precision, measured before and after. Same model: distance "
        f"from the naive loop's in float64 over how far that moved, {check.ROUNDS} rounds of {check.CLIENTS} clients; sumus "
        f"sums fixed-point integers, and pfl's updates are float32. {', '.join(bench.versions)}."
    )
    write_table("peers", caption, HEADER, table, args.write)
    panels = {name: over(found, NAIVE) for name, found in measured.items()}
    if args.write and all(panels.values()):
        ours = [peer.name for peer in peers if peer.name.startswith(OURS)]
        bars(DOCS / "peers.png", panels, "seconds a round / naive loop", ours)


if __name__ == "__main__":
    main()
