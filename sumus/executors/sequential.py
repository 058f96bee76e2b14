"""The sequential executor: one client after the other, through one reused module, with in-place updates."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from sumus.errors import at_client
from sumus.executors.client import LocalTraining, RoundTensors
from sumus.executors.executor import ClientAssignment, Trained
from sumus.rng import generator
from sumus.training.graph import LocalGraph, capture
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.training.step import path_of
from sumus.tree import unnested
from sumus.types import Broadcast
from sumus.work import ClientState, ClientWork, LeafState, LocalRun, apply_gradients, clip_gradients, no_correction

Step = Callable[[dict[str, Tensor], int], None]


class SequentialExecutor(LocalTraining):
    """An `Executor` on one `Program`. CPU and CUDA use the same code.

    Args:
        program: The module that trains.
        work: The work of a client.
        captured: Whether whole batches go through a captured graph of the step (`sumus.training.graph`). Steps that cannot be
            captured, and the shorter batch at the end of a pass, go through autograd.
        onednn: Whether oneDNN computes the graph's dense layers.

    Attributes:
        refused: The reason why the step could not be captured; None if it was captured, or if capturing was not tried.
    """

    needs_sizes = False

    def __init__(self, program: Program, work: ClientWork, captured: bool = False, onednn: bool = False) -> None:
        super().__init__(program, work)
        self.refused: str | None = None
        self._captured, self._onednn = captured, onednn
        self._graph: LocalGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether a step has been captured so far. If not, every step of every client runs the task's own code."""
        return self._graph is not None

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
                trained = self._trained(round_, assignment)
            yield trained

    def _trained(self, round_: RoundTensors, assignment: ClientAssignment) -> Trained:
        """Train one client."""
        self.watch(assignment)
        start, own = self.start(round_, assignment)
        with self.drawing(int.from_bytes(assignment.key[:8], "little") >> 1):
            self.program.load(start)
            gradient = None
            if self.work.rules.needs_gradient:
                gradient = self.gradient(assignment)
                self.program.load(start)
            steps, loss = self._train(assignment, round_, own)
        done = LocalRun(steps, round_.mean_rate(steps), len(assignment.inputs), gradient)
        leaves = {name: tensor.detach() for name, tensor in self.program.tensors.items()}
        return self.ended(round_, assignment, own, leaves, done, loss)

    def _train(
        self, assignment: ClientAssignment, round_: RoundTensors, own: ClientState
    ) -> tuple[int, tuple[float, int]]:
        """Take the local steps; return (steps, (summed loss, examples seen))."""
        program, work = self.program, self.work
        names, params = list(program.trained), list(program.trained.values())
        rules = self.first_rules(program.trained)
        take_step = self._fused_sgd(rules, round_) or self._generic_step(rules, round_, own)
        steps, seen = 0, 0
        state: Sequence[Tensor] | None = None
        total = torch.zeros((), device=program.device, dtype=torch.float64)
        program.module.train()
        rng = generator(assignment.key, "batches")
        for rows in work.batches(len(assignment.inputs), rng, assignment.most_steps):
            if isinstance(rows, slice):  # this is a view, and forward may change its input
                inputs, targets = assignment.inputs[rows].clone(), assignment.targets[rows].clone()
            else:
                index = torch.from_numpy(rows).to(program.device)
                inputs, targets = assignment.inputs.index_select(0, index), assignment.targets.index_select(0, index)
            steps += 1
            seen += len(inputs)
            if graph := self._graph_of(inputs, targets):
                noise = graph.noise([assignment.key], steps, program.device)
                state = state or self._state(graph, rules, round_, own)
                with self.stepping():
                    total += graph(state, inputs, targets, None, round_.rate(steps), steps, noise) * len(inputs)
                continue
            state, noise = None, self.noise(assignment, steps)  # a rule may replace its state by new tensors
            loss, grads = self.loss_and_gradient(inputs, targets, len(inputs), params, noise)
            with torch.no_grad(), self.stepping():
                total += loss
                take_step(dict(zip(names, grads, strict=True)), steps)
        return steps, (float(total), seen)

    def _graph_of(self, inputs: Tensor, targets: Tensor) -> LocalGraph | None:
        """Return the graph for a batch; None if the batch is not of the work's full size, or the step cannot be captured."""
        if not self._captured or len(inputs) != self.work.batch_size:
            return None
        if self._graph is None:
            try:
                if self.unkeyed:
                    raise NotCapturable(self.unkeyed)
                self._graph = capture(self.program, self.work, inputs, targets, onednn=self._onednn)
            except NotCapturable as error:
                self.refused, self._captured = str(error), False
        return self._graph

    def _state(
        self, graph: LocalGraph, rules: Mapping[str, LeafState], round_: RoundTensors, own: ClientState
    ) -> Sequence[Tensor]:
        """Return the arguments of the graph, in its order. They lie in the module's own memory, so a step with the graph can
        follow a step without it, and the reverse.
        """
        values = {path_of(self.program, name): tensor for name, tensor in self.program.tensors.items()}
        values |= {f"rule/{name}/{slot}": leaf for name, slots in rules.items() for slot, leaf in enumerate(slots)}
        values |= {f"broadcast/{path}": leaf for path, leaf in unnested(round_.sent).items()}
        values |= {f"state/{path}": leaf for path, leaf in unnested(own).items()}
        return [values[name].detach() for name in graph.names]

    def _fused_sgd(self, rules: Mapping[str, LeafState], round_: RoundTensors) -> Step | None:
        """Return a function that does SGD in place, by the rule of `rule/sgd` but without copies. Return None if the work uses
        another optimizer, a correction or groups.
        """
        rule = self.work.optimizer.spec
        if rule.name != "rule/sgd" or self.work.rules.correct is not no_correction or self.work.groups:
            return None
        momentum, decay = (float(cast(float, rule.params[name])) for name in ("momentum", "weight_decay"))
        nesterov = bool(rule.params["nesterov"])
        params = list(self.program.trained.values())
        velocity = [slots[0] for slots in rules.values() if slots]

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
            torch._foreach_add_(params, moves, alpha=-round_.rate(number))

        return step

    def _generic_step(self, rules: dict[str, LeafState], round_: RoundTensors, own: ClientState) -> Step:
        """Return a function that takes a step by any rule, as the rule defines it."""
        params = self.program.trained
        memory = {param.untyped_storage().data_ptr() for param in params.values()}

        def step(grads: dict[str, Tensor], number: int) -> None:
            values = {name: param.detach() for name, param in params.items()}
            rate = round_.rate(number)
            moved, states = apply_gradients(self.work, values, grads, rules, round_.sent, own, rate, number)
            taken = set(memory)
            rules.update({name: tuple(_outside(slot, taken) for slot in slots) for name, slots in states.items()})
            torch._foreach_copy_(list(params.values()), [_outside(moved[name], set(memory)) for name in params])

        return step


def _outside(tensor: Tensor, taken: set[int]) -> Tensor:
    """Return the tensor, or a copy of it, in memory that nothing else changes, and mark that memory as taken."""
    tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor
