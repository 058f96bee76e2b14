"""A run: deterministic, resumable, and honest about what it measured."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus import attacks
from sumus.simulator.checkpoint import CHECKPOINT, Checkpoint
from sumus.simulator.records import RoundRecord

Make = Callable[..., sumus.Experiment]

COMPRESSED = sumus.chain(sumus.clip_by_global_norm(1.0), sumus.rotate(), sumus.quantize(bits=8))


class StopAfter:
    """A progress that presses Ctrl-C after some rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def watching(self, experiment: sumus.Experiment, done: int):
        from contextlib import contextmanager

        @contextmanager
        def watch():
            def show(record: RoundRecord) -> None:
                if record.round == self.rounds:
                    raise KeyboardInterrupt

            yield show

        return watch()


def kept_in(folder: Path) -> sumus.MemoryClientStates:
    """The clients' states in a run's checkpoint."""
    checkpoint = Checkpoint.read(folder)
    assert checkpoint is not None
    states = sumus.MemoryClientStates()
    states.restore(checkpoint.clients)
    return states


def test_it_learns(experiment: Make) -> None:
    history = sumus.run(experiment(rounds=40))
    assert history.metrics["accuracy"] > 0.9


@pytest.mark.parametrize("update", [None, COMPRESSED], ids=["floats", "compressed"])
def test_two_runs_with_one_seed_give_one_model_bit_for_bit(experiment: Make, update: sumus.Transform | None) -> None:
    algorithm = sumus.fedavg(sumus.adam(lr=0.05, batch_size=8), update)
    first, second = (sumus.run(experiment(algorithm=algorithm, seed=3)) for _ in range(2))
    assert first.model_sha256 == second.model_sha256
    other = sumus.run(experiment(algorithm=algorithm, seed=4))
    assert other.model_sha256 != first.model_sha256


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_run_goes_on_to_the_same_model(experiment: Make, tmp_path: Path, stop_after: int) -> None:
    server = sumus.optimizers.averaged(sumus.optimizers.adam(lr=0.05, bias_correction=True))
    algorithm = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8), COMPRESSED, server)
    whole = sumus.run(experiment(algorithm=algorithm))
    with pytest.raises(sumus.Interrupted, match=f"after round {stop_after} of 6") as stop:
        sumus.run(
            experiment(algorithm=algorithm),
            out=sumus.Output(tmp_path, checkpoint_every=100, progress=StopAfter(stop_after)),
        )
    assert len(stop.value.history.rounds) == stop_after
    resumed = sumus.run(experiment(algorithm=algorithm), out=tmp_path)
    assert resumed.model_sha256 == whole.model_sha256
    assert [r.round for r in resumed.rounds] == [1, 2, 3, 4, 5, 6]
    assert [r.metrics for r in resumed.rounds] == [r.metrics for r in whole.rounds]


def test_whoever_started_over_is_told_to_go_on_without_that(experiment: Make, tmp_path: Path) -> None:
    """The very same command would start over once more."""
    for restart, again in (
        (True, "run the same experiment again, without restart, to continue$"),
        (False, "same experiment again to continue$"),
    ):
        with pytest.raises(sumus.Interrupted, match=again):
            sumus.run(
                experiment(), out=sumus.Output(tmp_path, restart=restart, progress=StopAfter(2 if restart else 4))
            )
    assert sumus.run(experiment(), out=tmp_path).model_sha256 == sumus.run(experiment()).model_sha256


def test_a_longer_run_goes_on_from_a_finished_one(experiment: Make, tmp_path: Path) -> None:
    sumus.run(experiment(rounds=3), out=tmp_path)
    longer = sumus.run(experiment(rounds=6), out=tmp_path)
    assert longer.model_sha256 == sumus.run(experiment(rounds=6)).model_sha256


def test_personal_leaves_are_kept_by_client_and_survive_a_break(people: sumus.Population, tmp_path: Path) -> None:
    task = sumus.Task(
        model=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)),
        loss=sumus.losses.cross_entropy,
        metrics={"accuracy": sumus.metrics.accuracy},
        leaves={"2.*": "personal"},
    )
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.3, batch_size=8)), sumus.Pacing(cohort=4))
    experiment = sumus.Experiment(plan, people, rounds=6, evaluate=sumus.Evaluation(seen=12))
    whole = sumus.run(experiment, out=tmp_path / "whole")
    with pytest.raises(sumus.Interrupted):
        sumus.run(experiment, out=sumus.Output(tmp_path / "broken", progress=StopAfter(3)))
    resumed = sumus.run(experiment, out=tmp_path / "broken")
    assert resumed.model_sha256 == whole.model_sha256
    one, two = (kept_in(tmp_path / name) for name in ("whole", "broken"))
    trained = [client for client in map(str, people) if one.get(client)]
    assert len(trained) > 4
    for client in map(str, people):
        assert one.get(client).keys() == two.get(client).keys() == ({"personal"} if client in trained else set())
    for client in trained:
        assert set(one.get(client)["personal"]) == {"2.weight", "2.bias"}
        for leaf, array in one.get(client)["personal"].items():
            np.testing.assert_array_equal(array, two.get(client)["personal"][leaf])
    assert resumed.metrics == whole.metrics


def test_another_experiment_does_not_go_on_from_this_folder(experiment: Make, tmp_path: Path) -> None:
    sumus.run(experiment(), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match=r"another seed \(0, now 1\).*--restart"):
        sumus.run(experiment(seed=1), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match="another plan"):
        sumus.run(experiment(algorithm=sumus.fedavg(sumus.sgd(lr=0.1))), out=tmp_path)
    restarted = sumus.run(experiment(seed=1), out=sumus.Output(tmp_path, restart=True))
    assert restarted.model_sha256 == sumus.run(experiment(seed=1)).model_sha256


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda people: people, attacks.sign_flip),
        (attacks.sign_flip, lambda people: people),
        (attacks.sign_flip, attacks.scaled),
        (attacks.scaled, lambda people: attacks.scaled(people, factor=9.0)),
        (attacks.sign_flip, lambda people: attacks.sign_flip(people, share=0.4)),
        (attacks.sign_flip, lambda people: attacks.sign_flip(people, seed=1)),
        (attacks.scaled, lambda people: attacks.scaled(attacks.label_flip(people, classes=2))),
    ],
    ids=["attacked", "honest", "attack", "factor", "share", "seed", "stacked"],
)
def test_a_run_does_not_go_on_with_other_attackers(experiment: Make, tmp_path: Path, before: Any, after: Any) -> None:
    def of(attack: Any, rounds: int) -> sumus.Experiment:
        made = experiment(rounds=rounds)
        return dataclasses.replace(made, population=attack(made.population))

    sumus.run(of(before, 1), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match="holds a run with another population .*--restart"):
        sumus.run(of(after, 2), out=tmp_path)
    assert len(sumus.run(of(before, 2), out=tmp_path).rounds) == 2


def test_a_damaged_checkpoint_is_said_to_be_one(experiment: Make, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(sumus.ExperimentError, match="is not a checkpoint.*move it away"):
        sumus.run(experiment(), out=tmp_path)


def test_ctrl_c_in_a_process_leaves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import sumus, numpy as np\nfrom torch import nn\n"
        "task = sumus.Task(lambda: nn.Linear(4, 2), sumus.losses.cross_entropy)\n"
        "def load(c):\n    r = np.random.default_rng(c)\n    return r.normal(size=(8, 4)), r.integers(0, 2, 8)\n"
        "experiment = sumus.Experiment(sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(4)),"
        " sumus.Population(range(8), load), rounds=100_000)\n"
    )
    command = [
        sys.executable,
        "-m",
        "sumus",
        "simulate",
        str(file),
        "--executor",
        "sequential",
        "--out",
        str(tmp_path / "run"),
        "--checkpoint-every",
        "5",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / CHECKPOINT).exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same experiment again to continue" in errors
    assert "Traceback" not in errors
    checkpoint = Checkpoint.read(tmp_path / "run")
    assert checkpoint is not None
    done = len(checkpoint.rounds)
    again = subprocess.run([*command, "--rounds", str(done + 1), "--json"], capture_output=True, text=True, check=True)
    straight = subprocess.run(
        [*command[:7], "--rounds", str(done + 1), "--json"], capture_output=True, text=True, check=True
    )
    key = '"model_sha256": "'
    assert again.stdout.split(key)[1][:64] == straight.stdout.split(key)[1][:64]
    assert os.listdir(tmp_path / "run")


def test_a_run_stops_at_its_target(experiment: Make) -> None:
    history = sumus.run(experiment(rounds=60, target={"accuracy": 0.8}))
    assert history.stopped == "target"
    assert len(history.rounds) < 60
    assert history.metrics["accuracy"] >= 0.8
    assert all(record.metrics["accuracy"] < 0.8 for record in history.rounds[:-1])


def test_the_last_round_is_always_evaluated_and_others_when_asked(experiment: Make) -> None:
    history = sumus.run(experiment(rounds=5, every=2))
    assert [bool(record.metrics) for record in history.rounds] == [False, True, False, True, True]


def test_the_model_loads_into_the_users_module_and_predicts_as_measured(experiment: Make, task: sumus.Task) -> None:
    history = sumus.run(experiment(rounds=10))
    module = task.make_model()
    module.load_state_dict(history.model)
    module.eval()
    unseen = experiment().evaluate.unseen
    assert unseen is not None
    inputs, labels = (np.concatenate(column) for column in zip(*(unseen[c] for c in unseen), strict=True))
    with torch.no_grad():
        accuracy = float((module(torch.from_numpy(inputs)).argmax(1).numpy() == labels).mean())
    assert accuracy == pytest.approx(history.metrics["accuracy"])


def test_a_round_counts_what_travelled(experiment: Make) -> None:
    parameters = 6 * 8 + 8 + 8 * 2 + 2
    record = sumus.run(experiment(rounds=1)).rounds[0]
    assert (record.clients, record.examples) == (4, 4 * 24)
    assert record.traffic.down == record.traffic.up == 4 * parameters * 4
    codes = sumus.run(experiment(rounds=1, algorithm=sumus.fedavg(sumus.sgd(lr=0.1), COMPRESSED))).rounds[0]
    assert codes.traffic.up == 4 * 256  # one byte each, padded to a block of 256


def test_the_users_model_and_randomness_are_left_alone(people: sumus.Population) -> None:
    module = nn.Linear(6, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    task = sumus.Task(module, sumus.losses.cross_entropy)
    history = sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.5)), people, rounds=2, pacing=sumus.Pacing(3))
    torch.testing.assert_close(torch.rand(3), expected)
    torch.manual_seed(7)
    weighted = sumus.fedavg(
        sumus.sgd(lr=0.5), sumus.weight(cap=4)
    )  # its sums depend on whether the model has statistics
    made = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    sumus.simulate(made, weighted, people, rounds=1, pacing=sumus.Pacing(3))
    torch.testing.assert_close(torch.rand(3), expected)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name])
        assert not torch.equal(history.model[name], value)


def test_clients_heavier_than_the_cap_are_noted() -> None:
    people = sumus.Population(range(2), lambda client: (np.ones((20, 3), np.float32), np.ones((20, 1), np.float32)))
    task = sumus.Task(lambda: nn.Linear(3, 1), sumus.losses.mean_squared_error)
    sums = sumus.FixedPoint.fit(max_count=2, max_weight=10)
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(2), sums=sums)
    (note,) = sumus.run(sumus.Experiment(plan, people, rounds=2)).notes
    assert "more than 10 examples weigh 10" in note


def test_a_diverging_client_is_named_and_the_rounds_before_are_kept(people: sumus.Population, tmp_path: Path) -> None:
    def poisoned(client: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = people[client]
        return (inputs * 1e20 if client == 5 else inputs), labels

    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.1)), sumus.Pacing(1))
    experiment = sumus.Experiment(plan, sumus.Population(range(12), poisoned), rounds=50, seed=1)
    with pytest.raises(sumus.ParticipantError, match=r"client 5: the update .* `params\[") as failure:
        sumus.run(experiment, out=tmp_path)
    assert "lower the learning rate" in str(failure.value)
    checkpoint = Checkpoint.read(tmp_path)
    assert checkpoint is not None
    assert 0 < len(checkpoint.rounds) < 50


@pytest.mark.parametrize("factor", [1e9, math.nan], ids=["beyond the bound", "not finite"])
@pytest.mark.parametrize(
    "options", [{"weight": "uniform"}, {"aggregator": sumus.robust.median()}], ids=["mean", "median"]
)
def test_an_attackers_report_that_cannot_be_counted_is_left_out_alone(
    task: sumus.Task, people: sumus.Population, options: dict[str, Any], factor: float
) -> None:
    """As if it had been lost: everyone else's rounds are those of a population without attackers."""
    attacked, states = attacks.scaled(people, share=0.25, factor=factor), sumus.MemoryClientStates()
    personal = dataclasses.replace(task, leaves={"3.*": "personal"})
    algorithm = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8), **options)
    history = sumus.simulate(personal, algorithm, attacked, rounds=2, out=sumus.Output(client_states=states))
    assert len(attacked.attackers) == 3
    assert [(record.clients, record.reports.dropped) for record in history.rounds] == [(9, 3), (9, 3)]
    (note,) = history.notes
    assert "some attackers' reports were refused: they were not finite, or exceeded the plan's bound" in note
    assert {client for client in people if states.get(str(client))} == set(people) - attacked.attackers
    honest = sumus.simulate(personal, algorithm, people.without(attacked.attackers), rounds=2)
    assert history.model_sha256 == honest.model_sha256
    assert [record.loss for record in history.rounds] == pytest.approx([record.loss for record in honest.rounds])


def test_an_honest_report_that_cannot_be_counted_stops_a_run_with_attackers_too(people: sumus.Population) -> None:
    honest = min(set(people) - attacks.sign_flip(people).attackers)

    def poisoned(client: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = people[client]
        return (inputs * 1e20 if client == honest else inputs), labels

    attacked = attacks.sign_flip(sumus.Population(range(12), poisoned))
    assert honest not in attacked.attackers
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    with pytest.raises(sumus.ParticipantError, match=rf"^client {honest}: the update "):
        sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.1)), attacked, rounds=1)


def test_a_run_that_failed_at_once_does_not_lock_its_folder(experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(sumus.ParticipantError):
        sumus.run(experiment(algorithm=sumus.fedavg(sumus.sgd(lr=1e30))), out=tmp_path)
    assert len(sumus.run(experiment(rounds=2), out=tmp_path).rounds) == 2


def test_fewer_rounds_than_a_folder_holds_are_not_taken_for_done(experiment: Make, tmp_path: Path) -> None:
    sumus.run(experiment(rounds=4), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match="holds 4 rounds, but only 2 are requested"):
        sumus.run(experiment(rounds=2), out=tmp_path)


def test_a_target_is_judged_in_the_same_rounds_whether_or_not_a_run_was_broken(
    experiment: Make, tmp_path: Path
) -> None:
    wanted = {"every": 4, "target": {"accuracy": 0.01}}
    whole = sumus.run(experiment(rounds=9, **wanted))
    sumus.run(experiment(rounds=1, **wanted), out=tmp_path)
    broken = sumus.run(experiment(rounds=9, **wanted), out=tmp_path)
    assert (len(whole.rounds), whole.stopped) == (len(broken.rounds), broken.stopped) == (4, "target")


def test_a_folder_that_cannot_be_written_is_found_before_training(experiment: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sumus.ExperimentError, match="nothing can be written to"):
        sumus.run(experiment(), out=tmp_path / "file")


def test_a_server_step_that_diverges_is_not_blamed_on_a_client(experiment: Make) -> None:
    algorithm = sumus.fedavg(sumus.sgd(lr=0.5, batch_size=8), server=sumus.optimizers.sgd(1e45))
    with pytest.raises(sumus.UsageError, match=r"the server optimizer sgd\(lr=1e\+45\) gave NaN or infinity"):
        sumus.run(experiment(rounds=1, algorithm=algorithm))


def test_people_who_train_are_not_unseen(task: sumus.Task, people: sumus.Population) -> None:
    with pytest.raises(sumus.ExperimentError, match="client 3 of .*unseen.* is in the population too"):
        sumus.simulate(
            task,
            sumus.fedavg(sumus.sgd(lr=0.1)),
            people,
            rounds=1,
            evaluate=sumus.Evaluation(unseen=people.subset([3])),
        )


def test_a_module_given_by_a_callable_is_left_alone(people: sumus.Population) -> None:
    net = nn.Linear(6, 2)
    task = sumus.Task(lambda: net, sumus.losses.cross_entropy)
    one, two = (sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=0.5)), people, rounds=1).model_sha256 for _ in range(2))
    assert one == two


def test_a_loader_may_use_its_buffer_again(task: sumus.Task, people: sumus.Population) -> None:
    buffer = np.empty((24, 6), np.float32)

    def load(client: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, labels = people[client]
        buffer[:] = inputs
        return buffer, labels

    algorithm = sumus.fedavg(sumus.sgd(lr=0.1, batch_size=8))
    plain = sumus.simulate(task, algorithm, people, rounds=3)
    assert (
        sumus.simulate(task, algorithm, sumus.Population(range(12), load), rounds=3).model_sha256 == plain.model_sha256
    )


def test_the_loss_of_a_round_is_not_held_within_what_a_sum_can_hold() -> None:
    people = {name: (np.zeros((50, 1), np.float32), np.full((50, 1), 3e6, np.float32)) for name in "abc"}
    task = sumus.Task(lambda: nn.Linear(1, 1), sumus.losses.mean_squared_error)
    record = sumus.simulate(task, sumus.fedavg(sumus.sgd(lr=1e-9)), people, rounds=1).rounds[0]
    assert record.loss == pytest.approx(9e12, rel=1e-3)


def test_running_statistics_are_averaged_whatever_the_server_optimizer(people: sumus.Population) -> None:
    task = sumus.Task(
        model=lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        loss=sumus.losses.cross_entropy,
    )
    plan = sumus.Plan(task, sumus.fedadam(sumus.sgd(lr=0.1, batch_size=8), lr=0.5), sumus.Pacing(4))
    model = sumus.run(sumus.Experiment(plan, people, rounds=15)).model
    assert (model["1.running_var"] > 0).all()
    assert not torch.equal(model["1.running_mean"], torch.zeros(4))
    assert int(model["1.num_batches_tracked"]) == 0


@pytest.mark.parametrize(
    "update", [COMPRESSED, sumus.chain(sumus.weight(cap=2**16), COMPRESSED)], ids=["clip", "weight, clip"]
)
def test_running_statistics_go_beside_the_chain(people: sumus.Population, update: sumus.Transform) -> None:
    """A whole-client batch and momentum=1: each client's statistics are its own data's, and the model's their average."""
    task = sumus.Task(
        model=lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=1.0), nn.Linear(6, 2)), loss=sumus.losses.cross_entropy
    )
    plan = sumus.Plan(task, sumus.fedyogi(sumus.sgd(lr=0.1), lr=0.5, update=update), sumus.Pacing(12))
    history = sumus.run(sumus.Experiment(plan, people, rounds=2))
    means, variances = zip(*((x.mean(0), x.var(0, ddof=1)) for x, _ in people.values()), strict=True)
    np.testing.assert_allclose(history.model["0.running_mean"], np.mean(means, 0), atol=1e-6)
    np.testing.assert_allclose(history.model["0.running_var"], np.mean(variances, 0), rtol=1e-6)
    record = history.rounds[0]
    assert record.traffic.down == 12 * 4 * (6 * 2 + 6 * 2 + 6 * 2 + 2)
    assert record.traffic.up == 12 * (64 + 4 * 12)  # codes padded to a block, and statistics as they are


def test_a_loss_that_is_no_number_names_the_client() -> None:
    """Single precision overflows in the square; the clipped gradient is fine."""
    examples = {"alice": (np.ones((4, 3), np.float32), np.full((4, 1), 1e25, np.float32))}
    task = sumus.Task(lambda: nn.Linear(3, 1), lambda outputs, targets: (outputs - targets).square().sum(1))
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1, clip_norm=1.0))
    for begin in (
        lambda: sumus.simulate(task, algorithm, examples, rounds=2),
        lambda: sumus.check(sumus.Plan(task, algorithm, sumus.Pacing(1)), examples),
    ):
        with pytest.raises(sumus.DivergedError, match=r"client 'alice': .*metrics\[loss\].*correct the loss"):
            begin()


def test_a_forward_in_place_does_not_change_the_data() -> None:
    class InPlace(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs -= 1
            return super().forward(inputs)

    inputs, labels = np.ones((6, 3), np.float32), np.array([0, 1, 0, 1, 0, 1])
    task = sumus.Task(lambda: InPlace(3, 2), sumus.losses.cross_entropy)
    sumus.simulate(
        task,
        sumus.fedavg(sumus.sgd(lr=0.1, epochs=2)),
        {"a": (inputs, labels)},
        rounds=2,
        evaluate=sumus.Evaluation(central=(inputs, labels), seen=1),
    )
    np.testing.assert_array_equal(inputs, np.ones((6, 3)))


def test_a_run_a_check_and_a_bundle_name_one_plan(experiment: Make) -> None:
    made = experiment(rounds=1)
    assert sumus.run(made).provenance.plan_id == sumus.check(made.plan, made.population).plan_id


def test_a_target_of_an_error_is_reached_from_above(people: sumus.Population) -> None:
    @sumus.metrics.lower_is_better
    def off(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(-1) != targets).double()

    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy, {"off": off})
    history = sumus.simulate(
        task,
        sumus.fedavg(sumus.sgd(lr=0.3, batch_size=8)),
        people,
        rounds=40,
        pacing=sumus.Pacing(4),
        evaluate=sumus.Evaluation(seen=12, target={"off": 0.1}),
    )
    assert history.stopped == "target"
    assert history.metrics["off"] <= 0.1
    assert all(record.metrics["off"] > 0.1 for record in history.rounds[:-1])
    assert history.spreads["seen"]["off"].worst >= history.spreads["seen"]["off"].mean


def test_a_checkpoint_is_written_every_few_rounds(experiment: Make, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(StopAfter):
        def watching(self, experiment: sumus.Experiment, done: int):
            from contextlib import contextmanager

            @contextmanager
            def watch():
                def show(record: RoundRecord) -> None:
                    checkpoint = Checkpoint.read(tmp_path)
                    seen.append(len(checkpoint.rounds) if checkpoint else 0)

                yield show

            return watch()

    sumus.run(experiment(rounds=6), out=sumus.Output(tmp_path, checkpoint_every=2, progress=Watch(0)))
    assert seen == [0, 0, 2, 2, 4, 4]
