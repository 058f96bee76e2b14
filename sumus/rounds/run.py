"""The common base of all kinds of run: the rounds of a task on a server, at an edge, and at a site.

    run.recover(now, fence)              finishes the work that a crash interrupted; fence is None if another process leads
    run.offer(session, now)              returns the assignment for a session that the coordinator gave
    run.carry_out(actions, now)          carries out decisions: a sum becomes a model or metrics, or is destroyed
    run.tick(now)                        does the work that is due: ends expired sessions, opens and closes rounds

Each kind of run defines the work that its devices get (`offer`) and the use of a round's sum (`conclude`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sumus.errors import ExperimentError
from sumus.first_hop import FirstHop
from sumus.logs import logger
from sumus.pacing import Pacing
from sumus.plan import ADDING
from sumus.protocol.round import AbandonRound, Action, CloseRound, ComeLater, Round, Session, State
from sumus.rounds.circumstances import Circumstances, Crowd
from sumus.rounds.closing import ClosedRounds
from sumus.rounds.coordinator import FOLLOWS, Also, Coordinator
from sumus.rounds.intake import ReportIntake
from sumus.rounds.sealed_sums import SealedSums
from sumus.rounds.seeds import Seeds, SumSeeds
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing
from sumus.storage.store import OF_THE_RUN, Rows, Store
from sumus.wire.messages import Assignment, Body, CheckInRequest, Kind, Relayed, Released

LOG = logger("sumus.server")
PATIENCE = 3600.0
"""The deadline of a round, in seconds, if the plan names none: a device that does not return must not block a round for ever.
"""
KEPT_ROUNDS = 100
"""The number of rounds before the newest one whose rows are kept."""


def pacing_on_server(pacing: Pacing, least: int) -> Pacing:
    """Return a plan's pacing for a server: every sum needs at least `least` contributors, and every round has a deadline."""
    deadline = PATIENCE if pacing.deadline is None else pacing.deadline
    if pacing.buffered:
        return replace(pacing, deadline=deadline)
    return replace(pacing, deadline=deadline, least=max(pacing.least, min(1.0, least / pacing.cohort)))


@dataclass(frozen=True)
class DeviceCheckIn:
    """A check-in of a device.

    Attributes:
        device: The device's id.
        request: The device's request.
        parent: The edge that relayed the check-in; empty if the device sent it here directly.
        signed: The request with the device's signature, for an edge to pass on.
    """

    device: str
    request: CheckInRequest
    parent: str = ""
    signed: Relayed | None = None


class Run:
    """The rounds of one task: the base of training, evaluation and edges.

    Attributes:
        task: The task's name on the wire.
        kind: Whether devices train or measure.
        hop: Checks updates and adds them.
        store: The rows of the run.
        least: The smallest number of contributors with which a sum is used.
        crowd: The devices of the server.
        coordinator: The rounds.
        sums: The sums of the rounds.
        intake: Stages checked reports and commits them to the sums.
        closed: The closed rounds whose models do not exist yet.
        seeds: The seeds of the sums.
        plan_body: The hash and size of the plan.
        objects: The hashes of the objects that devices may fetch.
        most_together: The largest number of reports in an edge's sum; 0 if edges may not take part.
        edges: The plan's settings for edges.
        paused: Whether the run is paused. While it is, no round begins and no work is given.
        trouble: Why no model can be made; empty if models can be made.
    """

    kind: Kind
    plan_body: Body
    objects: frozenset[str] = frozenset()
    most_together = 0
    edges = ADDING

    def __init__(
        self,
        task: str,
        pacing: Pacing,
        hop: FirstHop,
        store: Store,
        ring: KeyRing,
        sums: Blobs,
        seeds: Seeds,
        least: int,
        crowd: Crowd,
        spools: bool = False,
    ) -> None:
        """Open the rounds in a store.

        Args:
            task: The task's name on the wire.
            pacing: The pacing of the rounds.
            hop: Checks updates and adds them.
            store: The rows of the run.
            ring: Wraps the keys of the sums.
            sums: The store of the sealed sums.
            seeds: Draws the seed of a sum.
            least: The smallest number of contributors with which a sum is used.
            crowd: The devices of the server.
            spools: Whether each report is kept separately until its round is over.
        """
        self.task, self.hop, self.store, self.least, self.crowd = task, hop, store, least, crowd
        self.coordinator = Coordinator(
            lambda: Circumstances(self.pacing, self.paused, self.crowd.population, self.crowd.arriving), store
        )
        self.sums = SealedSums(self.coordinator, ring, sums, spools)
        self.intake = ReportIntake(self.coordinator, self.sums, hop, self.kind == "train", spools)
        self.seeds = SumSeeds(self.coordinator, seeds, pacing.buffered)
        self.closed = ClosedRounds(
            task,
            self.coordinator,
            self.sums,
            self.conclude,
            lambda number, why, now: _give_up_round(self, number, why, now),
            lambda why: self.pause(why, lasting=False),
            self._read_pause,
        )
        self.trouble = ""
        self.paused = False
        self._pacing = pacing

    @property
    def pacing(self) -> Pacing:
        """The pacing of the open round. A subclass may change it while the round is open."""
        return self._pacing

    @property
    def leads(self) -> bool:
        """Whether this process makes the models. If another process does, this process reads the models in `look`."""
        return self.coordinator.fence != FOLLOWS

    # ── called by a server for every run ─────────────────────────────────────────────────────────────────────────────

    def recover(self, now: float, fence: int | None) -> None:
        """Finish the work that another process left, or that this process left after a storage failure.

        Args:
            now: Seconds of the server's clock.
            fence: The fence of the lease; None if another process leads.
        """
        self.intake.restart()
        self.sums.begin_anew()
        self.seeds.forget()
        self.closed.restart()
        self._read_pause()
        self.sums.probe()
        if fence is None:
            self.coordinator.follow()
            return
        actions = self.coordinator.recover(now, fence)
        if not self._ended_what_was_open(now):
            self.carry_out(actions, now)
        self.sums.sweep()

    def carry_out(self, actions: Iterable[Action], now: float) -> None:
        """Carry out decisions about sums if this process leads. If another process leads, it finds the decisions in the rows.

        All other actions are answers to devices, which the server sends.
        """
        for action in actions if self.leads else ():
            if isinstance(action, CloseRound):
                self.closed.close_up_to(action.number, now)
            elif isinstance(action, AbandonRound):
                self.closed.destroy(action.number)
                self.abandoned(action.number, now)

    def look(self) -> None:
        """Read the results of the leading process from the rows: whether the run is paused, and which rounds are over."""
        self._read_pause()
        with self.store.transaction() as rows:
            self.sums.keep_open(rows)

    def pause(self, trouble: str = "", lasting: bool = True) -> None:
        """Begin no round and give no work until `resume`. Work that was given before may still be reported.

        Args:
            trouble: The reason; empty if an admin pauses the run.
            lasting: Whether the pause is stored. A stored pause outlasts the process, and applies to all processes of the run.
        """
        if lasting:
            with self.coordinator.leading() as rows:
                rows.put_note(OF_THE_RUN, "paused", trouble.encode())
        self.paused, self.trouble = True, trouble

    def resume(self) -> None:
        """Go on after a pause."""
        with self.coordinator.leading() as rows:
            rows.put_note(OF_THE_RUN, "paused", None)
        self.paused, self.trouble = False, ""

    def end_all(self, now: float) -> None:
        """End all open work, and every round that is not over."""
        self.all_ends(now)
        with self.store.transaction() as rows:
            out = rows.sessions_out()
            rounds = [row.number for row in rows.rounds() if not row.over]
        self.closed.forget_unfinished()
        for number in rounds:  # before sessions are dropped: the drop of the last session would close its round
            self.carry_out(self.coordinator.cancel(number, now), now)
        self.carry_out(self.coordinator.drop(out, "closed", now), now)

    def tick(self, now: float) -> None:
        """Do the work that is due at this time: end expired sessions, close rounds at their deadlines, open the next round.

        A process that does not lead only reads the results of the leading process.
        """
        if not self.leads:
            self.look()
            return
        self.time_passes(now)
        for decided in (self.coordinator.expire(now), self.coordinator.tick(now)):
            self.carry_out(decided, now)

    # ── methods for subclasses ───────────────────────────────────────────────────────────────────────────────────────

    def wanted(self) -> bool:
        """Return whether the run has any work for devices."""
        return True

    def admits(self, asked: DeviceCheckIn, now: float) -> ComeLater | None:
        """Decide whether a check-in is passed to the round. Return None if it is; otherwise the answer to the device."""
        return None

    def turned_away(self, asked: DeviceCheckIn, now: float) -> None:
        """Called when a check-in was refused because its device may not be in the open sum."""

    def dropped(self, sessions: Iterable[str], reason: str, now: float) -> None:
        """Called when it is known that these sessions will not report."""

    def time_passes(self, now: float) -> None:
        """Prepare a tick: called before sessions expire and rounds are closed."""

    def abandoned(self, number: int, now: float) -> None:
        """Called when a round was abandoned. After a crash, called again for every abandoned round whose row still exists."""

    def all_ends(self, now: float) -> None:
        """Prepare the end of all rounds and all work."""

    def rounds_of_sum(self) -> Sequence[int]:
        """Return the numbers of the rounds that go into the open sum, in order. A device may be in this sum only once."""
        return [self.coordinator.current.number]

    def released(self) -> Released | None:
        """Return the released model, which devices use for predictions; None if there is none."""
        return None

    def waits_for(self, row: Round) -> str:
        """Return the reason for waiting that is specific to this kind of run, as a sentence; empty for the default."""
        return ""

    def offer(self, session: Session, now: float) -> Assignment:
        """Return the assignment for a device that was given a session."""
        raise NotImplementedError

    def conclude(self, number: int, now: float) -> None:
        """Turn the sum of a closed round into a model or metrics, and publish the result.

        Raises:
            Unusable: No model can be made of the sum. After any other error, the call may be repeated.
        """
        raise NotImplementedError

    def _ended_what_was_open(self, now: float) -> bool:
        """End the open rounds if they can no longer have a result; return whether they were ended."""
        return False

    # ── private methods ──────────────────────────────────────────────────────────────────────────────────────────────

    def _read_pause(self) -> None:
        """Read from the rows whether the run is paused."""
        with self.store.transaction() as rows:
            paused = rows.note(OF_THE_RUN, "paused")
        self.paused, self.trouble = paused is not None, (paused or b"").decode()

    def _publish(self, number: int, now: float, also: Also = lambda rows: None) -> None:
        """Publish a round's result; when the result is durable, delete the round's sum. For `also`, see `Coordinator.publish`."""
        done = False

        def written(rows: Rows) -> None:
            nonlocal done
            also(rows)
            done = True

        self.coordinator.publish(number, now, written)
        if not done:
            raise ExperimentError("an earlier round is not published yet")
        self.sums.destroy(number)
        with self.coordinator.leading() as rows:
            rows.forget_rounds_before(rows.run().newest - KEPT_ROUNDS)


def cancel_newest(run: Run, now: float) -> int | None:
    """End a round without a model, and begin the next one. The oldest round that could not be closed is ended; if there is none,
    the newest round.

    Returns:
        The number of the round that was ended; None if no round could be ended.
    """
    stuck = bool(run.closed.unfinished)
    row = run.coordinator.round(run.closed.unfinished.pop(0)) if stuck else run.coordinator.current
    if row is None or row.state is State.PLANNED or row.over:
        return None
    run.carry_out(run.coordinator.cancel(row.number, now), now)
    if stuck:
        run.closed.finish(now)
    run.tick(now)
    return row.number


def _give_up_round(run: Run, number: int, why: str, now: float) -> None:
    """End a round whose sum is unusable, and pause the run until an admin resumes it."""
    run.pause(f"round {number} gave no model: {why}")
    run.carry_out(run.coordinator.cancel(number, now), now)


def give_up_open_rounds(run: Run, error: Exception, now: float) -> None:
    """End all open rounds, because one of their keys or sums is lost, and pause the run until an admin resumes it."""
    run.pause(f"the open rounds of this run were given up: {error}")
    run.end_all(now)
    run.intake.restart()
    run.sums.begin_anew()
