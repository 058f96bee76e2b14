"""Which executor trains the clients: measured on the real model and population, remembered, and said with its reason.

    choice, reason = choose(program, work, clients, broadcast, steps, recall)
    executor = choice.executor(program, work)

None wins everywhere: stacking clients pays where dispatch dominates, and loses where arithmetic does. What is chosen here
changes rounding, so it is kept in the checkpoint; over how many processes the clients are dealt changes nothing.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sumus.errors import ExperimentError, SumusError
from sumus.simulator.recall import Recall, where_of
from sumus.training.cost import step_flops
from sumus.training.executor import Assignment, Executor, Trained
from sumus.training.program import Program
from sumus.training.sequential import SequentialExecutor
from sumus.training.vectorized import VectorizedExecutor
from sumus.types import Broadcast
from sumus.work import ClientWork

KINDS = ("autograd", "sequential", "sequential+onednn", "vectorized")
SHORT = 6.0
"""Seconds of estimated training below which nothing is probed: autograd it is."""
BUDGET, SHARE = 2.5, 0.04
"""A probe takes at most so many seconds, or that share of the estimated run, whichever is more."""
BUSY = 2.5e10
"""Floating-point operations a second from which a CPU's core has no dispatch left to save by stacking."""
STACK_BYTES = 2**28
"""The most that the parameters of a stack may take."""
START = 5.0
"""Seconds that more processes must save: they take about two to start."""
MOST_PROCESSES = 16
"""Each takes some 300 MB."""
STACKS = {"cpu": (4, 16, 32), "cuda": (32, 128, 512)}
_STEPS, _REPEATS = 4, 3
_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
_COARSE = 0.05


@dataclass(frozen=True)
class Choice:
    """An executor by name: what a checkpoint holds and `--executor` takes.

    kind: "autograd": one client after the other, by torch as it is; "sequential": the same with the step captured as a graph,
    "sequential+onednn" with its dense layers by oneDNN; "vectorized": `stack` clients at once.
    """

    kind: str
    stack: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.stack < 1 or self.stack & (self.stack - 1):
            raise ExperimentError(
                f"executor {self} is not known: auto, {', '.join(KINDS)} or vectorized:K, where K is a power of two"
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.stack}" if self.kind == "vectorized" else self.kind

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """From its name."""
        kind, _, stack = text.partition(":")
        if stack and not (kind == "vectorized" and stack.isdecimal()):
            raise ExperimentError(f"executor {text!r} is not known: auto, {', '.join(KINDS)} or vectorized:K")
        return cls(kind, int(stack) if stack else 16 if kind == "vectorized" else 1)

    def executor(self, program: Program, work: ClientWork) -> Executor:
        """One, on a program."""
        if self.kind == "vectorized":
            return VectorizedExecutor(program, work, self.stack)
        return SequentialExecutor(
            program, work, captured=self.kind != "autograd", onednn=self.kind == "sequential+onednn"
        )


AUTOGRAD, SEQUENTIAL = Choice("autograd"), Choice("sequential")


@dataclass(frozen=True)
class Chosen:
    """A choice, and why in one line.  seconds: what a local step of one client took, where it was measured."""

    choice: Choice
    reason: str
    seconds: float | None = None


@dataclass(frozen=True)
class RunLength:
    """How much a run has to do. steps: local ones, of all clients.  flops: of one.

    seconds: what they may take one after the other, from their arithmetic alone, so that it is the same in every run: 0.3 ms
    a step, and 50 GFLOP/s.
    """

    steps: int
    flops: float

    @classmethod
    def of(cls, program: Program, work: ClientWork, first: Assignment, *, clients: int) -> "RunLength":
        """For so many times a client, all like this one."""
        rows = min(work.batch_size or len(first.inputs), len(first.inputs))
        steps = clients * work.step_count(len(first.inputs))
        return cls(steps, rows * step_flops(program, first.inputs, first.targets))

    @property
    def seconds(self) -> float:
        return self.steps * (3e-4 + self.flops / 5e10)

    def seconds_with(self, chosen: Chosen) -> float:
        """The same as it was measured, where it was."""
        return self.seconds if chosen.seconds is None else self.steps * chosen.seconds


def choose(
    program: Program,
    work: ClientWork,
    clients: Callable[[int], list[Assignment]],
    broadcast: Broadcast,
    run: RunLength,
    recall: Recall,
) -> Chosen:
    """The fastest executor for a run, tried on some of its clients.

    clients: gives up to so many, whose training here has no effect.  recall: what was found before on this machine.
    """
    if run.seconds < SHORT:
        return Chosen(AUTOGRAD, "the run is too short to probe")
    where = where_of(program, work, *clients(1))
    if (known := recall.get(where)) is not None:
        return Chosen(
            Choice.parse(known["choice"]), f"{known['reason']}; probed before on this machine", known["seconds"]
        )
    several = clients(STACKS[program.device.type][-1])
    chosen = _Probe(program, work, several, broadcast, max(BUDGET, SHARE * run.seconds)).run(run.flops)
    recall.put(where, {"choice": str(chosen.choice), "reason": chosen.reason, "seconds": chosen.seconds})
    return chosen


def checked(
    choice: Choice, program: Program, work: ClientWork, clients: Sequence[Assignment], broadcast: Broadcast
) -> Chosen:
    """A choice that was asked for; where the model cannot be trained so, the next that it can, with the reason."""
    probe = _Probe(program, work, clients, broadcast, 0.0)
    if (refused := probe.refused(choice)) is None:
        return Chosen(choice, "as asked for")
    instead = next(other for other in (SEQUENTIAL, AUTOGRAD) if other != choice and probe.refused(other) is None)
    return Chosen(instead, f"not {choice}: {refused}")


def processes(seconds: float, clients: int, device: str) -> int:
    """How many to deal so many clients to: as many as there are cores, where that saves more than starting them takes.

    seconds: that one process would train.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, clients, MOST_PROCESSES)
    return count if device == "cpu" and seconds * (1 - 1 / count) > START else 1


class _Probe:
    """Tries executors on clients' first steps, until the budget is spent. Every one is compared with autograd first."""

    def __init__(
        self,
        program: Program,
        work: ClientWork,
        clients: Sequence[Assignment],
        broadcast: Broadcast,
        budget: float,
    ) -> None:
        self._program, self._work, self._broadcast = program, work, broadcast
        self._clients = [_first_steps(client) for client in clients]
        self._until = time.perf_counter() + budget
        self._samples = [*self._clients[:3], _shortened(self._clients[0])]
        self._by_autograd: dict[Any, Trained] = {}
        self._executors: dict[Choice, Executor] = {}

    def run(self, flops: float) -> Chosen:
        """The fastest. flops: of a step, to tell whether arithmetic is what it takes."""
        took: dict[Choice, float] = {AUTOGRAD: self._time(AUTOGRAD)}
        reasons: list[str] = []
        for kind in ("sequential", "sequential+onednn") if self._on_cpu() else ("sequential",):
            if not self._try(Choice(kind), took, reasons):
                break
        for stack in STACKS[self._program.device.type]:
            if self._on_cpu() and flops / min(took.values()) > BUSY:
                if stack == STACKS["cpu"][0]:
                    reasons.append("not vectorized: a step is arithmetic already")
                break
            if stack > len(self._clients) or stack * self._bytes() > STACK_BYTES:
                break
            choice = Choice("vectorized", stack)
            if not self._try(choice, took, reasons) or took[choice] > min(took.values()):
                break
        best = min(took, key=lambda choice: took[choice])
        ratios = ", ".join(f"{choice} {took[AUTOGRAD] / seconds:.2f}" for choice, seconds in took.items())
        return Chosen(best, "; ".join([f"speed in units of autograd's: {ratios}", *dict.fromkeys(reasons)]), took[best])

    def refused(self, choice: Choice) -> str | None:
        """Why the model cannot be trained so: it cannot be captured, or the result is not autograd's."""
        if choice == AUTOGRAD:
            return None
        wanted, executor = self._autograd(), self._executor(choice)
        try:
            found = list(executor.run(self._broadcast, 0, [one for one in self._samples if one.client in wanted]))
        except Exception as error:  # of whatever kind: autograd has trained these clients, so it is not theirs
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        if refused := getattr(executor, "refused", None):
            return cast(str, refused)
        tolerance = max(_TOLERANCE.get(leaf.dtype, _COARSE) for leaf in self._program.leaves.values() if leaf.trained)
        if all(_distance(one, wanted[one.client]) <= tolerance for one in found):
            return None
        if choice.kind == "vectorized":
            return "its examples act on each other within a batch (batch statistics?), and short batches are padded"
        return "its captured step is not autograd's: something in it depends on values, or on earlier steps"

    def _try(self, choice: Choice, took: dict[Choice, float], reasons: list[str]) -> bool:
        """Measure it, if there is time left and the model can be trained so."""
        if time.perf_counter() > self._until:
            reasons.append("the rest was not tried for lack of time")
            return False
        if refused := self.refused(choice):
            reasons.append(f"not {choice.kind}: {refused}")
            return choice.kind == "sequential"
        took[choice] = self._time(choice)
        return True

    def _time(self, choice: Choice) -> float:
        """Seconds a local step of one client: the least of a few runs."""
        group = self._clients[: max(2, choice.stack)]
        steps = sum(_steps(self._work, client) for client in group)
        self._once(choice, group)  # captures, and fills caches
        took = [self._once(choice, group)]
        while len(took) < _REPEATS and time.perf_counter() < self._until:
            took.append(self._once(choice, group))
        return min(took) / steps

    def _once(self, choice: Choice, group: Sequence[Assignment]) -> float:
        began = time.perf_counter()
        for _ in self._executor(choice).run(self._broadcast, 0, group):
            pass
        return time.perf_counter() - began

    def _autograd(self) -> Mapping[Any, Trained]:
        """What autograd makes of the samples, of those that it can train: the run itself will say what is wrong with others."""
        if not self._by_autograd:
            for sample in self._samples:
                with suppress(SumusError):
                    self._by_autograd |= {
                        one.client: one for one in self._executor(AUTOGRAD).run(self._broadcast, 0, [sample])
                    }
        return self._by_autograd

    def _executor(self, choice: Choice) -> Executor:
        if choice not in self._executors:
            self._executors[choice] = choice.executor(self._program, self._work)
        return self._executors[choice]

    def _bytes(self) -> int:
        return sum(tensor.nelement() * tensor.element_size() for tensor in self._program.trained.values())

    def _on_cpu(self) -> bool:
        return self._program.device.type == "cpu"


def _first_steps(client: Assignment) -> Assignment:
    """A client that has time for a few steps."""
    return replace(client, most_steps=min(client.most_steps or _STEPS, _STEPS))


def _shortened(client: Assignment) -> Assignment:
    """The same client with half as many examples under another name: beside it in a stack, its batches are padded."""
    half = -(-len(client.inputs) // 2)
    return replace(client, client=("half", client.client), inputs=client.inputs[:half], targets=client.targets[:half])


def _steps(work: ClientWork, client: Assignment) -> int:
    return min(work.step_count(len(client.inputs)), client.most_steps or _STEPS)


def _distance(found: Trained, wanted: Trained) -> float:
    """How far an update is from another, over its length."""
    leaves = [(found.parts[part][name], leaf) for part, tree in wanted.parts.items() for name, leaf in tree.items()]
    apart = sum(float(np.sum((mine.astype(np.float64) - leaf) ** 2)) for mine, leaf in leaves)
    length = sum(float(np.sum(leaf.astype(np.float64) ** 2)) for _, leaf in leaves)
    return math.sqrt(apart / length if length else apart)
