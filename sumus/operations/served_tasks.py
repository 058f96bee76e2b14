"""The tasks of a server, opened: a bundle becomes a served task with its runs.

If the leaves or the data of a task have changed, the task becomes a new *version*, with a model of its own.
"""

import json
import re
from collections.abc import Callable

from sumus.errors import ExperimentError
from sumus.operations.policy import ServerPolicy, check_name
from sumus.operations.stores import Stores
from sumus.plan import Plan
from sumus.protocol.consent import hurdles
from sumus.rounds.circumstances import Crowd
from sumus.rounds.run import Run
from sumus.rounds.seeds import Seeds, any_seed
from sumus.server.evaluation import EvaluationRun
from sumus.server.tasks import ServedTask
from sumus.server.training import TrainingRun
from sumus.storage.store import OF_THE_RUN, Model, Store
from sumus.types import Tree
from sumus.wire.bundle import Bundle
from sumus.wire.reports import most_bytes
from sumus.wire.tensors import decode_tree


def open_task(
    name: str,
    bundle: Bundle,
    stores: Stores,
    policy: ServerPolicy,
    crowd: Crowd,
    seeds: Seeds,
    notes: list[str],
) -> tuple[ServedTask, Callable[[float], None]]:
    """Open a task of a server.

    Args:
        name: The task's name. If the task has earlier versions, a number is added to the name that devices use.
        bundle: The task's plan and first model.
        stores: The server's stores.
        policy: The rules by which the server runs its tasks.
        crowd: The number of enrolled devices.
        seeds: Returns, for a round, the seed that the round's sums share.
        notes: A list to which notes for the operator are added.

    Returns:
        The task, and the function that begins its first round. The argument of the function is the time of the store's clock.

    Raises:
        ExperimentError: The server cannot run the plan, or the name is not allowed.
    """
    plan = bundle.plan
    if plan.trusts_devices is None:  # its metrics would accept any number of predictions
        raise ExperimentError(
            f"the plan of {name} was not made for devices: it does not say whether it trusts them. Pack its file again with "
            "`sumus pack`, or bundle plan.for_devices()"
        )
    plan.check_deployable(policy.spool)
    check_name("task", name)
    if re.search(r"\.\d+$", name):
        raise ExperimentError(
            f"{name!r} cannot be the name of a task: names that end like `.2` are for versions of a task; give another name"
        )
    if plan.pacing.deadline is None:
        notes.append(
            f"{name}: the plan gives rounds no deadline; on a server, each round then ends after an hour; "
            "to change this, give Pacing(deadline=)"
        )
    notes.append(f"{name}: {plan.influence.said}")
    notes += [f"{name}: {each}" for each in hurdles(plan)]
    number, before = _version(name, plan, stores.store("tasks"))
    wire = name if number == 1 else f"{name}.{number}"
    training = TrainingRun(
        wire,
        plan,
        stores.store(f"{wire}.train"),
        stores.blobs,
        stores.ring,
        stores.sums(f"{wire}.train"),
        crowd,
        seeds,
        policy.releases,
    )
    if (most := most_bytes(training.hop)) > policy.memory:
        raise ExperimentError(
            f"a report of {name} may have {_mib(most)} MiB, but all reports in transit together only {_mib(policy.memory)} MiB: "
            f"every report would be refused. Give --memory {_mib(2 * most)}, or train fewer leaves"
        )
    shared: Tree = {
        leaf: bundle.model[leaf] for leaf in (*plan.description.trained_layout, *plan.description.buffer_layout)
    }
    runs: tuple[Run, ...] = (training,)
    if policy.evaluate is not None:
        run = f"{wire}.evaluate"
        runs += (EvaluationRun(training, policy.evaluate, stores.store(run), stores.ring, stores.sums(run), any_seed),)

    def begin(now: float) -> None:
        _version(name, plan, stores.store("tasks"), write=True)
        first = shared
        if number > 1:
            notes.append(
                f"{name}: its leaves or its data have changed: this is version {number} of the task, with a new model"
            )
        if number > 1 and policy.warm_start:
            first, taken = _warm(shared, before, stores)
            notes.append(f"{name}: {taken} of {len(shared)} leaves begin with the old model's values")
        training.begin(first, now)

    fingerprint, priority = plan.description.fingerprint, policy.priority.get(name, 0)
    return ServedTask(wire, runs, fingerprint, plan.keeps_state, priority), begin


def _version(name: str, plan: Plan, store: Store, write: bool = False) -> tuple[int, str]:
    """Find the number of a task's version, and the name by which devices know the previous version.

    Args:
        name: The task.
        plan: Its plan.
        store: The store of the versions.
        write: Whether to store a new version.
    """
    fingerprint = plan.description.fingerprint
    with store.transaction() as rows:
        note = rows.note(OF_THE_RUN, name)
        known: list[str] = [] if note is None else json.loads(note)
        if fingerprint not in known:
            known.append(fingerprint)
            if write:
                rows.put_note(OF_THE_RUN, name, json.dumps(known).encode())
    number = known.index(fingerprint) + 1
    return number, name if number <= 2 else f"{name}.{number - 1}"


def _warm(shared: Tree, before: str, stores: Stores) -> tuple[Tree, int]:
    """Return the first values of the leaves, and the number of leaves whose value is from the task's previous version.

    A leaf takes the value of the previous version if that version has a leaf with the same name and shape.
    """
    with stores.store(f"{before}.train").transaction() as rows:
        model: Model | None = rows.model(rows.run().version)
    if model is None:
        return shared, 0
    old = decode_tree(stores.blobs.get(model.model))
    fits = {leaf for leaf, value in shared.items() if leaf in old and old[leaf].shape == value.shape}
    return {leaf: old[leaf].astype(value.dtype) if leaf in fits else value for leaf, value in shared.items()}, len(fits)


def _mib(nbytes: int) -> int:
    return -(-nbytes // 2**20)
