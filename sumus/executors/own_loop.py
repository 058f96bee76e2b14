"""The executor for clients that the user's own code trains, and measurements by the user's own code.

    OwnLoopExecutor(program, work).run(broadcast, number, assignments)       used like every executor
    measured_by(program, loop, client, inputs, targets)                      (sum, count) by metric

The user's code gets copies, and everything that it returns is checked here. So an error names the client, and no value of a
failed client reaches another client.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sumus.errors import DivergedError, SumusError, TaskError, at_client, said
from sumus.executors.client import LocalTraining, RoundTensors
from sumus.executors.executor import ClientAssignment, Trained
from sumus.figures import is_slot
from sumus.own_loop import ClientRound, OwnFunction, OwnLoop, parameters_of
from sumus.training.hidden import generators_seeded
from sumus.training.program import Program, seeded
from sumus.types import Broadcast
from sumus.work import ClientWork, LocalRun

_MEND = 'clip its gradients or lower its learning rate, or leave the client out with Compute(failures="skip")'


class OwnLoopExecutor(LocalTraining):
    """An `Executor` that calls the user's own code for each client, one after the other.

    Args:
        program: The module that holds the leaves.
        work: The work of a client, with a `loop`.

    Raises:
        PlanError: This process has no function with the name that the plan gives.
    """

    needs_sizes = False

    def __init__(self, program: Program, work: ClientWork) -> None:
        super().__init__(program, work)
        assert work.loop is not None, "the work is not the user's own code"
        self._loop = work.loop
        self._function = self._loop.function(self._loop.train, program.task)
        self._names = ("loss", *(name for name in program.description.metrics if not is_slot(name)))
        for name in (self._loop.train, self._loop.evaluate):
            if name is not None:
                program.look_at(name, self._loop.function(name, program.task), restores=True)

    def groups(self, examples: Sequence[int]) -> list[list[int]]:
        """Return each client as a group of its own, in the given order."""
        return [[position] for position in range(len(examples))]

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Train each client from the broadcast; yield each result as soon as it is ready."""
        round_ = self.begin(broadcast, round_number)
        for assignment in assignments:
            with at_client(assignment.client):
                trained = self._trained(round_, round_number, assignment)
            yield trained

    def _trained(self, round_: RoundTensors, number: int, assignment: ClientAssignment) -> Trained:
        """Train one client."""
        program, key = self.program, assignment.key
        program.begin_anew()
        start, own = self.start(round_, assignment)
        program.load(start)
        about = ClientRound(assignment.client, number, int.from_bytes(key[8:12], "little"))
        with _seeded(int.from_bytes(key[:8], "little") >> 1):
            given = _called(self._function, program, assignment.inputs, assignment.targets, about)
        if not isinstance(given, tuple | list) or len(given) != 3:
            raise TaskError(f"`{self._loop.train}` returned {_kind(given)}: it must return (state, count, metrics)")
        state, count, metrics = given
        leaves = self._checked(assignment.client, state)
        count = _count_of(self._loop.train, count)
        means = _means_of(self._loop.train, metrics, self._names)
        program.load(leaves)
        measured = {name: (mean * count, count) for name, mean in means.items()}
        if "loss" not in measured:
            measured["loss"] = program.evaluate(assignment.inputs, assignment.targets)["loss"]
        for name, (total, _) in measured.items():
            if not np.isfinite(total):
                raise DivergedError(assignment.client, "metrics", name, _MEND)
        now = {name: tensor.detach() for name, tensor in program.tensors.items()}
        done = LocalRun(1, 0.0, count)
        trained = self.ended(round_, assignment, own, now, done, measured["loss"])
        return replace(trained, metrics=measured)

    def _checked(self, client: Any, state: Any) -> dict[str, Tensor]:
        """Check a returned state dict. Return its leaves that training may change, in the dtypes in which they are summed."""
        program, name_of = self.program, f"`{self._loop.train}`"
        if not isinstance(state, Mapping):
            raise TaskError(
                f"{name_of} returned {_kind(state)} as its state: it must return a state dict, such as net.state_dict()"
            )
        given = {str(name): value for name, value in state.items()}
        known = {own: leaf for leaf in program.leaves.values() for own in (leaf.name, *leaf.aliases)}
        wanted = {own for own, leaf in known.items() if leaf.role != "frozen"}
        missing, extra = sorted(wanted - given.keys()), sorted(given.keys() - known.keys())
        if missing or extra:
            lacks = f" lacks {', '.join(map('`{}`'.format, missing))}" if missing else ""
            more = f" has {', '.join(map('`{}`'.format, extra))}, which the model does not have" if extra else ""
            raise TaskError(
                f"the state that {name_of} returned{lacks}{' and' if lacks and more else ''}{more}: return a state dict with "
                "exactly the names of the state dict that was passed in"
            )
        leaves: dict[str, Tensor] = {}
        for own, leaf in known.items():
            if own not in given:
                continue
            tensor = self._as_leaf(client, own, leaf.shape, given[own])
            kept = program.tensors[leaf.name].detach()
            if leaf.role == "frozen":
                if leaf.name in dict(program.module.named_parameters()) and not torch.equal(tensor.to(kept), kept):
                    raise TaskError(
                        f"{name_of} changed `{own}`, but this leaf is frozen in the plan and never sent: leave it "
                        'unchanged, for example by requires_grad_(False), or make it "shared" in leaves= of the task'
                    )
                continue
            if leaf.name in leaves and not torch.equal(leaves[leaf.name], program.widen(leaf.name, tensor.to(kept))):
                raise TaskError(
                    f"{name_of} returned different numbers for `{own}` and `{leaf.name}`, but in the model both are names "
                    "of one tensor: return the state dict of a model that ties them too"
                )
            leaves[leaf.name] = program.widen(leaf.name, tensor.to(kept))
            if not bool(torch.isfinite(leaves[leaf.name]).all()):
                raise DivergedError(client, "params", own, _MEND)
        return leaves

    def _as_leaf(self, client: Any, name: str, shape: tuple[int, ...], value: Any) -> Tensor:
        try:
            tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        except Exception as error:
            raise TaskError(
                f"`{self._loop.train}` returned {_kind(value)} for the leaf `{name}`: return a tensor or an array of numbers"
            ) from error
        if tensor.is_complex() or tuple(tensor.shape) != tuple(shape):
            dtype = str(tensor.dtype).rpartition(".")[2]
            raise TaskError(
                f"`{self._loop.train}` returned {dtype} of shape {tuple(tensor.shape)} for the leaf `{name}`, whose shape is "
                f"{tuple(shape)}: return real numbers in this shape, as in the state dict that was passed in"
            )
        return tensor


def measured_by(
    program: Program, loop: OwnLoop, client: Any, inputs: Tensor, targets: Tensor
) -> dict[str, tuple[float, int]]:
    """Measure the module with its present leaves, by the user's own code.

    Args:
        program: The module, with its leaves loaded.
        loop: The user's functions; one of them evaluates.
        client: The client's id.
        inputs: One row for each example.
        targets: One row for each example.

    Returns:
        (sum, count) of the loss and of each metric of the task.

    Raises:
        TaskError: The code failed, or returned something other than (count, metrics).
    """
    name = loop.evaluate
    assert name is not None, "the work measures by the task's metrics"
    function = loop.function(name, program.task)
    program.begin_anew()
    with _seeded(0):  # independent of earlier measurements
        given = _called(function, program, inputs, targets, ClientRound(client, None, 0))
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TaskError(f"`{name}` returned {_kind(given)}: it must return (count, metrics)")
    count = _count_of(name, given[0])
    wanted = ("loss", *program.description.metrics)
    means = _means_of(name, given[1], wanted)
    if missing := [metric for metric in wanted if metric not in means]:
        raise TaskError(
            f"`{name}` returned no {missing[0]!r}, but the task measures {', '.join(wanted)}: return the mean of each, or "
            "leave the metric out of the task"
        )
    return {metric: (mean * count, count) for metric, mean in means.items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's generators, and restore them after the block."""
    with seeded(seed), generators_seeded(seed):
        yield


def _called(function: OwnFunction, program: Program, inputs: Tensor, targets: Tensor, about: ClientRound) -> Any:
    """Call the user's code with copies of the module's state dict and of the examples.

    Raises:
        TaskError: The code failed, or tried to end the program.
    """
    state = {name: tensor.detach().clone() for name, tensor in program.module.state_dict().items()}
    words = (state, (inputs.clone(), targets.clone()), about)
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return function(*words[: parameters_of(function)])
    except SumusError:
        raise
    except (Exception, SystemExit) as error:
        ended = "ended the program" if isinstance(error, SystemExit) else "failed"
        raise TaskError(
            f"`{name}` {ended}: {said(error)}; call it on this client's examples alone to see where, or leave the client out "
            'with Compute(failures="skip")'
        ) from error


def _count_of(name: str, count: Any) -> int:
    """Return the number of examples that the user's code returned, after a check."""
    try:
        whole = operator.index(count)
    except TypeError:
        whole = 0
    if whole < 1 or isinstance(count, bool):
        raise TaskError(
            f"`{name}` returned {count!r:.80} as the number of examples that it used: return a whole number of at least 1, "
            "such as len(targets)"
        )
    return whole


def _means_of(name: str, metrics: Any, known: Sequence[str]) -> dict[str, float]:
    """Return the means that the user's code returned, by metric, after a check."""
    if not isinstance(metrics, Mapping):
        raise TaskError(
            f'`{name}` returned {_kind(metrics)} as its metrics: return means by name, such as {{"loss": 0.3}}'
        )
    if extra := [metric for metric in metrics if metric not in known]:
        raise TaskError(
            f"`{name}` returned a metric {extra[0]!r}, but the task measures only {', '.join(known)}: leave the metric "
            "out, or add it to metrics= of the task"
        )
    means: dict[str, float] = {}
    for metric, mean in metrics.items():
        try:
            means[metric] = float(mean.detach() if isinstance(mean, Tensor) else mean)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(f"`{name}` returned {_kind(mean)} as the mean of {metric!r}: return a number") from error
    return means


def _kind(value: Any) -> str:
    """Describe a wrong value, for errors."""
    many = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{many}" if value is not None else "nothing"
