"""Plans: each legality rule from both sides, the same text and id for the same plan, and nothing but refusals for nonsense."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sumus
from sumus import robust
from sumus.aggregate import Aggregator, Part, mean
from sumus.algorithm import Algorithm
from sumus.errors import PlanError
from sumus.fixed_point import FixedPoint
from sumus.pacing import Pacing
from sumus.plan import RULES, Plan
from sumus.task import Data, Description, Leaf
from sumus.update import Props, Transform, chain, clip_by_global_norm, quantize, rotate, weight
from sumus.work import ClientWork

TASK = Description(
    "digits",
    (Leaf("fc.weight", (3, 2), "float32", "shared", True), Leaf("fc.bias", (3,), "float32", "shared", True)),
    "cross_entropy",
    ("accuracy",),
    Data((2,), "float32", (), "int64", classes=3),
)


def plan(
    update: Transform | None = None,
    *,
    task: Description = TASK,
    algorithm: Algorithm | None = None,
    cohort: int = 64,
    pacing: Pacing | None = None,
    trusts_devices: bool | None = True,
    **options: Any,
) -> Plan:
    """A plan that may trust its devices, so that it breaks the rule that a test is about, and no other."""
    made = algorithm or sumus.fedavg(sumus.sgd(0.1), update)
    return Plan(task, made, pacing or Pacing(cohort), trusts_devices=trusts_devices, **options)


def bounded(update: Transform | None = None, **options: Any) -> Plan:
    """A plan of FedAvg with these options, that does not trust its devices."""
    return plan(algorithm=sumus.fedavg(sumus.sgd(0.1), update, **options), trusts_devices=None)


def by_leaf(leaves: Any) -> Algorithm:
    return sumus.fedavg(sumus.sgd(0.1, leaves=leaves))


def uniform(update: Transform) -> Algorithm:
    return sumus.fedavg(sumus.sgd(0.1), update, weight="uniform")


def combined_by(aggregator: Aggregator) -> Algorithm:
    return sumus.fedavg(sumus.sgd(0.1), aggregator=aggregator)


@sumus.registered("aggregator/test-plan-at-least")
def mean_of_at_least(least: int) -> Aggregator:
    return dataclasses.replace(mean(Part("params")), least=least)


BUFFER = Pacing(cohort=16, concurrency=64)


@sumus.registered("client/test-plan-sends")
def sending(parts: tuple[str, ...]) -> ClientWork:
    return dataclasses.replace(sumus.sgd(0.1), rules=sumus.ClientRules(sends=parts))


def with_part(update: Transform, part: Part) -> Algorithm:
    """FedAvg that sends one part more."""
    return Algorithm(sending(("params", part.name)), update, mean(Part("params"), part), sumus.optimizers.sgd())


def fixed_on_its_way(update: Transform) -> Algorithm:
    """FedAvg whose one part no transform may touch."""
    return Algorithm(sumus.sgd(0.1), update, mean(Part("params", transformed=False)), sumus.optimizers.sgd())


def wanting(*, takes: tuple[str, ...] = ("params",), receives: tuple[str, ...] = ("params",)) -> Algorithm:
    client = dataclasses.replace(
        sumus.sgd(0.1), rules=sumus.ClientRules(receives=receives, sends=("params", "control"))
    )
    return Algorithm(client, chain(), mean(Part("params")), dataclasses.replace(sumus.optimizers.sgd(), takes=takes))


def custom() -> Transform:
    return Transform(apply=lambda tree, context: tree)


@sumus.registered("update/test-plan-halved")
def halved(lifts: bool) -> Transform:
    def twice(tree: Any, context: Any) -> Any:
        return {name: leaf * 2 for name, leaf in tree.items()}

    def half(tree: Any, context: Any) -> Any:
        return {name: leaf / 2 for name, leaf in tree.items()}

    return Transform(apply=half, invert=twice, lift=half) if lifts else Transform(apply=half, invert=twice)


@sumus.registered("update/test-plan-lengthened")
def lengthened() -> Transform:
    """A transform that makes updates longer, and says so."""
    return Transform(apply=lambda tree, context: tree, props=Props(keeps_norm=False))


SITES = sumus.Edges(rounds=4)
OWN_HEADS = dataclasses.replace(TASK, leaves=(TASK.leaves[0], dataclasses.replace(TASK.leaves[1], role="personal")))

# ── the rules, from both sides ───────────────────────────────────────────────────────────────────────────────────────

BROKEN_AND_KEPT: dict[str, tuple[list[Callable[[], Plan]], list[Callable[[], Plan]]]] = {
    "sum-count": (
        [lambda: plan(cohort=64, sums=FixedPoint.fit(63))],
        [lambda: plan(cohort=64, sums=FixedPoint.fit(64)), lambda: plan(cohort=64)],
    ),
    "chain-unused": (
        [
            lambda: plan(algorithm=fixed_on_its_way(rotate())),
            lambda: plan(algorithm=fixed_on_its_way(chain(clip_by_global_norm(1.0), rotate()))),
        ],
        [
            lambda: plan(algorithm=fixed_on_its_way(chain())),
            lambda: plan(algorithm=sumus.feddyn(sumus.sgd(0.1), 0.01)),
            lambda: plan(algorithm=with_part(rotate(), Part("control", transformed=False))),
        ],
    ),
    "cohort-too-small": (
        [
            lambda: plan(algorithm=combined_by(mean_of_at_least(65))),
            lambda: plan(algorithm=combined_by(robust.trimmed_mean(attackers=32))),
            lambda: plan(algorithm=combined_by(robust.krum(attackers=31))),
            lambda: plan(algorithm=combined_by(robust.multi_krum(attackers=31, keep=1))),
        ],
        [lambda: plan(algorithm=combined_by(mean_of_at_least(64)))],
    ),
    "buffer-needs-sum": (
        [
            lambda: plan(algorithm=combined_by(robust.median()), pacing=BUFFER),
            lambda: plan(algorithm=combined_by(mean_of_at_least(2)), pacing=BUFFER),
            lambda: plan(algorithm=sumus.cyclic(sumus.sgd(0.1)), pacing=BUFFER),
        ],
        [lambda: plan(pacing=BUFFER), lambda: plan(algorithm=sumus.fedbuff(sumus.sgd(0.1)), pacing=BUFFER)],
    ),
    "leaf-options": (
        [
            lambda: plan(algorithm=by_leaf({"fc.weights": {"lr_factor": 2.0}})),
            lambda: plan(algorithm=by_leaf({"fc.*": {"lr_factor": 2.0}, "*.bias": {"weight_decay": 0.0}})),
        ],
        [
            lambda: plan(algorithm=by_leaf({"fc.weight": {"lr_factor": 2.0}, "*.bias": {"weight_decay": 0.0}})),
            lambda: plan(algorithm=by_leaf({"*": {"lr_factor": 2.0}})),
            lambda: plan(algorithm=by_leaf({})),
        ],
    ),
    "quantize-range": (
        [
            lambda: plan(quantize(8)),
            lambda: plan(chain(rotate(), quantize(8))),
            lambda: plan(chain(clip_by_global_norm(1.0), quantize(8))),
        ],
        [
            lambda: plan(quantize(8, range=1.0)),
            lambda: plan(chain(clip_by_global_norm(1.0), quantize(8, range=1.0))),
            lambda: plan(chain(clip_by_global_norm(1.0), rotate(), quantize(8))),
            lambda: plan(chain(rotate(), clip_by_global_norm(1.0), quantize(8))),
        ],
    ),
    "weight-first": (
        [
            lambda: plan(chain(clip_by_global_norm(1.0), weight(cap=2**16))),
            lambda: plan(chain(rotate(), weight(cap=2**16))),
            lambda: plan(chain(weight(cap=2**16), weight(cap=2**16))),
        ],
        [
            lambda: plan(weight(cap=2**16)),
            lambda: plan(chain(weight(cap=2**16), clip_by_global_norm(1.0))),
            lambda: plan(chain(chain(), weight(cap=2**16), rotate())),
        ],
    ),
    "weight-twice": (
        [
            lambda: plan(algorithm=uniform(weight(cap=2**16))),
            lambda: plan(algorithm=uniform(chain(weight(cap=2**16), rotate()))),
            lambda: plan(algorithm=sumus.fedavg(sumus.sgd(0.1), weight(cap=1000), cap=4)),
            lambda: plan(algorithm=sumus.fedbuff(sumus.sgd(0.1), weight(cap=2**16))),
        ],
        [
            lambda: plan(weight(cap=2**16)),
            lambda: plan(algorithm=uniform(rotate())),
            lambda: plan(algorithm=with_part(weight(cap=2**16), Part("steps", content="scalar", weight="uniform"))),
            lambda: plan(algorithm=with_part(weight(cap=2**16), Part("control", weight="uniform", transformed=False))),
        ],
    ),
    "part-fits": (
        [
            lambda: plan(algorithm=with_part(chain(), Part("steps", bound=2.0**40))),
            lambda: plan(algorithm=combined_by(mean(Part("params", bound=2.0**40)))),
            lambda: plan(algorithm=with_part(chain(), Part("steps", bound=2.0**39)), cohort=128),
            lambda: plan(algorithm=sumus.fedbuff(sumus.sgd(0.1)), sums=FixedPoint.fit(64, 1023)),
            lambda: plan(
                algorithm=with_part(chain(), Part("steps", weight=sumus.staleness.hinge())), sums=FixedPoint.fit(64, 1)
            ),
        ],
        [
            lambda: plan(algorithm=with_part(chain(), Part("steps", bound=math.nextafter(2.0**40, 0)))),
            lambda: plan(algorithm=with_part(chain(), Part("steps", bound=2.0**-20))),
            lambda: plan(algorithm=with_part(chain(), Part("steps", bound=2.0**45)), sums=FixedPoint.fit(64, 2**10)),
            lambda: plan(algorithm=sumus.fedbuff(sumus.sgd(0.1)), sums=FixedPoint.fit(64, 1024)),
        ],
    ),
    "site-parts": (
        [
            lambda: plan(algorithm=sumus.scaffold(sumus.sgd(0.1)), edges=SITES),
            lambda: plan(algorithm=sumus.fednova(sumus.sgd(0.1)), edges=SITES),
            lambda: plan(algorithm=combined_by(mean(Part("params", denominator="population"))), edges=SITES),
            lambda: plan(algorithm=combined_by(mean(Part("params", denominator=sumus.Fixed(64)))), edges=SITES),
        ],
        [
            lambda: plan(algorithm=sumus.scaffold(sumus.sgd(0.1))),
            lambda: plan(algorithm=sumus.fedadam(sumus.sgd(0.1), 0.1), edges=SITES),
            lambda: plan(algorithm=sumus.fedprox(sumus.sgd(0.1), 0.1), edges=SITES),
            lambda: plan(algorithm=uniform(chain()), edges=SITES),
        ],
    ),
    "site-sum": (
        [
            lambda: plan(algorithm=combined_by(robust.median()), edges=SITES),
            lambda: plan(algorithm=sumus.cyclic(sumus.sgd(0.1)), edges=SITES),
        ],
        [lambda: plan(edges=SITES)],
    ),
    "site-state": (
        [lambda: plan(task=OWN_HEADS, edges=SITES)],
        [lambda: plan(task=OWN_HEADS)],
    ),
    "site-buffer": (
        [lambda: plan(pacing=BUFFER, edges=SITES)],
        [lambda: plan(pacing=BUFFER, edges=sumus.Edges(1))],
    ),
    "site-codes": (
        [
            lambda: plan(chain(weight(cap=2**16), quantize(8, range=1.0)), edges=SITES),
            lambda: plan(algorithm=uniform(quantize(8, range=1.0)), edges=SITES),
        ],
        [
            lambda: plan(quantize(8, range=1.0), edges=SITES),
            lambda: plan(weight(cap=2**16), edges=SITES),
            lambda: plan(algorithm=uniform(quantize(8, range=1.0))),
        ],
    ),
    "site-lifts": (
        [lambda: plan(chain(rotate(), halved(lifts=False)), edges=SITES)],
        [
            lambda: plan(chain(rotate(), halved(lifts=True)), edges=SITES),
            lambda: plan(chain(rotate(), halved(lifts=False))),
            lambda: plan(chain(clip_by_global_norm(1.0), rotate(), quantize(8)), edges=SITES),
        ],
    ),
    "noise-at-sites": (
        [lambda: plan(edges=sumus.Edges(2, noise_at="edges"))],
        [lambda: plan(edges=sumus.Edges(2, noise_at="top"))],
    ),
    "noise-at-edges": (
        [lambda: plan(edges=sumus.Edges(noise_at="edges"))],
        [lambda: plan(edges=sumus.Edges(noise_at="top"))],
    ),
    "needs-each-update": (
        [
            lambda: plan(algorithm=combined_by(robust.median())),
            lambda: plan(algorithm=combined_by(robust.trimmed_mean(attackers=31))),
            lambda: plan(algorithm=combined_by(robust.krum(attackers=30))),
            lambda: plan(algorithm=combined_by(robust.multi_krum(attackers=30))),
            lambda: plan(algorithm=combined_by(robust.norm_bounded(max_norm=1.0))),
        ],
        [lambda: plan(algorithm=combined_by(mean(Part("params")))), lambda: plan(clip_by_global_norm(1.0))],
    ),
    "one-by-one": (
        [lambda: plan(algorithm=sumus.cyclic(sumus.sgd(0.1)))],
        [lambda: plan(algorithm=sumus.fedavg(sumus.sgd(0.1)))],
    ),
    "min-contributors": (
        [lambda: plan(min_contributors=1), lambda: plan(min_contributors=0), lambda: plan(cohort=9)],
        [lambda: plan(cohort=10), lambda: plan(cohort=2, min_contributors=2)],
    ),
    "custom-name": (
        [
            lambda: plan(custom()),
            lambda: plan(chain(rotate(), custom())),
            lambda: plan(algorithm=sumus.fedavg(dataclasses.replace(sumus.sgd(0.1), lr=sumus.schedules.constant(0.2)))),
            lambda: plan(
                algorithm=combined_by(Aggregator(parts=(Part("params"),), combine=mean(Part("params")).combine))
            ),
        ],
        [lambda: plan(chain(rotate())), lambda: plan()],
    ),
    "undeclared-data": (
        [lambda: plan(task=dataclasses.replace(TASK, data=None))],
        [lambda: plan(task=TASK)],
    ),
    "trusts-devices": (
        [
            lambda: bounded(),
            lambda: bounded(weight="uniform"),
            lambda: bounded(clip_by_global_norm(1.0)),
            lambda: bounded(rotate(), cap=9),
            lambda: bounded(weight(cap=9)),
            lambda: bounded(chain(clip_by_global_norm(1.0), lengthened()), weight="uniform"),
            lambda: bounded(clip_by_global_norm(1.0), cap=2**16),
            lambda: plan(
                algorithm=with_part(clip_by_global_norm(1.0), Part("control", transformed=False, bound=1.0)),
                trusts_devices=None,
            ),
            lambda: plan(algorithm=sumus.feddyn(sumus.sgd(0.1), 0.01), trusts_devices=False),
        ],
        [
            lambda: plan(),
            lambda: bounded(clip_by_global_norm(1.0), weight="uniform"),
            lambda: bounded(clip_by_global_norm(1.0), cap=9),
            lambda: bounded(chain(weight(cap=9), clip_by_global_norm(1.0))),
            lambda: bounded(chain(clip_by_global_norm(1.0), rotate(), quantize(8)), cap=9),
            lambda: plan(algorithm=sumus.fedbuff(sumus.sgd(0.1), clip_by_global_norm(1.0)), trusts_devices=None),
        ],
    ),
}


def broken_rules(make: Callable[[], Plan]) -> list[str]:
    """The rules that a plan breaks: the one that stops its making, or those of deployment."""
    try:
        return [rule for rule, _ in make().violations("deployed")]
    except PlanError as error:
        return [error.rule]


def test_every_rule_is_tried_from_both_sides() -> None:
    assert list(BROKEN_AND_KEPT) == [rule.name for rule in RULES]


@pytest.mark.parametrize("rule", BROKEN_AND_KEPT)
def test_what_breaks_a_rule_is_refused_by_its_name(rule: str) -> None:
    for make in BROKEN_AND_KEPT[rule][0]:
        assert broken_rules(make) == [rule]


@pytest.mark.parametrize("rule", BROKEN_AND_KEPT)
def test_what_keeps_a_rule_is_a_plan(rule: str) -> None:
    for make in BROKEN_AND_KEPT[rule][1]:
        assert broken_rules(make) == []


DEPLOYED = (
    "noise-at-edges", "needs-each-update", "one-by-one", "min-contributors", "custom-name", "undeclared-data", "trusts-devices",
)  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN_AND_KEPT)
def test_a_rule_of_deployment_leaves_the_simulator_alone_and_no_other_does(rule: str) -> None:
    for make in BROKEN_AND_KEPT[rule][0]:
        broken = make() if rule in DEPLOYED else None
        with pytest.raises(PlanError) as error:
            broken.check_deployable() if broken else make()
        assert error.value.rule == rule


def test_a_refusal_ends_with_the_rules_name() -> None:
    with pytest.raises(PlanError, match=r"put clip_by_global_norm and rotate before it.* \[rule quantize-range\]$"):
        plan(quantize(8))


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("sum-overflow", lambda: FixedPoint(60, 256.0, 1, 1)),
        (
            "parts-match",  # the client sends no control
            lambda: Algorithm(sumus.sgd(0.1), chain(), mean(Part("params"), Part("control")), sumus.optimizers.sgd()),
        ),
        ("parts-match", lambda: wanting(takes=("params", "control"))),  # and here nobody combines it
        ("parts-match", lambda: wanting(receives=("params", "control"))),  # nobody broadcasts it
        ("part-words", lambda: mean(Part("control"))),
        ("part-words", lambda: mean()),
        ("part-words", lambda: mean(Part("params"), Part("params"))),
        ("part-words", lambda: mean(Part("params"), Part("buffers"))),
        ("part-words", lambda: robust.median(Part("control"))),
        ("quantize-last", lambda: chain(quantize(8, range=1.0), rotate())),
        ("epochs-or-steps", lambda: sumus.sgd(0.1, epochs=1, steps=1)),
        ("positive", lambda: Pacing(0)),
        *(
            ("positive", lambda name=name: Pacing(5, **{name: 0}))
            for name in ("deadline", "concurrency", "separation", "most_rounds")
        ),
        ("positive", lambda: Pacing(5, over_select=0.9)),
        ("positive", lambda: Pacing(5, least=1.1)),
        ("positive", lambda: Pacing(5, concurrency=5, most_stale=-1)),
        ("positive", lambda: Pacing(5, requires=sumus.Conditions(battery=2.0))),
        ("pacing-buffer", lambda: Pacing(5, most_stale=3)),
        ("pacing-buffer", lambda: Pacing(5, concurrency=5, over_select=1.3)),
        ("pacing-buffer", lambda: Pacing(5, concurrency=5, least=0.5)),
        ("wrong-type", lambda: Pacing(5, concurrency=2.5)),  # pyright: ignore[reportArgumentType]
        ("positive", lambda: Part("params", bound=0.0)),
        ("positive", lambda: Part("params", bound=-1.0)),
        ("positive", lambda: Part("params", bound=math.inf)),
        ("positive", lambda: Part("params", bound=math.nan)),
        ("edge-words", lambda: sumus.Edges(0)),
        ("edge-words", lambda: sumus.Edges(1001)),
        ("edge-words", lambda: sumus.Edges(noise_at="bottom")),  # pyright: ignore[reportArgumentType]
        ("wrong-type", lambda: sumus.Edges(2.0)),  # pyright: ignore[reportArgumentType]
        ("part-words", lambda: sumus.fedavg(sumus.sgd(0.1), weight="exmaples")),  # pyright: ignore[reportArgumentType]
    ],
)
def test_some_rules_are_checked_where_the_value_is_made(rule: str, make: Callable[[], Any]) -> None:
    with pytest.raises(PlanError) as error:
        make()
    assert error.value.rule == rule


# ── sums by default ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_sums_are_as_fine_as_the_cohort_allows() -> None:
    assert plan(cohort=64).sums == FixedPoint.fit(64, 2**16)
    assert plan(algorithm=uniform(chain()), cohort=64).sums == FixedPoint.fit(64, 1)
    assert plan(weight(cap=100), cohort=64).sums == FixedPoint.fit(64, 1)
    assert plan(algorithm=combined_by(robust.median()), cohort=64).sums == FixedPoint.fit(64, 1)


def test_a_weight_stage_leaves_room_for_what_it_does_not_multiply() -> None:
    """Buffers and scalars are weighed at the first hop all the same; their sum must not overflow."""
    running = Leaf("norm.mean", (3,), "float32", "shared", False)
    normed = dataclasses.replace(TASK, leaves=(*TASK.leaves, running))
    assert plan(weight(cap=100), task=normed).sums == FixedPoint.fit(64, 100)
    assert plan(algorithm=with_part(weight(cap=100), Part("steps", content="scalar"))).sums == FixedPoint.fit(64, 100)
    steps = Part("steps", content="scalar", weight="uniform")
    assert plan(algorithm=with_part(weight(cap=100), steps)).sums == FixedPoint.fit(64, 1)


# ── one plan, one text, one id ───────────────────────────────────────────────────────────────────────────────────────

PLANS: dict[str, Plan] = {
    "plain": plan(),
    "everything": plan(
        algorithm=sumus.fedadam(
            sumus.adamw(sumus.schedules.cosine(0.1, rounds=9), steps=3, batch_size=4, clip_norm=1),
            lr=0.01,
            update=chain(weight(cap=9), clip_by_global_norm(2), rotate(), quantize(6)),
        ),
        cohort=11,
        min_contributors=3,
        sums=FixedPoint(20, 64.0, 1, 500),
    ),
    "parts": plan(
        algorithm=with_part(
            rotate(), Part("steps", "scalar", sumus.staleness.hinge(3), "population", transformed=False, bound=2.0**20)
        )
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_comes_back_from_its_text_with_the_same_id(name: str) -> None:
    text = PLANS[name].to_json()
    again = Plan.from_json(text)
    assert again == PLANS[name]
    assert hash(again) == hash(PLANS[name])
    assert again.to_json() == text
    assert again.id == PLANS[name].id == hashlib.sha256(text.encode()).hexdigest()
    assert again.algorithm.client == PLANS[name].algorithm.client


@pytest.mark.parametrize("name", PLANS)
def test_blanks_and_the_order_of_names_do_not_matter(name: str) -> None:
    loose = json.dumps(json.loads(PLANS[name].to_json()), indent=3, sort_keys=False)
    assert Plan.from_json(loose).id == PLANS[name].id


def test_an_integer_rate_is_the_same_plan() -> None:
    one, two = (plan(algorithm=sumus.fedavg(sumus.sgd(lr))).id for lr in (1, 1.0))
    assert one == two
    assert Plan.from_json(plan(algorithm=sumus.fedavg(sumus.sgd(1))).to_json().replace('"lr":1.0', '"lr":1')).id == one


def test_every_field_is_part_of_the_id() -> None:
    ids = {
        plan().id,
        plan(task=dataclasses.replace(TASK, name="letters")).id,
        plan(rotate()).id,
        plan(cohort=65).id,
        plan(min_contributors=11).id,
        plan(sums=FixedPoint.fit(99)).id,
        plan(edges=SITES).id,
        plan(edges=sumus.Edges(noise_at="edges")).id,
        plan(algorithm=with_part(chain(), Part("steps"))).id,
        plan(algorithm=with_part(chain(), Part("steps", bound=2.0))).id,
        plan(algorithm=with_part(chain(), Part("steps", weight=sumus.staleness.polynomial(0.5)))).id,
        plan(algorithm=with_part(chain(), Part("steps", weight=sumus.staleness.polynomial(1.0)))).id,
    }
    assert len(ids) == 12


def test_a_task_and_its_description_are_the_same_plan() -> None:
    torch = pytest.importorskip("torch")
    task = sumus.Task(model=lambda: torch.nn.Linear(2, 3), loss=sumus.losses.cross_entropy)
    whole = Plan(task, sumus.fedavg(sumus.sgd(0.1)), Pacing(64))
    assert Plan(task.description, whole.algorithm, whole.pacing) == whole
    assert Plan.from_json(whole.to_json()).task == task.description


# ── what a peer may send ─────────────────────────────────────────────────────────────────────────────────────────────


def refuses(text: str) -> bool:
    try:
        Plan.from_json(text)
    except PlanError:
        return True
    return False


GOOD = json.loads(PLANS["everything"].to_json())


def with_change(path: str, value: Any) -> str:
    changed = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    node = changed
    for step in way:
        node = node[step]
    node[last] = value
    return json.dumps(changed)


def without(name: str) -> str:
    return json.dumps({field: value for field, value in GOOD.items() if field != name})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", '"plan"', "{}", '{"sumus": 1}', "NaN", "\ud800",
        without("sumus"), without("task"), without("algorithm"), without("pacing"),
        with_change("sumus", 2), with_change("sumus", "1"), with_change("extra", 1),
        with_change("task", {"name": "pacing", "with": {"cohort": 3}}), with_change("task", None), with_change("task", 1),
        with_change("algorithm", {"name": "os.system"}), with_change("algorithm", "fedavg"),
        with_change("algorithm", GOOD["algorithm"]["with"]["client"]),
        with_change("algorithm.with.client.name", "client/evil"), with_change("algorithm.with.client", GOOD["task"]),
        with_change("algorithm.with.client.with.epochs", 3), with_change("algorithm.with.client.with.momentum", 0.9),
        with_change("algorithm.with.server.with.lr", "0.1"), with_change("algorithm.with.server.with.lr", None),
        with_change("algorithm.with.server.with.lr", float("inf")), with_change("algorithm.with.server.with.lr", 10**400),
        with_change("pacing", 64), with_change("pacing.with.cohort", 0), with_change("pacing.with.cohort", 501),
        with_change("pacing.with.cohort", True), with_change("pacing.with.cohort", 1.5),
        with_change("min_contributors", "ten"), with_change("min_contributors", None),
        with_change("sums", None), with_change("sums.with.fraction_bits", 62), with_change("sums.with.fraction_bits", 10**15),
        with_change("sums.with.bound", float("nan")), with_change("sums.with.max_count", 10**4000),
        with_change("task.with.leaves", [1, 2]), with_change("task.with.leaves", "all"),
        with_change("task.with.data", []), with_change("task.with.name", None),
        with_change("task.with.name", "\ud800"),
    ],
)  # fmt: skip
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize("depth", [100, 10_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"name":', "}"), ('{"a":', "}")])
def test_deep_nesting_is_refused(depth: int, opening: str, closing: str) -> None:
    assert refuses(opening * depth + "1" + closing * depth)
    assert refuses(with_change("task", "HERE").replace('"HERE"', opening * depth + "1" + closing * depth))


def test_a_deep_chain_of_servers_is_refused_or_built() -> None:
    server: Any = {"name": "server/sgd"}
    for _ in range(900):
        server = {"name": "server/averaged", "with": {"server": server}}
    text = with_change("algorithm.with.server", "HERE").replace('"HERE"', nested_json(server))
    assert refuses(text)


def nested_json(server: Any) -> str:
    """json.dumps without its recursion."""
    depth = 0
    while "with" in server:
        server, depth = server["with"]["server"], depth + 1
    return '{"name":"server/averaged","with":{"server":' * depth + '{"name":"server/sgd"}' + "}}" * depth


def test_an_overlong_plan_is_refused_before_it_is_read() -> None:
    assert refuses(" " * (16 * 2**20) + PLANS["plain"].to_json())


def nodes(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield from nodes(inner, (*way, step))


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**40]), st.floats(), st.text(max_size=3),
        st.sampled_from(list(GOOD["algorithm"]["with"].values())), st.sampled_from(["shared", "params", "server/sgd"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "with", "lr", "of"]), inner, max_size=2),
    ),
    max_leaves=5,
)  # fmt: skip


@given(st.sampled_from(list(nodes(GOOD))), JUNK)
def test_a_plan_with_anything_anywhere_is_refused_or_whole(way: tuple[Any, ...], junk: Any) -> None:
    changed = copy.deepcopy({"root": GOOD})
    node: Any = changed
    for step in ("root", *way)[:-1]:
        node = node[step]
    node[("root", *way)[-1]] = junk
    try:
        read = Plan.from_json(json.dumps(changed["root"]))
    except PlanError:
        return
    assert Plan.from_json(read.to_json()) == read
    assert all(isinstance(rule, str) for rule, _ in read.violations("deployed"))
    assert read.description.trained_layout is not None
    assert read.description.buffer_layout is not None
    assert len(read.description.fingerprint) == 64


def test_a_broadcast_is_the_model_and_what_the_algorithm_sends_beside_it() -> None:
    task = sumus.Task(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), sumus.losses.cross_entropy)
    trained, buffers = 4 * (4 * 8 + 8 + 8 + 8), 4 * (8 + 8)
    work = sumus.sgd(lr=0.1)
    assert sumus.Plan(task, sumus.fedavg(work), sumus.Pacing(2)).broadcast_nbytes == trained + buffers
    assert sumus.Plan(task, sumus.scaffold(work), sumus.Pacing(2)).broadcast_nbytes == 2 * trained + buffers
