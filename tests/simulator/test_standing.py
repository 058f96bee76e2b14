"""Who is worst, by the key that the population has; and how far a run is, for whoever has no terminal."""

import datetime
import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sumus
from sumus.simulator.progress import LineProgress, ProgressFile, progress_of
from sumus.simulator.records import RoundEvaluation, RoundRecord
from tests.simulating import simulated


def person(number: int) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(8, 3)).astype("float32")
    return inputs, (inputs.sum(1) > 0).astype("int64")


class Ward(enum.Enum):
    NORTH = 1
    SOUTH = 2
    EAST = 3


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        inputs, targets = person(index // 8)
        return torch.tensor(inputs[index % 8]), int(targets[index % 8])


def arrays(names: Any) -> sumus.Population:
    pairs = [person(number) for number in range(5)]
    inputs, targets = (np.concatenate([pair[which] for pair in pairs]) for which in (0, 1))
    return sumus.Population.from_arrays(inputs, targets, np.repeat(names, 8))


POPULATIONS: dict[str, Callable[[], Any]] = {
    "range": lambda: sumus.Population(range(-2, 3), load=lambda number: person(number + 2)),
    "numbers": lambda: {number: person(number) for number in range(5)},
    "numpy's numbers": lambda: {np.int64(number): person(number) for number in range(5)},
    "pairs": lambda: {("ward", number): person(number) for number in range(5)},
    "enum": lambda: {ward: person(ward.value) for ward in Ward},
    "dates": lambda: {datetime.date(2026, 1, day): person(day) for day in range(1, 6)},
    "bytes": lambda: {bytes([65 + number]): person(number) for number in range(5)},
    "arrays by number": lambda: arrays(np.arange(5)),
    "arrays by text": lambda: arrays(np.array(list("abcde"))),
    "data set": lambda: sumus.Population.from_dataset(Rows(), np.repeat(np.arange(5), 8)),
}
TASK = sumus.Task(
    lambda: torch.nn.Linear(3, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="net"
)


def run(people: Any, rounds: int = 1, **options: Any) -> sumus.History:
    return simulated(
        TASK,
        sumus.fedavg(sumus.sgd(lr=0.1)),
        people,
        rounds=rounds,
        pacing=sumus.Pacing(cohort=2),
        evaluate=sumus.Evaluation(seen=5),
        **{"progress": False, "executor": "autograd", **options},
    )


@pytest.mark.parametrize("kind", POPULATIONS)
def test_the_worst_client_is_the_key_of_the_population_also_after_a_break(kind: str, tmp_path: Path) -> None:
    people = POPULATIONS[kind]()
    first = run(people, out=tmp_path)
    again = run(people, rounds=1, out=tmp_path)  # nothing is left: all of it comes from the file
    for history in (first, again):
        for spread in history.spreads["seen"].values():
            assert spread.worst_client in people
            assert people[spread.worst_client] is not None
            assert type(spread.worst_client) in {type(client) for client in people}
    assert first.spreads == again.spreads
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["spreads"]["seen"]["loss"]["worst_client"] == str(
        first.spreads["seen"]["loss"].worst_client
    )


def test_a_text_that_is_no_client_stays_text() -> None:
    people = sumus.Population(range(5), load=person)
    assert [people.key_of(text) for text in ("3", "-3", "5", "x", "")] == [3, "-3", "5", "x", ""]


# ── how far ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_round(number: int) -> RoundRecord:
    metrics = {"loss": 0.5, "accuracy": 0.25} if number % 2 == 0 else {}
    return RoundRecord(number, 2, 16, 0.5, RoundEvaluation(metrics), seconds=1.0)


def lines_of(
    capsys: pytest.CaptureFixture[str], rounds: int, seconds: float, first: float = 10.0, done: int = 0
) -> Any:
    """What is printed where each round takes so many seconds."""
    clock = Clock()
    experiment = type("Wanted", (), {"rounds": rounds})()
    with LineProgress(first, clock).watching(experiment, done) as show:
        for number in range(done, rounds):
            clock.now += seconds
            show(a_round(number + 1))
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, rounds=5, seconds=1.0) == [], "what is over at once needs none"
    said = lines_of(capsys, rounds=300, seconds=1.0)
    assert said[0] == "round 10 of 300: loss 0.5000, accuracy 0.250; about 5 min left"
    assert [int(line.split()[1]) for line in said] == [10, 20, 30, 40, 50, 60, 120, 180, 240, 300]
    assert said[-1] == "round 300 of 300: loss 0.5000, accuracy 0.250"
    assert lines_of(capsys, rounds=3, seconds=1.0, first=0.0)[0].startswith("round 1 of 3: loss 0.5000; about 2 s left")
    assert lines_of(capsys, rounds=30, seconds=20.0, done=28)[0].startswith("round 29 of 30: "), "it goes on counting"


def test_a_run_without_a_terminal_says_it_and_one_without_progress_does_not() -> None:
    assert isinstance(progress_of(None), LineProgress)
    assert not isinstance(progress_of(False), LineProgress)


def test_a_folder_says_how_far_its_run_is_while_it_goes_on_and_after_it(tmp_path: Path) -> None:
    seen = list[dict[str, Any]]()

    def look(number: int) -> tuple[Any, Any]:
        path = tmp_path / "progress.json"
        seen.append(json.loads(path.read_text()) if path.exists() else {})
        return person(number)

    run(sumus.Population(range(40), load=look), rounds=4, out=tmp_path)
    after = json.loads((tmp_path / "progress.json").read_text())
    assert any(each.get("rounds") == 4 and each["round"] < 4 and each["stopped"] == "" for each in seen)
    assert (after["round"], after["rounds"], after["stopped"]) == (4, 4, "rounds")
    assert set(after) == {"round", "rounds", "seconds", "loss", "metrics", "stopped"}
    assert 0 <= after["metrics"]["accuracy"] <= 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ends_before_its_time_says_so(tmp_path: Path, stop: type[BaseException]) -> None:
    class Stopping:
        from contextlib import contextmanager

        @contextmanager
        def watching(self, experiment: Any, done: int) -> Any:
            def show(record: RoundRecord) -> None:
                if record.round == 2:
                    raise stop("enough")

            yield show

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        run(POPULATIONS["numbers"](), rounds=4, out=tmp_path, progress=Stopping())
    after = json.loads((tmp_path / "progress.json").read_text())
    assert (after["round"], after["rounds"]) == (2, 4)
    assert after["stopped"] == ("interrupted" if stop is KeyboardInterrupt else "error")


def test_a_standing_is_written_once_a_second_at_most(tmp_path: Path) -> None:
    clock = Clock()
    standing = ProgressFile(tmp_path, 100, clock)
    rounds = list[int]()
    for number in range(1, 31):
        clock.now += 0.125
        standing.note([a_round(each) for each in range(1, number + 1)])
        rounds.append(json.loads((tmp_path / "progress.json").read_text())["round"])
    assert sorted(set(rounds)) == [1, 9, 17, 25]
