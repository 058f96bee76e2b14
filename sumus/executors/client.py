"""The beginning and the end of a client's training in a round, which all executors on one `Program` share."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sumus.aggregate import BUFFERS
from sumus.errors import UsageError, own_code
from sumus.executors.executor import ClientAssignment, Trained
from sumus.schedules import Schedule
from sumus.training.hidden import generators_seeded
from sumus.training.noise import KeyedNoise
from sumus.training.observed import Observed, expect_gradient, gradients_of, observe
from sumus.training.program import Program, seeded
from sumus.types import Array, Broadcast, Tree
from sumus.work import PERSONAL, ClientState, ClientWork, LeafState, LocalRun, Parts


@dataclass(frozen=True)
class RoundTensors:
    """The broadcast of a round, as tensors.

    Attributes:
        lr: The round's learning rate.
        factors: The schedule, which gives the factors of local steps.
        sent: The parts that the server sent, by name, including the params.
        buffers: The shared leaves that have no gradient.
    """

    lr: float
    factors: Schedule
    sent: Parts
    buffers: Mapping[str, Tensor]

    def rate(self, step: int) -> float:
        """Return the learning rate of a local step. Steps count from 1."""
        return self.lr if self.factors.within is None else self.lr * self.factors.factor(step)

    def mean_rate(self, steps: int) -> float:
        """Return the mean learning rate of the first `steps` steps."""
        if self.factors.within is None or not steps:
            return self.lr
        return math.fsum(self.rate(step) for step in range(1, steps + 1)) / steps


class LocalTraining:
    """The part of a client's training that all executors on one `Program` share.

    Attributes:
        program: The module that trains.
        work: The work of a client.
        unkeyed: The reason why no step is captured: sumus cannot replace the model's random numbers by numbers for each client
            and step (`sumus.training.noise`), or the code does more than a graph can hold. None if steps can be captured.
    """

    def __init__(self, program: Program, work: ClientWork) -> None:
        self.program = program
        self.work = work
        self.unkeyed: str | None = None
        self._seen: Observed | None = None
        if work.loop is None:
            program.look_at("work", work)

    def begin(self, broadcast: Broadcast, round_number: int) -> RoundTensors:
        """Return the round's broadcast as tensors on the device."""
        program = self.program
        sent = {name: self._apart(tree) for name, tree in broadcast.items() if name not in ("params", BUFFERS)}
        sent["params"] = program.tensors_of(broadcast["params"])
        lr = self.work.lr
        return RoundTensors(lr.rate(round_number), lr, sent, program.tensors_of(broadcast.get(BUFFERS, {})))

    def start(self, round_: RoundTensors, assignment: ClientAssignment) -> tuple[dict[str, Tensor], ClientState]:
        """Return a client's leaves before its first step, and the state that it kept, or a first state if it kept none."""
        own = {name: self._apart(tree) for name, tree in assignment.state.items() if name != PERSONAL}
        personal = self.program.tensors_of(assignment.state.get(PERSONAL, {})) or self.program.initial_personal
        leaves: dict[str, Any] = {**round_.sent["params"], **round_.buffers, **personal}
        with own_code("init", self.work, "it must return a client's first state: trees by name"):
            return leaves, own or dict(self.work.rules.init(round_.sent["params"]))

    def loss_and_gradient(
        self, inputs: Tensor, targets: Tensor, over: int, params: Sequence[Tensor], noise: AbstractContextManager[Any]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss of these examples. Also return the gradient of sum / `over` with respect to `params`.

        `noise` is the context for the forward pass.
        """
        with noise:
            _, losses = self.program.losses(inputs, targets)
        expect_gradient(losses)
        loss = losses.sum()
        return loss, gradients_of(loss / over, params)

    def gradient(self, assignment: ClientAssignment) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over all of a client's examples with respect to the shared leaves. It is
        computed batch by batch.
        """
        names, params = list(self.program.shared), list(self.program.shared.values())
        total = [torch.zeros_like(param) for param in params]
        count = len(assignment.inputs)
        noise = self.noise(assignment, 0)
        self.program.module.train()
        for start in range(0, count, self.work.batch_size or count):
            rows = slice(start, start + (self.work.batch_size or count))
            inputs, targets = assignment.inputs[rows].clone(), assignment.targets[rows].clone()
            torch._foreach_add_(total, list(self.loss_and_gradient(inputs, targets, count, params, noise)[1]))
        return {name: self.program.widen(name, grad) for name, grad in zip(names, total, strict=True)}

    def noise(self, assignment: ClientAssignment, step: int) -> AbstractContextManager[Any]:
        """Return a context for the forward pass of a step. Steps count from 1; 0 means the gradient before the first step."""
        return KeyedNoise(assignment.key, step) if self._seen is not None and self._seen.draws else nullcontext()

    def watch(self, assignment: ClientAssignment) -> None:
        """Try the model on the first client's first examples, and make every client begin in the same state."""
        if self._seen is None:
            seen: Observed = self.program.observed or observe(self.program, assignment.inputs, assignment.targets)
            self._seen = self.program.observed = seen
            self.unkeyed = seen.unkeyed or seen.alone
        self.program.begin_anew()

    @contextmanager
    def drawing(self, seed: int) -> Generator[None, None, None]:
        """Return a context for a client's training: it seeds torch's generator, and Python's and numpy's if they are used."""
        also = self._seen is not None and self._seen.generators
        with seeded(seed), generators_seeded(seed) if also else nullcontext():
            yield

    def first_rules(self, params: Mapping[str, Tensor]) -> dict[str, LeafState]:
        """Return the optimizer's first state for each leaf, in new memory."""
        with own_code(
            "init", self.work.optimizer, "it must return a leaf's first state: a tuple of tensors like the leaf"
        ):
            return {
                name: tuple(torch.as_tensor(slot).clone() for slot in self.work.rule_of(name).init(param.detach()))
                for name, param in params.items()
            }

    def stepping(self) -> AbstractContextManager[None]:
        """Return a context for the rest of a local step after its gradient. An error in it is reported as one of the work."""
        dtype = next(iter(self.program.trained.values())).dtype
        held = f"its numbers must be numbers that {str(dtype).rpartition('.')[2]} can hold, and its rules must fit the leaves"
        return own_code("a local step", self.work, held)

    def ended(
        self,
        round_: RoundTensors,
        assignment: ClientAssignment,
        own: ClientState,
        leaves: Mapping[str, Tensor],
        done: LocalRun,
        loss: tuple[float, int],
    ) -> Trained:
        """Return what a client sends and keeps.

        Args:
            round_: The broadcast of the round.
            assignment: The client.
            own: The state that the client began with.
            leaves: Every leaf after the last step. The caller may change them after this call.
            done: The summary of the training.
            loss: The summed loss, and the number of examples in it.
        """
        program = self.program
        now = {name: program.widen(name, leaf) for name, leaf in leaves.items()}
        with own_code("finish", self.work, "it must return (parts, state)"):
            parts, state = self.work.rules.finish(round_.sent, {name: now[name] for name in program.shared}, own, done)
            parts, state = dict(parts), dict(state)
        if PERSONAL in state or (state and not self.work.keeps_state):
            raise UsageError(
                f"{self.work!r} returned the state {sorted(state)}, but it has no init=, or the state uses the reserved name "
                f"{PERSONAL!r}: give it init=, which returns the first state, and use other names"
            )
        if program.buffers:
            parts = {**parts, BUFFERS: {name: round_.buffers[name] - now[name] for name in program.buffers}}
        if program.personal:
            state = {**state, PERSONAL: {name: now[name] for name in program.personal}}
        lent = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        with own_code("finish", self.work, "its parts and its state must be trees of tensors by name"):
            sent = {part: _numpy(tree, lent) for part, tree in parts.items()}
            kept = {name: _numpy(tree, lent) for name, tree in state.items()}
        return Trained(assignment.client, sent, done.examples, {"loss": loss}, kept)

    def _apart(self, tree: Tree) -> dict[str, Tensor]:
        """Return a tree that does not belong to the model (such as a control variate) as tensors of its own dtypes."""
        return {name: torch.from_numpy(np.array(leaf)).to(self.program.device) for name, leaf in tree.items()}


def _numpy(tree: Mapping[str, Any], lent: set[int]) -> Tree:
    """Return a tree as arrays. An array in lent memory is copied, since the next client overwrites this memory. A leaf may
    be a plain number.
    """

    def array(leaf: Any) -> Array:
        if not isinstance(leaf, Tensor):
            return np.asarray(leaf, np.float64)
        leaf = leaf.detach()
        return (leaf.clone() if leaf.untyped_storage().data_ptr() in lent else leaf).cpu().numpy()

    return {name: array(leaf) for name, leaf in tree.items()}
