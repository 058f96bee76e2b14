"""The sequential executor: one client after the other, through one reused model, with in-place updates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sumus.aggregate import BUFFERS
from sumus.errors import SumusError, TaskError, UsageError
from sumus.rng import generator
from sumus.training.executor import Assignment, Trained
from sumus.training.program import Program, seeded
from sumus.types import Array, Broadcast, Tree
from sumus.work import (
    PERSONAL,
    ClientState,
    ClientWork,
    LocalRun,
    Parts,
    apply_gradients,
    clip_gradients,
    no_correction,
)

Step = Callable[[dict[str, Tensor], int], None]


class SequentialExecutor:
    """An `Executor` on one `Program`. CPU and CUDA take the same path."""

    def __init__(self, program: Program, work: ClientWork) -> None:
        self.program = program
        self.work = work

    def run(self, broadcast: Broadcast, round_number: int, assignments: Iterable[Assignment]) -> Iterator[Trained]:
        """Train each client from the broadcast; results come as they are ready."""
        program, lr = self.program, self.work.lr.at(round_number)
        sent = {name: self._apart(tree) for name, tree in broadcast.items() if name not in ("params", BUFFERS)}
        sent["params"], buffers = (
            program.tensors_of(broadcast["params"]),
            program.tensors_of(broadcast.get(BUFFERS, {})),
        )
        initial_personal = program.initial_personal
        for assignment in assignments:
            own = {name: self._apart(tree) for name, tree in assignment.state.items() if name != PERSONAL}
            own = own or self.work.init(sent["params"])
            personal = program.tensors_of(assignment.state.get(PERSONAL, {})) or initial_personal
            start = {**sent["params"], **buffers, **personal}
            try:
                with seeded(int.from_bytes(assignment.key[:8], "little") >> 1):
                    program.load(start)
                    gradient = None
                    if self.work.needs_gradient:
                        gradient = self._gradient(assignment)
                        program.load(start)
                    steps, loss = self._train(assignment, sent, own, lr)
            except TaskError as error:
                raise TaskError(f"client {assignment.client!r}: {error}") from error
            done = LocalRun(steps, lr, len(assignment.inputs), gradient)
            parts, state = self._finished(assignment.client, sent, own, done)
            if PERSONAL in state or (state and not self.work.keeps_state):
                raise UsageError(
                    f"{self.work!r} keeps {sorted(state)}: give it init=, the first state, and leave the name "
                    f"{PERSONAL!r} to personal leaves"
                )
            if program.buffers:
                now = program.widened(program.buffers)
                parts = {**parts, BUFFERS: {name: buffers[name] - now[name] for name in now}}
            if program.personal:
                state = {**state, PERSONAL: program.widened(program.personal)}
            yield Trained(
                assignment.client,
                {part: self._numpy(tree) for part, tree in parts.items()},
                done.examples,
                {"loss": loss},
                {name: self._numpy(tree) for name, tree in state.items()},
            )

    def _train(
        self,
        assignment: Assignment,
        sent: Parts,
        own: ClientState,
        lr: float,
    ) -> tuple[int, tuple[float, int]]:
        """Take the local steps; (steps, (summed loss, examples seen))."""
        program = self.program
        names, params = list(program.trained), list(program.trained.values())
        take_step = self._fused_sgd(lr) or self._generic_step(sent, own, lr)
        steps, seen = 0, 0
        total = torch.zeros((), device=program.device, dtype=torch.float64)
        program.module.train()
        rng = generator(assignment.key, "batches")
        for rows in self.work.batches(len(assignment.inputs), rng, assignment.most_steps):
            index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(program.device)
            inputs, targets = assignment.inputs[index], assignment.targets[index]
            if isinstance(index, slice):  # a view: a forward in place must not change the data
                inputs = inputs.clone()
            loss, grads = self._loss_and_gradient(inputs, targets, len(inputs), params)
            steps += 1
            seen += len(inputs)
            with torch.no_grad():
                total += loss
                take_step(dict(zip(names, grads, strict=True)), steps)
        return steps, (float(total), seen)

    def _loss_and_gradient(
        self, inputs: Tensor, targets: Tensor, over: int, params: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The summed loss of these examples, and the gradient of that sum over a number."""
        _, losses = self.program.losses(inputs, targets)
        if not losses.requires_grad:
            raise TaskError("the loss does not depend on the model's parameters: drop .detach() and argmax from it")
        loss = losses.sum()
        return loss, torch.autograd.grad(loss / over, params, allow_unused=True, materialize_grads=True)

    def _gradient(self, assignment: Assignment) -> dict[str, Tensor]:
        """The gradient, in the shared leaves, of the mean loss over all of a client's examples; a batch at a time."""
        names, params = list(self.program.shared), list(self.program.shared.values())
        total = [torch.zeros_like(param) for param in params]
        count = len(assignment.inputs)
        self.program.module.train()
        for start in range(0, count, self.work.batch_size or count):
            rows = slice(start, start + (self.work.batch_size or count))
            inputs, targets = assignment.inputs[rows].clone(), assignment.targets[rows]
            torch._foreach_add_(total, list(self._loss_and_gradient(inputs, targets, count, params)[1]))
        return {name: self.program.widen(name, grad) for name, grad in zip(names, total, strict=True)}

    def _finished(self, client: Any, sent: Parts, own: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        """What the work's `finish` gives; what it raises is said to be its own."""
        try:
            parts, state = self.work.finish(sent, self.program.widened(self.program.shared), own, done)
        except SumusError:
            raise
        except Exception as error:
            raise UsageError(
                f"client {client!r}: finish of {self.work!r} failed: {type(error).__name__}: {error}; it must give (parts, state)"
            ) from error
        return parts, state

    def _fused_sgd(self, lr: float) -> Step | None:
        """SGD in place, where the work is SGD and corrects nothing: the same rule as `work.sgd_rule`, without copies."""
        rule = self.work.optimizer.spec
        if rule.name != "rule/sgd" or self.work.correct is not no_correction:
            return None
        momentum, decay = (float(cast(float, rule.params[name])) for name in ("momentum", "weight_decay"))
        nesterov = bool(rule.params["nesterov"])
        params = list(self.program.trained.values())
        velocity = [torch.zeros_like(param) for param in params] if momentum else []

        def step(grads: dict[str, Tensor], number: int) -> None:
            if self.work.clip_norm is not None:
                grads = clip_gradients(grads, self.work.clip_norm)
            moves = list(grads.values())
            if decay:
                moves = list(torch._foreach_add(moves, params, alpha=decay))
            if momentum:
                torch._foreach_mul_(velocity, momentum)
                torch._foreach_add_(velocity, moves)
                moves = list(torch._foreach_add(moves, velocity, alpha=momentum)) if nesterov else velocity
            torch._foreach_add_(params, moves, alpha=-lr)

        return step

    def _generic_step(self, sent: Parts, own: ClientState, lr: float) -> Step:
        """Any rule, by its own definition."""
        params = self.program.trained
        states = {name: self.work.optimizer.init(param.detach()) for name, param in params.items()}

        def step(grads: dict[str, Tensor], number: int) -> None:
            nonlocal states
            values = {name: param.detach() for name, param in params.items()}
            moved, states = apply_gradients(self.work, values, grads, states, sent, own, lr, number)
            torch._foreach_copy_(list(params.values()), [moved[name] for name in params])

        return step

    def _apart(self, tree: Tree) -> dict[str, Tensor]:
        """A tree that is not the model's (a control variate), as tensors in its own dtypes."""
        return {name: torch.from_numpy(np.array(leaf)).to(self.program.device) for name, leaf in tree.items()}

    def _numpy(self, tree: Mapping[str, Any]) -> Tree:
        """Arrays of their own: what still lies in the module is copied, since the next client overwrites it. Numbers too."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.program.tensors.values()}

        def array(leaf: Any) -> Array:
            if not isinstance(leaf, Tensor):
                return np.asarray(leaf, np.float64)
            leaf = leaf.detach()
            return (leaf.clone() if leaf.untyped_storage().data_ptr() in own else leaf).cpu().numpy()

        return {name: array(leaf) for name, leaf in tree.items()}
