"""Fuzz the parsers of input from outside: files, messages and bodies that other programs or people made.

    python -m benchmarks.fuzz                         every target for ten minutes, one after another, with atheris
    python -m benchmarks.fuzz links npz --minutes 1   these targets for a minute each
    python -m benchmarks.fuzz --branches              the share of each parser's branches that its kept corpus reaches
    python -m benchmarks.fuzz links --keep            keep the shortest inputs of the last campaigns that reach new branches

A campaign ends with a table, and with exit status 1 if an input failed. The table gives the file of that input. Repair
the parser, and copy the input to `tests/fuzz/corpora/TARGET/` under a name that says what is wrong with it.
"""

import argparse

from benchmarks.fuzz import campaign
from benchmarks.fuzz.reached import reached_by, smallest
from benchmarks.fuzz.target import CORPORA, Target
from benchmarks.fuzz.targets import NAMES, load

MOST_KEPT = 4096
"""Bytes of the longest input that is kept."""


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"all if none is named: {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of atheris' randomness (default 1)")
    parser.add_argument("--branches", action="store_true", help="show what the kept corpora reach, and fuzz nothing")
    parser.add_argument("--keep", action="store_true", help="add to the kept corpora, and fuzz nothing")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(NAMES):
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    names = args.targets or NAMES
    if args.branches:
        for name in names:
            _show_branches(load(name))
    elif args.keep:
        for name in names:
            _keep(load(name))
    else:
        _fuzz(names, round(60 * args.minutes), args.seed)


def _fuzz(names: tuple[str, ...], seconds: int, seed: int) -> None:
    print(f"{'target':12}{'minutes':>8}{'executions':>14}{'a second':>10}{'inputs':>8}  finding", flush=True)
    failed = False
    for name in names:
        outcome = campaign.run(name, seconds, seed)
        failed = failed or outcome.finding is not None
        rate = outcome.executions / outcome.seconds if outcome.seconds else 0.0
        line = f"{name:12}{outcome.seconds / 60:8.1f}{outcome.executions:14,}{rate:10,.0f}{outcome.found:8}"
        print(f"{line}  {outcome.finding or 'none'}", flush=True)
        if outcome.finding is not None:
            print(outcome.said, flush=True)
    if failed:
        raise SystemExit(1)


def _show_branches(target: Target) -> None:
    found = reached_by(target, target.corpus().values())
    print(f"{target.name:12}{len(found.reached):5} of {len(found.every):4} branches, {found.share:.1%}")
    for module, line, then in found.missing:
        print(f"    {module}: from line {line} to {'the end' if then < 0 else f'line {then}'}")


def _keep(target: Target) -> None:
    folder = campaign.FOLDER / target.name / "found"
    found = {path.name[:12]: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    short = {name: data for name, data in found.items() if len(data) <= MOST_KEPT}
    chosen = smallest(target, short, target.corpus().values())
    for name in chosen:
        (CORPORA / target.name).mkdir(parents=True, exist_ok=True)
        (CORPORA / target.name / name).write_bytes(short[name])
    print(f"{target.name:12}{len(chosen)} of {len(found)} inputs reach something new, and are kept")


if __name__ == "__main__":
    main()
