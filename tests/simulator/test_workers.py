"""Worker processes change how long a run takes, and nothing else; and none of them outlives it."""

import contextlib
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fleet import After
from torch import nn

import sumus
from sumus import attacks
from sumus.executors.vectorized import VectorizedExecutor
from sumus.simulator.populations.population import as_population
from sumus.simulator.processes.share import CannotTravel, ClientJob, RunSetting, Sums, Trainer
from sumus.simulator.processes.travel import packed, unpacked
from sumus.simulator.processes.workers import Workers
from sumus.simulator.records import RoundRecord
from sumus.training.program import Program
from sumus.tree import sha256

Make = Callable[..., sumus.Experiment]
Told = Callable[[sumus.History], dict[str, Any]]
ALONE = "all clients train in one process: "


def children() -> set[int]:
    """Processes that this one has started and that are there, or are zombies."""
    return set(map(int, Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()))


def descriptors() -> list[str]:
    """Open lines, and open files without a name."""
    found: list[str] = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this scan
            found.append(os.readlink(entry.path))
    return sorted(link for link in found if link.startswith(("socket:", "pipe:")) or link.endswith("(deleted)"))


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, no descriptor and no file."""
    gc.collect()
    before = children(), descriptors()
    yield
    gc.collect()
    assert (children(), descriptors()) == before


# ── the same results ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "median", "fleet", "buffered", "buffered scaffold"])
def test_a_run_is_the_same_bit_for_bit_in_one_two_and_three_processes(anywhere: Make, told: Told, name: str) -> None:
    alone = sumus.run(anywhere(name))
    for workers in (2, 3) if name == "fedavg" else (3,):
        history = sumus.run(anywhere(name), compute=sumus.Compute(workers=workers))
        assert told(history) == told(alone)
        assert history.notes == alone.notes == ()


@pytest.mark.parametrize("name", ["fleet", "buffered scaffold"])
def test_a_run_goes_on_with_another_number_of_workers(anywhere: Make, told: Told, tmp_path: Path, name: str) -> None:
    whole = sumus.run(anywhere(name, rounds=5))
    for workers, after in ((2, 2), (1, 3)):
        with pytest.raises(sumus.Interrupted, match=f"after round {after} of 5"):
            sumus.run(
                anywhere(name, rounds=5),
                compute=sumus.Compute(workers=workers),
                out=sumus.Output(tmp_path, progress=After(after, lambda: signal.raise_signal(signal.SIGINT))),
            )
    assert told(sumus.run(anywhere(name, rounds=5), compute=sumus.Compute(workers=3), out=tmp_path)) == told(whole)


def crew_parts(experiment: sumus.Experiment, executor: Any) -> tuple[Trainer, RunSetting]:
    population = as_population(experiment.population)
    program = Program(experiment.plan.task, seed=0)
    data = program.learn_schema(0, *program.reader.read(population, 0))
    setting = RunSetting(experiment.plan.with_data(data), population, 0, executor)
    return Trainer(setting, program), setting


def stacked(program: Program, work: Any) -> VectorizedExecutor:
    return VectorizedExecutor(program, work, 4)


def test_whole_groups_go_to_one_process_and_sizes_are_asked_of_all(anywhere: Make) -> None:
    experiment = anywhere("fedavg")
    trainer, setting = crew_parts(experiment, stacked)
    trainer.program.module.train()
    clients = list(range(10))
    sizes = trainer.sizes(clients)
    groups = [[ClientJob(clients[place]) for place in group] for group in trainer.executor.groups(sizes)]
    assert max(map(len, groups)) > 1
    broadcast = setting.plan.algorithm.start(trainer.program.initial_shared, setting.plan.description).broadcast
    alone, shared = Sums(), Sums()
    results = {result.client: result.metrics for result in trainer.train(0, bytes(32), broadcast, groups, alone)}
    with contextlib.closing(Workers(trainer, setting, 3)) as workers:
        assert workers.sizes(clients) == sizes
        again = {result.client: result.metrics for result in workers.train(0, bytes(32), broadcast, groups, shared)}
    assert again == results
    assert sha256(shared[0].total.slots()) == sha256(alone[0].total.slots())


def test_attackers_and_a_travelling_model_train_in_one_process(anywhere: Make, told: Told) -> None:
    attacked = anywhere("fedavg")
    attacked = dataclasses.replace(attacked, population=attacks.sign_flip(attacked.population, share=0.3))
    history = sumus.run(attacked, compute=sumus.Compute(workers=2))
    assert history.notes == (f"{ALONE}attackers cooperate",)
    assert told(history) == told(sumus.run(attacked))
    cyclic = anywhere("fedavg")
    cyclic = dataclasses.replace(
        cyclic, plan=dataclasses.replace(cyclic.plan, algorithm=sumus.cyclic(sumus.sgd(lr=0.1)))
    )
    assert sumus.run(cyclic, compute=sumus.Compute(workers=2)).notes == (
        f"{ALONE}each client trains the model that the previous client has trained",
    )


def test_what_a_worker_is_through_with_while_this_process_trains_its_last_client_counts(
    anywhere: Make, told: Told
) -> None:
    here, experiment = os.getpid(), anywhere("median")
    people = experiment.population

    def load(client: int) -> Any:
        if os.getpid() == here:
            time.sleep(0.1)
        return people[client]

    slow = dataclasses.replace(experiment, population=sumus.Population(people, load), evaluate=sumus.Evaluation())
    alone = dataclasses.replace(experiment, evaluate=sumus.Evaluation())
    assert told(sumus.run(slow, compute=sumus.Compute(workers=2))) == told(sumus.run(alone))


SCRIPT = """
import warnings
warnings.simplefilter("error")
import numpy as np, sumus
from torch import nn

SCALE = 2.0
print("begun")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
    def forward(self, inputs):
        return self.layer(inputs * SCALE)

class Name:
    def __init__(self, number):
        self.number = number
    def __eq__(self, other):
        return isinstance(other, Name) and self.number == other.number
    def __hash__(self):
        return hash(self.number)
    def __repr__(self):
        return f"Name({self.number})"

rng = np.random.default_rng(0)
inputs, targets = rng.normal(size=(160, 4)), rng.integers(0, 2, 160)

def load(client):
    rows = slice(client.number * 20, client.number * 20 + 20)
    return inputs[rows], targets[rows]

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none") * SCALE

task = sumus.Task(Net, loss)
people = sumus.Population([Name(number) for number in range(8)], load)
for workers in (1, 2):
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1, batch_size=5))
    history = sumus.simulate(task, algorithm, people, 3, compute=sumus.Compute(workers=workers))
    print(history.model_sha256, list(history.notes))
"""


def test_a_script_without_a_main_guard_may_define_everything_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCRIPT)
    run = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert run.stderr == ""
    begun, *lines = run.stdout.splitlines()
    assert begun == "begun"
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].endswith("[]")


def test_a_file_of_the_command_line_travels_by_value(tmp_path: Path) -> None:
    """It is a module that no other process finds."""
    (tmp_path / "mine.py").write_text(SCRIPT)
    code = f"""
        import sys
        from sumus.userfile import load
        load({str(tmp_path / "mine.py")!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr == ""
    assert [line.endswith(" []") for line in run.stdout.splitlines()[1:]] == [True, True]


# ── what does not travel ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_population_that_cannot_be_pickled_trains_here_and_it_is_said(anywhere: Make, told: Told) -> None:
    lock = threading.Lock()
    experiment = anywhere("fedavg")
    people = experiment.population

    def load(client: int) -> Any:
        with lock:
            return people[client]

    history = sumus.run(
        dataclasses.replace(experiment, population=sumus.Population(people, load)), compute=sumus.Compute(workers=2)
    )
    (note,) = history.notes
    assert note.startswith(f"{ALONE}the population cannot be sent to another process (TypeError: cannot pickle")
    assert told(history) == told(sumus.run(experiment))


def test_a_model_that_another_process_makes_otherwise_trains_here_and_it_is_said(anywhere: Make) -> None:
    experiment = anywhere("fedavg")

    def model() -> nn.Module:
        net = nn.Linear(6, 2)
        net.register_buffer("where", torch.tensor([float(os.getpid() % 2**20)]))
        return net

    task = dataclasses.replace(experiment.plan.task, model=model, leaves={"where": "frozen"})
    plan = dataclasses.replace(experiment.plan, task=task)
    history = sumus.run(dataclasses.replace(experiment, plan=plan), compute=sumus.Compute(workers=2))
    (note,) = history.notes
    assert note.startswith(f"{ALONE}another process computes different results")


def test_what_is_found_here_alone_trains_here_and_it_is_said(anywhere: Make) -> None:
    experiment = anywhere("fedavg")
    people = sumus.Population(experiment.population, Here(experiment.population, os.getpid()))
    history = sumus.run(dataclasses.replace(experiment, population=people), compute=sumus.Compute(workers=2))
    assert history.notes == (f"{ALONE}it failed in the other process (RuntimeError: only at home)",)


class Here:
    """A loader that can be pickled, and not unpickled elsewhere."""

    def __init__(self, people: Any, process: int) -> None:
        self.people, self.process = people, process
        if os.getpid() != process:
            raise RuntimeError("only at home")

    def __call__(self, client: Any) -> Any:
        return self.people[client]

    def __reduce__(self) -> Any:
        return Here, (None, self.process)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5, "nowhere"])
def test_a_number_of_workers_that_is_none_is_refused(anywhere: Make, workers: Any) -> None:
    with pytest.raises(sumus.ExperimentError, match=r"^workers=.*give .* number of processes"):
        sumus.run(anywhere("fedavg"), compute=sumus.Compute(workers=workers))


def test_a_gpu_is_not_shared(anywhere: Make) -> None:
    with pytest.raises(
        sumus.ExperimentError, match="workers=2 with device='cuda': processes cannot share a GPU; leave"
    ):
        sumus.run(anywhere("fedavg"), compute=sumus.Compute(workers=2, device="cuda"))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_large_arrays_are_mapped_and_not_copied_and_nobody_elses_changes_show(tmp_path: Path) -> None:
    array, tensor = np.arange(100_000.0), torch.arange(100_000.0)
    np.save(tmp_path / "held.npy", np.arange(50_000))
    held = np.load(tmp_path / "held.npy", mmap_mode="r")
    file, spans = packed({"array": array, "tensor": tensor, "held": held[100:], "small": np.ones(3)})
    with file:
        assert [stop - start for start, stop in spans[:-1]] == [800_000, 400_000]
        start, stop = spans[-1]
        assert stop - start < 5000, "neither small arrays nor arrays in files take room"
        one, other = unpacked(file.fileno(), spans), unpacked(file.fileno(), spans)
    one["array"][0] = one["tensor"][0] = 7
    assert other["array"][0] == other["tensor"][0] == array[0] == tensor[0] == 0
    np.testing.assert_array_equal(other["array"], array)
    assert torch.equal(other["tensor"], tensor)
    np.testing.assert_array_equal(other["held"], held[100:])


def resident() -> dict[int, int]:
    """MiB of every process of this run."""
    pages = {
        process: int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in {os.getpid(), *children()}
    }
    return {process: count * os.sysconf("SC_PAGE_SIZE") // 2**20 for process, count in pages.items()}


def test_memory_does_not_grow_over_many_rounds(anywhere: Make) -> None:
    seen: dict[int, dict[int, int]] = {}

    class Look:
        @contextmanager
        def watching(self, experiment: Any, done: int) -> Generator[Callable[[RoundRecord], None], None, None]:
            def show(record: RoundRecord) -> None:
                if record.round in (50, 200):
                    seen[record.round] = resident()

            yield show

    sumus.run(
        dataclasses.replace(anywhere("scaffold", rounds=200), evaluate=sumus.Evaluation()),
        compute=sumus.Compute(workers=2),
        out=sumus.Output(progress=Look()),
    )
    assert seen[50].keys() == seen[200].keys()
    assert len(seen[200]) >= 2  # pytest may have a helper process of its own
    for process, size in seen[200].items():
        assert size <= seen[50][process] + 10


# ── endings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_is_killed_ends_the_run_with_what_there_was(anywhere: Make, told: Told, tmp_path: Path) -> None:
    others = children()  # such as multiprocessing's own helper, which is not ours to kill

    def killing() -> None:
        for process in children() - others:
            os.kill(process, signal.SIGKILL)

    with pytest.raises(
        sumus.ExperimentError, match="^worker 1 ended by SIGKILL: if the machine ran out of memory"
    ) as error:
        sumus.run(
            anywhere("fedavg", rounds=4),
            compute=sumus.Compute(workers=2),
            out=sumus.Output(tmp_path, progress=After(2, killing)),
        )
    assert len(error.value.history.rounds) == 2
    assert told(sumus.run(anywhere("fedavg", rounds=4), out=tmp_path)) == told(sumus.run(anywhere("fedavg", rounds=4)))


LONG = r"""
import os, sys, time
import numpy as np, sumus
from torch import nn

parent = os.getpid()

def load(client):
    rng = np.random.default_rng(client)
    return rng.normal(size=(50, 4)), rng.integers(0, 2, 50)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
    def forward(self, inputs):
        if os.getpid() != parent:
            os.write(1, f"child {os.getpid()}\n".encode())  # in one piece
            time.sleep(30)
        return self.layer(inputs)

task = sumus.Task(Slow, sumus.losses.cross_entropy)
try:
    sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Population(range(8), load), 100, compute=sumus.Compute(workers=3))
except sumus.Interrupted as stop:
    print(stop)
"""


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", set[int]]]:
    """A run in a process group of its own, whose two workers are in the middle of training; and these workers."""
    file = tmp_path / "long.py"
    file.write_text(LONG)
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        workers = set[int]()
        while len(workers) < 2:
            line = process.stdout.readline()
            assert line.startswith("child"), line
            workers.add(int(line.split()[1]))
        yield process, workers
        process.kill()


def test_workers_end_with_their_parent_though_it_is_killed(long_run: tuple["subprocess.Popen[str]", set[int]]) -> None:
    process, workers = long_run
    assert all(map(is_alive, workers))
    process.kill()
    process.wait()
    wait_until(
        lambda: not any(map(is_alive, workers)), "workers outlive their parent", 20
    )  # by themselves they would sleep longer


@pytest.mark.parametrize("whom", ["parent", "everyone"])
def test_ctrl_c_ends_the_run_and_its_workers_quietly(
    long_run: tuple["subprocess.Popen[str]", set[int]], whom: str
) -> None:
    """A terminal sends it to everyone."""
    process, workers = long_run
    if whom == "parent":
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert "stopped after round 0 of 100" in output
    assert errors == ""
    assert not any(map(is_alive, workers))


def failing(kind: str) -> Callable[[int], Any]:
    """A loader that fails in worker processes alone."""
    here = os.getpid()

    def load(client: int) -> Any:
        rng = np.random.default_rng(client)
        inputs = rng.normal(size=(20, 6)).astype(np.float32)
        if os.getpid() != here and client:  # the first one is tried before anyone trains
            match kind:
                case "data":
                    inputs[3] = np.nan
                case "diverged":
                    inputs *= np.float32(1e38)
                case "own":
                    raise Unpicklable
                case "exit":
                    sys.exit(3)
                case _:
                    os._exit(7)
        return inputs, rng.integers(0, 2, 20)

    return load


class Unpicklable(BaseException):
    def __init__(self) -> None:
        super().__init__("too bad")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "data",
            sumus.DataError,
            r"^client \d: its inputs hold a NaN or an infinity at example 3, column 0; clean them",
        ),
        ("diverged", sumus.DivergedError, r"^client \d: the update is not finite at `params\[.*its training diverged"),
        ("own", RuntimeError, r"^Unpicklable: too bad$"),
        ("exit", SystemExit, "^3$"),
        ("crash", sumus.ExperimentError, "^worker 1 ended with exit code 7"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised_here_in_the_same_words(
    anywhere: Make, kind: str, error: Any, message: str
) -> None:
    experiment = anywhere("fedavg")
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    people = sumus.Population(range(10), failing(kind))
    plan = dataclasses.replace(experiment.plan, task=task)
    with pytest.raises(error, match=message) as raised:
        sumus.run(sumus.Experiment(plan, people, rounds=2), compute=sumus.Compute(workers=2))
    if isinstance(raised.value, sumus.DataError | sumus.ParticipantError):
        assert raised.value.client in range(10)
        assert raised.value.history.rounds == ()
    if kind != "crash":
        assert "Traceback" in str(raised.value.__cause__), "with where it was"


def test_workers_are_not_started_where_one_of_them_cannot_be(anywhere: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, setting = crew_parts(anywhere("fedavg"), stacked)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CannotTravel, match="^no process could be started"):
        Workers(trainer, setting, 3)
