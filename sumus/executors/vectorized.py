"""The vectorized executor: a stack of clients takes each step together, as batched products.

The clients of a stack are sorted by their number of steps, the largest first. Step t is taken by the clients that have a t-th
batch. These are the first clients of the stack. They are divided into runs of 2^k clients, and there is a captured graph for
each length of a run. A short batch is padded with a row of the same client, and the padding is masked. Only the last batch of
a pass can be short.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sumus.errors import at_client
from sumus.executors.client import LocalTraining, RoundTensors
from sumus.executors.executor import ClientAssignment, Trained
from sumus.executors.sequential import SequentialExecutor
from sumus.rng import generator
from sumus.training.graph import LocalGraph, capture, is_stacked
from sumus.training.program import Program
from sumus.training.rewrite import NotCapturable
from sumus.training.step import path_of
from sumus.tree import unnested
from sumus.types import Array, Broadcast
from sumus.work import ClientState, ClientWork, LocalRun


class VectorizedExecutor(LocalTraining):
    """An `Executor` on one `Program`, for steps that can be captured.

    Attributes:
        stack: The largest number of clients that step together, a power of two.
        refused: The reason why the step could not be captured, so that some clients were trained one by one by autograd; None
            if all were stacked.
    """

    needs_sizes = True

    def __init__(self, program: Program, work: ClientWork, stack: int) -> None:
        super().__init__(program, work)
        self.stack = stack
        self.refused: str | None = None
        self._alone = SequentialExecutor(program, work)
        self._graphs: dict[tuple[int, int], LocalGraph | NotCapturable] = {}
        self._memory: dict[str, Tensor] = {}

    def groups(self, examples: Sequence[int]) -> list[list[int]]:
        """Return stacks of clients of nearly the same size, the largest first."""
        groups: list[list[int]] = []
        for position in sorted(range(len(examples)), key=lambda position: (-examples[position], position)):
            rows = self._rows(examples[position])
            if not groups or len(groups[-1]) == self.stack or 2 * rows < self._rows(examples[groups[-1][0]]):
                # batches of a stack are padded to one length, so clients with much shorter batches form another stack
                groups.append([])
            groups[-1].append(position)
        return groups

    def run(
        self, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Train the clients from the broadcast, one stack at a time."""
        round_ = self.begin(broadcast, round_number)
        everyone = list(assignments)
        for positions in self.groups([len(assignment.inputs) for assignment in everyone]):
            group = [everyone[position] for position in positions]
            try:
                yield from self._train(round_, group)
            except NotCapturable as error:  # no result was yielded yet, so the stack can be trained again
                self.refused = str(error)
                yield from self._alone.run(broadcast, round_number, group)

    def _train(self, round_: RoundTensors, group: list[ClientAssignment]) -> Iterator[Trained]:
        with at_client(group[0].client):
            self.watch(group[0])
        if self.unkeyed:
            raise NotCapturable(self.unkeyed)
        batches = [self._batches(assignment) for assignment in group]
        order = sorted(range(len(group)), key=lambda position: -len(batches[position]))
        group, batches = [group[position] for position in order], [batches[position] for position in order]
        begun, gradients = list[tuple[dict[str, Tensor], ClientState]](), list[Any]()
        for assignment in group:
            with at_client(assignment.client):
                begun.append(self.start(round_, assignment))
                gradients.append(self._gradient(assignment, begun[-1][0]))
        values = self._stacked(round_, begun)
        losses = torch.zeros(len(group), dtype=torch.float64, device=self.program.device)
        with at_client(group[0].client):  # the error names one client, since the stack steps together
            self._take_steps(round_, group, batches, values, losses)
        each = self._unstacked(values, len(group))
        for place, (assignment, gradient, leaves) in enumerate(zip(group, gradients, each, strict=True)):
            steps = len(batches[place])
            done = LocalRun(steps, round_.mean_rate(steps), len(assignment.inputs), gradient)
            seen = sum(len(rows) for rows in batches[place])
            with at_client(assignment.client):
                trained = self.ended(round_, assignment, begun[place][1], leaves, done, (float(losses[place]), seen))
            yield trained

    def _take_steps(
        self,
        round_: RoundTensors,
        group: list[ClientAssignment],
        batches: list[list[Array]],
        values: Mapping[str, Tensor],
        losses: Tensor,
    ) -> None:
        """Take every step of every client; change `values` and the summed `losses` in place."""
        rows, mask = _padded(batches, [len(assignment.inputs) for assignment in group], self.work.batch_size)
        inputs = self._joined("inputs", [assignment.inputs for assignment in group])
        targets = self._joined("targets", [assignment.targets for assignment in group])
        device, kind = self.program.device, next(iter(self.program.trained.values())).dtype
        index, weights = torch.from_numpy(rows).to(device), torch.from_numpy(mask).to(device, kind)
        counts = torch.from_numpy(mask.sum(2, dtype=np.float64)).to(device)
        prefixes: dict[tuple[int, int], list[Tensor]] = {}
        lengths = np.array([len(each) for each in batches])
        for step in range(len(rows)):
            for first, last in _runs(int(np.count_nonzero(lengths > step))):
                batch, labels = (_chosen(examples, index[step, first:last]) for examples in (inputs, targets))
                graph = self._graph(last - first, batch, labels)
                if (first, last) not in prefixes:
                    prefixes[first, last] = [
                        values[name][first:last] if is_stacked(name, self.program) else values[name]
                        for name in graph.names
                    ]
                noise = graph.noise([assignment.key for assignment in group[first:last]], step + 1, device)
                with self.stepping():
                    rate = round_.rate(step + 1)
                    loss = graph(prefixes[first, last], batch, labels, weights[step, first:last], rate, step + 1, noise)
                losses[first:last] += loss * counts[step, first:last]

    def _rows(self, examples: int) -> int:
        """Return the number of rows in a client's longest batch."""
        return min(examples, self.work.batch_size or examples)

    def _batches(self, assignment: ClientAssignment) -> list[Array]:
        rng = generator(assignment.key, "batches")
        count = len(assignment.inputs)
        everything = np.arange(count)
        return [
            everything if isinstance(rows, slice) else rows
            for rows in self.work.batches(count, rng, assignment.most_steps)
        ]

    def _gradient(self, assignment: ClientAssignment, start: Mapping[str, Tensor]) -> Any:
        """Return the gradient that the work needs before the first step, for one client."""
        if not self.work.rules.needs_gradient:
            return None
        self.program.load(start)
        return self.gradient(assignment)

    def _stacked(
        self, round_: RoundTensors, begun: Sequence[tuple[Mapping[str, Tensor], ClientState]]
    ) -> dict[str, Tensor]:
        """Return the arguments of a step by name. Values that each client has of its own are stacked `(K, ...)`. The memory
        is reused.
        """
        program, count = self.program, len(begun)
        values: dict[str, Tensor] = {}
        for name, tensor in program.tensors.items():
            path = path_of(program, name)
            if not is_stacked(path, program):
                values[path] = tensor.detach()
                continue
            stacked = values[path] = self._room(path, tensor, count)
            if name in program.personal:
                for place, (start, _) in enumerate(begun):
                    stacked[place].copy_(start[name])
            else:
                stacked.copy_(begun[0][0].get(name, tensor.detach()))
        rules = self.first_rules({name: values[f"params/{name}"] for name in program.trained})
        values |= {f"rule/{name}/{slot}": leaf for name, slots in rules.items() for slot, leaf in enumerate(slots)}
        values |= {f"broadcast/{path}": leaf for path, leaf in unnested(round_.sent).items()}
        for path in unnested(begun[0][1]):
            name, _, leaf = path.partition("/")
            values[f"state/{path}"] = torch.stack([own[name][leaf] for _, own in begun])
        return values

    def _room(self, path: str, like: Tensor, count: int) -> Tensor:
        if path not in self._memory or len(self._memory[path]) < count:
            self._memory[path] = torch.empty((count, *like.shape), dtype=like.dtype, device=like.device)
        return self._memory[path][:count]

    def _joined(self, path: str, examples: Sequence[Tensor]) -> Tensor:
        """Return the rows of all clients, one client after another."""
        return torch.cat(list(examples), out=self._room(path, examples[0][0], sum(map(len, examples))))

    def _unstacked(self, values: Mapping[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the leaves of each client."""
        paths = {name: path_of(self.program, name) for name in self.program.tensors}
        stacked = {
            name: values[path].unbind() if is_stacked(path, self.program) else (values[path],) * count
            for name, path in paths.items()
        }
        return (dict(zip(stacked, leaves, strict=True)) for leaves in zip(*stacked.values(), strict=True))

    def _graph(self, stack: int, batch: Tensor, labels: Tensor) -> LocalGraph:
        where = (stack, batch.shape[1])
        if where not in self._graphs:
            try:
                self._graphs[where] = capture(self.program, self.work, batch[0], labels[0], stack)
            except NotCapturable as error:
                self._graphs[where] = error
        found = self._graphs[where]
        if isinstance(found, NotCapturable):
            raise found
        return found


def _chosen(examples: Tensor, index: Tensor) -> Tensor:
    """Return `examples[index]`, at a quarter of the cost if rows are long."""
    return examples.index_select(0, index.reshape(-1)).reshape(*index.shape, *examples.shape[1:])


def _padded(batches: Sequence[Sequence[Array]], sizes: Sequence[int], most: int | None) -> tuple[Array, Array]:
    """Return rows of the concatenated examples `(steps, K, B)`, and a mask of the rows that count."""
    offsets = np.cumsum([0, *sizes[:-1]])
    width = _width(max(len(rows) for each in batches for rows in each), most)
    index = np.zeros((len(batches[0]), len(batches), width), np.int64)
    counts = np.zeros(index.shape[:2], np.int64)
    for place, each in enumerate(batches):
        for step, rows in enumerate(each):
            count = counts[step, place] = len(rows)
            index[step, place, :count] = rows
            if count < width:
                index[step, place, count:] = rows[0]
    return index + offsets[:, None], (np.arange(width) < counts[:, :, None]).astype(np.float32)


def _width(rows: int, most: int | None) -> int:
    """Return the number of rows of a padded batch, rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …: each width needs its own
    graph.
    """
    width = 1
    while width < rows:
        width = width * 4 // 3 if width % 3 == 0 else max(width + 1, width * 3 // 2)
    return width if most is None else min(width, most)


def _runs(active: int) -> Iterator[tuple[int, int]]:
    """Yield runs that cover [0, active); their lengths are decreasing powers of two."""
    first = 0
    while first < active:
        length = 1 << ((active - first).bit_length() - 1)
        yield first, first + length
        first += length
