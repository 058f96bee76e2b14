"""Plans: a server's description of a task, from which a device or an edge builds the task."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import sumus
from benchmarks.fuzz.framing import text
from benchmarks.fuzz.target import Target
from sumus import robust
from sumus.aggregate import Fixed, Part, mean
from sumus.errors import PlanError
from sumus.plan import Plan
from sumus.task import Data, Description, Leaf
from sumus.update import chain, clip_by_global_norm, quantize, rotate

LEAF = Leaf("w", (2,), "float32", "shared", True)
DATA = Data((3,), "float32", (), "int64", 2)
Change = Callable[[dict[str, Any]], object]


def check(data: bytes) -> None:
    """Check that a plan that is read has one text, which is read as the same plan, and that its questions are answered
    or refused."""
    try:
        plan = Plan.from_json(data.decode("utf-8", "replace"))
    except PlanError:
        return
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert hash(again) == hash(plan)
    for spools in (False, True):
        try:
            plan.check_deployable(spools)
        except PlanError:
            continue
    assert plan.first_hop.nbytes >= 0
    assert plan.keeps_state in (False, True)
    try:
        served = plan.for_devices()
    except PlanError:
        return
    assert served.for_devices() == served
    assert str(served.influence)


def tiny(leaves: tuple[Leaf, ...] = (LEAF,), algorithm: Any = None, pacing: Any = None, **options: Any) -> Plan:
    """Return a plan of one leaf of two numbers."""
    task = Description(options.pop("name", "tiny"), leaves, "loss", (), options.pop("data", DATA))
    chosen = algorithm or sumus.fedavg(sumus.sgd(0.1))
    return Plan(task, chosen, pacing or sumus.Pacing(3), **{"min_contributors": 2, **options})


def seeds() -> Mapping[str, bytes]:
    """Return plans of every algorithm and rule, and texts that are no plans."""
    clipped = chain(clip_by_global_norm(1.0), rotate(), quantize(8))
    buffer = sumus.Pacing(3, concurrency=10)
    plans = {
        "tiny": tiny(),
        "clipped": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), clipped)),
        "weighed": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), chain(sumus.weight(cap=10), clip_by_global_norm(1.0)))),
        "buffered": tiny(algorithm=sumus.fedbuff(sumus.sgd(0.1)), pacing=buffer),
        "scaffold": tiny(algorithm=sumus.scaffold(sumus.sgd(0.1))),
        "prox": tiny(algorithm=sumus.fedprox(sumus.adamw(lr=0.1), mu=0.1)),
        "nova": tiny(algorithm=sumus.fednova(sumus.sgd(0.1))),
        "scheduled": tiny(
            algorithm=sumus.fedavg(sumus.sgd(sumus.schedules.cosine(0.1, rounds=10), epochs=2, batch_size=4))
        ),
        "krum": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), aggregator=robust.krum(attackers=0))),
        "fixed": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), aggregator=mean(Part("params", denominator=Fixed(3))))),
        "adam": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), server=sumus.optimizers.adam(lr=0.1))),
        "cyclic": tiny(algorithm=sumus.cyclic(sumus.sgd(0.1)), pacing=sumus.Pacing(1)),
        "site": tiny(edges=sumus.Edges(2)),
        "noise-at-edges": tiny(edges=sumus.Edges(1, "edges"), name="noise"),
        "uniform-codes": tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), clipped, weight="uniform")),
        "personal": tiny((LEAF, Leaf("p", (), "float32", "personal", True))),
        "of-one": tiny(pacing=sumus.Pacing(1), min_contributors=1),
        "few": tiny(min_contributors=10),
        "without-data": tiny(data=None),
        "pacing": tiny(pacing=sumus.Pacing(3, 1.5, 0.5, 60.0, requires=sumus.Conditions(charging=True, battery=0.5))),
        "leaves": tiny(
            (LEAF, Leaf("m", (1,), "float64", "shared", False), Leaf("p", (), "float16", "personal", True, ("q",)))
        ),
    }
    whole = {name: plan.to_json().encode() for name, plan in plans.items()}
    whole |= {f"{name}-at-sites": _at_sites(body) for name, body in whole.items()}
    return (
        whole | _changed(json.loads(plans["tiny"].to_json()), json.loads(plans["clipped"].to_json())) | _nonsense(whole)
    )


def _at_sites(body: bytes) -> bytes:
    """Return a plan whose edges have rounds of their own, and whose sums follow from its pacing."""
    fields = json.loads(body)
    del fields["sums"]
    noise = {"noise_at": "edges"} if "noise" in fields["task"]["with"]["name"] else {}
    return text({**fields, "edges": {"name": "edges", "with": {"rounds": 2, **noise}}})


def _nonsense(whole: Mapping[str, bytes]) -> dict[str, bytes]:
    return {
        "empty": b"",
        "no-object": b"[]",
        "no-format": b"{}",
        "deep": b'{"sumus":1,"task":' + b"[" * 3000 + b"]" * 3000 + b"}",
        "number-without-end": whole["tiny"].replace(b'"cohort":3', b'"cohort":' + b"9" * 5000),
        "infinite": whole["tiny"].replace(b'"checkins":100.0', b'"checkins":1e400'),
        "not-a-number": whole["tiny"].replace(b'"checkins":100.0', b'"checkins":NaN'),
        "too-long": b" " * (16 * 2**20 + 1),
        "half-a-letter": whole["tiny"].replace(b'"name":"tiny"', b'"name":"\\ud800"'),
        "blanks": whole["tiny"].replace(b",", b" , "),
    }


def _changed(tiny: dict[str, Any], clipped: dict[str, Any]) -> dict[str, bytes]:
    """Return plans that each break a rule, or name something that does not exist."""
    found: dict[str, bytes] = {}

    def change(name: str, how: Change, of: dict[str, Any] = tiny) -> None:
        value = json.loads(json.dumps(of))
        how(value)
        found[name] = text(value)

    def algorithm(value: dict[str, Any]) -> dict[str, Any]:
        return value["algorithm"]["with"]

    params = mean(Part("params")).spec.to_json()
    chains = {
        "quantize-range": [quantize(8)],
        "weight-late": [clip_by_global_norm(1.0), sumus.weight(cap=3)],
        "clip-alone": [clip_by_global_norm(1.0)],
    }
    for name, stages in chains.items():
        links = [stage.spec.to_json() for stage in stages]
        change(
            name, lambda value, links=links: algorithm(value)["update"].update({"with": {"transforms": links}}), clipped
        )
    change("format", lambda value: value.update(sumus=2))
    change("unknown-field", lambda value: value.update(more=1))
    change("no-task", lambda value: value.pop("task"))
    change("task-of-another-kind", lambda value: value.update(task=value["pacing"]))
    change("no-registered-name", lambda value: value["task"].update(name="nobody/knows"))
    change("name-no-text", lambda value: value["task"].update(name=7))
    change("more-than-name-and-with", lambda value: value["task"].update(more=7))
    change("with-no-object", lambda value: value["task"].update({"with": 7}))
    change("mapping", lambda value: value["task"].update(name="mapping"))
    change("custom", lambda value: algorithm(value).update(client={"name": "custom"}))
    change("sums-too-few", lambda value: value["sums"]["with"].update(max_count=1))
    change("sums-overflow", lambda value: value["sums"]["with"].update(max_count=2**60))
    change("cohort-zero", lambda value: value["pacing"]["with"].update(cohort=0))
    change("cohort-huge", lambda value: value["pacing"]["with"].update(cohort=10**400))
    change("cohort-true", lambda value: value["pacing"]["with"].update(cohort=True))
    change("shape-negative", lambda value: value["task"]["with"]["leaves"][0]["with"].update(shape=[-1]))
    change("shape-huge", lambda value: value["task"]["with"]["leaves"][0]["with"].update(shape=[2**62, 2**62]))
    change("role", lambda value: value["task"]["with"]["leaves"][0]["with"].update(role="another"))
    change("dtype", lambda value: value["task"]["with"]["leaves"][0]["with"].update(dtype="another"))
    change("same-leaf", lambda value: value["task"]["with"]["leaves"].append(value["task"]["with"]["leaves"][0]))
    change("median", lambda value: algorithm(value).update(aggregator=robust.median(Part("params")).spec.to_json()))
    change("one-part-twice", lambda value: algorithm(value)["aggregator"].update({"with": {"parts": [params, params]}}))
    wide = {"fraction_bits": 0, "bound": 1e-6, "max_count": 2**33}
    change("sums-too-wide", lambda value: value["sums"]["with"].update(wide), json.loads(_of_wide_codes()))
    change("rounds", lambda value: value["edges"].update({"with": {"rounds": 10**6}}))
    change("edges-of-another-word", lambda value: value["edges"].update({"with": {"noise_at": "below"}}))
    change("krum-of-many", lambda value: algorithm(value).update(aggregator=robust.krum(attackers=3).spec.to_json()))
    buffered = {"concurrency": 10, "over_select": 1.0, "least": 0.0}
    change("krum-of-a-buffer", lambda value: value["pacing"]["with"].update(buffered), json.loads(_krum()))
    change("chain-unused", lambda value: _parts(value)[0]["with"].update(transformed=False), clipped)
    change("weight-twice", lambda value: _parts(value)[0]["with"].update(weight="uniform"), json.loads(_weighed()))
    change("part-that-does-not-fit", lambda value: _parts(value)[0]["with"].update(bound=1e18))
    change("part-of-another-word", lambda value: _parts(value)[0]["with"].update(content="other"))
    change("leaves-no-list", lambda value: value["task"]["with"].update(leaves=7))
    return found


def _parts(value: dict[str, Any]) -> list[dict[str, Any]]:
    return value["algorithm"]["with"]["aggregator"]["with"]["parts"]


def _of_wide_codes() -> str:
    update = chain(clip_by_global_norm(1.0), rotate(), quantize(16))
    return tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), update)).to_json()


def _krum() -> str:
    return tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), aggregator=robust.krum(attackers=0))).to_json()


def _weighed() -> str:
    return tiny(algorithm=sumus.fedavg(sumus.sgd(0.1), sumus.weight(cap=10))).to_json()


TARGET = Target(
    "plans",
    check,
    seeds,
    {
        "sumus.plan": (),
        "sumus.spec": ("build", "call_with", "_check_types", "_declared", "_is_of", "to_json", "canonical_json"),
    },
    (
        b'"name":',
        b'"with":{',
        b'"mapping"',
        b'"custom"',
        b"1e400",
        b"-1",
        b"9" * 30,
        b"true",
        b"null",
        b'"algorithm"',
        b'"part"',
    ),
)
