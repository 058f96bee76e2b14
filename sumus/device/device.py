"""A device: it takes part in a server's rounds with examples that stay here.

    device = Device("https://sumus.example.org:8443/#enrol=TOKEN&pin=HEX", task, examples, folder="~/.health")
    device.run()                                  until it is stopped
    device.predict(inputs)                        with the last model that it was given, also offline
    device.forget()                               consent taken back

It is a shell around `sumus.protocol.session`: what that decides is written, in one step, and then done. Where the process ends,
the next one goes on from there, with the same report. `wake` does what is due and says when it is due again, for programs with a
loop of their own; nothing here sleeps, but `run`, and a check-in that waits at the server.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import sumus.protocol.session as session
from sumus.device.conditions import Sensors, here
from sumus.device.keys import Keys, share_of, system
from sumus.device.link import Link, fetch_authority, pin_of, read_link
from sumus.device.requests import Requests
from sumus.device.store import (
    DeviceStore,
    FolderDeviceStore,
    KeptModel,
    KeptState,
    Membership,
    MemoryDeviceStore,
    Record,
    WorkStarts,
    counted,
)
from sumus.errors import (
    BeyondBoundError,
    DataError,
    DivergedError,
    ExperimentError,
    ParticipantError,
    PlanError,
    SumusError,
    TaskError,
    UsageError,
)
from sumus.errors import said as said_of
from sumus.pacing import Conditions
from sumus.plan import Plan
from sumus.protocol.session import Floor, Phase, WorkOffer
from sumus.storage.files import expanded
from sumus.task import Task
from sumus.text import amount, many, printable
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Transport, Unreachable
from sumus.tree import nested, unnested
from sumus.types import Array
from sumus.wire.messages import (
    AGAIN,
    AbortReason,
    Assignment,
    CheckInAnswer,
    CheckInRequest,
    DeviceConditions,
    Kind,
    PreviousSession,
    Refused,
    Released,
    Window,
)
from sumus.wire.tensors import decode_tree, encode_tree
from sumus.work import ClientState

if TYPE_CHECKING:
    from torch import Tensor

    from sumus.device.training import Training

V = TypeVar("V")

FLOOR, ANY = Floor(), Conditions()
LONGEST_WAIT = 60.0
"""Seconds that a check-in may be held open, at most."""
MAX_PLAN = 2**24
"""The longest plan that is read, in bytes."""
MOST_TASKS = 16
"""Tasks of which something is kept: those that came last, however many a server names."""
TRIES = 3
"""Times that an object is asked for, one after the other, before its round is given up."""
LEAST = 1.0
"""Seconds that a window which a server gives is wide at least, counted from now."""
SOON = 0.1
"""Seconds within which a device that may wait at the server comes back, once its report is settled; and within which a process
that has just been started asks."""
FIRST_WAIT = 0.5
"""Seconds for which a process's first check-ins may be held open, until it could say what it waits for."""
COPIED = (
    "somebody else asks with this device's key: the server has answered check-in {}, and the last one of this folder is {}. The "
    "folder was copied to another machine, or put back from a backup. Of two machines with one folder let one go on alone, and "
    "enrol the other with a link and a folder of its own; a folder that was put back goes on by itself"
)
SPREAD = 100
"""How far such a folder counts ahead at most, at random, so that the other one is told too."""
HIGHEST = 2**52
"""The highest serial that a server takes."""
CLEAN = 20
"""Check-ins that go well, after which a copy is not spoken of any more."""
UNMET = (60.0, 300.0)
"""Seconds to look again, where the device's own conditions are not met."""
REFUSALS = frozenset(
    {
        "malformed",
        "digest_required",
        "bad_report",
        "not_finite",
        "out_of_bounds",
        "empty",
        "closed",
        "stale",
        "phase",
        "too_large",
        "encoding",
    }
)
"""Codes after which a report is not counted, and will not be."""
WAITS: Mapping[str, str] = {
    "asking": "for the server above its edge to answer",
    "battery": "until its battery is charged further, as the plan asks",
    "cap": "for nothing more: it has had all the rounds that the plan gives it",
    "charging": "until it is charging, as the plan asks (--always, for a machine that always is)",
    "closed": "for the next round",
    "few": "until enough devices are enrolled for a sum",
    "full": "for the next round: this one has all its devices",
    "idle": "until nobody uses it, as the plan asks (--always, for a machine that nobody does)",
    "left": "for the next round: somebody who came with the same link is in this one, and has left",
    "not_edge": "until its edge may speak for more devices: ask who runs the edge",
    "nothing to do": "for work: the server has none of the kinds that it takes",
    "pace": "for the next round: the plan leaves time between rounds",
    "parent": "until the work that it has by way of another edge has ended",
    "paused": "until the server's operator lets it go on",
    "resting": "for a while, since earlier work of this device did not come to an end",
    "separation": "until others have had their turn",
    "unmetered": "until its network is unmetered, as the plan asks (--always, for one that always is)",
    "version": "for a newer version of the program that it is part of, as the plan asks: update it",
}
"""What a server's reasons mean to a device's owner."""
FINAL: Mapping[str, str] = {
    "not_device": "this link is for an edge, and not for a device: ask for another one",
    "revoked": "the server has barred this device: ask who runs it; predictions go on working",
    "wrong_task": "the server has no task with this model and these data: update the file that defines them",
    "old_protocol": "the server speaks another version of the protocol: update sumus, here or there",
    "unknown_device": "the server does not know this device: it was let go there, or the server was put back from a backup "
    "that is older than this device; enrol it again, with a new link",
}
"""Codes that a person must do something about."""


@dataclass(frozen=True)
class DeviceNews:
    """Something that a device did or met. said: in words.  task, version: of the model that it is about.  measured: means by
    metric.  again_s: seconds within which it asks again, where it waits or had no answer."""

    what: Literal[
        "enrolled", "training", "trained", "evaluated", "counted", "discarded", "aborted", "model", "waiting", "trouble"
    ]
    said: str = ""
    task: str = ""
    kind: str = ""
    version: int = -1
    examples: int = 0
    seconds: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    again_s: float = 0.0


@dataclass(frozen=True)
class Status:
    """Where a device stands. checkins: so far.  counts: of what it did.  models: versions by task.  trouble: what went wrong
    last, if that is not mended since.  unanswered: requests, one after the other, that the server did not answer."""

    device: str
    server: str
    population: str
    phase: str
    checkins: int
    counts: Mapping[str, int]
    models: Mapping[str, int]
    trouble: str
    unanswered: int


@dataclass(frozen=True)
class Prediction:
    """What a model says. outputs: one row an example.  task, version: of the model.  answers: the same in the words of a node's
    file, one an example, if that has any."""

    outputs: Array
    task: str
    version: int
    answers: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ForgetReport:
    """What `forget` erased, and what it could not, in words."""

    erased: tuple[str, ...]
    remains: tuple[str, ...]


def _quiet(news: DeviceNews) -> None:
    """Nobody watches."""


def _today() -> int:
    return date.today().toordinal()


class Device:
    """One device of one server, with one task.

    server: its address or its link; None for the one that it is enrolled at.  task: a `Task`, or a `Training` that many devices
        of this process share.
    examples: (inputs, targets) or a data set of pairs, or a function that gives them whenever they are needed.
    held_out: such examples to evaluate on; else `examples`.
    folder: for what it remembers; without, that is forgotten with the process.
    token: lets it in, the first time, where the link holds none.
    floor: what it consents to.  requires: conditions without which it does nothing.  sensors: what tells its conditions.
    version: of the program that it is part of, for plans that ask for one.
    executor: see `sumus.run`.  name: in messages to its owner, and in keyed randomness.
    trains, evaluates: kinds of work that it takes.  keeps_model: whether it fetches the models to predict with.
    wait_s: how long the server may hold a check-in open.  insecure: take http:// to other machines.
    moves: whether a link of another server is one of another edge of the same population, or of the server above, to which this
        device moves with its key.
    authority: a file of certificates, PEM, that the server's must come from; kept for the next start. None for those that were
        named before, else the system's.
    watch: is told what happens.
    keys, transport, store, clock, sleep, today: for tests and simulation; the system's by default.

    Raises ExperimentError and its like for what a person must mend.
    """

    def __init__(
        self,
        server: str | None,
        task: "Task | Training",
        examples: Any,
        *,
        folder: str | Path | None = None,
        token: str | None = None,
        held_out: Any = None,
        floor: Floor = FLOOR,
        requires: Conditions = ANY,
        sensors: Sensors | None = None,
        version: int = 0,
        executor: str = "auto",
        name: Any = "this device",
        trains: bool = True,
        evaluates: bool = True,
        keeps_model: bool = True,
        wait_s: float = 20.0,
        insecure: bool = False,
        moves: bool = False,
        authority: str | Path | None = None,
        watch: Callable[[DeviceNews], None] = _quiet,
        keys: Keys = system,
        transport: Transport | None = None,
        store: DeviceStore | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
        today: Callable[[], int] = _today,
    ) -> None:
        link = Link("") if server is None else read_link(server, insecure)
        self._link = replace(link.vouched_for_by(authority), token=token or link.token)
        self._store = store or (MemoryDeviceStore() if folder is None else FolderDeviceStore(expanded(folder)))
        self._record, self._unknown = self._store.read(), False
        if (member := self._record.membership) is not None and _is_of_another(self._link, member.server):
            why = _stays(self._record, member, self._link) if moves else _belongs(member, self._link)
            if why:
                if store is None:
                    self._store.close()
                raise ExperimentError(why)
            self._unknown = True
        if member is not None and self._store.key() is None:
            if store is None:
                self._store.close()
            raise ExperimentError(
                f"{folder or 'this device'} knows its server and has no key: it was put back in part. Put its `key` back too, or "
                "delete the folder and enrol it anew, with a new link"
            )
        self._task, self._examples, self._held_out = task, examples, held_out
        self._executor = executor
        self._floor, self._requires, self._sensors, self._version = floor, requires, sensors or here(), version
        self._client, self._keys, self._watch = name, keys, watch
        self._kinds: tuple[Kind, ...] = (*(("train",) if trains else ()), *(("evaluate",) if evaluates else ()))
        self._keeps_model, self._wait_s = keeps_model, min(wait_s, LONGEST_WAIT)
        self._given_transport, self._transport = transport, transport
        self._requests: Requests | None = None
        self._training: Training | None = None
        self._read: dict[str, tuple[Tensor, Tensor]] = {}
        self._stopped, self._making = threading.Event(), threading.Lock()
        self._clock, self._sleep, self._today = clock, sleep or self._stopped.wait, today
        self._begun = self._record.row == session.DeviceState()
        self._due = clock()
        self._unanswered = 0
        self._fetched = "" if self._unknown else self._record.authority
        self._trouble, self._has_said = "", False
        self._copied, self._clean = "", 0

    # ── what it is asked to do ───────────────────────────────────────────────────────────────────────────────────────

    def enrol(self) -> str:
        """Make it known to its server, with its token, where it is not; its id. Again changes nothing."""
        requests, member = self._to_server(), self._record.membership
        if member is None or self._unknown:
            if self._link.token is None:
                raise ExperimentError(
                    "this device is not enrolled: give it a link or a token, from whoever runs the server"
                )
            try:
                enrolment = requests.enrol(self._link.token)
            except Refused as refused:
                if refused.problem.code in AGAIN:
                    raise Unreachable(f"the server cannot enrol this device now: {refused}") from refused
                raise ExperimentError(_said_of_enrolment(refused)) from refused
            if member is not None and enrolment.population != member.population:
                raise ExperimentError(
                    f"{self._link.server} is of the population {enrolment.population}, and this device is of "
                    f"{member.population}: give another --folder"
                )
            member = Membership(self._link.server, enrolment.population, enrolment.device)
            self._write(replace(self._record, membership=member, authority=self._fetched))
            self._unknown, self._unanswered = False, 0
            self._tell(DeviceNews("enrolled", f"enrolled in {enrolment.population} as {enrolment.device[:12]}…"))
        return requests.device

    def wake(self) -> float:
        """Do what is due; seconds until something is due again. Raises ExperimentError where a person must do something."""
        if not self._begun:  # another process ended there
            self._begun = True
            self._apply(session.Restarted())
        elif self._record.row.phase is Phase.TRAINING:  # an error ended there
            self._apply(session.Restarted())
            self._sleep_within(self._record.row.window)
        if (left := self._due - self._clock()) > 0:
            return left
        unmet = None if self._requires == ANY else self._requires.unmet(self._conditions())
        if unmet is not None:
            self._sleep_within(UNMET)
            self._tell(DeviceNews("waiting", WAITS[unmet].replace("as the plan asks", "as you ask"), again_s=UNMET[1]))
        elif self._is_enrolled():
            self._sleep_within(self._record.row.window)  # unless an action says otherwise
            word = self._keys("session", self._client, self._record.row.serial + 1).hex()[:32]
            self._carry_out(session.WakeUp(word))
        return max(0.0, self._due - self._clock())

    def run(self, rounds: int | None = None, until: Callable[[Status], bool] | None = None) -> None:
        """Take part, until so many more reports are counted, or `until` says so, or `stop` is called. On Ctrl-C the server is
        told."""
        goal = math.inf if rounds is None else self._record.counts.get("counted", 0) + rounds
        try:
            while not self._stopped.is_set():
                seconds = self.wake()
                if self._record.counts.get("counted", 0) >= goal or (until is not None and until(self.status)):
                    return
                if seconds:
                    self._sleep(seconds)
        except KeyboardInterrupt:
            self.give_up()
            raise

    def give_up(self) -> None:
        """After Ctrl-C: tell the server that what was being trained will not come."""
        self._record = self._store.read()
        if self._record.row.phase is Phase.TRAINING:
            self._carry_out(session.Failed("stopped"))

    def stop(self) -> None:
        """Let `run` end as soon as what it does is done; from any thread."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of its folder and its connections."""
        if self._transport is not None and self._given_transport is None:
            self._transport.close()
        self._store.close()

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def predict(self, inputs: Any, task: str | None = None) -> Array:
        """What the last model says of inputs, as this device stores them: they are prepared like its examples. Asks nobody.

        task: whose model, where the server has several tasks for it; by default the one that came last.
        """
        return self.prediction(inputs, task).outputs

    def prediction(self, inputs: Any, task: str | None = None) -> Prediction:
        """The same, with the model that it comes from."""
        training = self._trains_with()
        name, version, body, state = self._last_model(task)
        try:
            model = training.model(body)
        except ParticipantError as error:
            raise ExperimentError(
                f"the kept model is not of this task: {error}; let the device check in again"
            ) from error
        return Prediction(training.predict(model, state, self._examples, inputs), name, version)

    def forget(self) -> ForgetReport:
        """Take back consent: the server forgets the device, and everything that it kept here is erased. Where the server cannot
        be reached nothing is, so that it can be asked again."""
        done = forget(self._store, self._to_server() if self._record.membership else None)
        self._record, self._requests = self._store.read(), None
        return done

    @property
    def status(self) -> Status:
        """Where it stands."""
        record = self._record
        member = record.membership or Membership(self._link.server, "", "")
        return Status(
            member.device,
            member.server,
            member.population,
            record.row.phase.value,
            record.row.serial,
            record.counts,
            {task: kept.version for task, kept in record.models.items()},
            "; ".join(dict.fromkeys(filter(None, (self._trouble, self._copied)))),
            self._unanswered,
        )

    def kept(self, task: str) -> ClientState:
        """What it keeps of a task's rounds: control variates, leaves of its own."""
        return self._state(self._record, task)

    # ── the table, and what it decides ───────────────────────────────────────────────────────────────────────────────

    def _apply(self, event: session.Event, **changes: Any) -> tuple[session.Action, ...]:
        """Decide, write the row with all that belongs to it, and give what is to be done then."""
        before = replace(self._record, **changes) if changes else self._record
        row, actions = session.step(before.row, event, self._floor)
        record, work = replace(before, row=row), before.work
        news = list[DeviceNews]()
        for act in actions:
            if isinstance(act, session.KeepState | session.UndoState):
                kept = isinstance(act, session.KeepState)
                became: Literal["counted", "discarded"] = "counted" if kept else "discarded"
                if kept and work is not None and record.pending is not None:
                    record = replace(record, states=_with(record.states, work.task, record.pending))
                in_sums = ("in sums",) if kept and work is not None and work.kind == "train" else ()
                record = replace(record, counts=counted(record.counts, became, *in_sums))
                news.append(_news(became, work))
            elif isinstance(act, session.SendAbort):
                record = replace(record, counts=counted(record.counts, "aborted"))
        if not row.session:  # its end is known, or there is nothing to know
            record = replace(record, work=None)
        if not row.unsettled:
            record = replace(record, report=None, pending=None)
        if record != self._record:
            self._write(record)
        for act in actions:
            if isinstance(act, session.SleepFor):
                settled = bool(news) and before.row.phase is Phase.REPORTING and self._wait_s > 0
                self._sleep_within((0.0, SOON) if settled or act.window == session.AT_ONCE else act.window)
        for one in news:
            self._tell(one)
        return actions

    def _carry_out(self, event: session.Event, **changes: Any) -> None:
        """Apply an event, and do what follows."""
        work = self._record.work
        for act in self._apply(event, **changes):
            if isinstance(act, session.SendCheckIn):
                self._ask(act)
            elif isinstance(act, session.SendReport):
                self._send()
            elif isinstance(act, session.SendAbort) and work is not None:
                self._abort(work, cast(AbortReason, act.reason), self._trouble)

    def _ask(self, act: session.SendCheckIn) -> None:
        work = self._record.work
        previous = None if act.previous is None or work is None else PreviousSession(work.task, work.kind, act.previous)
        request = CheckInRequest(
            serial=act.serial,
            session=act.session,
            fingerprints=(self._trains_with().fingerprint,),
            kinds=self._kinds,
            conditions=_said(self._conditions()),
            previous=previous,
            wait_s=0.0 if previous else self._wait_s if self._has_said else min(self._wait_s, FIRST_WAIT),
        )
        try:
            answer = self._to_server().check_in(request)
        except Unreachable as error:
            self._unheard(str(error))
        except Refused as refused:
            self._turned_away(refused)
        else:
            self._heard()
            self._clean += 1
            if self._clean >= CLEAN:
                self._copied = ""
            self._answered(act, answer)

    def _answered(self, act: session.SendCheckIn, answer: CheckInAnswer) -> None:
        """Take what an answer says in its order: the end of the last session, then work or a window, and models."""
        if answer.settled is not None:
            self._carry_out(session.Settled(answer.settled.session, answer.settled.outcome))
        if self._record.row.phase is Phase.ASKED:
            if answer.assignment is not None:
                try:
                    self._consider(act, answer.assignment)
                finally:
                    self._let_go()
            else:
                window = _ordered(answer.retry_after_s or self._record.row.window)
                self._apply(session.ToldLater(window))
                if self._kinds:  # else it waits for models alone
                    self._tell(DeviceNews("waiting", WAITS.get(answer.reason, answer.reason), again_s=window[1]))
                self._has_said = True
        if self._keeps_model:
            for task, released in islice(answer.released.items(), MOST_TASKS):
                self._take_model(task, released)

    def _consider(self, act: session.SendCheckIn, work: Assignment) -> None:
        """Look at what is asked for, and do it where that is within the floor."""
        if work.session != act.session or self._record.row.unsettled:
            self._apply(session.Assigned(WorkOffer(work.session), self._today()))
            return
        try:
            plan, offer = self._offer(work)
        except Unreachable as error:
            self._unheard(str(error))
            return
        before = self._record.begun.get(work.task, WorkStarts())
        begun = WorkStarts(work.version, before.times + 1 if before.version == work.version else 1)
        actions = self._apply(
            session.Assigned(offer, self._today()),
            work=work,
            **({} if plan is None else {"begun": _with(self._record.begun, work.task, begun)}),
        )
        for one in actions:
            if isinstance(one, session.SendAbort):
                self._abort(
                    work, cast(AbortReason, one.reason), _beyond(one.reason, offer, self._floor) or self._trouble
                )
                self._rest(self._record.failures + 1)
            elif isinstance(one, session.StartWork) and plan is not None:
                self._work(work, plan)

    def _offer(self, work: Assignment) -> tuple[Plan | None, WorkOffer]:
        """What an assignment asks for, from its real plan; without a plan, why it cannot be done. Raises Unreachable."""
        size = work.plan.bytes + work.broadcast.bytes
        asked = WorkOffer(work.session, bytes=size, contributors=work.contributors)
        if size > self._floor.bytes:
            return None, asked
        if work.kind not in self._kinds or work.plan.bytes > MAX_PLAN:
            return None, replace(asked, unfit="plan")
        training = self._trains_with()
        try:
            plan = training.plan(work.plan.sha256, lambda: self._object(work.plan))
            if plan.description.fingerprint != training.fingerprint:
                self._note_trouble("the plan is of another model, or of other data, than this device's file defines")
                return None, replace(asked, unfit="floor-task")
            if plan.pacing.requires != ANY and plan.pacing.requires.unmet(self._conditions()) is not None:
                return None, replace(asked, unfit="conditions")
            asked = replace(asked, contributors=min(work.contributors, plan.min_contributors))
            if work.kind == "evaluate":
                return plan, asked
            inputs, targets = self._own("train")
            steps = plan.algorithm.client.step_count(len(inputs))
            return plan, replace(
                asked,
                steps=steps,
                seconds=steps * self._record.seconds,
                bytes=asked.bytes + plan.first_hop.nbytes,
                memory=training.memory(plan, inputs, targets),
            )
        except Unreachable:
            raise
        except Exception as error:
            self._note_trouble(_in_words(error))
            return None, replace(asked, unfit=_reason(error))

    def _work(self, work: Assignment, plan: Plan) -> None:
        """Train or evaluate; whatever goes wrong ends this round, and not the device."""
        self._tell(_news("training", work))
        try:
            training = self._trains_with()
            broadcast = training.broadcast(plan, work.broadcast.sha256, self._object(work.broadcast))
            done = self._done(work, plan, broadcast)
            pending = None
            if done.state:
                kept = self._store.put(encode_tree(unnested(done.state)))
                pending = KeptState(kept, training.fingerprint)
            report = self._store.put(done.report)
        except ExperimentError:
            raise  # the folder, not the round
        except Exception as error:
            self._note_trouble(_in_words(error))
            self._carry_out(session.Failed(_reason(error)))
            self._rest(self._record.failures + 1)
            return
        self._tell(
            replace(
                _news("trained" if work.kind == "train" else "evaluated", work),
                examples=done.examples,
                seconds=done.seconds,
                measured={name: total / count for name, (total, count) in done.measured.items() if count},
            )
        )
        self._carry_out(
            session.TrainingDone(),
            report=report,
            pending=pending,
            failures=0,
            seconds=done.seconds / done.steps if done.steps else self._record.seconds,
            counts=counted(self._record.counts, "trained" if work.kind == "train" else "evaluated"),
        )

    def _done(self, work: Assignment, plan: Plan, broadcast: Any) -> Any:
        from sumus.device.training import DeviceJob

        training, inputs_and_targets = self._trains_with(), self._own(work.kind)
        errand = DeviceJob(
            self._client,
            *inputs_and_targets,
            work.version,
            bytes.fromhex(work.seed),
            self._keys,
            self._record.begun[work.task].times - 1,
            self._state(self._record, work.task),
        )
        compute = training.train if work.kind == "train" else training.evaluate
        return compute(plan, broadcast, errand)

    def _send(self) -> None:
        """Send the report, the same bytes each time."""
        record = self._record
        work, report = record.work, record.report
        if work is None or report is None:
            raise ExperimentError(
                "the device's record names a report that it does not hold: delete its folder, and enrol again"
            )
        try:
            self._to_server().report(work, self._store.get(report))
        except Unreachable as error:
            self._unheard(str(error))
        except Refused as refused:
            code = refused.problem.code
            self._note_trouble(f"the report was refused: {refused}")
            if code in REFUSALS:
                self._carry_out(session.Settled(work.session, "discarded"))
            elif code == "unknown_session":
                self._carry_out(session.SessionUnknown())
            else:
                self._carry_out(session.NoAnswer(_ordered(refused.problem.retry_after_s or (0.0, 0.0))))
        else:
            self._heard()
            self._carry_out(session.Settled(work.session, "counted"))

    def _abort(self, work: Assignment, reason: AbortReason, why: str) -> None:
        """Tell the server, if it hears. why: for the owner alone."""
        self._tell(replace(_news("aborted", work), said=f"{reason}: {why}" if why else reason))
        with suppress(Unreachable, Refused):  # it finds out when the session's time is over
            self._to_server().abort(work, reason)

    def _take_model(self, task: str, released: Released) -> None:
        """Fetch the model that a task's devices answer with, unless it is here."""
        kept = self._record.models.get(task)
        if kept == KeptModel(released.version, released.model.sha256) or released.model.bytes > self._floor.bytes:
            return
        try:
            if kept is None or kept.object != released.model.sha256:
                body = self._object(released.model)
                self._trains_with().model(body)
                self._store.put(body)
        except (Unreachable, Refused, ParticipantError) as error:
            self._note_trouble(f"model {released.version} could not be taken: {error}")
            return
        models = _with(self._record.models, task, KeptModel(released.version, released.model.sha256))
        self._write(replace(self._record, models=models, latest=task))
        self._tell(DeviceNews("model", "to predict with", task, "train", released.version))

    # ── when the server does not answer, or answers no ───────────────────────────────────────────────────────────────

    def _is_enrolled(self) -> bool:
        """Enrolled, now at least; or a wait begins."""
        try:
            self.enrol()
        except Unreachable as error:
            self._unanswered += 1
            self._sleep_within(_longer((0.0, 0.0), self._unanswered))
            self._note_trouble(str(error), again_s=self._due - self._clock())
            return False
        return True

    def _heard(self) -> None:
        """The server answered, and knows this device: where it was asked at another address than before, it has moved there."""
        self._trouble, self._unanswered = "", 0
        member = self._record.membership
        if member is not None:
            member = replace(member, server=self._link.server or member.server)
        if (member, self._fetched) != (self._record.membership, self._record.authority):
            self._write(replace(self._record, membership=member, authority=self._fetched))

    def _unheard(self, said: str, window: Window = (0.0, 0.0)) -> None:
        """There was no answer, or none that helps."""
        self._unanswered += 1
        self._carry_out(session.NoAnswer(_ordered(window)))
        self._note_trouble(said, again_s=self._due - self._clock())

    def _turned_away(self, refused: Refused) -> None:
        """A check-in was refused."""
        problem = refused.problem
        said = str(refused)
        if (
            problem.code == "replayed" and problem.serial is not None
        ):  # this memory is older than the server's, or newer
            said = self._counted_on(problem.serial) or said
        self._unheard(said, problem.retry_after_s or (0.0, 0.0))
        if problem.code == "unknown_device" and self._link.token is not None:
            self._unknown = True
        elif problem.code in FINAL:
            raise ExperimentError(f"{FINAL[problem.code]} ({problem.detail or problem.code})")

    def _counted_on(self, last: int) -> str:
        """Go on from the server's last serial, and return what a person should know, if anything. This device writes each serial
        before it asks with it. If the server knows a higher one, another has asked with this device's key."""
        row, said = self._record.row, ""
        if last > row.serial:
            said = COPIED.format(last, row.serial)
            self._copied, self._clean = said, 0
            last += 1 + int(SPREAD * share_of(self._keys("apart", self._client, row.serial)))
        self._write(replace(self._record, row=replace(row, serial=min(last, HIGHEST))))
        return said

    def _rest(self, failures: int) -> None:
        """After so many rounds in a row that came to nothing here, wait: each time longer."""
        self._write(replace(self._record, failures=failures))
        self._sleep_within(_longer(self._record.row.window, failures))

    def _note_trouble(self, said: str, again_s: float = 0.0) -> None:
        self._trouble = printable(said)
        self._tell(DeviceNews("trouble", said, again_s=again_s))

    # ── what it has ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _trains_with(self) -> "Training":
        with self._making:  # who predicts may be another thread
            if self._training is None:
                if isinstance(self._task, Task):
                    from sumus.device.training import Training

                    self._training = Training(self._task, self._examples, self._executor)
                else:
                    self._training = self._task
            return self._training

    def _own(self, kind: str) -> "tuple[Tensor, Tensor]":
        """Its examples for a kind of work; kept, or where a function gives them, until this work is done."""
        held_out = kind == "evaluate" and self._held_out is not None
        which, examples = ("held out", self._held_out) if held_out else ("own", self._examples)
        if which in self._read:
            return self._read[which]
        self._read[which] = pair = self._trains_with().read(self._client, examples)
        return pair

    def _let_go(self) -> None:
        """Forget the examples that a function gave: it is asked again for the next work."""
        for which, examples in (("own", self._examples), ("held out", self._held_out)):
            if callable(examples):
                self._read.pop(which, None)

    def _state(self, record: Record, task: str) -> ClientState:
        """What it keeps of a task, if that is of this task's leaves."""
        kept = record.states.get(task)
        if kept is None or kept.fingerprint != self._trains_with().fingerprint:
            return {}
        return nested(decode_tree(self._store.get(kept.object)))

    def _last_model(self, task: str | None) -> tuple[str, int, bytes, ClientState]:
        """A model that was kept, of which task and version, and what the client keeps beside it; another process may be replacing
        all of it."""
        for last in (False, True):
            record = self._store.read()
            name = task or record.latest
            if (kept := record.models.get(name)) is None:
                raise ExperimentError("this device has no model to predict with yet: let it check in once")
            try:
                return name, kept.version, self._store.get(kept.object), self._state(record, name)
            except ExperimentError:
                if last:
                    raise
        raise AssertionError

    def _conditions(self) -> Conditions:
        return replace(self._sensors.read(), version=self._version)

    def _object(self, body: Any) -> bytes:
        """An object of the server's, asked for a few times."""
        for left in reversed(range(TRIES)):
            try:
                return self._to_server().object(body)
            except Unreachable:
                if not left:
                    raise
            except Refused as refused:
                raise Unreachable(f"the server does not give what it announced: {refused}") from refused
        raise AssertionError

    def _to_server(self) -> Requests:
        if self._requests is None:
            record = self._record
            member = record.membership
            server = self._link.server or (member.server if member else "")
            if self._transport is None:
                if not server:
                    raise ExperimentError("this device knows no server: give it an address or a link")
                self._transport = HttpTransport(server, self._authority(replace(self._link, server=server)) or None)
            if (key := self._store.key()) is None:
                self._store.put_key(key := self._keys("device", self._client))
            self._requests = Requests(self._transport, key, member.population if member else "")
        return self._requests

    def _authority(self, link: Link) -> str:
        """Who vouches for the server: as it was named or pinned, now or before; kept once that server knows this device."""
        if link.authority:
            self._fetched = link.authority
        if link.pin is not None and pin_of(self._fetched) != link.pin:
            self._fetched = fetch_authority(link)
        return self._fetched

    def _write(self, record: Record) -> None:
        self._store.write(record)
        self._record = record

    def _sleep_within(self, window: Window) -> None:
        """Nothing is due before a moment in it."""
        first, last = window
        row = self._record.row
        share = share_of(self._keys("sleep", self._client, row.serial, row.tries))
        self._due = self._clock() + first + share * (last - first)

    def _tell(self, news: DeviceNews) -> None:
        self._watch(replace(news, said=printable(news.said)))


def forget(store: DeviceStore, requests: Requests | None) -> ForgetReport:
    """Take back a device's consent. requests: to its server; None where it is not enrolled."""
    record = store.read()
    if requests is not None:
        try:
            requests.withdraw()
        except Refused as refused:
            if refused.problem.code != "unknown_device":  # that it is forgotten already
                raise Unreachable(f"the server did not take it: {refused}; nothing was erased, try again") from refused
    store.erase()
    sent = record.counts.get("in sums", 0)
    erased = ["here: its key, what it kept from rounds, models and counts"]
    if requests is not None:
        erased.append("at the server: its key and identity; it can send nothing more under them")
    remains = ["its examples: they never left this device, and are its owner's to delete"]
    if sent:
        remains.append(
            f"models: {many(sent, 'report')} of it went into sums that models are made of, and what is in a sum cannot be "
            "taken out"
        )
    return ForgetReport(tuple(erased), tuple(remains))


def _is_of_another(link: Link, server: str) -> bool:
    """Whether a link lets in at another server than a device's own. An address alone says that this one has moved."""
    return link.token is not None and link.server not in ("", server)


def _belongs(member: Membership, link: Link) -> str:
    return (
        f"this folder is a device of {member.server}: give another --folder for {link.server}, or forget it first; where that "
        "server has moved, give its new address alone, without a token; where this is another edge of the same population, --move"
    )


def _stays(record: Record, member: Membership, link: Link) -> str:
    """Why a device cannot move; empty where it can."""
    if record.row.session:
        return (
            f"what became of its last report is known at {member.server} alone: let it check in there once more before it "
            f"moves to {link.server}"
        )
    return ""


def _with(kept: Mapping[str, V], task: str, value: V) -> dict[str, V]:
    """A mapping by task with one changed, as the newest."""
    others = [(name, one) for name, one in kept.items() if name != task]
    return dict([*others[1 - MOST_TASKS :], (task, value)])


def _news(what: Any, work: Assignment | None) -> DeviceNews:
    return DeviceNews(what) if work is None else DeviceNews(what, "", work.task, work.kind, work.version)


def _said(conditions: Conditions) -> DeviceConditions:
    return DeviceConditions(
        conditions.charging, conditions.unmetered, conditions.idle, conditions.battery, conditions.version
    )


def _ordered(window: Window) -> Window:
    first, last = window
    return min(first, last), max(first, last, LEAST)


def _longer(window: Window, times: int) -> Window:
    """A window after so many failures in a row."""
    first = min(session.LONGEST / 2, session.PATIENCE * 2.0 ** max(0, times - 1))
    return max(window[0], first), max(window[1], 2 * first)


def _beyond(reason: str, offer: WorkOffer, floor: Floor) -> str:
    """What of an offer is beyond the floor, and how to consent to it; empty for other reasons."""
    name = reason.removeprefix("floor-")
    if name == reason or not hasattr(floor, name):
        return ""
    consented = getattr(floor, name)
    if name == "contributors":
        return (
            f"the server's sums have at least {offer.contributors} contributors, and you consent to {consented} and more: join "
            f"with --floor contributors={offer.contributors}"
        )
    if name == "rounds":
        a_day = many(consented, "round")
        return f"you consent to {a_day} a day, and so many were begun: wait, or join with a greater --floor rounds=N"
    asked = math.ceil(getattr(offer, name))
    takes, most = (amount(each) if name in ("bytes", "memory") else f"{each:,.0f}" for each in (asked, consented))
    return f"{_ASKED[name].format(takes)}, and you consent to {most}: join with --floor {name}={asked}"


_ASKED = {
    "steps": "the round takes {} local steps",
    "seconds": "the round takes some {} seconds of training here",
    "bytes": "the round takes {}, plan, model and report together",
    "memory": "a local step takes at least {} of memory",
}


def _reason(error: Exception) -> AbortReason:
    """What the server may know of an error."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return "memory" if type(error).__name__ == "OutOfMemoryError" else "other"


_REASONS: tuple[tuple[type[Exception], AbortReason], ...] = (
    (DivergedError, "diverged"),
    (BeyondBoundError, "diverged"),
    (DataError, "data"),
    (TaskError, "task"),
    (PlanError, "plan"),
    (ParticipantError, "plan"),
    (UsageError, "plan"),
    (MemoryError, "memory"),
)


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, SumusError) else f"this round's work failed with {said_of(error)}"


def _said_of_enrolment(refused: Refused) -> str:
    words = {
        "bad_token": "the server does not know this token: ask for a new link",
        "token_used": "this link was used already, or its time is over: ask for a new one",
        "quota": "the server takes no more devices: ask who runs it",
        "revoked": "the server has barred this device: ask who runs it",
    }
    code = refused.problem.code
    return f"{words.get(code, 'the server does not enrol this device')} ({refused.problem.detail or code})"
