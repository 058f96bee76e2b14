"""A plan is data: values know the call that makes them again."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sumus
from sumus import optimizers, robust, schedules, spec, staleness, work
from sumus.aggregate import Fixed, Part, mean
from sumus.algorithm import Algorithm
from sumus.algorithms import cyclic, feddyn, fednova, fedprox, scaffold
from sumus.errors import PlanError
from sumus.fixed_point import FixedPoint
from sumus.metrics import Range
from sumus.optimizers import ServerOptimizer
from sumus.pacing import Conditions, Pacing
from sumus.site import Edges
from sumus.spec import Spec, build, canonical_json, describe, is_custom, record, registered, to_json
from sumus.task import Data, Description, Leaf
from sumus.update import Props, Transform, chain, clip_buffers, clip_by_global_norm, quantize, rotate, weight
from tests import own_loops

LEAF = Leaf("fc.weight", (3, 2), "float32", "shared", True, ("tied.weight",))
STATISTIC = Leaf("norm.mean", (2,), "float32", "shared", False)
DATA = Data((2,), "float32", (), "int64", classes=3)

EXAMPLES: dict[str, Callable[[], Any]] = {
    "aggregator/krum": lambda: robust.krum(attackers=2),
    "aggregator/mean": lambda: mean(Part("params"), Part("control", denominator="population")),
    "aggregator/median": lambda: robust.median(Part("params", bound=2.0), Part("control", transformed=False)),
    "aggregator/multi_krum": lambda: robust.multi_krum(Part("params"), attackers=1, keep=3),
    "aggregator/norm_bounded": lambda: robust.norm_bounded(max_norm=0.5),
    "aggregator/rescaled_mean": lambda: fednova.rescaled_mean(
        fednova.PARAMS, sumus.Part("steps", content="scalar", bound=9.0)
    ),
    "aggregator/travelling": lambda: cyclic.travelling(cyclic.PARAMS),
    "aggregator/trimmed_mean": lambda: robust.trimmed_mean(attackers=3),
    "algorithm": lambda: Algorithm(sumus.sgd(0.1), chain(), mean(Part("params")), optimizers.sgd()),
    "client/adam": lambda: sumus.adam(1e-3, steps=5, betas=(0.8, 0.9)),
    "client/adamw": lambda: sumus.adamw(schedules.cosine(0.1, rounds=50), epochs=2, batch_size=8),
    "client/client": lambda: sumus.client(own_loops.train, own_loops.evaluate),
    "client/control": lambda: scaffold.control(sumus.adam(0.1), option=1),
    "client/dynamic": lambda: feddyn.dynamic(sumus.sgd(0.1), 0.01),
    "client/normalized": lambda: fednova.normalized(sumus.sgd(0.1, momentum=0.9)),
    "client/prox": lambda: fedprox.prox(sumus.adam(0.1), 0.5),
    "client/sgd": lambda: sumus.sgd(0.1, momentum=0.9, nesterov=True, clip_norm=1.0),
    "data": lambda: DATA,
    "edges": lambda: Edges(4, "top"),
    "first-hop": lambda: (
        sumus.Plan(
            Description("digits", (LEAF, STATISTIC), "cross_entropy", ("accuracy",), DATA),
            sumus.fedavg(sumus.sgd(0.1), chain(weight(cap=9), clip_by_global_norm(2.0), rotate(), quantize(6))),
            Pacing(64),
        ).first_hop
    ),
    "conditions": lambda: Conditions(charging=True, battery=0.5, version=3),
    "leaf": lambda: LEAF,
    "pacing": lambda: Pacing(
        64, 1.3, 0.8, 600, separation=3, most_rounds=9, requires=Conditions(idle=True), checkins=20
    ),
    "part": lambda: Part("steps", content="scalar", weight=staleness.hinge(3), denominator=Fixed(64), bound=2.0**20),
    "part/fixed": lambda: Fixed(7),
    "rule/adam": lambda: work.adam_rule(weight_decay=0.1, decoupled=True),
    "rule/sgd": lambda: work.sgd_rule(momentum=0.5),
    "schedule/local_decay": lambda: schedules.local_decay(schedules.warmup(0.1, steps=5), decay=0.9),
    "schedule/warmup": lambda: schedules.warmup(schedules.cosine(0.1, 100), steps=5),
    "schedule/constant": lambda: schedules.constant(0.1),
    "schedule/cosine": lambda: schedules.cosine(0.1, 100, floor=0.01),
    "schedule/exponential": lambda: schedules.exponential(0.1, 0.99),
    "schedule/steps": lambda: schedules.steps(0.1, (10, 20)),
    "server/adagrad": lambda: optimizers.adagrad(0.1),
    "server/adam": lambda: optimizers.adam(0.1, (0.8, 0.9), bias_correction=True),
    "server/averaged": lambda: optimizers.averaged(optimizers.yogi(0.1), 0.5),
    "server/controlled": lambda: scaffold.controlled(optimizers.momentum(0.5)),
    "server/momentum": lambda: optimizers.momentum(nesterov=True),
    "server/sgd": lambda: optimizers.sgd(),
    "server/shifted": lambda: feddyn.shifted(),
    "server/yogi": lambda: optimizers.yogi(0.1),
    "staleness/constant": lambda: staleness.constant(),
    "staleness/hinge": lambda: staleness.hinge(5, slope=0.5),
    "staleness/polynomial": lambda: staleness.polynomial(1.5),
    "range": lambda: Range(0.0, 1.0),
    "sums/fixed-point": lambda: FixedPoint.fit(100),
    "task": lambda: Description("digits", (LEAF,), "cross_entropy", ("accuracy",), DATA),
    "update/chain": lambda: chain(chain(clip_by_global_norm(2.0), rotate()), quantize(6)),
    "update/clip_buffers": lambda: clip_buffers(0.5),
    "update/clip_by_global_norm": lambda: clip_by_global_norm(1.0),
    "update/quantize": lambda: quantize(8, range=0.5),
    "update/rotate": lambda: rotate(),
    "update/weight": lambda: weight(cap=100),
}


@pytest.fixture
def scratch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(spec, "_factories", dict(spec._factories))
    monkeypatch.setattr(spec, "_records", dict(spec._records))


def test_every_registered_name_has_an_example_here() -> None:
    """Those that the files say, whether somebody imported them already or not, and those that were registered otherwise."""
    root = Path(sumus.__file__).parent
    files = [path.read_text(encoding="utf-8") for path in root.rglob("*.py") if path.parent.name != "demos"]
    said = {name for text in files for name in re.findall(r'^@(?:registered|record)\("(.+?)"\)', text, re.MULTILINE)}
    made = {
        n
        for n, make in spec._factories.items()
        if make.__module__.startswith("sumus.") and ".demos." not in make.__module__
    }
    assert said | made == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_value_is_built_again_from_its_json(name: str) -> None:
    value = EXAMPLES[name]()
    text = canonical_json(to_json(value))
    again = build(json.loads(text))
    assert json.loads(text)["name"] == name
    assert type(again) is type(value)
    assert again == value
    assert canonical_json(to_json(again)) == text


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_made_alike_are_equal_and_hash_alike(name: str) -> None:
    one, two = EXAMPLES[name](), EXAMPLES[name]()
    assert one == two
    assert hash(one) == hash(two)


def test_all_examples_differ() -> None:
    assert len({canonical_json(to_json(make())) for make in EXAMPLES.values()}) == len(EXAMPLES)


# ── one value, one text ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (sumus.sgd(1), sumus.sgd(1.0)),
        (sumus.sgd(lr=1), sumus.sgd(np.float64(1))),
        (sumus.sgd(np.int64(1)), sumus.sgd(1.0)),
        (sumus.sgd(0.5), sumus.sgd(np.float32(0.5))),
        (sumus.sgd(0.5, steps=3), sumus.sgd(0.5, steps=np.int64(3))),
        (sumus.sgd(1, clip_norm=2), sumus.sgd(1.0, clip_norm=2.0)),
        (optimizers.adam(1, betas=(0, 0.9)), optimizers.adam(1.0, betas=(0.0, 0.9))),
        (optimizers.adam(0.1), optimizers.adam(lr=0.1, betas=(0.9, 0.99), tau=1e-3)),
        (clip_by_global_norm(3), clip_by_global_norm(max_norm=3.0)),
        (schedules.steps(0.1, [1, 2]), schedules.steps(0.1, (1, 2))),
        (FixedPoint(20, 4, 1, 1), FixedPoint(20, 4.0, 1, 1)),
        (Part("steps", bound=256), Part("steps", bound=256.0)),
        (Part("steps", bound=np.int64(256)), Part("steps", bound=256.0)),
        (Pacing(np.int64(5)), Pacing(5)),
    ],
)
def test_calls_that_mean_the_same_give_the_same_text(one: Any, same: Any) -> None:
    assert canonical_json(to_json(one)) == canonical_json(to_json(same))


def test_counts_stay_integers() -> None:
    assert to_json(sumus.sgd(1, steps=5, batch_size=2))["with"]["steps"] == 5  # pyright: ignore
    assert '"steps":5,' in canonical_json(to_json(sumus.sgd(1, steps=5, batch_size=2)))


def test_another_parameter_is_another_value() -> None:
    assert sumus.sgd(0.1) != sumus.sgd(0.2)
    assert sumus.sgd(0.1) != sumus.adam(0.1)
    assert chain(rotate()) != rotate()
    assert optimizers.sgd(1.0) != "server/sgd"


def test_canonical_json_is_sorted_compact_and_keeps_every_bit() -> None:
    text = canonical_json({"b": 0.1, "a": [1, 2.0, None, True], "ü": 1e-300})
    assert text == '{"a":[1,2.0,null,true],"b":0.1,"ü":1e-300}'
    value = math.nextafter(0.1, 1)
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_parameter_that_is_not_finite_has_no_text(value: float) -> None:
    with pytest.raises(PlanError) as error:
        canonical_json({"lr": value})
    assert error.value.rule == "finite"


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_values_print_as_the_call_that_makes_them() -> None:
    assert repr(clip_by_global_norm(1)) == "clip_by_global_norm(max_norm=1.0)"
    assert repr(chain(rotate(), quantize(6, range=1.0))) == "chain(transforms=(rotate(), quantize(bits=6, range=1.0)))"
    assert describe([1, "a", None]) == "(1, 'a', None)"


# ── custom values ────────────────────────────────────────────────────────────────────────────────────────────────────


def own() -> Transform:
    return Transform(apply=lambda tree, context: tree)


def test_a_custom_value_prints_as_custom_and_equals_only_itself() -> None:
    one, two = own(), own()
    assert repr(one) == "custom()"
    assert one == one
    assert one != two
    assert len({one, two}) == 2


def test_a_chain_with_a_custom_stage_is_itself_custom_and_says_so() -> None:
    mixed = chain(rotate(), own())
    assert is_custom(mixed) == ["custom()"]
    assert is_custom(chain(rotate())) == []
    assert mixed != chain(rotate(), own())


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (sumus.sgd(0.1), {"rules": work.ClientRules(correct=lambda grads, params, broadcast, state: grads)}),
        (sumus.sgd(0.1), {"batch_size": 5}),
        (sumus.sgd(0.1), {}),
        (work.sgd_rule(), {"init": lambda param: ()}),
        (optimizers.sgd(), {"takes": ("params", "control")}),
        (mean(Part("params")), {"least": 3}),
        (rotate(), {"props": Props()}),
    ],
    ids=["correct", "batch_size", "nothing", "rule", "server", "aggregator", "transform"],
)
def test_a_replaced_value_is_custom(value: Any, change: dict[str, Any]) -> None:
    """Else a changed sgd would travel, and be fused, as the sgd that it no longer is."""
    changed = dataclasses.replace(value, **change)
    assert is_custom(value) == []
    assert is_custom(changed) == ["custom()"]
    assert changed != value
    assert changed == changed
    for field, wanted in change.items():
        assert getattr(changed, field) is wanted


def test_a_spec_is_no_argument() -> None:
    with pytest.raises(ValueError, match="spec"):
        dataclasses.replace(sumus.sgd(0.1), spec=Spec("client/sgd"))  # pyright: ignore
    with pytest.raises(TypeError, match="spec"):
        Transform(spec=Spec("update/rotate"))  # pyright: ignore


@pytest.mark.usefixtures("scratch_names")
def test_registering_a_factory_leaves_what_it_returns_alone() -> None:
    """A factory that gives another's value, or a value of its own twice, names only what it hands out."""
    kept = own()
    one, two = registered("update/one")(lambda: kept), registered("update/two")(lambda: kept)
    assert [repr(value) for value in (one(), two(), kept)] == ["one()", "two()", "custom()"]


def test_a_function_among_the_parameters_is_custom_by_its_name() -> None:
    assert to_json(math.sqrt) == {"name": "custom", "with": {"of": "sqrt"}}


def test_custom_values_cannot_be_built() -> None:
    with pytest.raises(PlanError, match="unknown-name"):
        build(to_json(own()))


# ── registering ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("scratch_names")
def test_a_registered_factory_of_ones_own_travels() -> None:
    @registered("server/halved")
    def halved(lr: float = 1.0, *, note: str = "") -> ServerOptimizer:
        return dataclasses.replace(optimizers.sgd(lr / 2))

    value = halved(3, note="hello")
    assert repr(value) == "halved(lr=3.0, note='hello')"
    assert is_custom(value) == []
    assert build(to_json(value)) == value


@pytest.mark.usefixtures("scratch_names")
@pytest.mark.parametrize("taken", ["server/sgd", "pacing", "mapping"])
def test_a_taken_name_is_refused(taken: str) -> None:
    with pytest.raises(PlanError) as error:
        registered(taken)(optimizers.adam)
    assert error.value.rule == "taken-name"
    with pytest.raises(PlanError) as error:
        record(taken)(Fixed)
    assert error.value.rule == "taken-name"
    assert build({"name": "server/sgd"}) == optimizers.sgd()


@pytest.mark.parametrize("taken", ["aggregator/median", "client/control"])
def test_a_name_of_sumus_is_taken_before_anyone_has_used_it(taken: str) -> None:
    """In a process of its own. What is refused there leaves no trace: sumus brings its own afterwards, without torch."""
    code = """
import sys
from sumus.errors import PlanError
from sumus.spec import registered
assert not [name for name in sys.modules if name.startswith(("sumus.robust", "sumus.algorithms"))]
try:
    registered(sys.argv[1])(lambda: None)
except PlanError as error:
    print(error.rule)
import sumus
print(sumus.robust.median(), sumus.scaffold(sumus.sgd(0.1)).client, "torch" in sys.modules, sep=chr(10))
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code, taken], capture_output=True, text=True)
    wanted = ["taken-name", repr(robust.median()), repr(sumus.scaffold(sumus.sgd(0.1)).client), "False"]
    assert run.stdout.splitlines() == wanted, run.stderr


@pytest.mark.usefixtures("scratch_names")
def test_a_definition_may_be_made_again() -> None:
    """A notebook's cell that is run twice: the last one counts."""

    def cell(factor: float) -> Callable[..., ServerOptimizer]:
        @registered("server/mine")
        def mine(lr: float = 1.0) -> ServerOptimizer:
            return optimizers.sgd(lr * factor)

        return mine

    def moved(server: ServerOptimizer) -> float:
        state = server.update({"params": {"w": np.ones(1)}}, server.init({"w": np.zeros(1)}))
        return float(server.release(state)["w"][0])

    first, second = cell(2.0), cell(3.0)
    assert (moved(first()), moved(second()), moved(build({"name": "server/mine"}))) == (-2.0, -3.0, -3.0)


# ── what a peer may send ─────────────────────────────────────────────────────────────────────────────────────────────

BROUGHT = {
    "scaffold": lambda: sumus.scaffold(sumus.sgd(0.1)),
    "feddyn": lambda: sumus.feddyn(sumus.sgd(0.1), 0.01),
    "fednova": lambda: sumus.fednova(sumus.sgd(0.1)),
    "prox": lambda: sumus.fedprox(sumus.sgd(0.1), 0.1),
    "krum": lambda: sumus.fedavg(sumus.sgd(0.1), aggregator=robust.krum(attackers=1)),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_a_plan_is_read_where_nobody_has_imported_what_is_in_it(name: str) -> None:
    """In a process of its own, and without torch: what sumus brings is found by its name."""
    plan = sumus.Plan(Description("digits", (LEAF,), "cross_entropy", (), DATA), BROUGHT[name](), Pacing(64))
    code = """
import sys
from sumus.plan import Plan
assert not [name for name in sys.modules if name.startswith(("sumus.robust", "sumus.algorithms"))]
plan = Plan.from_json(sys.stdin.read())
print(plan.id, plan.algorithm.aggregator, "torch" in sys.modules, sep=chr(10))
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input=plan.to_json(), capture_output=True, text=True
    )
    assert run.stdout.splitlines() == [plan.id, repr(plan.algorithm.aggregator), "False"], run.stderr


@pytest.mark.parametrize(
    "hostile",
    [
        {"name": "os/system"},
        {"name": "__import__", "with": {"name": "os"}},
        {"name": 7},
        {"name": ["server/sgd"]},
        {"name": None},
        {},
        {"with": {}},
        {"name": "server/sgd", "with": {"lr": 1.0}, "and": 1},
        {"name": "server/sgd", "with": [1.0]},
        {"name": "server/sgd", "with": None},
        {"name": "server/sgd", "with": {"rate": 1.0}},
        {"name": "server/sgd", "with": {"lr": "1.0"}},
        {"name": "server/sgd", "with": {"lr": True}},
        {"name": "server/sgd", "with": {"lr": None}},
        {"name": "server/sgd", "with": {"lr": [1.0]}},
        {"name": "server/sgd", "with": {"lr": {"name": "update/rotate"}}},
        {"name": "server/adam", "with": {}},
        {"name": "server/adam", "with": {"lr": 0.1, "betas": [0.9]}},
        {"name": "server/adam", "with": {"lr": 0.1, "betas": 0.9}},
        {"name": "server/averaged", "with": {"server": {"name": "pacing", "with": {"cohort": 1}}}},
        {"name": "update/chain", "with": {"transforms": 5}},
        {"name": "update/chain", "with": {"transforms": ["update/rotate"]}},
        {"name": "update/chain", "with": {"transforms": [{"name": "server/sgd"}]}},
        {"name": "update/weight", "with": {"by": "words"}},
        {"name": "update/quantize", "with": {"bits": 8.0}},
        {"name": "pacing", "with": {"cohort": 0}},
        {"name": "part", "with": {"name": 3}},
        {"name": "part", "with": {"name": "params", "weight": "none"}},
        {"name": "part", "with": {"name": "params", "weight": {"name": "part/fixed", "with": {"count": 3}}}},
        {"name": "part", "with": {"name": "params", "denominator": {"name": "staleness/constant"}}},
        {"name": "part", "with": {"name": "params", "bound": 0}},
        {"name": "part", "with": {"name": "params", "bound": "1.0"}},
        {"name": "aggregator/median", "with": {"parts": ["params"]}},
        {"name": "aggregator/krum"},
        {"name": "aggregator/krum", "with": {"attackers": 1.0}},
        {"name": "aggregator/mean", "with": {"parts": [{"name": "part", "with": {"name": "params"}}], "centre": None}},
        {"name": "staleness/hinge", "with": {"after": 0.5}},
        {"name": "client/prox", "with": {"client": {"name": "rule/sgd"}, "mu": 0.1}},
        {"name": "client/control", "with": {"client": {"name": "client/sgd", "with": {"lr": 0.1}}, "option": 3}},
        {"name": "leaf", "with": {"name": "w", "shape": "ab", "dtype": "float32", "role": "shared", "trained": True}},
        {"name": "leaf", "with": {"name": "w", "shape": [2], "dtype": "float32", "role": "stolen", "trained": True}},
        {"name": "sums/fixed-point", "with": {"fraction_bits": 10**12, "bound": 1, "max_weight": 1, "max_count": 1}},
    ],
)
def test_only_registered_names_with_parameters_of_their_types_are_built(hostile: Any) -> None:
    with pytest.raises(PlanError):
        build(hostile)


def test_plain_json_is_itself() -> None:
    assert build([1, "a", [None, 2.5]]) == (1, "a", (None, 2.5))
