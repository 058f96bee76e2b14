"""After each round: a function of the user's own, the best model, patience, and what was measured before the first round."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sumus
from sumus.simulator.after_round import RoundOutcome
from sumus.simulator.kept import BestSoFar
from sumus.simulator.records import RoundEvaluation, RoundRecord
from sumus.simulator.stopping import Stopping
from tests.simulating import doors

Make = Callable[..., sumus.Experiment]


def heard_of(experiment: sumus.Experiment, **options: Any) -> tuple[list[RoundOutcome], sumus.History]:
    heard: list[RoundOutcome] = []
    return heard, sumus.run(experiment, after_round=lambda outcome: heard.append(outcome), **doors(options))


@pytest.mark.parametrize("how", [{"executor": "vectorized:2"}, {"executor": "autograd", "workers": 2}], ids=str)
def test_it_is_told_of_every_round_in_every_executor(people: sumus.Population, how: dict[str, Any]) -> None:
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy})
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.2, batch_size=24)), sumus.Pacing(cohort=4))
    made = sumus.Experiment(plan, people, 3, sumus.Evaluation(seen=3, first=True, every=2, best="accuracy"))
    heard, history = heard_of(made, **how)
    assert [outcome.round for outcome in heard] == [0, 1, 2, 3]
    assert [outcome.record for outcome in heard] == [history.start, *history.rounds]
    assert [bool(outcome.metrics) for outcome in heard] == [True, False, True, True]
    assert heard[2].spreads["seen"]["accuracy"] == history.rounds[1].evaluation.spreads["seen"]["accuracy"]
    assert all(torch.equal(heard[3].model[name], leaf) for name, leaf in history.model.items())
    assert not all(torch.equal(heard[2].model[name], leaf) for name, leaf in history.model.items())
    assert sumus.run(made, compute=how["executor"]).model_sha256 == history.model_sha256


def test_it_is_told_of_rounds_through_the_wire(task: sumus.Task, people: sumus.Population) -> None:
    algorithm = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8))
    made = sumus.Experiment(
        sumus.Plan(task, algorithm, sumus.Pacing(4), 4), people, 3, sumus.Evaluation(seen=3, first=True, best="loss")
    )
    here, there = (heard_of(made, executor="autograd", through=through) for through in ("memory", "wire"))
    assert [outcome.metrics for outcome in here[0]] == [outcome.metrics for outcome in there[0]]
    assert here[1].best is not None
    assert there[1].best is not None
    assert here[1].best.model_sha256 == there[1].best.model_sha256


def test_figures_are_what_a_table_holds(experiment: Make) -> None:
    heard, history = heard_of(experiment(rounds=2, first=True))
    frame = history.to_frame()
    for outcome in heard:
        for name, value in outcome.figures.items():
            assert frame.loc[outcome.round, name.replace(".", "/")] == value
    assert "loss" not in heard[0].figures  # nobody trained
    assert "unseen/accuracy.worst_decile" in heard[0].figures
    assert math.isnan(frame.loc[0, "loss"])


def test_it_ends_a_run_and_the_folder_goes_on(experiment: Make, tmp_path: Path) -> None:
    made = experiment(rounds=6)
    stopped = sumus.run(made, after_round=lambda outcome: "stop" if outcome.round == 2 else None, out=tmp_path)
    assert (stopped.stopped, len(stopped.rounds)) == ("after_round", 2)
    heard, gone_on = heard_of(made, out=tmp_path)
    assert [outcome.round for outcome in heard] == [3, 4, 5, 6]
    assert gone_on.model_sha256 == sumus.run(made).model_sha256


def test_it_may_end_a_run_before_round_1(experiment: Make) -> None:
    history = sumus.run(experiment(rounds=6, first=True), after_round=lambda outcome: "stop")
    assert history.start is not None
    assert (history.rounds, history.stopped) == ((), "after_round")


def disturb(outcome: RoundOutcome) -> None:
    """Whatever would change numbers, if training saw it."""
    torch.manual_seed(7)
    torch.rand(outcome.round + 1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    for leaf in outcome.model.values():
        leaf.zero_()


def test_nothing_that_it_does_changes_a_number(experiment: Make) -> None:
    made = experiment()
    before = torch.get_rng_state()
    assert sumus.run(made, after_round=disturb).model_sha256 == sumus.run(made).model_sha256
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_what_it_draws_goes_on_from_round_to_round(experiment: Make) -> None:
    drawn: list[float] = []
    sumus.run(experiment(rounds=4), after_round=lambda outcome: drawn.append(float(torch.rand(()))))
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda outcome: True, "after_round returned True after round 1: return 'stop' to end the run, or None"),
        (lambda outcome: "halt", "after_round returned 'halt'"),
        (lambda outcome: 1 / 0, "after_round of round 1 failed: ZeroDivisionError"),
        (lambda: None, "after_round of round 1 failed: TypeError"),
        (lambda outcome: outcome.metrics.update(a=1), "after_round of round 1 failed: AttributeError"),
    ],
    ids=["true", "other word", "raises", "takes nothing", "writes"],
)
def test_what_it_does_wrong_is_said_and_the_round_is_kept(
    experiment: Make, tmp_path: Path, function: Any, said: str
) -> None:
    with pytest.raises(sumus.UsageError, match=said) as raised:
        sumus.run(experiment(), after_round=function, out=tmp_path)
    assert len(raised.value.history.rounds) == 1
    assert sumus.run(experiment(), out=tmp_path).model_sha256 == sumus.run(experiment()).model_sha256


def test_what_is_no_function_is_refused_before_the_first_round(experiment: Make) -> None:
    with pytest.raises(sumus.ExperimentError, match=r"after_round=3: give a function"):
        sumus.run(experiment(), after_round=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'afterround'"):
        sumus.run(experiment(), afterround=print)  # pyright: ignore[reportCallIssue]


def test_ctrl_c_in_it_is_ctrl_c(experiment: Make) -> None:
    def press(outcome: RoundOutcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(sumus.Interrupted, match="stopped after round 1 of 6"):
        sumus.run(experiment(), after_round=press)


def test_a_population_that_grows_without_saying_so_is_refused(task: sumus.Task, people: sumus.Population) -> None:
    growing = {client: people[client] for client in range(4)}

    def grow(outcome: RoundOutcome) -> None:
        growing[9] = people[9]

    with pytest.raises(sumus.ExperimentError, match=r"has grown from 4 clients to 5 .*population.joining"):
        sumus.simulate(task, sumus.fedavg(sumus.sgd(0.1)), growing, 3, after_round=grow)


# ── the best model, and patience ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_best_model_is_the_one_of_the_best_record(experiment: Make, tmp_path: Path, metric: str) -> None:
    heard, history = heard_of(experiment(rounds=8, first=True, best=metric), out=tmp_path)
    values = [outcome.metrics[metric] for outcome in heard]
    best = history.best
    assert best is not None
    assert best.value == (max if metric == "accuracy" else min)(values)
    assert best.round == values.index(best.value)  # the first of equal ones
    assert all(torch.equal(leaf, best.model[name]) for name, leaf in heard[best.round].model.items())
    assert all(torch.equal(leaf, best.model[name]) for name, leaf in load_file(tmp_path / "best.safetensors").items())
    better = [o.round for o in heard if all((o.metrics[metric] < v) == (metric == "loss") and o.metrics[metric] != v
                                            for v in values[: o.round])]  # fmt: skip
    assert [outcome.round for outcome in heard if outcome.is_best] == better


def test_a_run_that_was_cut_keeps_the_same_best_model(experiment: Make, tmp_path: Path) -> None:
    """Also where the cut run measured its last round out of turn."""
    chosen: dict[str, Any] = {"every": 2, "best": "loss", "first": True}
    straight = sumus.run(experiment(rounds=8, **chosen))
    for rounds in (3, 5, 8):
        cut = sumus.run(experiment(rounds=rounds, **chosen), out=tmp_path)
    assert (cut.best, straight.best) != (None, None)
    assert cut.best is not None
    assert straight.best is not None
    assert (cut.best.round, cut.best.model_sha256) == (straight.best.round, straight.best.model_sha256)
    assert cut.start is not None
    assert straight.start is not None
    assert cut.start.evaluation == straight.start.evaluation


def test_patience_ends_a_run(experiment: Make, tmp_path: Path) -> None:
    history = sumus.run(experiment(rounds=60, best="accuracy", patience=3), out=tmp_path)
    assert history.best is not None
    assert history.stopped == "patience"
    assert len(history.rounds) == history.best.round + 3
    again = sumus.run(experiment(rounds=60, best="accuracy", patience=3), out=tmp_path)
    assert (again.stopped, len(again.rounds)) == ("patience", len(history.rounds))
    longer = sumus.run(experiment(rounds=60, best="accuracy", patience=4), out=tmp_path)
    assert len(longer.rounds) > len(history.rounds)


def record(number: int, **metrics: float) -> RoundRecord:
    return RoundRecord(number, 1, 1, 0.0, RoundEvaluation(metrics))


def test_nan_is_the_worst() -> None:
    stopping = Stopping(sumus.Evaluation(seen=1, best="accuracy", patience=2), lambda name: False)
    assert stopping.improves(record(1, accuracy=math.nan), None)
    assert stopping.improves(record(2, accuracy=0.0), BestSoFar("accuracy", 1, math.nan))
    assert not stopping.improves(record(2, accuracy=math.nan), BestSoFar("accuracy", 1, math.nan))
    assert not stopping.improves(record(2, accuracy=math.nan), BestSoFar("accuracy", 1, -5.0))
    lower = Stopping(sumus.Evaluation(seen=1, best="loss"), lambda name: True)
    assert not lower.improves(record(2, loss=math.nan), BestSoFar("loss", 1, 9.0))
    assert lower.improves(record(2, loss=-math.inf), BestSoFar("loss", 1, 9.0))


def test_patience_counts_measurements_and_not_rounds() -> None:
    stopping = Stopping(sumus.Evaluation(seen=1, every=3, best="accuracy", patience=2), lambda name: False)
    rounds = [record(number, **({"accuracy": 0.5} if number % 3 == 0 or number == 7 else {})) for number in range(1, 9)]
    kept = BestSoFar("accuracy", 3, 0.5)
    assert stopping.why(rounds, kept) is None  # 6; 7 was out of turn
    assert stopping.why([*rounds, record(9, accuracy=0.1)], kept) == "patience"


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"seen": 1, "patience": 3}, r"patience=\) needs best="),
        ({"seen": 1, "best": "accuracy", "patience": 0}, "wait for 1 or more"),
        ({"best": "accuracy"}, r"best=\) needs something to measure on"),
        ({"first": True}, r"first=\) needs something to measure on"),
        ({"seen": 1, "best": 3}, "takes a str"),
        ({"seen": 1, "first": 1}, "takes a bool"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(evaluate: dict[str, Any], said: str) -> None:
    with pytest.raises(sumus.UsageError, match=said):
        sumus.Evaluation(**evaluate)


def test_a_best_that_is_not_measured_is_refused(experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(sumus.ExperimentError, match=r"best= names 'acuracy', .* give one of loss, accuracy"):
        sumus.run(experiment(best="acuracy"))
    sumus.run(experiment(rounds=2, best="loss"), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match=r"keeps the best model by 'loss', not by 'accuracy'"):
        sumus.run(experiment(rounds=3, best="accuracy"), out=tmp_path)
    assert sumus.run(experiment(rounds=3), out=tmp_path).best is None
    late = sumus.run(experiment(rounds=4, best="accuracy"), out=tmp_path)
    assert any("the best model is the best since round 4" in note for note in late.notes)
