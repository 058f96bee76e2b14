"""Reports get lost, devices are late, runs are broken: what clients keep and what the server has stay together."""

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus import robust
from sumus.algorithms import scaffold
from sumus.executors.executor import Trained
from sumus.rng import generator
from sumus.simulator.checkpoint import CHECKPOINT, Checkpoint
from sumus.simulator.history import History
from sumus.simulator.records import RoundRecord
from sumus.storage.client_states import ClientStates
from sumus.work import ClientState, LocalRun, Parts, send_difference

LOSSY = sumus.Fleet(lost=0.4)
STORES: dict[str, Callable[[Path], ClientStates]] = {
    "memory": lambda folder: sumus.MemoryClientStates(),
    "directory": lambda folder: sumus.DirectoryClientStates(folder),
}


class After:
    """A progress that does something after a round."""

    def __init__(self, number: int, action: Callable[[], Any]) -> None:
        self.number = number
        self.action = action

    @contextmanager
    def watching(self, experiment: sumus.Experiment, done: int) -> Generator[Callable[[RoundRecord], None], None, None]:
        def show(record: RoundRecord) -> None:
            if record.round == self.number:
                self.action()

        yield show


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


def personal(**changes: Any) -> sumus.Task:
    """A task whose last layer is everyone's own."""
    return sumus.Task(net, sumus.losses.cross_entropy, leaves={"2.*": "personal"}, **changes)


@pytest.fixture
def controlled(people: sumus.Population) -> Callable[..., sumus.Experiment]:
    """SCAFFOLD with personal leaves beside: both kinds of state."""

    def make(fleet: sumus.Fleet = LOSSY, rounds: int = 6, **changes: Any) -> sumus.Experiment:
        plan = sumus.Plan(personal(**changes), sumus.scaffold(sumus.sgd(lr=0.2, batch_size=8)), sumus.Pacing(5))
        return sumus.Experiment(plan, people, rounds, sumus.Evaluation(seen=6), seed=2, fleet=fleet)

    return make


def told(records: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """Everything in the records but the time they took."""
    return [{**record.to_json(), "seconds": 0} for record in records]


def kept(states: ClientStates, people: sumus.Population) -> dict[Any, dict[str, dict[str, bytes]]]:
    """Everyone's state, bit for bit."""
    return {
        client: {
            name: {k: leaf.tobytes() for k, leaf in tree.items()} for name, tree in states.get(str(client)).items()
        }
        for client in people
    }


def is_lost(fleet: sumus.Fleet, number: int, client: Any) -> bool:
    """What becomes of a client's report in a round, with seed 0."""
    return fleet.fate(1, generator(0, "round", number, "client", client, "fleet")).lost


# ── the draw ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "shares", [{"lost": -0.1}, {"lost": 1.01}, {"stragglers": 2}, {"stragglers": float("nan")}], ids=str
)
def test_a_share_that_is_none_is_refused(shares: dict[str, float]) -> None:
    (name,) = shares
    with pytest.raises(sumus.ExperimentError, match=rf"Fleet\({name}=.*\): it is a share, a number from 0 to 1"):
        sumus.Fleet(**shares)


def test_fates_fall_as_often_as_the_fleet_says() -> None:
    fleet = sumus.Fleet(lost=0.3, stragglers=0.5)
    fates = [fleet.fate(8, generator(0, number)) for number in range(4000)]
    assert np.mean([fate.lost for fate in fates]) == pytest.approx(0.3, abs=0.03)
    steps = [fate.most_steps for fate in fates if fate.most_steps is not None]
    assert len(steps) / 4000 == pytest.approx(0.5, abs=0.03)
    assert np.bincount(steps, minlength=9)[1:] / len(steps) == pytest.approx(np.full(8, 1 / 8), abs=0.03)
    assert np.mean([fate.lost for fate in fates if fate.most_steps]) == pytest.approx(0.3, abs=0.04)
    assert not any(fate.late for fate in fates)


# ── lost reports ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_lossy_run_that_was_broken_ends_like_one_that_was_not(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str, stop_after: int
) -> None:
    whole_states = sumus.MemoryClientStates()
    whole = sumus.run(controlled(), out=sumus.Output(client_states=whole_states))
    assert 0 < sum(record.reports.dropped for record in whole.rounds) < 6 * 5
    assert all(record.clients + record.reports.dropped == 5 for record in whole.rounds)
    with pytest.raises(sumus.Interrupted, match=f"after round {stop_after} of 6"):
        sumus.run(
            controlled(),
            out=sumus.Output(
                tmp_path / "run",
                checkpoint_every=3,
                client_states=STORES[store](tmp_path / "states"),
                progress=After(stop_after, ctrl_c),
            ),
        )
    states = STORES[store](tmp_path / "states")
    resumed = sumus.run(controlled(), out=sumus.Output(tmp_path / "run", client_states=states))
    assert resumed.model_sha256 == whole.model_sha256
    assert told(resumed.rounds) == told(whole.rounds)
    people = controlled().population
    assert kept(states, people) == kept(whole_states, people)


def test_the_servers_control_stays_the_mean_of_everyones(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path
) -> None:
    """c = Σcᵢ/N holds only if a lost report moves neither."""
    states = sumus.MemoryClientStates()
    sumus.run(controlled(rounds=8), out=sumus.Output(tmp_path, client_states=states))
    checkpoint = Checkpoint.read(tmp_path)
    assert checkpoint is not None
    people = controlled().population
    for leaf, control in checkpoint.state.memory["control"].items():
        own = [states.get(str(client)).get("control", {}).get(leaf, np.zeros(control.shape)) for client in people]
        np.testing.assert_allclose(control, np.mean(own, axis=0), atol=1e-6)
        assert np.abs(control).max() > 1e-3


def test_another_fleet_does_not_go_on_from_this_folder(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path
) -> None:
    sumus.run(controlled(rounds=2), out=tmp_path)
    with pytest.raises(sumus.ExperimentError, match="another fleet .*--restart"):
        sumus.run(controlled(sumus.Fleet(lost=0.1)), out=tmp_path)


@pytest.mark.parametrize("store", STORES)
def test_states_of_another_run_are_not_forgotten_unasked(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str
) -> None:
    states = STORES[store](tmp_path / "states")
    whole = sumus.run(controlled(rounds=2), out=sumus.Output(tmp_path / "run", client_states=states))
    people = controlled().population
    before = kept(states, people)
    with pytest.raises(sumus.ExperimentError, match="holds the states of another run, .*restart=True"):
        sumus.run(controlled(rounds=2), out=sumus.Output(tmp_path / "mistyped", client_states=states))
    assert kept(states, people) == before
    again = sumus.run(controlled(rounds=2), out=sumus.Output(tmp_path / "other", client_states=states, restart=True))
    assert again.model_sha256 == whole.model_sha256


@pytest.mark.parametrize("store", STORES)
def test_a_run_that_cannot_start_over_forgets_no_states(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str
) -> None:
    states = STORES[store](tmp_path / "states")
    sumus.run(controlled(rounds=2), out=sumus.Output(tmp_path / "run", client_states=states))
    people = controlled().population
    before = kept(states, people)
    misspelt = dataclasses.replace(controlled(), evaluate=sumus.Evaluation(seen=6, target={"los": 0.1}))
    with pytest.raises(sumus.ExperimentError, match="the target names 'los', which is not measured"):
        sumus.run(misspelt, out=sumus.Output(tmp_path / "run", client_states=states, restart=True))
    assert kept(states, people) == before
    longer = sumus.run(controlled(), out=sumus.Output(tmp_path / "run", client_states=states))
    assert longer.model_sha256 == sumus.run(controlled()).model_sha256


def test_a_round_in_which_every_report_is_lost_leaves_the_model_and_the_run_goes_on(
    task: sumus.Task, people: sumus.Population, tmp_path: Path
) -> None:
    plan = sumus.Plan(task, sumus.fedadam(sumus.sgd(lr=0.2, batch_size=8), lr=0.05), sumus.Pacing(2))
    evaluate = sumus.Evaluation(unseen=people.subset([10, 11]))
    experiment = sumus.Experiment(plan, people.without([10, 11]), 12, evaluate, fleet=sumus.Fleet(lost=0.75))
    history = sumus.run(experiment, out=tmp_path)
    lost = [record.reports.dropped == 2 for record in history.rounds]
    assert 2 < sum(lost) < 10
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for before, record, line in zip(history.rounds, history.rounds[1:], lines[1:], strict=False):
        assert (record.evaluation.by_source == before.evaluation.by_source) == (record.reports.dropped == 2)
        assert math.isnan(record.loss) == (line["loss"] is None) == (record.reports.dropped == 2)
        assert (record.clients, record.examples) == (2 - record.reports.dropped, 24 * (2 - record.reports.dropped))
        assert record.traffic.up == record.traffic.down > 0  # a lost report was sent all the same
    longer = sumus.run(dataclasses.replace(experiment, rounds=13), out=tmp_path)
    np.testing.assert_array_equal(
        [record.loss for record in longer.rounds[:12]], [record.loss for record in history.rounds]
    )


def test_who_trained_with_whom_does_not_depend_on_who_was_lost(
    remembering: Callable[[sumus.Population], Any], people: sumus.Population
) -> None:
    watched = remembering(people), remembering(people)
    plan = sumus.Plan(personal(), sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8)), sumus.Pacing(5))
    for population, fleet in zip(watched, (sumus.Fleet(), LOSSY), strict=True):
        sumus.run(sumus.Experiment(plan, population, 3, fleet=fleet))
    one, other = (list(population.trained) for population in watched)
    cohorts = [one[5 * number : 5 * number + 5] for number in range(3)]
    arrived = [t for number, cohort in enumerate(cohorts) for t in cohort if not is_lost(LOSSY, number, t.client)]
    assert [trained.client for trained in other] == [trained.client for trained in arrived]


def test_seen_people_are_measured_with_the_leaves_that_they_keep(people: sumus.Population) -> None:
    """Those of this round where the report was counted, and the earlier ones where it was lost."""
    states = sumus.MemoryClientStates()
    task = personal(metrics={"accuracy": sumus.metrics.accuracy})
    plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(lr=0.3, batch_size=8, epochs=2)), sumus.Pacing(12))
    experiment = sumus.Experiment(plan, people, 2, sumus.Evaluation(seen=12), fleet=sumus.Fleet(lost=0.5))
    history = sumus.run(experiment, out=sumus.Output(client_states=states))
    assert all(1 < record.reports.dropped < 11 for record in history.rounds)
    total = 0.0
    module = net()
    for client, (inputs, labels) in people.items():
        own = {name: torch.from_numpy(leaf) for name, leaf in states.get(str(client)).get("personal", {}).items()}
        module.load_state_dict({**history.model, **own})
        with torch.no_grad():
            outputs = module(torch.from_numpy(inputs))
        total += float(nn.functional.cross_entropy(outputs, torch.from_numpy(labels), reduction="sum"))
    assert history.rounds[-1].evaluation.by_source["seen"]["loss"] == pytest.approx(total / (12 * 24), rel=1e-5)


# ── stragglers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def counting(work: sumus.ClientWork, steps: list[int]) -> sumus.ClientWork:
    """The same work, which notes how many steps each client took."""

    def finish(broadcast: Parts, params: Any, state: ClientState, done: LocalRun) -> tuple[Parts, ClientState]:
        steps.append(done.steps)
        return send_difference(broadcast, params, state, done)

    return dataclasses.replace(work, rules=dataclasses.replace(work.rules, finish=finish))


def with_work(task: sumus.Task, people: sumus.Population, work: sumus.ClientWork, fleet: sumus.Fleet) -> sumus.History:
    plan = sumus.Plan(task, sumus.fedavg(work), sumus.Pacing(len(people)))
    return sumus.run(sumus.Experiment(plan, people, rounds=1, fleet=fleet))


def test_partial_work_is_counted_and_is_the_beginning_of_the_whole(task: sumus.Task, people: sumus.Population) -> None:
    steps: list[int] = []
    work = sumus.sgd(lr=0.2, batch_size=8, epochs=4)  # 12 steps
    record = with_work(task, people, counting(work, steps), sumus.Fleet(stragglers=0.7)).rounds[0]
    assert (record.clients, record.reports.dropped, record.examples) == (12, 0, 12 * 24)
    assert min(steps) < 6
    assert max(steps) == 12
    one = people.subset([3])
    slow: list[int] = []
    history = with_work(task, one, counting(work, slow), sumus.Fleet(stragglers=1.0))
    assert slow[0] < 12
    shorter = sumus.sgd(lr=0.2, batch_size=8, steps=slow[0])
    assert history.model_sha256 == with_work(task, one, shorter, sumus.Fleet()).model_sha256


def test_where_partial_work_is_not_counted_stragglers_do_not_even_begin(
    task: sumus.Task, people: sumus.Population
) -> None:
    steps: list[int] = []
    work = counting(sumus.sgd(lr=0.2, batch_size=8, epochs=4), steps)
    some = with_work(task, people, work, sumus.Fleet(stragglers=0.5, partial_work=False)).rounds[0]
    assert 0 < some.reports.dropped < 12
    assert steps == [12] * (
        some.clients + 1
    )  # the first one is trained again at the end, see `sumus.executors.witness`
    assert some.traffic.up == some.clients * some.traffic.down / 12
    steps.clear()
    few = with_work(task, people, work, sumus.Fleet(stragglers=1.0, partial_work=False)).rounds[0]
    again = min(few.clients, 1)
    assert (few.clients + few.reports.dropped, steps) == (
        12,
        [12] * (few.clients + again),
    )  # those who had time for all of it
    assert few.reports.dropped > 8
    assert few.traffic.up == few.clients * few.traffic.down / 12


# ── breaks at bad moments ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_break_while_the_model_is_measured_undoes_that_round_everywhere(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str, error: type[BaseException]
) -> None:
    broken = str(tmp_path / "broken")  # a file: what the metric's code could see would be put back

    def margin(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if os.path.exists(broken):
            raise error
        return outputs[:, 0] - outputs[:, 1]

    def break_it() -> None:
        Path(broken).touch()

    experiment = controlled(metrics={"margin": margin})
    whole = sumus.run(experiment)
    with pytest.raises((sumus.TaskError, sumus.Interrupted)):
        sumus.run(
            experiment,
            out=sumus.Output(
                tmp_path / "run",
                checkpoint_every=2,
                client_states=STORES[store](tmp_path / "states"),
                progress=After(3, break_it),
            ),
        )
    checkpoint = Checkpoint.read(tmp_path / "run")
    assert checkpoint is not None
    assert len(checkpoint.rounds) == 3
    Path(broken).unlink()
    resumed = sumus.run(
        experiment, out=sumus.Output(tmp_path / "run", client_states=STORES[store](tmp_path / "states"))
    )
    assert resumed.model_sha256 == whole.model_sha256
    assert told(resumed.rounds) == told(whole.rounds)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_first_round_that_fails_leaves_an_empty_store_and_the_same_command_runs_again(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str, error: type[BaseException]
) -> None:
    class Broken(sumus.Population):
        """Whose second report does not come."""

        def sent(self, results: Iterator[Trained]) -> Iterator[Trained]:
            for number, trained in enumerate(results):
                if number == 1:
                    raise error
                yield trained

    whole, states = controlled(), STORES[store](tmp_path / "states")
    people = whole.population
    broken = dataclasses.replace(whole, population=Broken(range(12), people.__getitem__))
    with pytest.raises((ZeroDivisionError, sumus.Interrupted)):
        sumus.run(broken, out=sumus.Output(tmp_path / "run", client_states=states))
    assert states.empty
    again = sumus.run(whole, out=sumus.Output(tmp_path / "run", client_states=states))
    assert again.model_sha256 == sumus.run(whole).model_sha256


@pytest.mark.parametrize("store", STORES)
def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before_to_go_on_from(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, store: str
) -> None:
    in_the_way = tmp_path / "run" / f"{CHECKPOINT}.new"  # of every later checkpoint, as a full disk is
    with pytest.raises(sumus.ExperimentError, match=f"{CHECKPOINT} cannot be written: Is a directory"):
        sumus.run(
            controlled(),
            out=sumus.Output(
                tmp_path / "run",
                checkpoint_every=1,
                client_states=STORES[store](tmp_path / "states"),
                progress=After(2, in_the_way.mkdir),
            ),
        )
    in_the_way.rmdir()
    checkpoint = Checkpoint.read(tmp_path / "run")
    assert checkpoint is not None
    assert len(checkpoint.rounds) == 1
    resumed = sumus.run(
        controlled(), out=sumus.Output(tmp_path / "run", client_states=STORES[store](tmp_path / "states"))
    )
    assert resumed.model_sha256 == sumus.run(controlled()).model_sha256


class Disturbed(sumus.MemoryClientStates):
    """A store during one of whose calls Ctrl-C is pressed."""

    def __init__(self, method: str, number: int) -> None:
        super().__init__()
        self.calls_left = number
        before = getattr(self, method)

        def call(*arguments: Any) -> Any:
            self.calls_left -= 1
            result = before(*arguments)
            if self.calls_left == 0:
                ctrl_c()
            return result

        setattr(self, method, call)


@pytest.mark.parametrize(
    ("method", "number", "done"),
    [
        ("propose", 8, 2),
        ("counted", 2, 1),
        ("counted", 8, 3),
        ("snapshot", 1, 2),
        ("snapshot", 4, 6),
    ],
)
def test_ctrl_c_leaves_whole_rounds_whenever_it_comes(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, method: str, number: int, done: int
) -> None:
    """While clients train the round is undone; while states are settled it is finished first; also when all is done."""
    with pytest.raises(sumus.Interrupted) as stop:
        sumus.run(controlled(), out=sumus.Output(tmp_path, checkpoint_every=2, client_states=Disturbed(method, number)))
    assert len(stop.value.history.rounds) == done
    assert sumus.run(controlled(), out=tmp_path).model_sha256 == sumus.run(controlled()).model_sha256


def test_ctrl_c_while_the_history_is_written_loses_nothing(
    controlled: Callable[..., sumus.Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = sumus.DirectoryClientStates(tmp_path / "states")
    with monkeypatch.context() as pressed:
        pressed.setattr(History, "write_jsonl", lambda history, path: ctrl_c())
        with pytest.raises(
            sumus.Interrupted, match="after round 6 of 6, kept in .*: run the same experiment again"
        ) as stop:
            sumus.run(controlled(), out=sumus.Output(tmp_path / "run", client_states=states))
    assert len(stop.value.history.rounds) == 6
    states = sumus.DirectoryClientStates(tmp_path / "states")
    again = sumus.run(controlled(), out=sumus.Output(tmp_path / "run", client_states=states))
    assert again.model_sha256 == stop.value.history.model_sha256 == sumus.run(controlled()).model_sha256
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 6


# ── one after the other, and one beside the other ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ids", [range(9), list("hbgaciedf")], ids=["range", "names"])
def test_a_travelling_model_visits_its_cohort_in_the_populations_order(
    remembering: Callable[[sumus.Population], Any], ids: Sequence[Any], people: Any
) -> None:
    order = {client: number for number, client in enumerate(ids)}
    watched = remembering(sumus.Population(ids, lambda client: people[order[client]]))
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    plan = sumus.Plan(task, sumus.cyclic(sumus.sgd(lr=0.2, batch_size=8)), sumus.Pacing(5))
    sumus.run(sumus.Experiment(plan, watched, rounds=4))
    visits = [[order[trained.client] for trained in watched.trained[start : start + 5]] for start in range(0, 20, 5)]
    assert all(visit == sorted(visit) for visit in visits)
    assert len({tuple(visit) for visit in visits}) > 1


def test_a_travelling_model_passes_over_those_whose_report_is_lost(
    remembering: Callable[[sumus.Population], Any], people: sumus.Population
) -> None:
    """The last model is what it was at first, less what every counted client took from it."""
    watched = remembering(people)
    module = nn.Linear(6, 2)
    plan = sumus.Plan(sumus.Task(module, sumus.losses.cross_entropy), sumus.cyclic(sumus.sgd(lr=0.2)), sumus.Pacing(12))
    fleet = sumus.Fleet(lost=0.4)
    history = sumus.run(sumus.Experiment(plan, watched, rounds=1, fleet=fleet))
    arrived = [trained for trained in watched.trained if not is_lost(fleet, 0, trained.client)]
    assert 3 < len(arrived) == history.rounds[0].clients < 10
    moved = sum(trained.parts["params"]["weight"] for trained in arrived)
    np.testing.assert_allclose(history.model["weight"].numpy(), module.weight.detach().numpy() - moved, atol=1e-5)


def test_in_a_run_the_median_is_that_of_the_reports(
    remembering: Callable[[sumus.Population], Any], people: sumus.Population
) -> None:
    watched = remembering(people)
    module = nn.Linear(6, 2)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.2, batch_size=8), aggregator=robust.median())
    plan = sumus.Plan(sumus.Task(module, sumus.losses.cross_entropy), algorithm, sumus.Pacing(5))
    history = sumus.run(sumus.Experiment(plan, watched, rounds=1))
    median = np.median([trained.parts["params"]["weight"] for trained in watched.trained], axis=0)
    np.testing.assert_allclose(history.model["weight"].numpy(), module.weight.detach().numpy() - median, atol=1e-6)
    assert history.rounds[0].clients == 5


class Backwards(sumus.Population):
    """A population whose reports come in the opposite order."""

    def sent(self, results: Iterator[Trained]) -> Iterator[Trained]:
        yield from reversed(list(results))


@pytest.mark.parametrize(
    "aggregator", [robust.multi_krum(attackers=1, keep=1), robust.norm_bounded(max_norm=1)], ids=repr
)
def test_in_a_run_robust_rules_do_not_depend_on_who_comes_first(aggregator: sumus.Aggregator) -> None:
    """Of two updates that are equally near to the others the first in the cohort is taken, and floats are added in its
    order; not that of the fastest device. Here −1 and 1 lie between one neighbour on either side."""
    wanted = [-3.0, -1.0, 1.0, 3.0, 100.0]
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.3), aggregator=aggregator)
    plan = sumus.Plan(sumus.Task(module, sumus.losses.mean_squared_error), algorithm, sumus.Pacing(5))
    one, other = (
        sumus.run(sumus.Experiment(plan, people, rounds=1))
        for people in (
            kind(range(5), lambda client: (np.ones((4, 1)), np.full((4, 1), wanted[client])))
            for kind in (sumus.Population, Backwards)
        )
    )
    assert one.model_sha256 == other.model_sha256


def test_a_round_with_too_few_reports_is_void_for_clients_too(
    remembering: Callable[[sumus.Population], Any], people: sumus.Population
) -> None:
    watched = remembering(people)
    aggregator = robust.trimmed_mean(scaffold.PARAMS, scaffold.CONTROL, attackers=1)
    algorithm = dataclasses.replace(sumus.scaffold(sumus.sgd(lr=0.2, batch_size=8)), aggregator=aggregator)
    plan = sumus.Plan(personal(), algorithm, sumus.Pacing(4))
    states = sumus.MemoryClientStates()
    fleet = sumus.Fleet(lost=0.4)
    history = sumus.run(sumus.Experiment(plan, watched, rounds=8, fleet=fleet), out=sumus.Output(client_states=states))
    counted = [record.clients for record in history.rounds]
    assert set(counted) == {0, 3, 4}  # two and one are too few
    expected = sumus.MemoryClientStates()
    assert len(watched.trained) == sum(counted)  # nobody trains for a round that comes to nothing
    for trained in watched.trained:
        expected.propose(str(trained.client), trained.state)
        expected.counted(str(trained.client))
    assert kept(states, people) == kept(expected, people)
