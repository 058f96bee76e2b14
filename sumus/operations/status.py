"""What a server does, and what it waits for, as data: for `sumus status`, the admin's page and /metrics.

    now = await look(server)                       a ServerStatus; also while storage fails
    now.tasks[0].runs[0].waiting                   "3 of 7 reports; 4 devices train"

Sums over devices only: no device is named, and no moment at which one did something.
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
"""Until masks hide them."""
SPOOL = "; sealed spool: each update of {} lies on its disk, sealed, until its round is over"
SHORT = 80
"""Letters of what is said in short."""
PATIENCE = 15.0
"""Seconds that a look waits for the thread that decides."""


class RunStatus(msgspec.Struct, frozen=True):
    """A run's newest round. since_s: that it has been in this state.  goal: reports that its sum takes, and fewest, that it must
    have.  given, out, dropped, counted: sessions.  left_s: to its deadline.  trouble: why no model could be made.
    waiting: in a sentence, why nothing more has happened yet.  illegal: since the process started, events that the
    table of a round does not allow, by state and event."""

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
    """A version. round: that it is of, if it is of one.  age_s: since it was made.  sha256: of its file, which `export` writes.
    staleness: reports, by how many versions late they were.  train: means of local training.  evaluate: what devices measured of
    it: means, medians (the edges of the bin that the median device lies in), histograms, devices."""

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
    """One of the servers that share the rounds. name: its own.  leads: whether it is the one that makes models.  leader: who is.
    fence: of the leader's lease.  there: all of them, by name."""

    name: str
    leads: bool
    leader: str
    fence: int
    there: tuple[str, ...]


class InfluenceStatus(msgspec.Struct, frozen=True):
    """What one dishonest device can do to a sum, at most (`sumus.influence`).

    contributors: the fewest devices whose sum is used.
    share: of the sum's weight, from 0 to 1; of an aggregator that chooses among updates, of what it gives.
    length: the longest update that is counted, in parameters; None if no clip bounds it.
    step: how far the device moves the round's mean; of an aggregator that chooses among updates, or of an algorithm whose devices
        receive more than the model, how long what it gives is at most. None if nothing bounds it.
    trusted: whether the plan trusts its devices, and bounds neither.
    said: the same as a sentence, which the terminal and the page show as it is.
    """

    contributors: int
    share: float
    length: float | None
    step: float | None
    trusted: bool
    said: str


class TaskStatus(msgspec.Struct, frozen=True):
    """A task.

    version: the newest model, and released: the one that devices answer with.
    model: the newest; None at an edge, which makes none.
    evaluated: the newest model that devices have measured.
    edge_rounds, noise_at: what the plan asks of edges (`Edges`).
    influence: what one device can do to a sum; None at an edge, which knows no plan.
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
    """Of an edge, the server above it. trouble: why that does not hear; empty where it does.  sums, bytes: that it has counted.
    waiting: sums that are on their way.  why: the trouble in a few words."""

    server: str
    trouble: str
    sums: int
    bytes: int
    waiting: int
    why: str = ""


def in_short(trouble: str, server: str) -> str:
    """Of why a server does not hear, what fits on a small screen: without its address, and without what to do."""
    short = trouble.removeprefix(server).removeprefix(" cannot be reached: ").strip().partition("; ")[0]
    return short if len(short) <= SHORT else short[: SHORT - 1] + "…"


class RefusalStatus(msgspec.Struct, frozen=True):
    """Devices that took no part in the last minutes. task, kind: of which run; empty for whatever the server has.  why: a word.
    devices: how many.  said: the same as a sentence, "12 devices: already took part in …"."""

    task: str
    kind: str
    why: str
    devices: int
    said: str


class ServerStatus(msgspec.Struct, frozen=True):
    """A server. trouble: why it decides nothing; then there are no tasks.  devices: that are enrolled.  up_s: since it started.
    bytes_in, bytes_out: of bodies.  commits, acknowledged_s: of reports, and the seconds that they waited, added up.
    lent: bytes of memory in which bodies are arriving.  held: check-ins that are held open.  events: how often what happened, by
    what and which.  above: of an edge.  certificate_s: seconds until its certificate ends; None if it shows none.
    refusals: why devices took no part in the last minutes."""

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
    """The status now. lent: bytes of memory that bodies arrive in."""
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
        trouble = f"the present decision has taken {server.stuck_s:.0f} s: is the disk or the database slow?"
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
    """What the server sees of updates, in words."""
    spooled = [task.name for task in server.tasks if any(run.sums.spools for run in task.runs)]
    return CLEAR_MODE + (SPOOL.format(", ".join(spooled)) if spooled else "")


def lineage(run: Run, now: float) -> tuple[ModelStatus, ...]:
    """All versions of a task that are kept, the oldest first. On the deciding thread."""
    with run.store.transaction() as rows:
        return tuple(model_status(model, now) for model in rows.models())


def model_status(model: Model, now: float) -> ModelStatus:
    """A version's row, as it is shown."""
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
    """What a run waits for, in a sentence. people: devices that are enrolled.  refused: of late, most devices first.  now: by the
    store's clock."""
    if run.paused:
        return f"paused: {run.trouble}" if run.trouble else "paused by an admin"
    if told := run.waits_for(row):
        return told
    if isinstance(run, EvaluationRun) and not run.wanted():
        return "every model that is to be measured has been"
    if row.state is State.CLOSING:
        return "its model is being made"
    pause = begins_at(run.pacing, row) - now
    if pause > 0 and not row.out:
        return f"the plan leaves {ago(run.pacing.every or 0.0)} between rounds: goes on in {ago(pause)}"
    if row.state is not State.OPEN:
        return "about to begin"
    goal, fewest = run.pacing.cohort, run.pacing.fewest
    if people < fewest:
        return f"needs {fewest - people} more: {many(people, 'device')} of at least {fewest} enrolled"
    mine = [each.devices for each in refused if (each.task, each.kind) in ((run.task, run.kind), ("", ""))]
    if mine and not row.out:
        return f"{row.counted} of {goal} reports; {many(mine[0], 'device')} took no part of late, as is said below"
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
