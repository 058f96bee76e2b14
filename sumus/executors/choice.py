"""Choose the executor that trains the clients, by measuring executors on the real model and population.

The measurement is called a probe. The choice is stored for later runs, and reported with its reason.

    chosen = choose(program, work, clients, broadcast, run, recall)      an `ExecutorChoice`, and the reason
    executor = chosen.choice.executor(program, work)

No executor is the fastest for every model. Training a stack of clients together saves time if torch's dispatch of operators
takes most of the time, but it is slower if arithmetic takes most of the time. Executors round differently, so a checkpoint
stores the choice. The number of processes does not change the result.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sumus.errors import ExperimentError, SumusError
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.own_loop import OwnLoopExecutor
from sumus.executors.recall import Recall, where_of
from sumus.executors.sequential import SequentialExecutor
from sumus.executors.vectorized import VectorizedExecutor
from sumus.logs import logger
from sumus.training.cost import cost_of, step_flops
from sumus.training.graph import leaving_no_trace
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.types import Broadcast, Tree
from sumus.work import ClientWork

LOG = logger("sumus.executors")
KINDS = ("autograd", "sequential", "sequential+onednn", "vectorized")
SHORT = 6.0
"""Seconds of estimated training. For a shorter run, nothing is probed, and autograd is chosen."""
BUDGET, SHARE = 2.5, 0.04
"""The budget of a probe in seconds: this number of seconds, or this share of the estimated run, whichever is more."""
BUSY = 2.5e10
"""Floating-point operations per second. A core that reaches this rate loses no time to dispatch, so stacking saves none."""
STACK_BYTES = 2**28
"""The most memory, in bytes, that a step of a stack may take."""
START = 5.0
"""The number of seconds that several processes must save. Starting the processes takes about two seconds."""
MOST_PROCESSES = 16
"""The largest number of processes. Each of them takes about 300 MB."""
STACKS = {"cpu": (4, 16, 32), "cuda": (32, 128, 512)}
_STEPS, _REPEATS, _ENOUGH = 4, 3, 0.1
_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
_COARSE = 0.05
_SMALL = 1e-2
"""When two results are compared, the norm of each leaf's update counts as at least this share of the whole update's norm."""


@dataclass(frozen=True)
class ExecutorChoice:
    """An executor, in the form in which a checkpoint stores it and the option `--executor` names it.

    Attributes:
        kind: "autograd" trains one client after the other, by plain torch. "sequential" does the same with the step captured
            as a graph, and "sequential+onednn" computes that graph's dense layers with oneDNN. "vectorized" trains `stack`
            clients at once.
        stack: The number of clients that train at once.
    """

    kind: str
    stack: int = 1

    def __str__(self) -> str:
        return f"{self.kind}:{self.stack}" if self.kind == "vectorized" else self.kind

    @classmethod
    def parse(cls, text: object) -> "ExecutorChoice":
        """Parse a name. "vectorized" alone means stacks of 16."""
        if isinstance(text, str) and text in KINDS:
            return cls(text, 16 if text == "vectorized" else 1)
        if isinstance(text, str) and (stack := re.fullmatch(r"vectorized:([1-9][0-9]{0,5})", text)):
            count = int(stack[1])
            if count & (count - 1) == 0:
                return cls("vectorized", count)
        raise ExperimentError(
            f"executor {text!r} is not known: give auto, {', '.join(KINDS)}, or vectorized:K, where K is a power of two"
        )

    def executor(self, program: Program, work: ClientWork) -> Executor:
        """Create the executor for a program. If the user's own code trains the clients, the choice has no effect."""
        if work.loop is not None:
            return OwnLoopExecutor(program, work)
        if self.kind == "vectorized":
            return VectorizedExecutor(program, work, self.stack)
        return SequentialExecutor(
            program, work, captured=self.kind != "autograd", onednn=self.kind == "sequential+onednn"
        )


OWN_CODE = "the user's own code trains the clients"
"""The reason for the plain executor if the user's own code trains."""
AUTOGRAD, SEQUENTIAL = ExecutorChoice("autograd"), ExecutorChoice("sequential")


@dataclass(frozen=True)
class ExecutorChosen:
    """A choice and its reason.

    Attributes:
        choice: The choice.
        reason: The reason, in one line.
        seconds: The time of a local step of one client; None if it was not measured.
    """

    choice: ExecutorChoice
    reason: str
    seconds: float | None = None


@dataclass(frozen=True)
class RunLength:
    """The amount of work of a run.

    Attributes:
        steps: The number of local steps of all clients.
        flops: The floating-point operations of one step.
    """

    steps: int
    flops: float

    @classmethod
    def of(cls, program: Program, work: ClientWork, first: ClientAssignment, *, clients: int) -> "RunLength":
        """Estimate the length of a run of `clients` clients, as if all of them were like the first."""
        rows = min(work.batch_size or len(first.inputs), len(first.inputs))
        steps = clients * work.step_count(len(first.inputs))
        return cls(steps, rows * step_flops(program, first.inputs, first.targets))

    @property
    def seconds(self) -> float:
        """The estimated time of the steps, one after the other, at 0.3 ms a step and 50 GFLOP/s. It depends on the arithmetic
        alone, so it is the same in every run.
        """
        return self.steps * (3e-4 + self.flops / 5e10)

    def seconds_with(self, chosen: ExecutorChosen) -> float:
        """Return the time of the steps. It is computed from the measured time of a step, or estimated if none was measured."""
        return self.seconds if chosen.seconds is None else self.steps * chosen.seconds


def choose(
    program: Program,
    work: ClientWork,
    clients: Callable[[int], list[ClientAssignment]],
    broadcast: Broadcast,
    run: RunLength,
    recall: Recall,
) -> ExecutorChosen:
    """Find the fastest executor for a run by trying executors on some of its clients.

    Args:
        program: The program that trains.
        work: The work of a client.
        clients: Function that returns at most the given number of clients. The probe trains them, and drops the results.
        broadcast: The broadcast that clients begin with.
        run: The length of the run.
        recall: Earlier choices on this machine.
    """
    if work.loop is not None:
        return ExecutorChosen(AUTOGRAD, OWN_CODE)
    if run.seconds < SHORT:
        return ExecutorChosen(AUTOGRAD, "the run is too short to probe")
    where = where_of(program, work, *clients(1))
    several = clients(STACKS[program.device.type][-1])
    probe = _Probe(program, work, several, broadcast, max(BUDGET, SHARE * run.seconds))
    with suppress(ExperimentError):  # the stored choice may come from another version
        if (known := recall.get(where)) is not None and probe.refused(
            choice := ExecutorChoice.parse(known["choice"])
        ) is None:
            return ExecutorChosen(choice, f"{known['reason']}; probed before on this machine", known["seconds"])
    chosen = probe.run(run.flops)
    if not probe.hurried:
        recall.put(where, {"choice": str(chosen.choice), "reason": chosen.reason, "seconds": chosen.seconds})
    return chosen


def checked(
    choice: ExecutorChoice,
    program: Program,
    work: ClientWork,
    clients: Sequence[ClientAssignment],
    broadcast: Broadcast,
) -> ExecutorChosen:
    """Return the requested executor. If it cannot train the model, return another one, with the reason."""
    if work.loop is not None:
        return ExecutorChosen(AUTOGRAD, f"not {choice}: {OWN_CODE}")
    probe = _Probe(program, work, clients, broadcast, 0.0)
    if (refused := probe.refused(choice)) is None:
        return ExecutorChosen(choice, "as requested")
    instead = next(other for other in (SEQUENTIAL, AUTOGRAD) if other != choice and probe.refused(other) is None)
    return ExecutorChosen(instead, f"not {choice}: {refused}")


def processes(seconds: float, clients: int, device: str) -> int:
    """Return the number of processes to train in: one per core, if that saves more time than starting them takes.

    Args:
        seconds: The time that one process would need.
        clients: The number of clients.
        device: The device on which torch computes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, clients, MOST_PROCESSES)
    return count if device == "cpu" and seconds * (1 - 1 / count) > START else 1


class _Probe:
    """Tries executors on the clients' first steps until the budget is spent. Each executor is compared with autograd first."""

    def __init__(
        self,
        program: Program,
        work: ClientWork,
        clients: Sequence[ClientAssignment],
        broadcast: Broadcast,
        budget: float,
    ) -> None:
        self._program, self._work, self._broadcast = program, work, broadcast
        self._clients = [_first_steps(client) for client in clients]
        self._until = time.perf_counter() + budget
        self.hurried = False
        self._samples = [*self._clients[:3], _shortened(self._clients[0], work.batch_size)]
        self._by_autograd: dict[Any, Trained] = {}
        self._executors: dict[ExecutorChoice, Executor] = {}

    def run(self, flops: float) -> ExecutorChosen:
        """Find the fastest executor.

        Args:
            flops: The floating-point operations of one step. They show whether a step is mostly arithmetic.
        """
        took: dict[ExecutorChoice, float] = {AUTOGRAD: self._time(AUTOGRAD)}
        reasons: list[str] = []
        for kind in ("sequential", "sequential+onednn") if self._on_cpu() else ("sequential",):
            if not self._try(ExecutorChoice(kind), took, reasons):
                break
        largest = max(self._clients, key=lambda client: len(client.inputs))
        each = cost_of(self._program, self._work, largest.inputs, largest.targets).total
        stacks = STACKS[self._program.device.type]
        if self._on_cpu() and flops / min(took.values()) > BUSY:
            reasons.append("not vectorized: arithmetic already takes most of a step's time")
            stacks = ()
        for stack in stacks:
            if stack > len(self._clients) or stack * each > STACK_BYTES:
                break
            choice = ExecutorChoice("vectorized", stack)
            if not self._try(choice, took, reasons) or took[choice] > min(took.values()):
                break
        best = min(took, key=lambda choice: took[choice])
        ratios = ", ".join(f"{choice} {took[AUTOGRAD] / took[choice]:.2f}" for choice in took if choice != AUTOGRAD)
        said = [f"times autograd's speed: {ratios}"] if ratios else []
        return ExecutorChosen(best, "; ".join([*said, *dict.fromkeys(reasons)]), took[best])

    def refused(self, choice: ExecutorChoice) -> str | None:
        """Return why this executor cannot train the model: its step cannot be captured, or its result differs."""
        if choice == AUTOGRAD:
            return None
        wanted, executor = self._autograd(), self._executor(choice)
        try:
            found, _ = self._trained(choice, [one for one in self._samples if one.client in wanted])
        except Exception as error:  # of any kind: autograd has trained these clients, so they are not at fault
            LOG.debug("%s cannot train this model", choice, exc_info=error)  # it may be a defect, but costs only speed
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        if refused := getattr(executor, "refused", None):
            return cast(str, refused)
        if not all(math.isfinite(one.metrics["loss"][0]) for one in wanted.values()):
            return "autograd gives NaN or infinity on the first clients, so there is nothing to compare with"
        if all(self._agree(one, wanted[one.client]) for one in found):
            return None
        if not self._repeats():
            return (
                "the same clients give another result when they train again: the code keeps state that sumus does not see "
                "(in an object of an installed package, a cache, a file), or draws numbers that sumus does not seed"
            )
        if choice.kind == "vectorized":
            return (
                "the examples of a batch influence each other (perhaps by batch statistics), so the padding of short "
                "batches would change the result"
            )
        return (
            "its captured step and autograd give different results: something in the step depends on the values of "
            "tensors, or on earlier steps"
        )

    def _repeats(self) -> bool:
        """Return whether autograd gives the same results when the samples are trained again."""
        samples = [sample for sample in self._samples if sample.client in self._autograd()]
        again = [one for sample in samples for one in self._trained(AUTOGRAD, [sample])[0]]
        return all(self._agree(one, self._autograd()[one.client]) for one in again)

    def _agree(self, found: Trained, wanted: Trained) -> bool:
        """Return whether the loss, and every leaf that is sent or kept, equal those of autograd up to rounding."""

        def close(mine: Tree, tree: Tree) -> bool:
            whole = math.sqrt(sum(_square(leaf) for leaf in tree.values()))
            return all(
                math.sqrt(_square(mine[name] - leaf.astype(np.float64)))
                <= self._tolerance(name) * max(math.sqrt(_square(leaf)), _SMALL * whole)
                for name, leaf in tree.items()
            )

        pairs = [(found.parts[part], tree) for part, tree in wanted.parts.items()]
        pairs += [(found.state[name], tree) for name, tree in wanted.state.items()]
        loss, other = found.metrics["loss"][0], wanted.metrics["loss"][0]
        coarsest = max(map(self._tolerance, self._program.trained))
        return all(close(*pair) for pair in pairs) and abs(loss - other) <= coarsest * max(abs(other), _SMALL)

    def _tolerance(self, leaf: str) -> float:
        held = self._program.leaves.get(leaf)
        return _TOLERANCE.get(held.dtype if held else "", _COARSE)

    def _try(self, choice: ExecutorChoice, took: dict[ExecutorChoice, float], reasons: list[str]) -> bool:
        """Measure an executor, if there is time left and it can train the model."""
        if time.perf_counter() > self._until:
            self.hurried = True
            reasons.append("the other executors were not tried, for lack of time")
            return False
        if refused := self.refused(choice):
            reasons.append(f"not {choice.kind}: {refused}")
            return False
        took[choice] = self._time(choice)
        return True

    def _time(self, choice: ExecutorChoice) -> float:
        """Return the time of one client's local step in seconds: the shortest of a few runs. All stacks train the same
        clients.
        """
        group = self._clients if choice.stack > 1 else self._clients[:2]
        steps = sum(min(self._work.step_count(len(one.inputs)), one.most_steps or _STEPS) for one in group)
        self._trained(choice, group)  # the first run captures the step, and fills caches
        took = [self._trained(choice, group)[1]]
        while (len(took) < _REPEATS or sum(took) < _ENOUGH) and time.perf_counter() < self._until:
            took.append(self._trained(choice, group)[1])
        return min(took) / steps

    def _trained(self, choice: ExecutorChoice, clients: Sequence[ClientAssignment]) -> tuple[list[Trained], float]:
        """Train clients, and return the results and the seconds. Then restore counters in modules and random generators."""
        trained, took = list[Trained](), 0.0
        with suppress(NotCapturable), leaving_no_trace(self._program):
            began = time.perf_counter()
            trained += self._executor(choice).run(self._broadcast, 0, clients)
            took = time.perf_counter() - began
        return trained, took

    def _autograd(self) -> Mapping[Any, Trained]:
        """Return the results of autograd, by client, for the sample clients. A client that cannot be trained is left out.

        The run itself reports the error of such a client later.
        """
        if not self._by_autograd:
            for sample in self._samples:
                with suppress(SumusError):
                    self._by_autograd |= {one.client: one for one in self._trained(AUTOGRAD, [sample])[0]}
        return self._by_autograd

    def _executor(self, choice: ExecutorChoice) -> Executor:
        if choice not in self._executors:
            self._executors[choice] = choice.executor(self._program, self._work)
        return self._executors[choice]

    def _on_cpu(self) -> bool:
        return self._program.device.type == "cpu"


def _first_steps(client: ClientAssignment) -> ClientAssignment:
    """Return the same client with time for only a few steps."""
    return replace(client, most_steps=min(client.most_steps or _STEPS, _STEPS))


def _shortened(client: ClientAssignment, batch_size: int | None) -> ClientAssignment:
    """Return the same client with fewer examples and another name, so that one of its first batches is incomplete."""
    count = len(client.inputs)
    rows = -(-count // 2) if batch_size is None or count <= batch_size else batch_size + -(-batch_size // 2)
    return replace(client, client=("short", client.client), inputs=client.inputs[:rows], targets=client.targets[:rows])


def _square(leaf: Any) -> float:
    return float(np.sum(np.square(leaf, dtype=np.float64)))
