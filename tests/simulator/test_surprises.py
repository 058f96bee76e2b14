"""Notes on runs that do something else than their author may expect: each has a parameter and a remedy, and a control."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sumus
from sumus.simulator.checkpoint import CHECKPOINT, Checkpoint
from sumus.simulator.task_code import changed, digests_of

WORK = sumus.sgd(lr=0.1, batch_size=5)


def people(count: int = 4) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(count, 20, 4)).astype("float32")
    return {person: (own, (own.sum(1) > 0).astype("int64")) for person, own in enumerate(inputs)}


def net() -> nn.Module:
    return nn.Linear(4, 2)


def task(**options: Any) -> sumus.Task:
    return sumus.Task(**({"model": net, "loss": sumus.losses.cross_entropy} | options))


def notes(algorithm: sumus.Algorithm | None = None, rounds: int = 2, **options: Any) -> tuple[str, ...]:
    return sumus.simulate(task(), algorithm or sumus.fedavg(WORK), people(), rounds, **options).notes


# ── few contributors ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("least", "is_noted"), [(5, True), (4, False), (10, False)])
def test_a_round_of_fewer_than_min_contributors_is_noted_once_if_the_plan_names_them(
    least: int, is_noted: bool
) -> None:
    """10 is the default, which a plan that is only simulated does not choose."""
    plan = sumus.Plan(task(), sumus.fedavg(WORK), sumus.Pacing(cohort=4), min_contributors=least)
    found = sumus.run(sumus.Experiment(plan, people(), rounds=3)).notes
    assert len(found) == is_noted
    if is_noted:
        assert "4 contributors" in found[0]
        assert "min_contributors=5" in found[0]
        assert "raise Pacing(cohort=) to 5" in found[0]


# ── the lengths of updates ───────────────────────────────────────────────────────────────────────────────────────────


def clipped(norm: float, *stages: sumus.Transform) -> sumus.Algorithm:
    return sumus.fedavg(WORK, sumus.chain(sumus.clip_by_global_norm(norm), *stages))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_update_far_below_the_clip_of_quantize_is_noted_once(workers: int) -> None:
    algorithm = clipped(100.0, sumus.rotate(), sumus.quantize(bits=8))
    (note,) = notes(algorithm, compute=sumus.Compute(workers=workers, executor="autograd"))
    assert "quantize rounds most of an update away" in note
    assert "lower the norm" in note


def test_the_norm_that_the_note_on_quantize_proposes_is_one_without_a_note() -> None:
    (note,) = notes(clipped(100.0, sumus.rotate(), sumus.quantize(bits=8)))
    proposed = float(note.rpartition("towards ")[2].split()[0])
    assert notes(clipped(proposed, sumus.rotate(), sumus.quantize(bits=8))) == ()


def test_the_noted_error_of_quantize_is_the_true_one() -> None:
    update = {"w": np.random.default_rng(0).normal(size=4096).astype(np.float32)}
    update["w"] /= np.linalg.norm(update["w"])
    chain = sumus.chain(sumus.clip_by_global_norm(50.0), sumus.rotate(), sumus.quantize(bits=8))
    from sumus.simulator.surprises import notes_on_lengths
    from sumus.update import Context

    context = Context({"w": (4096,)}, seed=b"public", rng=np.random.default_rng(1))
    codes = {name: leaf.astype(float) for name, leaf in chain.apply(update, context).items()}
    error = float(np.linalg.norm(chain.invert(codes, context)["w"] - update["w"]))
    (note,) = notes_on_lengths(chain, [1.0])
    said = float(note.partition("rounding error of ")[2].split()[0])
    assert abs(said - error) < 0.1 * error


@pytest.mark.parametrize(
    "algorithm",
    [
        clipped(1.0, sumus.rotate(), sumus.quantize(bits=8)),
        clipped(100.0, sumus.rotate(), sumus.quantize(bits=16)),  # fine enough all the same
        clipped(100.0, sumus.quantize(bits=8, range=0.5)),  # the range is the user's own
        clipped(100.0),
        clipped(0.1),
    ],
)
def test_no_note_if_the_clip_fits_or_its_norm_does_not_matter(algorithm: sumus.Algorithm) -> None:
    assert notes(algorithm) == ()


def test_a_clip_that_shortens_nearly_all_updates_is_noted_once() -> None:
    (note,) = notes(clipped(0.001))
    assert "clip_by_global_norm(0.001) shortens nearly all updates" in note
    assert "raise the norm" in note


def test_the_length_before_a_clip_is_that_of_the_weighted_update() -> None:
    """20 examples: a norm that is right for the update alone is small for 20 times the update."""
    weighted = sumus.fedavg(WORK, sumus.chain(sumus.weight(cap=100), sumus.clip_by_global_norm(0.05)))
    assert "shortens nearly all updates" in notes(weighted)[0]
    assert notes(clipped(0.05)) == ()


def test_only_the_first_round_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from sumus.simulator.processes import share

    measured: list[float] = []

    def count(tree: Any) -> float:
        measured.append(1.0)
        return 1.0

    monkeypatch.setattr(share, "global_norm", count)
    notes(clipped(1.0), rounds=5, compute="autograd")
    assert len(measured) == 4
    notes(rounds=5, compute="autograd")  # no clip
    assert len(measured) == 4


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def headed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (sumus.Evaluation(unseen={9: people()[0]}), "Evaluation(unseen=) measures `1.weight` and 1 more"),
        (sumus.Evaluation(central=people()[0], seen=2), "Evaluation(central=) measures `1.weight` and 1 more"),
        (sumus.Evaluation(seen=2), None),
        (sumus.Evaluation(), None),
    ],
)
def test_personal_leaves_that_nobody_has_trained_are_noted_if_they_are_measured(
    evaluate: sumus.Evaluation, said: str | None
) -> None:
    personal = task(model=headed, leaves={"1.*": "personal"})
    found = sumus.simulate(personal, sumus.fedavg(WORK), people(), 2, evaluate=evaluate).notes
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and "give Evaluation(seen=)" in found[0])
    shared = sumus.simulate(task(model=headed), sumus.fedavg(WORK), people(), 2, evaluate=evaluate).notes
    assert shared == ()


def test_central_data_of_one_class_are_noted() -> None:
    inputs, targets = people()[0]
    by_class = np.argsort(targets)
    (note,) = notes(evaluate=sumus.Evaluation(central=(inputs[by_class][:5], targets[by_class][:5])))
    assert "all 5 targets of Evaluation(central=) are 0" in note
    assert "shuffle" in note
    assert notes(evaluate=sumus.Evaluation(central=(inputs, targets))) == ()
    assert notes(evaluate=sumus.Evaluation(central=(inputs[:1], targets[:1]))) == ()
    padded = sumus.Evaluation(central=(inputs, np.full(len(inputs), -100)))
    assert not [note for note in notes(evaluate=padded) if "one class" in note]


def test_an_attack_by_nobody_is_noted() -> None:
    def attacked(share: float) -> tuple[str, ...]:
        population = sumus.attacks.sign_flip(people(), share=share)
        return sumus.simulate(task(), sumus.fedavg(WORK), population, 1).notes

    (note,) = attacked(0.1)
    assert "share=0.1 of 4 clients is no whole client" in note
    assert "raise share= of the attack to 0.25" in note
    assert attacked(0.25) == ()
    assert attacked(0.0) == ()  # the honest run of a comparison


# ── code that has changed ────────────────────────────────────────────────────────────────────────────────────────────


def scaled_loss(factor: float) -> Callable[[Any, Any], Any]:
    def loss(outputs: Any, targets: Any) -> Any:
        return sumus.losses.cross_entropy(outputs, targets) * factor

    return loss


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 2


Doubled.__qualname__ = "Mine"  # as an edited file has it


def centred(inputs: Any, targets: Any) -> tuple[Any, Any]:
    return inputs - inputs.mean(), targets


def transformed(factor: float) -> sumus.Algorithm:
    def apply(tree: Any, context: Any) -> Any:
        return {name: leaf * leaf.dtype.type(factor) for name, leaf in tree.items()}

    return sumus.fedavg(WORK, sumus.Transform(apply=apply))


def continued(folder: Path, before: sumus.Plan, after: sumus.Plan) -> list[tuple[str, ...]]:
    """The notes of a run of two rounds, of its next two by another plan, and of two more by this plan."""
    runs = [(before, 2), (after, 4), (after, 6)]
    return [sumus.run(sumus.Experiment(plan, people(), rounds), out=folder).notes for plan, rounds in runs]


def plan_of(algorithm: sumus.Algorithm | None = None, **options: Any) -> sumus.Plan:
    return sumus.Plan(task(**options), algorithm or sumus.fedavg(WORK), sumus.Pacing(cohort=4))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        (plan_of(loss=scaled_loss(1.0)), plan_of(loss=scaled_loss(2.0)), "loss="),
        (plan_of(model=Mine), plan_of(model=Doubled), "model="),
        (plan_of(model=Mine()), plan_of(model=Doubled()), "model="),
        (plan_of(), plan_of(prepare=centred), "prepare="),
        (plan_of(transformed(1.0)), plan_of(transformed(2.0)), "update="),
    ],
    ids=["a number of the loss", "forward", "forward of a module", "prepare", "a custom transform"],
)
def test_code_that_has_changed_is_noted_when_a_run_goes_on(
    before: sumus.Plan, after: sumus.Plan, name: str, tmp_path: Path
) -> None:
    first, second, third = continued(tmp_path / "changed", before, after)
    assert not [note for note in (*first, *third) if "has changed" in note]
    (note,) = [note for note in second if "has changed" in note]
    assert note.startswith(f"the code of {name} has changed since round 2")
    assert "Output(restart=True)" in note
    same = continued(tmp_path / "same", before, before)
    assert not [note for found in same for note in found if "has changed" in note]


def test_the_same_text_gives_the_same_digests_and_comments_do_not_count() -> None:
    def digests(text: str) -> dict[str, str]:
        made: dict[str, Any] = {"__name__": "my_file"}
        exec(compile(text, "my_file.py", "exec"), made)
        return digests_of(plan_of(loss=made["loss"]))

    text = (
        "SCALE = 2\ndef loss(outputs, targets):\n    'A loss.'\n    return ((outputs - targets) ** 2).sum(1) * SCALE\n"
    )
    assert digests(text) == digests(text) == digests("# new\n" + text.replace("A loss", "My loss"))
    for old, new in (("** 2", "** 4"), ("SCALE = 2", "SCALE = 3"), ("sum", "mean")):
        assert changed(digests(text), digests(text.replace(old, new))) == ["loss="]


def test_state_that_code_keeps_and_the_logs_it_fills_are_no_change(tmp_path: Path) -> None:
    log: list[float] = []

    def loss(outputs: Any, targets: Any) -> Any:
        value = sumus.losses.cross_entropy(outputs, targets)
        log.append(float(value.detach().mean()))
        return value

    kept = plan_of(loss=loss)
    assert not [note for found in continued(tmp_path, kept, kept) for note in found if "has changed" in note]
    assert log


def test_a_checkpoint_of_an_older_sumus_or_another_python_gives_no_note(tmp_path: Path) -> None:
    digests = digests_of(plan_of(loss=scaled_loss(1.0)))
    other = digests_of(plan_of(loss=scaled_loss(2.0)))
    assert changed(digests, other) == ["loss="]
    assert changed({}, other) == []
    assert changed({**digests, "python": "2.7"}, other) == []
    sumus.run(sumus.Experiment(plan_of(), people(), 1), out=tmp_path)
    kept = Checkpoint.read(tmp_path)
    assert kept is not None
    assert kept.code["python"]
    dataclasses.replace(kept, code={}).write(tmp_path)
    assert (tmp_path / CHECKPOINT).is_file()
    assert sumus.run(sumus.Experiment(plan_of(), people(), 2), out=tmp_path).notes == ()


# ── a batch of one ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rest_of_one_example_under_batch_norm_is_refused_with_the_remedy() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    rest_of_one = {**people(1), 1: tuple(np.concatenate([part, part[:1]]) for part in people(1)[0])}
    with pytest.raises(
        sumus.TaskError, match=r"client 1: .*batch_size= with which no client has a last batch.*GroupNorm"
    ):
        sumus.simulate(task(model=normed), sumus.fedavg(WORK), rest_of_one, 1)
    assert sumus.simulate(task(model=normed), sumus.fedavg(WORK), people(2), 1).notes == ()
