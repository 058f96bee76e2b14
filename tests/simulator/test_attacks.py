"""Attackers do what their paper says, everyone else is as before, and a defence can be seen to hold."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sumus
from sumus import attacks
from sumus.aggregate import BUFFERS
from sumus.executors.executor import Trained
from sumus.simulator.populations.attacks import AttackedPopulation, largest_z

Attack = Callable[..., AttackedPopulation]

FORGED: dict[str, Attack] = {
    "sign_flip": attacks.sign_flip,
    "scaled": attacks.scaled,
    "a_little_is_enough": lambda people, **options: attacks.a_little_is_enough(people, z=1.5, **options),
}


def examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    inputs = rng.normal(size=(30, 6)).astype(np.float32)
    return inputs, (inputs @ np.linspace(-1, 1, 6, dtype=np.float32) > 0).astype(np.int64)


PEOPLE = sumus.Population(range(20), examples)


def report(client: int) -> Trained:
    """What a client might have trained: leaves, a number, running statistics."""
    rng = np.random.default_rng(client)
    return Trained(
        client,
        {
            "params": {"w": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=3)},
            "steps": {"": np.asarray(float(client))},
            BUFFERS: {"running_mean": rng.normal(size=3).astype(np.float32)},
        },
        30,
        {"loss": (1.0, 30)},
        {"personal": {"v": rng.normal(size=2)}},
    )


def bits(trained: Trained) -> Any:
    """Everything in a report; equal only for equal bits."""
    parts, state = (
        {
            name: {leaf: (array.dtype.name, array.shape, array.tobytes()) for leaf, array in tree.items()}
            for name, tree in trees.items()
        }
        for trees in (trained.parts, trained.state)
    )
    return parts, state, trained.examples, trained.metrics


def sent(people: sumus.Population, clients: Iterable[int] = range(20)) -> dict[int, Trained]:
    """What arrives of these clients' reports."""
    return {trained.client: trained for trained in people.sent(report(client) for client in clients)}


# ── who attacks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_share_and_the_seed_choose_the_attackers() -> None:
    first = attacks.sign_flip(PEOPLE, share=0.3, seed=1)
    assert len(first.attackers) == 6
    assert first.attackers < set(PEOPLE)
    assert attacks.scaled(PEOPLE, share=0.3, seed=1).attackers == first.attackers
    assert attacks.sign_flip(PEOPLE, share=0.3, seed=2).attackers != first.attackers
    assert not attacks.sign_flip(PEOPLE, share=0.0).attackers
    assert list(first) == list(PEOPLE)


@pytest.mark.parametrize("share", [1.0, -0.5, float("nan"), "0.2"])
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(sumus.ExperimentError, match="share of clients that attack, a number from 0 to below 1"):
        attacks.sign_flip(PEOPLE, share=share)


@pytest.mark.parametrize("name", FORGED)
def test_honest_reports_arrive_as_they_were_sent(name: str) -> None:
    people = FORGED[name](PEOPLE, share=0.4)
    arrived = sent(people)
    assert set(arrived) == set(range(20))
    for client, trained in arrived.items():
        assert (bits(trained) == bits(report(client))) == (client not in people.attackers)


@pytest.mark.parametrize("name", FORGED)
def test_a_round_without_attackers_is_an_honest_round(name: str) -> None:
    people = FORGED[name](PEOPLE, share=0.4)
    honest = [client for client in range(20) if client not in people.attackers]
    arrived = list(people.sent(report(client) for client in honest))
    assert [bits(trained) for trained in arrived] == [bits(report(client)) for client in honest]


@pytest.mark.parametrize("name", FORGED)
def test_numbers_statistics_and_what_the_attacker_keeps_stay_honest(name: str) -> None:
    people = FORGED[name](PEOPLE, share=0.4)
    for client in people.attackers:
        forged, true = sent(people)[client], report(client)
        assert {
            part: {leaf: (a.dtype, a.shape) for leaf, a in tree.items()} for part, tree in forged.parts.items()
        } == {part: {leaf: (a.dtype, a.shape) for leaf, a in tree.items()} for part, tree in true.parts.items()}
        for part in ("steps", BUFFERS):
            for leaf, array in true.parts[part].items():
                np.testing.assert_array_equal(forged.parts[part][leaf], array)
        assert bits(forged)[1:] == bits(true)[1:]


def test_a_part_of_an_attacked_population_is_attacked() -> None:
    flipped = attacks.sign_flip(attacks.label_flip(PEOPLE, classes=2, share=0.4), share=0.4)
    whole = attacks.scaled(flipped, share=0.4)
    gone = [min(whole.attackers), min(set(PEOPLE) - whole.attackers)]
    left = [client for client in PEOPLE if client not in gone]
    for part in (whole.without(gone), whole.subset(left)):
        assert list(part) == left
        assert part.attackers == whole.attackers - set(gone)
        for client, trained in sent(part, left).items():
            assert bits(trained) == bits(sent(whole)[client])
            np.testing.assert_array_equal(part[client][1], whole[client][1])


# ── what they do ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("attack", "factor"),
    [
        (attacks.sign_flip, -1.0),
        (lambda people: attacks.sign_flip(people, factor=2.5), -2.5),
        (attacks.scaled, 10.0),
        (lambda people: attacks.scaled(attacks.sign_flip(people), factor=4.0), -4.0),
    ],
    ids=["sign_flip", "sign_flip more", "scaled", "scaled sign_flip"],
)
def test_leaves_are_multiplied_by_the_factor(attack: Attack, factor: float) -> None:
    people = attack(PEOPLE)
    for client in people.attackers:
        for leaf, array in report(client).parts["params"].items():
            np.testing.assert_array_equal(sent(people)[client].parts["params"][leaf], array * array.dtype.type(factor))


def test_labels_are_flipped_for_attackers_alone() -> None:
    labels = np.arange(10, dtype=np.uint8)
    held = {client: (np.full((10, 2), client), labels) for client in "abcdefgh"}
    people = attacks.label_flip(held, classes=10, share=0.5)
    assert len(people.attackers) == 4
    for client in held:
        inputs, targets = people[client]
        np.testing.assert_array_equal(inputs, held[client][0])
        np.testing.assert_array_equal(targets, labels[::-1] if client in people.attackers else labels)
    np.testing.assert_array_equal(labels, np.arange(10))


@pytest.mark.parametrize(
    "hold",
    [
        lambda inputs, labels: TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels)),
        lambda inputs, labels: list(zip(inputs, labels.tolist(), strict=True)),
        lambda inputs, labels: [inputs, labels],
        lambda inputs, labels: (torch.from_numpy(inputs), torch.from_numpy(labels)),
    ],
    ids=["data set", "list of pairs", "list of two", "tensors"],
)
def test_labels_are_flipped_in_whatever_form_they_are_held(hold: Callable[[Any, Any], Any]) -> None:
    """What a model is trained on is the same as where plain arrays are flipped."""
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.5, batch_size=10))
    held = sumus.Population(range(20), lambda client: hold(*examples(client)))
    ours, plain, honest = (
        sumus.simulate(task, algorithm, people, rounds=1).model_sha256
        for people in (attacks.label_flip(held, classes=2), attacks.label_flip(PEOPLE, classes=2), PEOPLE)
    )
    assert ours == plain != honest


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 2]), np.array([0.0, 1.0]), np.array([True, False])],
    ids=["too many", "floats", "truth values"],
)
def test_targets_that_are_no_labels_of_so_many_classes_are_not_flipped(labels: np.ndarray) -> None:
    people = attacks.label_flip({"a": (np.zeros((2, 3)), labels)}, classes=2, share=0.9)
    with pytest.raises(
        sumus.ExperimentError, match=r"label_flip\(classes=2\): client 'a' holds targets .*below classes="
    ):
        people["a"]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_padding_stays_padding(kind: Callable[[Any], Any]) -> None:
    held = {client: (np.zeros((2, 3)), kind([[0, 4, -100], [3, -100, -100]])) for client in "ab"}
    people = attacks.label_flip(held, classes=5, share=0.9)
    assert people.attackers == {"a", "b"}
    for client in people.attackers:
        assert people[client][1].tolist() == [[4, 0, -100], [1, -100, -100]]


def test_stacked_attacks_have_one_set_of_attackers() -> None:
    """Ten times what was learned from wrong labels."""
    flipped = attacks.label_flip(PEOPLE, classes=2, share=0.25, seed=3)
    both = attacks.scaled(flipped, share=0.25, seed=3)
    assert both.attackers == flipped.attackers
    for client in PEOPLE:
        one_of_them = client in both.attackers
        np.testing.assert_array_equal(both[client][1], 1 - PEOPLE[client][1] if one_of_them else PEOPLE[client][1])
        factor = np.float32(10 if one_of_them else 1)
        np.testing.assert_array_equal(
            sent(both)[client].parts["params"]["w"], report(client).parts["params"]["w"] * factor
        )


def test_a_little_is_enough_sends_its_mean_less_z_deviations_from_every_attacker() -> None:
    """Baruch et al. 2019, Algorithm 3, on what the attackers themselves trained."""
    people = attacks.a_little_is_enough(PEOPLE, share=0.45)
    arrived = sent(people)
    assert len(people.attackers) == 9
    for leaf in ("w", "b"):
        own = np.stack([report(client).parts["params"][leaf] for client in sorted(people.attackers)]).astype(np.float64)
        mean = own.sum(axis=0) / 9
        deviation = np.sqrt(((own - mean) ** 2).sum(axis=0) / 9)
        expected = mean - z_by_definition(20, 9) * deviation
        assert np.abs(expected - mean).max() > 0.1
        for client in people.attackers:
            np.testing.assert_allclose(arrived[client].parts["params"][leaf], expected, rtol=1e-5, atol=1e-6)


def z_by_definition(count: int, attackers: int, supporters: int | None = None) -> float:
    """The largest z with Φ(z) < (n − m − s) / (n − m), s = ⌊n/2 + 1⌋ − m, by halving."""
    supporters = math.floor(count / 2 + 1) - attackers if supporters is None else supporters
    share = (count - attackers - supporters) / (count - attackers)
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < share else (low, middle)
    return low


@pytest.mark.parametrize(("count", "attackers"), [(50, 24), (51, 12), (20, 9), (100, 20), (7, 3), (5, 1)])
def test_z_is_the_papers_largest(count: int, attackers: int) -> None:
    assert largest_z(count, attackers) == pytest.approx(max(0.0, z_by_definition(count, attackers)), abs=1e-9)


@pytest.mark.parametrize(("count", "attackers"), [(10, 6), (11, 6), (20, 15), (50, 26)])
def test_z_is_large_where_the_attackers_are_the_majority(count: int, attackers: int) -> None:
    """They need nobody beside them: as if they needed one."""
    z = largest_z(count, attackers)
    assert z == pytest.approx(z_by_definition(count, attackers, supporters=1), abs=1e-9)
    assert z > 0.6


def test_the_papers_own_example_of_z() -> None:
    assert largest_z(50, 24) == pytest.approx(1.43, abs=0.005)


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_defence_holds_where_the_mean_is_pulled_away() -> None:
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy, metrics={"accuracy": sumus.metrics.accuracy})
    unseen = {client: examples(client) for client in range(100, 110)}

    def accuracy(people: sumus.Population, aggregator: sumus.Aggregator | None = None) -> float:
        algorithm = sumus.fedavg(sumus.sgd(lr=0.5, batch_size=10), aggregator=aggregator)
        history = sumus.simulate(task, algorithm, people, rounds=8, evaluate=sumus.Evaluation(unseen=unseen, every=8))
        return history.metrics["accuracy"]

    attacked = attacks.sign_flip(PEOPLE, share=0.25, factor=5.0)
    assert accuracy(PEOPLE) > 0.9
    assert accuracy(attacked) < 0.5
    assert accuracy(attacked, sumus.robust.median()) > 0.9


def test_in_a_run_the_mean_moves_by_what_the_attackers_turned_round(
    remembering: Callable[[sumus.Population], Any],
) -> None:
    """From one broadcast, so that the first round of an attacked and of an honest run trains the same."""
    task = sumus.Task(lambda: nn.Linear(6, 2), sumus.losses.cross_entropy)
    algorithm = sumus.fedavg(sumus.sgd(lr=0.1, batch_size=10), weight="uniform")
    honest = remembering(PEOPLE)
    attacked = attacks.sign_flip(remembering(PEOPLE), share=0.2)
    before = sumus.simulate(task, algorithm, honest, rounds=1)
    after = sumus.simulate(task, algorithm, attacked, rounds=1)
    turned = [t.parts["params"]["weight"] for t in honest.trained if t.client in attacked.attackers]
    assert len(turned) == 4
    moved = after.model["weight"].numpy() - before.model["weight"].numpy()
    np.testing.assert_allclose(moved, 2 * np.sum(turned, axis=0) / len(PEOPLE), atol=1e-6)
