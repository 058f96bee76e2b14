"""Runs independent runs in parallel, one process for each core."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

R = TypeVar("R")
C = TypeVar("C")


def played(play: Callable[[R], C], runs: Sequence[R], said: Callable[[C], object]) -> Iterator[tuple[R, C]]:
    """Yield each run with its result, in order. said: makes what is printed about a result."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        for number, (run, found) in enumerate(zip(runs, pool.map(play, runs), strict=True), 1):
            print(f"{number} of {len(runs)}: {run}: {said(found)}", flush=True)
            yield run, found
