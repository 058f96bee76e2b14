"""Runs of the simulator with all options given by name in one list, as tests pass them on."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import sumus

_OUTPUT = {"out": "folder"} | {field.name: field.name for field in fields(sumus.Output) if field.name != "folder"}
_COMPUTE = {field.name: field.name for field in fields(sumus.Compute)}
_EXPERIMENT = ("fleet", "edge_groups", "edges")


def doors(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `sumus.run` for these options. Options that belong to no options object stay as they are."""
    compute = {own: options[name] for name, own in _COMPUTE.items() if name in options}
    output = {own: options[name] for name, own in _OUTPUT.items() if name in options}
    rest = {name: value for name, value in options.items() if name not in _COMPUTE and name not in _OUTPUT}
    return rest | {"compute": sumus.Compute(**compute), "out": sumus.Output(**output)}


def simulated(
    task: sumus.Task, algorithm: sumus.Algorithm, population: Any, rounds: int, **options: Any
) -> sumus.History:
    """Run `sumus.simulate`; or, with a fleet or edges, `sumus.run` of an experiment."""
    given = doors(options)
    extra = {name: given.pop(name) for name in _EXPERIMENT if name in given}
    if not extra:
        return sumus.simulate(task, algorithm, population, rounds, **given)
    pacing = given.pop("pacing", None) or sumus.Pacing(cohort=min(len(population), 100))
    edges = {"edges": extra.pop("edges")} if "edges" in extra else {}
    plan = sumus.Plan(task, algorithm, pacing, **edges)
    own = {name: given.pop(name) for name in ("evaluate", "seed") if name in given}
    return sumus.run(sumus.Experiment(plan, population, rounds, **own, **extra), **given)
