"""Does state outside the leaves ever change a result silently? Random models and losses with state are trained in every
way.

    python -m benchmarks.hidden_state [--draws 2000] [--seed 0] [--ways 2]

A draw is a set of `FEATURES`: counters in attributes, closures, globals and classes, buffers that change the
computation, hooks, layers made in forward, losses with parameters. Each draw is trained by autograd in one process, and
again in other ways: captured, stacked, in two processes, through the wire, and in two parts. All ways must give the
same model and the same measurements, or refuse. Code with state must cause a note; code without state must cause none.
"""

import argparse
import collections
import contextlib
import itertools
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sumus
from sumus.simulator.processes import worker
from sumus.simulator.processes.share import CannotTravel
from sumus.simulator.processes.travel import dumps
from sumus.simulator.processes.workers import Workers
from sumus.training.program import one_thread, seeded

WIDTH, CLIENTS, ROUNDS = 4, 4, 2
LATE = 3
"""The number of calls after which late state begins to act."""
CALLS = 0
KEPT: list[float] = []


class Count:
    """Counts calls, as a class and as an object."""

    of_all = 0

    def __init__(self) -> None:
        self.calls = 0

    def late(self) -> float:
        """Return 1, and after a few calls a different number each time."""
        self.calls += 1
        return 1.0 + 0.1 * max(0, self.calls - LATE)


class Drawn(nn.Module):
    """A small model with the drawn features."""

    def __init__(self, features: "Sequence[Feature]") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = tuple(features)
        self.first, self.out = nn.Linear(WIDTH, 5), nn.Linear(5, 2)
        for feature in features:
            feature.make(self)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        for feature in self.features:
            hidden = feature.forward(self, hidden)
        return self.out(hidden)


@dataclass(frozen=True)
class Feature:
    """One way to keep state, or to keep none.

    Attributes:
        make: Adds to a module what the feature needs.
        forward: (module, hidden) → hidden.
        loss: Makes a factor of the losses.
        kept: Whether state lies outside the leaves, so that a run must give a note.
    """

    make: Callable[[Any], object] = lambda m: None
    forward: Callable[[Any, Tensor], Tensor] = lambda m, x: x
    loss: Callable[[], Callable[[Tensor], Any]] | None = None
    kept: bool = True


def _attribute(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return x * (1 + 0.1 * m.calls)


def _late(m: Any, x: Tensor) -> Tensor:
    return x * m.count.late()


def _listed(m: Any, x: Tensor) -> Tensor:
    m.memory.append(x.detach().mean(0))
    return x + 0.1 * torch.stack(list(m.memory)[-3:]).mean(0)


def _told(m: Any, x: Tensor) -> Tensor:
    m.told["n"] = m.told.get("n", 0) + 1
    return x * (1 + 0.05 * m.told["n"])


def _global(m: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return x * (1 + 0.05 * CALLS)


def _global_list(m: Any, x: Tensor) -> Tensor:
    KEPT.append(1.0)
    return x * (1 + 0.05 * len(KEPT))


def _of_class(m: Any, x: Tensor) -> Tensor:
    Count.of_all += 1
    return x * (1 + 0.05 * Count.of_all)


def _own_generator(m: Any, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * float(m.draws.random()))


def _torch_generator(m: Any, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * float(torch.rand((), generator=m.draws_too)))


def _python(m: Any, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * random.random())


def _numpy(m: Any, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * float(np.random.random()))


def _beside(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.running.lerp_(x.mean(0), 0.2)
    return x - m.running


def _through_data(m: Any, x: Tensor) -> Tensor:
    m.scale.data.mul_(1.05)
    return x * m.scale


def _anew(m: Any, x: Tensor) -> Tensor:
    m.last = x.detach().mean(0) if m.last is None else 0.5 * m.last + 0.5 * x.detach().mean(0)
    return x - m.last


def _teacher(m: Any, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.teacher.weight.lerp_(m.first.weight, 0.1)
    return x + 0.1 * m.teacher(x[:, :WIDTH])


def _teacher_data(m: Any, x: Tensor) -> Tensor:
    m.frozen.data.mul_(0.9)
    return x * m.frozen


def _counter(m: Any, x: Tensor) -> Tensor:
    m.steps.add_(1)
    return x * (1 + 0.05 * m.steps)


def _steered(m: Any, x: Tensor) -> Tensor:
    m.steps_too.add_(1)
    return x * 1.5 if m.steps_too > 2 else x


def _flag(m: Any, x: Tensor) -> Tensor:
    if m.training and not m.begun:
        m.offset.copy_(x.detach().mean(0))
        m.begun.fill_(True)
    return x - m.offset


def _mean(m: Any, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(x.mean(0), 0.1)
    return x - m.mean


def _queue(m: Any, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.queue.copy_(torch.cat([x.detach(), m.queue])[: len(m.queue)])
    return x + 0.1 * m.queue.mean(0)


def _unit(m: Any, x: Tensor) -> Tensor:
    if m.training:
        with torch.no_grad():
            m.direction.copy_(F.normalize(0.9 * m.direction + 0.1 * x.detach().mean(0), dim=0))
    return x + 0.2 * m.direction


def _hooked(m: Any) -> None:
    def count(layer: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        count.calls += 1  # pyright: ignore[reportFunctionMemberAccess]
        return outputs * (1 + 0.05 * count.calls)  # pyright: ignore[reportFunctionMemberAccess]

    count.calls = 0  # pyright: ignore[reportFunctionMemberAccess]
    m.first.register_forward_hook(count)


def _on_gradient(m: Any) -> None:
    m.first.weight.register_hook(lambda grad: grad * torch.arange(grad.shape[1]))


def _counting_gradient(m: Any) -> None:
    count = Count()
    m.first.weight.register_hook(lambda grad: grad * count.late())


def _around_itself(m: Any) -> None:
    m.around = lambda x: x * m.out.weight.sum()


def _on_demand(m: Any, x: Tensor) -> Tensor:
    if m.head is None:
        m.head = nn.Linear(5, 5)
    return m.head(x)


def _fresh_mask(m: Any, x: Tensor) -> Tensor:
    if m.mask is None:
        m.mask = torch.ones(5)
    return x * m.mask


def _masked(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.out.weight.mul_(m.pruned)
    return x


def _rebound(m: Any, x: Tensor) -> Tensor:
    m.out.weight.data = m.out.weight.data * m.pruned_too
    return x


def _enclosed() -> Callable[[Tensor], Any]:
    calls = 0

    def factor(outputs: Tensor) -> float:
        nonlocal calls
        calls += 1
        return 1 + 0.1 * max(0, calls - LATE)

    return factor


def _function_attribute() -> Callable[[Tensor], Any]:
    def factor(outputs: Tensor) -> float:
        factor.calls = getattr(factor, "calls", 0) + 1  # pyright: ignore[reportFunctionMemberAccess]
        return 1 + 0.1 * factor.calls  # pyright: ignore[reportFunctionMemberAccess]

    return factor


def _default() -> Callable[[Tensor], Any]:
    def factor(outputs: Tensor, seen: Any = []) -> float:  # noqa: B006
        seen.append(1)
        return 1 + 0.1 * len(seen)

    return factor


def _bound() -> Callable[[Tensor], Any]:
    count = Count()

    class Owner:
        def factor(self, outputs: Tensor) -> float:
            return count.late()

    return Owner().factor


class _Centred:
    def __init__(self) -> None:
        self.center = torch.zeros(2)

    def __call__(self, outputs: Tensor) -> Any:
        self.center.mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        return 1 + self.center.abs().sum()


class _Weighed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor) -> Any:
        return self.weight


class _Counted:
    def __init__(self) -> None:
        self.count = Count()

    def __call__(self, outputs: Tensor) -> Any:
        return self.count.late()


class _Slotted:
    __slots__ = ("calls", "recent")

    def __init__(self) -> None:
        self.calls, self.recent = 0, collections.deque[float](maxlen=3)

    def __call__(self, outputs: Tensor) -> Any:
        self.calls += 1
        self.recent.append(float(self.calls))
        return 1 + 0.05 * sum(self.recent)


def _cycle() -> Callable[[Tensor], Any]:
    numbers = itertools.cycle([1.0, 1.5, 2.0])
    return lambda outputs: next(numbers)


def _generated() -> Callable[[Tensor], Any]:
    numbers = (1.0 + 0.1 * number for number in range(10_000))
    return lambda outputs: next(numbers)


def _enclosed_array() -> Callable[[Tensor], Any]:
    held = np.zeros(2)

    def factor(outputs: Tensor) -> float:
        held[0] += 0.1
        return 1 + held[0]

    return factor


def _set(**values: Any) -> Callable[[Any], object]:
    """Return a function that sets attributes, each made by a function."""
    return lambda m: [setattr(m, name, make()) for name, make in values.items()]


def _buffer(name: str, make: Callable[[], Tensor], persistent: bool = True) -> Callable[[Any], object]:
    return lambda m: m.register_buffer(name, make(), persistent=persistent)


def _flags(m: Any) -> None:
    m.register_buffer("begun", torch.zeros((), dtype=torch.bool))
    m.register_buffer("offset", torch.zeros(5))


FEATURES: dict[str, Feature] = {
    # no state outside the leaves: all results are equal, and there is no note
    "dropout": Feature(_set(drop=lambda: nn.Dropout(0.5)), lambda m, x: m.drop(x), kept=False),
    "layer norm": Feature(_set(norm=lambda: nn.LayerNorm(5)), lambda m, x: m.norm(x), kept=False),
    "batch norm": Feature(_set(batch=lambda: nn.BatchNorm1d(5)), lambda m, x: m.batch(x), kept=False),
    "a running mean": Feature(_buffer("mean", lambda: torch.zeros(5)), _mean, kept=False),
    "a mask in place": Feature(_set(pruned=lambda: torch.tensor([1.0, 0, 1, 1, 0])), _masked, kept=False),
    "a mask in other memory": Feature(_set(pruned_too=lambda: torch.tensor([1.0, 0, 1, 1, 0])), _rebound, kept=False),
    "a hook on a gradient": Feature(_on_gradient, kept=False),
    "a hook": Feature(
        lambda m: m.first.register_forward_hook(lambda layer, inputs, outputs: 1.5 * outputs), kept=False
    ),
    "an if": Feature(forward=lambda m, x: x if m.out.bias.sum() > -9 else 0.5 * x, kept=False),
    "Python's generator": Feature(forward=_python, kept=False),
    "numpy's generator": Feature(forward=_numpy, kept=False),
    # state
    "an attribute": Feature(_set(calls=lambda: 0), _attribute),
    "late state": Feature(_set(count=Count), _late),
    "a list": Feature(_set(memory=lambda: []), _listed),
    "a deque": Feature(_set(memory=lambda: collections.deque(maxlen=9)), _listed),
    "a mapping": Feature(_set(told=dict), _told),
    "a global": Feature(forward=_global),
    "a global list": Feature(forward=_global_list),
    "a class": Feature(forward=_of_class),
    "its own generator": Feature(_set(draws=lambda: np.random.default_rng(0)), _own_generator),
    "a generator of torch's": Feature(_set(draws_too=lambda: torch.Generator().manual_seed(0)), _torch_generator),
    "a buffer beside": Feature(_buffer("running", lambda: torch.zeros(5), persistent=False), _beside),
    "a tensor through .data": Feature(_set(scale=lambda: torch.ones(5)), _through_data),
    "an attribute bound anew": Feature(_set(last=lambda: None), _anew),
    "a frozen teacher": Feature(_set(teacher=lambda: nn.Linear(WIDTH, 5).requires_grad_(False)), _teacher),
    "a frozen parameter through .data": Feature(
        _set(frozen=lambda: nn.Parameter(torch.ones(5), requires_grad=False)), _teacher_data
    ),
    "a counter that scales": Feature(_buffer("steps", lambda: torch.zeros((), dtype=torch.long)), _counter),
    "a counter that steers": Feature(_buffer("steps_too", lambda: torch.zeros((), dtype=torch.int32)), _steered),
    "a flag": Feature(_flags, _flag),
    "a queue": Feature(_buffer("queue", lambda: torch.ones(16, 5)), _queue),
    "a unit vector": Feature(_buffer("direction", lambda: F.normalize(torch.ones(5), dim=0)), _unit),
    "a hook that counts": Feature(_hooked),
    "a gradient's hook that counts": Feature(_counting_gradient),
    "a layer on demand": Feature(_set(head=lambda: None), _on_demand),
    "a layer in a list": Feature(_set(layers=lambda: [nn.Linear(5, 5)]), lambda m, x: m.layers[0](x)),
    "a mask on demand": Feature(_set(mask=lambda: None), _fresh_mask),
    "a function around the model": Feature(_around_itself, lambda m, x: x + 0.1 * m.around(x), kept=False),
    "a loss's closure": Feature(loss=_enclosed),
    "a loss's object": Feature(loss=_Counted),
    "a loss's bound method": Feature(loss=_bound),
    "a loss's function attribute": Feature(loss=_function_attribute),
    "a loss's default": Feature(loss=_default),
    "a loss's center": Feature(loss=_Centred),
    "a loss's parameter": Feature(loss=_Weighed),
    "a loss's slots": Feature(loss=_Slotted),
    "a loss's iterator": Feature(loss=_cycle),
    "a loss's stream": Feature(loss=_generated),
    "a loss's array": Feature(loss=_enclosed_array),
}

PLANTED = (
    *("late state", "a loss's closure", "a loss's bound method"),
    *("a frozen teacher", "a gradient's hook that counts", "a counter that steers", "a flag", "a queue"),
    *("a layer on demand", "a loss's parameter", "a unit vector"),
)
"""The kinds of state in reports from the field. The last one, a mask in place, has no state."""


class Losses:
    """Cross-entropy times the factors of the drawn features."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self.factors = [make() for feature in features if (make := feature.loss) is not None]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        for factor in self.factors:
            losses = losses * factor(outputs)
        return losses


# ── ways to train ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        model: The model.
        measured: The measurements.
        notes: The notes that the run gave.
        refused: The error's text, if the run was refused.
    """

    model: Mapping[str, Any]
    measured: Mapping[str, float]
    notes: tuple[str, ...] = ()
    refused: str = ""


WAYS: dict[str, dict[str, Any]] = {
    "autograd": {},
    "captured": {"executor": "sequential"},
    "stacked": {"executor": "vectorized:2"},
    "processes": {"workers": 2},
    "wire": {"through": "wire"},
    "resumed": {},
}


def people() -> dict[int, Any]:
    """Return clients of a few whole batches."""
    rng = np.random.default_rng(0)
    given: dict[int, Any] = {}
    for client in range(CLIENTS):
        inputs = rng.normal(size=(8, WIDTH)).astype("float32")
        given[client] = inputs, (inputs.sum(1) > 0).astype("int64")
    return given


def trained(features: Sequence[str], way: str) -> Outcome:
    """Train the drawn features in one of the ways."""
    compute = sumus.Compute(**{"executor": "autograd", **WAYS[way]})
    evaluate = sumus.Evaluation(seen=2)

    def run(rounds: int, folder: str | None = None) -> sumus.History:
        own = [FEATURES[feature] for feature in features]
        task = sumus.Task(lambda: Drawn(own), Losses(own))
        work = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=4))
        out = sumus.Output(folder, progress=False)
        return sumus.simulate(task, work, people(), rounds, evaluate=evaluate, compute=compute, out=out)

    try:
        if way == "resumed":
            with tempfile.TemporaryDirectory() as folder:
                run(1, folder)
                history = run(ROUNDS, folder)
        else:
            history = run(ROUNDS)
    except sumus.SumusError as error:
        return Outcome({}, {}, refused=str(error))
    model = {name: leaf.numpy() for name, leaf in history.model.items()}
    return Outcome(model, dict(history.rounds[-1].metrics), history.notes)


def difference(features: Sequence[str], way: str, plain: Outcome, other: Outcome) -> str | None:
    """Describe what is wrong with a pair of ways; None if nothing is."""
    kept = any(FEATURES[feature].kept for feature in features)
    if plain.refused or other.refused:
        return (
            None
            if bool(plain.refused) == bool(other.refused)
            else f"refused in one way alone: {plain.refused or other.refused}"
        )
    if kept and not (plain.notes and other.notes):
        return "it has state outside the leaves, and no note says so"
    if not kept and [note for note in (*plain.notes, *other.notes) if "trained by " not in note]:
        return f"it has no state outside the leaves, and a note: {(*plain.notes, *other.notes)}"
    rounds_apart = 0.0 if way not in ("captured", "stacked") else 1e-4
    for name, leaf in plain.model.items():
        if not np.allclose(leaf, other.model[name], rtol=rounds_apart, atol=rounds_apart):
            return f"`{name}` differs by {np.abs(leaf - other.model[name]).max():g}"
    for name, value in plain.measured.items():
        if not np.isclose(value, other.measured[name], rtol=rounds_apart, atol=rounds_apart):
            return f"measured {name} is {value} and {other.measured[name]}"
    return None


def drawn(rng: random.Random) -> tuple[str, ...]:
    """Draw up to three features that can be combined."""
    features = rng.sample(list(FEATURES), rng.choice([0, 1, 1, 2, 2, 3]))
    together = {"a list", "a deque"} <= {*features}
    return tuple(features[:1] if together else features)


# ── a second process that lasts ──────────────────────────────────────────────────────────────────────────────────────


class SecondProcess:
    """A worker process that serves one run after another, since starting a process for each run would take a second."""

    def __init__(self) -> None:
        self.line, theirs = Pipe()
        with theirs:
            start = "import sys; sys.path = sys.argv[2:]; from benchmarks.hidden_state import serve; serve(int(sys.argv[1]))"
            command = [sys.executable, "-P", "-c", start, str(theirs.fileno()), *sys.path]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        self.owes = 0

    def send(self, message: Any) -> None:
        self.line.send_bytes(dumps(message))

    def send_bytes(self, message: bytes) -> None:
        self.line.send_bytes(message)

    def receive(self) -> Any:
        answer = pickle.loads(self.line.recv_bytes())
        if isinstance(answer, worker.Failure):
            raise answer.error
        return answer

    def end(self) -> None:
        """End a run; the process goes on."""
        self.owes = 0

    def close(self) -> None:
        self.line.close()
        self._process.wait()

    def crew(self, trainer: Any, setting: Any, count: int) -> Workers:
        """Return the workers of a run: this process and the second one."""
        proof = trainer.proof()
        self.send(setting)
        if self.receive() != proof:
            raise CannotTravel("another process computes something else")
        both = Workers.__new__(Workers)
        both._trainer, both._children = trainer, [self]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        return both


def serve(line: int) -> None:
    """Serve in the second process: one run's setting after another, and in between the requests to a worker."""
    connection = Connection(line)
    given = SimpleQueue[Any]()

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                given.put(pickle.loads(connection.recv_bytes()))
        given.put(None)

    threading.Thread(target=read, daemon=True).start()
    setting = given.get()
    while setting is not None:
        inbox, outbox, trainer = _Until(given), _Sent(connection), None
        try:
            with one_thread(), seeded(setting.seed):
                trainer = worker.trainer_of(setting)
                outbox.put(dumps(trainer.proof()))
                worker._serve(trainer, inbox, outbox)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
        except _NextRun as run:
            setting = run.args[0]
            if trainer is not None:
                with contextlib.suppress(sumus.TaskError):
                    trainer.program.end()
        except Exception as error:
            outbox.put(dumps(worker.Failure(error, "")))
            if trainer is not None:
                with contextlib.suppress(sumus.TaskError):
                    trainer.program.end()
            setting = given.get()
        else:
            return


class _NextRun(Exception):
    """Another run begins, or none."""


class _Until:
    """The requests to a worker, until another run begins."""

    def __init__(self, given: "SimpleQueue[Any]") -> None:
        self._given = given

    def get(self) -> Any:
        message = self._given.get()
        if not isinstance(message, worker.Message):
            raise _NextRun(message)
        return message


class _Sent:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, answer: bytes) -> None:
        self._connection.send_bytes(answer)


@contextlib.contextmanager
def second_process() -> Iterator[None]:
    """Let all runs of two processes use the same second process."""
    second = SecondProcess()
    try:
        with (
            mock.patch("sumus.simulator.processes.workers.Workers", second.crew),
            mock.patch.object(sumus.History, "plot"),  # drawing takes longer than training
        ):
            yield
    finally:
        second.close()


def campaign(draws: int, seed: int, ways: int) -> int:
    """Draw this many times, train each draw by autograd and in other ways, print wrong pairs, and return how many are
    wrong."""
    rng, wrong = random.Random(seed), 0
    with second_process():
        for number in range(draws):
            features = drawn(rng)
            others = rng.sample([way for way in WAYS if way != "autograd"], ways)
            plain = trained(features, "autograd")
            for way in others:
                if (found := difference(features, way, plain, trained(features, way))) is not None:
                    wrong += 1
                    print(f"draw {number}, {features}, autograd and {way}: {found}", flush=True)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} draws", flush=True)
    return wrong


def main() -> None:
    """Run a campaign. The exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", type=int, default=2, help="other ways that a draw is trained in, beside autograd")
    given = parser.parse_args()
    began = time.perf_counter()
    wrong = campaign(given.draws, given.seed, given.ways)
    took = time.perf_counter() - began
    print(f"{given.draws} draws, {given.draws * given.ways} pairs of ways, {wrong} wrong, {took:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    from benchmarks import hidden_state  # the module that the second process imports, not `__main__`

    hidden_state.main()
