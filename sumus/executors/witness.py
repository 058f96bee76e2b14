"""A witness: the first client of a process is trained again, to see whether it still gives the same numbers.

    witness = Witness(program, clients=1000)
    for trained in witness.run(executor, broadcast, number, assignments): ...      as `executor.run`
    witness.look()                                                                 at the end; the result is in `program.moved`

A client's result is a function of its examples, its state, the broadcast, the round and its key. `sumus.training.hidden` walks
over objects to find state outside the leaves, and restores that state before every client. But the walk does not see all
state: not a file, an object of an extension, or the variables of an installed package. Any such state has one effect: the
same client, from the same broadcast, gives different bits later. So each process keeps the input of its first client, and a
digest of the result. The process trains this client again after 2, 16, 128, 1024 … further clients of a long run, and once
at the end of every run. So a process that trains 100 clients repeats 3 trainings. In a longer run the share is smaller. A
shorter run repeats one training.

A repeated training leaves no trace: leaves, generators of random numbers, and lists that are a user's logs are restored.
Its result is only compared, and never sent.

What the witness does not see:

- Captured and vectorized executors run the Python of a step once, and then a graph of the step. A counter is a constant in
  such a graph, and a repeated training gives the same bits. There the witness only reads the client's examples again. (Before
  such an executor is used, its graph is compared with autograd on a few steps.)
- On a GPU, kernels may add in a different order each time, so bits differ even without hidden state. There too, the witness
  only reads the examples.
- State that has returned to its old value when the client is trained again, such as a counter modulo a small number.
"""

import copy
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from sumus.errors import SumusError
from sumus.executors.executor import ClientAssignment, Executor, Trained
from sumus.executors.own_loop import OwnLoopExecutor
from sumus.executors.sequential import SequentialExecutor
from sumus.training import observed
from sumus.training.hidden import generators, put_generators
from sumus.training.program import Program, seeded
from sumus.tree import sha256
from sumus.types import Broadcast

OTHER_NUMBERS = "numbers of a client that is trained again"
"""The entry in `Program.moved` which says that the witness gave different bits when it was trained again."""
_EXAMPLES = "examples of "
FIRST_LOOK, FACTOR = 2, 8
"""The number of further clients before the first repeated training, and the factor by which it grows each time."""
LONG = 100
"""If a process trains at least this number of clients, it trains the witness again during the run, and not only at its end."""


@dataclass(frozen=True)
class Testimony:
    """The input of the first client, and a digest of its result.

    Attributes:
        executor: The executor that trained the client.
        broadcast: A copy of the broadcast that the client began with.
        round_number: The round, from 0.
        assignment: A copy of the client's assignment; its examples are not copied.
        digest: `digest_of` the client's result; None if only its examples are read again.
    """

    executor: Executor
    broadcast: Broadcast
    round_number: int
    assignment: ClientAssignment
    digest: str | None = None


class Witness:
    """Trains the first client of a process again from time to time: the same input must give the same bits.

    Args:
        program: The program on which all clients of this process are trained. The witness adds the differences that it
            finds to the program's `moved`.
        clients: The number of clients that this process is likely to train. If it is below `LONG`, only `look` trains the
            witness again.
        read: Function that reads a client's examples anew, as (inputs, targets); None if they cannot be read again.
    """

    def __init__(
        self, program: Program, clients: int = 0, read: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self._program, self._read = program, read
        self._first: Testimony | None = None
        self._further, self._looked = 0, -1
        self._due = FIRST_LOOK if clients >= LONG else None

    def run(
        self, executor: Executor, broadcast: Broadcast, round_number: int, assignments: Iterable[ClientAssignment]
    ) -> Iterator[Trained]:
        """Yield the results of `executor.run`; the first client of all calls becomes the witness."""
        everyone = iter(assignments)
        begun = list(islice(everyone, 1))
        for trained in executor.run(broadcast, round_number, chain(begun, everyone)):
            if self._first is not None:
                self._count()
            elif trained.client == begun[0].client and self._program.device.type == "cpu" and _runs_the_code(executor):
                own = replace(begun[0], state=copy.deepcopy(dict(begun[0].state)))
                self._first = Testimony(executor, copy.deepcopy(dict(broadcast)), round_number, own, digest_of(trained))
            else:
                self._first = Testimony(executor, {}, round_number, begun[0])
            begun = []
            yield trained

    def look(self) -> None:
        """Read the witness's examples again, and train it again unless a difference is already known. Do nothing if no client
        was trained since the last look.
        """
        first, program = self._first, self._program
        if first is None or self._looked == self._further:
            return
        self._looked = self._further
        with _leaving_no_trace(program):
            if self._read is not None and (other := _other_examples(first.assignment, self._read)):
                program.moved[other] = None
            known = len(program.moved)
            if first.digest is None or OTHER_NUMBERS in program.moved or not _runs_the_code(first.executor):
                return
            try:
                (again,) = first.executor.run(first.broadcast, first.round_number, [first.assignment])
                differs = digest_of(again) != first.digest
            except SumusError:  # it was trained before, so some state changed; the walk adds the path
                differs = len(program.moved) == known
        if differs and not any(path.startswith(("work.", "work[")) for path in program.moved):
            program.moved[OTHER_NUMBERS] = None

    def _count(self) -> None:
        """Count a further client that was trained; call `look` if it is due."""
        self._further += 1
        if self._due is not None and self._further >= self._due:
            self._due *= FACTOR
            self.look()


def _runs_the_code(executor: Executor) -> bool:
    """Return whether the Python code of a task runs at each step of each client."""
    plain = isinstance(executor, SequentialExecutor) and not executor.is_captured
    return plain or isinstance(executor, OwnLoopExecutor)


def digest_of(trained: Trained) -> str:
    """Hash everything that a client returned. Equal hashes mean equal bits."""
    trees = [sorted((name, sha256(tree)) for name, tree in part.items()) for part in (trained.parts, trained.state)]
    numbers = sorted((name, float(total), int(count)) for name, (total, count) in trained.metrics.items())
    return hashlib.sha256(repr((trees, trained.examples, numbers)).encode()).hexdigest()


def examples_of(client: object) -> str:
    """Return the entry in `Program.moved` for a client whose examples differ each time they are read."""
    return f"{_EXAMPLES}client {client!r}"


def notes_of(moved: Iterable[str], most: int) -> list[str]:
    """Return notes for the user about `Program.moved`.

    Args:
        moved: The paths that the walk found, and the entries of witnesses.
        most: The largest number of paths that are named.

    Returns:
        The notes, each once; at most one is about changed examples.
    """
    paths = list(moved)
    read = [path for path in paths if path.startswith(_EXAMPLES)][:1]
    walked = [path for path in paths if path != OTHER_NUMBERS and not path.startswith(_EXAMPLES)]
    notes = [
        f"{path.removeprefix(_EXAMPLES)} gives different examples each time it is read, but a run reads each client only "
        "once: random views of an example are therefore drawn only once; draw them in the model's forward during training"
        for path in read
    ]
    if OTHER_NUMBERS in paths:
        notes.append(
            "the same client gave different numbers when it was trained again: code of the task keeps state, or draws "
            "random numbers, that sumus does not see. So the results of this run depend on the order of clients, and on "
            "how many processes train them. Keep such state in a float buffer of the model, which is averaged, or in "
            "personal leaves"
        )
    return [*notes, *map(observed.note_of, walked[:most])]


def _other_examples(assignment: ClientAssignment, read: Callable[[Any], tuple[Tensor, Tensor]]) -> str | None:
    """Return the entry for `moved` if a client's examples have changed; None if not, or if they can no longer be read."""
    with suppress(Exception):  # a user's code may raise anything, and no result is wrong because of it
        pairs = zip((assignment.inputs, assignment.targets), read(assignment.client), strict=True)
        return None if all(torch.equal(one, other) for one, other in pairs) else examples_of(assignment.client)
    return None


@contextmanager
def _leaving_no_trace(program: Program) -> Generator[None, None, None]:
    """Restore everything that a training changes: leaves, modes of layers, generators, and the state that the walk sees.

    Lists that are a user's logs get no entries from the training.
    """
    with suppress(SumusError):  # the next client raises the same error
        program.begin_anew()
    stood = generators()
    values: Mapping[str, Tensor] = {name: tensor.detach().clone() for name, tensor in program.tensors.items()}
    modes = [(part, part.training) for part in program.module.modules()]
    with program.hidden.keeping_logs():
        try:
            with seeded(0):
                yield
        finally:
            with suppress(SumusError):
                program.begin_anew()
            with torch.no_grad():
                for name, tensor in program.tensors.items():
                    if not torch.equal(tensor, values[name]):
                        tensor.copy_(values[name])
            for part, is_training in modes:
                part.training = is_training
            put_generators(stood)
