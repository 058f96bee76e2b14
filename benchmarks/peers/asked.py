"""What every runner must do: which workload, how much of it, and in which precision. All environments import this
module."""

import argparse

from benchmarks.workloads import Workload, named


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a runner's command line; a runner may add options."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("workload", help="w1, w2, w3, or a variant such as w1/7")
    made.add_argument("--clients", type=int, help="only the first so many")
    made.add_argument("--double", action="store_true", help="in float64")
    return made


def workload_of(args: argparse.Namespace) -> Workload:
    """Return the workload that the arguments name."""
    workload = named(args.workload)
    return workload.only(args.clients) if args.clients else workload
