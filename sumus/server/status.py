"""The status of a server as data: what it does and what it waits for. `sumus status`, the admin's page and /metrics show it.

    now = await look(server)                       a ServerStatus, even while storage fails
    now.tasks[0].runs[0].waiting                   "3 of 7 reports; 4 devices train"

A status holds sums over devices only: it names neither a device nor the time of a device's action. The structs are the JSON of
the admin plane, so their fields stay flat, however many they are.
"""

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sumus.plan import Plan
from sumus.protocol.round import Round, State, begins_at
from sumus.rounds.run import Run
from sumus.server.evaluation import EvaluationRun
from sumus.server.refusals import Refusal
from sumus.server.server import Server
from sumus.server.tasks import ServedTask
from sumus.server.training import TrainingRun
from sumus.storage.store import Model
from sumus.text import ago, many
from sumus.wire.messages import Refused

CLEAR_MODE = "clear mode: the server sees each update in memory"
"""The mode of every server, as long as sumus has no secure aggregation, which would hide single updates."""
SPOOL = "; sealed spool: each update of {} is kept on its disk, encrypted, until the update's round is over"
SHORT = 80
"""The largest number of characters of a shortened reason."""
PATIENCE = 15.0
"""The longest time for which `look` waits for the deciding thread, in seconds."""


class RunStatus(msgspec.Struct, frozen=True):
    """A run's newest round.

    Attributes:
        kind: Whether the run trains or evaluates.
        round: The round's number.
        state: The round's state.
        since_s: The time for which the round has been in this state, in seconds.
        goal: The number of reports that the round's sum needs.
        fewest: The smallest number of reports with which a model is made.
        given: The number of sessions that were assigned to devices.
        out: The number of sessions that have not ended.
        dropped: The number of sessions that ended without a report.
        counted: The number of sessions whose report is in the sum.
        left_s: The time to the round's deadline, in seconds; None if it has none.
        paused: Whether the run is paused.
        trouble: The reason why no model can be made; empty if models can be made.
        waiting: The reason why the round waits, as a sentence.
        illegal: The number of events, since the process started, that the table of rounds does not allow, by state and event.
    """

    kind: str
    round: int
    state: str
    since_s: float
    goal: int
    fewest: int
    given: int
    out: int
    dropped: int
    counted: int
    left_s: float | None
    paused: bool
    trouble: str
    waiting: str
    illegal: dict[str, dict[str, int]] = {}


class ModelStatus(msgspec.Struct, frozen=True):
    """A version of a model.

    Attributes:
        version: The version's number.
        round: The round that made the version; None if no round did.
        parent: The version that this one was made from; None for the first one.
        plan: The id of the plan.
        contributors: The number of reports in the version.
        age_s: The time since the version was made, in seconds.
        sha256: The hash of its file, which `export` writes.
        staleness: The number of reports, by the number of versions by which their model was out of date.
        train: The means of metrics from local training, by name.
        evaluate: The metrics that devices measured: `means`, `medians` (the limits of the bin with the median device),
            `histograms` and the number of `devices`.
    """

    version: int
    round: int | None
    parent: int | None
    plan: str
    contributors: int
    age_s: float
    sha256: str = ""
    staleness: dict[str, int] = {}
    train: dict[str, float] = {}
    evaluate: dict[str, Any] = {}


class ReplicaStatus(msgspec.Struct, frozen=True):
    """One of the servers that share rounds.

    Attributes:
        name: The server's name.
        leads: Whether this server makes the models.
        leader: The name of the leader.
        fence: The number of the leader's lease; it grows with each new leader.
        there: The names of all servers that share the rounds.
    """

    name: str
    leads: bool
    leader: str
    fence: int
    there: tuple[str, ...]


class InfluenceStatus(msgspec.Struct, frozen=True):
    """The largest effect of one dishonest device on a sum (`sumus.influence`).

    Attributes:
        contributors: The smallest number of contributors with which a sum is used.
        share: The device's share of the sum's weight, from 0 to 1; if an aggregator chooses among updates, the device's
            share of the aggregator's result.
        length: The largest norm of an update that is counted; None if no clip bounds updates.
        step: The largest distance by which the device can move the round's mean. If an aggregator chooses among updates, or
            devices receive more than the model, it is the largest norm of the aggregator's result. None if it is unbounded.
        trusted: Whether the plan trusts its devices, and limits neither `length` nor `step`.
        said: The same as a sentence, which the terminal and the page show.
    """

    contributors: int
    share: float
    length: float | None
    step: float | None
    trusted: bool
    said: str


class TaskStatus(msgspec.Struct, frozen=True):
    """A task that is served.

    Attributes:
        name: The task's name.
        plan: The id of its plan.
        priority: The priority: devices get work for tasks of higher priority first.
        min_contributors: The smallest number of contributors with which a sum is used.
        epoch: The task's noise epoch.
        version: The newest version.
        released: The released version, which devices use for predictions.
        model: The newest model; None at an edge, which makes none.
        evaluated: The newest model that devices have measured; None if there is none.
        edge_rounds: The number of rounds that an edge runs for each of its sums (`Edges`).
        noise_at: The place where noise is added (`Edges`).
        runs: The task's runs.
        influence: The largest effect of one device on a sum; None at an edge, which does not have the plan.
    """

    name: str
    plan: str
    priority: int
    min_contributors: int
    epoch: int
    version: int
    released: int
    model: ModelStatus | None
    evaluated: ModelStatus | None
    edge_rounds: int
    noise_at: str
    runs: tuple[RunStatus, ...]
    influence: InfluenceStatus | None = None


class AboveStatus(msgspec.Struct, frozen=True):
    """The upstream server of an edge.

    Attributes:
        server: The server's address.
        trouble: The reason why the server cannot be reached; empty if it can.
        sums: The number of sums that the server has counted.
        bytes: The size of these sums in bytes.
        waiting: The number of sums that wait to be sent or counted.
        why: The same reason in a few words, without the address and the advice.
    """

    server: str
    trouble: str
    sums: int
    bytes: int
    waiting: int
    why: str = ""


def in_short(trouble: str, server: str) -> str:
    """Shorten the reason why a server cannot be reached: remove the address and the advice.

    Args:
        trouble: The reason.
        server: The server's address.
    """
    short = trouble.removeprefix(server).removeprefix(" cannot be reached: ").strip().partition("; ")[0]
    return short if len(short) <= SHORT else short[: SHORT - 1] + "…"


class RefusalStatus(msgspec.Struct, frozen=True):
    """Devices that took no part in the last minutes, for one reason.

    Attributes:
        task: The task; empty for all tasks.
        kind: The kind of run; empty for all runs.
        why: The reason, as a code.
        devices: The number of devices.
        said: The same as a sentence: "12 devices: already took part in …".
    """

    task: str
    kind: str
    why: str
    devices: int
    said: str


class ServerStatus(msgspec.Struct, frozen=True):
    """A server.

    Attributes:
        population: The name of its population.
        trouble: The reason why the server cannot decide; then `tasks` is empty. Empty if it can decide.
        devices: The number of enrolled devices.
        up_s: The time since the server started, in seconds.
        bytes_in: The number of bytes of received bodies.
        bytes_out: The number of bytes of sent bodies.
        commits: The number of commits of reports.
        acknowledged_s: The sum of the times that reports waited for their acknowledgements, in seconds.
        lent: The memory that is lent for arriving bodies, in bytes.
        held: The number of check-ins that are held open.
        mode: The text that describes what the server can see of updates.
        events: The number of events, by kind and outcome.
        replica: This server as one of the servers that share its rounds.
        tasks: The tasks.
        above: The upstream server of an edge; None if the server is not an edge.
        certificate_s: The time until the server's certificate ends, in seconds; None if it has no certificate.
        refusals: The reasons why devices took no part in the last minutes.
    """

    population: str
    trouble: str
    devices: int
    up_s: float
    bytes_in: int
    bytes_out: int
    commits: int
    acknowledged_s: float
    lent: int
    held: int
    mode: str
    events: dict[str, dict[str, int]]
    replica: ReplicaStatus
    tasks: tuple[TaskStatus, ...] = ()
    above: AboveStatus | None = None
    certificate_s: float | None = None
    refusals: tuple[RefusalStatus, ...] = ()


async def look(
    server: Server, lent: int = 0, above: AboveStatus | None = None, certificate_s: float | None = None
) -> ServerStatus:
    """Return the status of a server now.

    Args:
        server: The server.
        lent: The memory that is lent for arriving bodies, in bytes.
        above: The upstream server, if the server is an edge.
        certificate_s: The time until the server's certificate ends, in seconds.
    """
    tasks, people, trouble = tuple[TaskStatus, ...](), 0, server.trouble
    refusals = tuple[RefusalStatus, ...]()

    def looked(now: float) -> tuple[tuple[TaskStatus, ...], int, tuple[RefusalStatus, ...]]:
        people = server.crowd.count()
        seen = server.refusals.seen(now)
        tasks = tuple(_task(task, people, seen, now) for task in server.tasks)
        return tasks, people, tuple(map(_refusal, seen))

    try:
        tasks, people, refusals = await asyncio.wait_for(server.command(looked), PATIENCE)
        trouble = server.trouble
    except Refused as refused:
        trouble = server.trouble or refused.problem.detail
    except TimeoutError:
        trouble = f"the current decision has already taken {server.stuck_s:.0f} s: check whether the disk or the database is slow"
    counts = server.counts
    return ServerStatus(
        population=server.population,
        trouble=trouble,
        devices=people,
        up_s=time.monotonic() - server.began,
        bytes_in=counts.bytes_in,
        bytes_out=counts.bytes_out,
        commits=counts.batches,
        acknowledged_s=counts.waited,
        lent=lent,
        held=server.held,
        mode=mode_of(server),
        events=_by_what(dict(counts.events)),
        replica=ReplicaStatus(
            name=server.replica.name,
            leads=server.leads,
            leader=server.replica.leader,
            fence=server.replica.last_fence,
            there=server.replica.there,
        ),
        tasks=tasks,
        above=above,
        certificate_s=certificate_s,
        refusals=refusals,
    )


def _refusal(seen: Refusal) -> RefusalStatus:
    return RefusalStatus(seen.task, seen.kind, seen.why, seen.devices, f"{many(seen.devices, 'device')}: {seen.said}")


def mode_of(server: Server) -> str:
    """Return a text that describes what a server can see of updates."""
    spooled = [task.name for task in server.tasks if any(run.sums.spools for run in task.runs)]
    return CLEAR_MODE + (SPOOL.format(", ".join(spooled)) if spooled else "")


def lineage(run: Run, now: float) -> tuple[ModelStatus, ...]:
    """List all versions of a task that are kept, starting with the oldest. Call this on the deciding thread."""
    with run.store.transaction() as rows:
        return tuple(model_status(model, now) for model in rows.models())


def model_status(model: Model, now: float) -> ModelStatus:
    """Return the status of a version, made from its row."""
    measured: Mapping[str, Any] = json.loads(model.metrics)
    return ModelStatus(
        version=model.version,
        round=model.round,
        parent=model.parent,
        plan=model.plan,
        contributors=model.contributors,
        age_s=max(0.0, now - model.at),
        sha256=model.model,
        staleness=measured.get("staleness", {}),
        train=measured.get("train", {}),
        evaluate=measured.get("evaluate", {}),
    )


def _task(task: ServedTask, people: int, refused: Sequence[Refusal], now: float) -> TaskStatus:
    main = task.runs[0]
    with main.store.transaction() as rows:
        run = rows.run()
    models = lineage(main, now)
    shown = task.released
    makes = isinstance(main, TrainingRun)
    released = 0 if shown is None else shown.version
    return TaskStatus(
        name=task.name,
        plan=main.plan_body.sha256,
        priority=task.priority,
        min_contributors=main.least,
        epoch=run.epoch,
        version=run.version if makes else released,
        released=released,
        model=next((model for model in reversed(models) if model.version == run.version), None),
        evaluated=next((model for model in reversed(models) if model.evaluate), None),
        edge_rounds=main.edges.rounds,
        noise_at=main.edges.noise_at,
        runs=tuple(_run(each, people, refused, now) for each in task.runs),
        influence=_influence(main.plan) if isinstance(main, TrainingRun) else None,
    )


def _influence(plan: Plan) -> InfluenceStatus:
    found = plan.influence
    return InfluenceStatus(found.contributors, found.share, found.length, found.step, found.trusted, found.said)


def _run(run: Run, people: int, refused: Sequence[Refusal], now: float) -> RunStatus:
    row, pacing = run.coordinator.current, run.pacing
    left = None
    if row.state is State.OPEN and not pacing.buffered and pacing.deadline is not None:
        left = max(0.0, row.since + pacing.deadline - now)
    return RunStatus(
        kind=run.kind,
        round=row.number,
        state=row.state.value,
        since_s=max(0.0, now - row.since) if row.since else 0.0,
        goal=pacing.cohort,
        fewest=pacing.fewest,
        given=row.given,
        out=row.out,
        dropped=row.dropped,
        counted=row.counted,
        left_s=None if left is None or math.isinf(left) else left,
        paused=run.paused,
        trouble=run.trouble,
        waiting=why(run, row, people, refused, now),
        illegal=_by_what(run.coordinator.illegal),
    )


def why(run: Run, row: Round, people: int, refused: Sequence[Refusal], now: float) -> str:
    """Return a sentence that tells why a run waits.

    Args:
        run: The run.
        row: The newest round of the run.
        people: The number of enrolled devices.
        refused: The reasons why devices took no part recently, sorted by their number of devices, largest first.
        now: The time by the store's clock.
    """
    if run.paused:
        return f"paused: {run.trouble}" if run.trouble else "paused by an admin"
    if told := run.waits_for(row):
        return told
    if isinstance(run, EvaluationRun) and not run.wanted():
        return "all models that should be measured have been measured"
    if row.state is State.CLOSING:
        return "its model is being made"
    pause = begins_at(run.pacing, row) - now
    if pause > 0 and not row.out:
        return f"the plan leaves {ago(run.pacing.every or 0.0)} between rounds: the next one begins in {ago(pause)}"
    if row.state is not State.OPEN:
        return "about to begin"
    goal, fewest = run.pacing.cohort, run.pacing.fewest
    if people < fewest:
        return f"needs {fewest - people} more: {many(people, 'device')} of at least {fewest} enrolled"
    mine = [each.devices for each in refused if (each.task, each.kind) in ((run.task, run.kind), ("", ""))]
    if mine and not row.out:
        return (
            f"{row.counted} of {goal} reports; {many(mine[0], 'device')} took no part recently, for the reasons below"
        )
    if not row.given:
        return f"no device has asked for work yet; {people} {'is' if people == 1 else 'are'} enrolled"
    reports = f"{row.counted} of {goal} reports"
    if row.out:
        return f"{reports}; {many(row.out, 'device')} {'trains' if row.out == 1 else 'train'}"
    return f"{reports}; waits for devices to ask for work"


def _by_what(events: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (what, which), times in sorted(events.items()):
        found.setdefault(what, {})[which] = times
    return found
