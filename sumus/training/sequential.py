"""The sequential executor: one client after the other, through one reused model, with in-place updates."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sumus.rng import generator, key
from sumus.training.program import Program, seeded
from sumus.types import Broadcast, Tree
from sumus.work import ClientWork, apply_gradients, clip_gradients, no_correction

Step = Callable[[dict[str, Tensor], int], None]


@dataclass(frozen=True)
class Assignment:
    """A client that is to train: its id, its examples as tensors, and its state from earlier rounds."""

    client: Any
    inputs: Tensor
    targets: Tensor
    state: Mapping[str, Tree]


@dataclass(frozen=True)
class Trained:
    """What a client's training gave: parts to send (numpy), examples, metric sums, and its pending state."""

    client: Any
    parts: Mapping[str, Tree]
    examples: int
    metrics: Mapping[str, tuple[float, int]]
    state: Mapping[str, Tree]


class SequentialExecutor:
    """Runs a `ClientWork` on a `Program`. CPU and CUDA take the same path.

    Randomness is keyed by (seed, round, client): who else trains, and in which order, changes nothing.
    """

    def __init__(self, program: Program, work: ClientWork) -> None:
        self.program = program
        self.work = work

    def run(
        self, broadcast: Broadcast, round_number: int, seed: int, assignments: Iterable[Assignment]
    ) -> Iterator[Trained]:
        """Train each client from the broadcast; results come as they are ready."""
        program = self.program
        sent = {name: program.tensors_of(tree) for name, tree in broadcast.items()}
        initial_personal = program.initial_personal
        lr = self.work.lr.at(round_number)
        for assignment in assignments:
            own = {name: program.tensors_of(tree) for name, tree in assignment.state.items()}
            program.load({**sent["params"], **(own.get("personal") or initial_personal)})
            words = (seed, "round", round_number, "client", assignment.client)
            with seeded(int.from_bytes(key(*words, "torch")[:8], "little") >> 1):
                steps, loss = self._train(assignment, sent, own, lr, words)
            parts, state = self.work.finish(sent, program.widened(program.shared), own, steps, lr)
            if program.personal:
                state = {**state, "personal": program.widened(program.personal)}
            yield Trained(
                assignment.client,
                {part: self._numpy(tree) for part, tree in parts.items()},
                len(assignment.inputs),
                {"loss": loss},
                {name: self._numpy(tree) for name, tree in state.items()},
            )

    def _train(
        self,
        assignment: Assignment,
        sent: Mapping[str, Mapping[str, Tensor]],
        own: Mapping[str, Mapping[str, Tensor]],
        lr: float,
        words: tuple[object, ...],
    ) -> tuple[int, tuple[float, int]]:
        """Take the local steps; (steps, (summed loss, examples seen))."""
        program = self.program
        names, params = list(program.trained), list(program.trained.values())
        take_step = self._fused_sgd(lr) or self._generic_step(sent, own, lr)
        steps, seen = 0, 0
        total = torch.zeros((), device=program.device, dtype=torch.float64)
        program.module.train()
        for rows in self.work.batches(len(assignment.inputs), generator(*words, "batches")):
            index = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(program.device)
            inputs, targets = assignment.inputs[index], assignment.targets[index]
            if isinstance(index, slice):  # a view: a forward in place must not change the data
                inputs = inputs.clone()
            _, losses = program.losses(inputs, targets)
            grads = torch.autograd.grad(losses.mean(), params, allow_unused=True, materialize_grads=True)
            steps += 1
            seen += len(inputs)
            with torch.no_grad():
                total += losses.sum()
                take_step(dict(zip(names, grads, strict=True)), steps)
        return steps, (float(total), seen)

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

    def _generic_step(
        self, sent: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, Mapping[str, Tensor]], lr: float
    ) -> Step:
        """Any rule, by its own definition."""
        params = self.program.trained
        states = {name: self.work.optimizer.init(param.detach()) for name, param in params.items()}

        def step(grads: dict[str, Tensor], number: int) -> None:
            nonlocal states
            values = {name: param.detach() for name, param in params.items()}
            moved, states = apply_gradients(self.work, values, grads, states, sent, own, lr, number)
            torch._foreach_copy_(list(params.values()), [moved[name] for name in params])

        return step

    def _numpy(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays of their own: what still lies in the module is copied, since the next client overwrites it."""
        own = {tensor.data_ptr() for tensor in self.program.tensors.values()}
        leaves = {
            name: leaf.detach().clone() if leaf.data_ptr() in own else leaf.detach() for name, leaf in tree.items()
        }
        return {name: leaf.cpu().numpy() for name, leaf in leaves.items()}
