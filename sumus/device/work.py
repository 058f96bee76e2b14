"""The work of one device: checks what an assignment requires, and does the work.

    offer = work.look_at(assignment)                the work's cost here, or why this device cannot do it
    done = work.do(assignment, offer.plan)          a stored report, or the reason for a failure

`sumus.device.rounds` decides what to do next, and communicates with the server; this module does neither.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sumus.device.access import ServerAccess
from sumus.device.compute import DeviceCompute, DeviceJob, JobResult, PreparedExamples
from sumus.device.memory import DeviceMemory
from sumus.device.options import ANY_CONDITIONS, Consent, DeviceProfile
from sumus.device.store import KeptState
from sumus.device.words import abort_reason, failure_in_words, ran_out_of_memory
from sumus.errors import ExperimentError, SumusError
from sumus.logs import logger
from sumus.pacing import Conditions
from sumus.plan import Plan
from sumus.protocol.session import WorkOffer
from sumus.transport.transport import Unreachable
from sumus.tree import unnested
from sumus.wire.messages import AbortReason, Assignment
from sumus.wire.tensors import encode_tree
from sumus.work import ClientState

LOG = logger("sumus.device")
MAX_PLAN = 2**24
"""The longest plan that is accepted, in bytes."""


@dataclass(frozen=True)
class OfferSeen:
    """An assignment, as this device sees it.

    Attributes:
        offer: The work's requirements, which the device compares with its floor.
        plan: The plan; None if the device cannot do the work.
        trouble: The reason, for the owner; empty if the owner need not know.
    """

    offer: WorkOffer
    plan: Plan | None = None
    trouble: str = ""


@dataclass(frozen=True)
class WorkDone:
    """Work that resulted in a report.

    Attributes:
        report: The name of the report in the store.
        pending: The state that the client keeps if the report is counted.
        result: The result of the work.
        seconds: The duration of the work.
    """

    report: str
    pending: KeptState | None
    result: JobResult
    seconds: float


@dataclass(frozen=True)
class WorkFailed:
    """Work that resulted in no report.

    Attributes:
        reason: The reason, as one word for the server.
        said: The message for the owner.
    """

    reason: AbortReason
    said: str


class LocalWork:
    """A device's computations for its server's rounds.

    Args:
        compute: Returns the device's compute, the same one at each call.
        examples: The owner's examples, or a function that returns them.
        held_out: Examples to evaluate on; None for `examples`.
        memory: The device's record and objects.
        access: Fetches plans and broadcasts.
        consent: The owner's consent.
        profile: A description of this device.
        conditions: Reads the device's conditions.
    """

    def __init__(
        self,
        compute: Callable[[], DeviceCompute[Any]],
        examples: Any,
        held_out: Any,
        memory: DeviceMemory,
        access: ServerAccess,
        consent: Consent,
        profile: DeviceProfile,
        conditions: Callable[[], Conditions],
    ) -> None:
        self._compute = compute
        self._sources = {"own": examples, "held out": held_out}
        self._memory, self._access = memory, access
        self._consent, self._profile, self._conditions = consent, profile, conditions
        self._read: dict[str, PreparedExamples] = {}

    @property
    def fingerprint(self) -> str:
        """The hash of the task's leaves and data."""
        return self._compute().fingerprint

    def look_at(self, work: Assignment) -> OfferSeen:
        """Read the plan of an assignment, and find out what the work requires.

        Raises:
            Unreachable: The plan could not be fetched.
        """
        floor = self._consent.floor
        size = work.plan.bytes + work.broadcast.bytes
        asked = WorkOffer(work.session, bytes=size, contributors=work.contributors)
        if size > floor.bytes:
            return OfferSeen(asked)
        if work.kind not in self._consent.kinds or work.plan.bytes > MAX_PLAN:
            return OfferSeen(replace(asked, unfit="plan"))
        try:
            return self._look_at_plan(work, asked)
        except Unreachable:
            raise
        except Exception as error:
            failed = _failure(error, work)
            return OfferSeen(replace(asked, unfit=failed.reason), trouble=failed.said)

    def _look_at_plan(self, work: Assignment, asked: WorkOffer) -> OfferSeen:
        compute = self._compute()
        plan = compute.plan(work.plan.sha256, lambda: self._access.object(work.plan))
        if plan.description.fingerprint != compute.fingerprint:
            return OfferSeen(
                replace(asked, unfit="floor-task"),
                trouble="the plan is for another model, or other data, than this device's file defines: update that file",
            )
        requires = plan.pacing.requires
        if requires != ANY_CONDITIONS and requires.unmet(self._conditions()) is not None:
            return OfferSeen(replace(asked, unfit="conditions"))
        asked = replace(asked, contributors=min(work.contributors, plan.min_contributors))
        if work.kind == "evaluate":
            return OfferSeen(asked, plan)
        examples = self._examples("train")
        steps = plan.algorithm.client.step_count(examples.count)
        asked = replace(
            asked,
            steps=steps,
            seconds=steps * self._memory.record.seconds,
            bytes=asked.bytes + plan.first_hop.nbytes,
            memory=compute.memory(plan, examples),
        )
        return OfferSeen(asked, plan)

    def do(self, work: Assignment, plan: Plan) -> WorkDone | WorkFailed:
        """Train or evaluate, and store the report. Any failure ends only this round, not the device.

        Raises:
            ExperimentError: Nothing can be stored here, in this or any other round.
        """
        compute = self._compute()
        try:
            broadcast = compute.broadcast(plan, work.broadcast.sha256, self._access.object(work.broadcast))
            job = self._job(work)
            run = compute.train if work.kind == "train" else compute.evaluate
            began = time.perf_counter()
            result = run(plan, broadcast, job)
            seconds = time.perf_counter() - began
            pending = None
            if result.state:
                kept = self._memory.store.put(encode_tree(unnested(result.state)))
                pending = KeptState(kept, compute.fingerprint)
            return WorkDone(self._memory.store.put(result.report), pending, result, seconds)
        except ExperimentError:
            raise
        except Exception as error:
            return _failure(error, work)

    def state(self, task: str) -> ClientState:
        """Return the client's state for a task."""
        return self._memory.state(task, self.fingerprint)

    def let_go(self) -> None:
        """Discard the examples that functions returned: the functions are called again for the next work."""
        self._read = {which: read for which, read in self._read.items() if not callable(self._sources[which])}

    def _job(self, work: Assignment) -> DeviceJob[Any]:
        examples = self._examples(work.kind)
        again = self._memory.record.begun[work.task].times - 1
        profile, seed = self._profile, bytes.fromhex(work.seed)
        return DeviceJob(profile.name, examples, work.version, seed, profile.system.keys, again, self.state(work.task))

    def _examples(self, kind: str) -> PreparedExamples:
        """Return the examples for a kind of work, which are read once and kept until `let_go`."""
        which = "held out" if kind == "evaluate" and self._sources["held out"] is not None else "own"
        if which not in self._read:
            self._read[which] = self._compute().read(self._profile.name, self._sources[which])
        return self._read[which]


def _failure(error: Exception, work: Assignment) -> WorkFailed:
    """Convert an error into a failure of the round.

    A mistake of the owner or of the server is a `SumusError`, whose text says what to do. Every other error, except a lack of
    memory, is a defect in sumus or in a package that it calls: its traceback goes to the log.
    """
    if not isinstance(error, SumusError) and not ran_out_of_memory(error):
        LOG.error("work on model %d of task %s failed because of a defect", work.version, work.task, exc_info=error)
    return WorkFailed(abort_reason(error), failure_in_words(error))
