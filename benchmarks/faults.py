"""Fault schedules: rounds with lost, doubled and reordered messages, restarted devices and crashed servers; and what
must hold.

    python -m benchmarks.faults                            500 schedules of each pacing
    python -m benchmarks.faults --schedules 10000          the long form
    python -m benchmarks.faults --seed 4711 --tell         one schedule again, event by event
    python -m benchmarks.faults --bug forgets-to-resend    with a planted bug: it must be found

One seed makes one schedule: a virtual clock, devices that follow `sumus.protocol.session`, a server that follows
`sumus.protocol.round` with its rows in memory, and a network between them. What a server has written survives a crash;
what it holds in memory does not. A device's row survives too. After the faults stop, all devices and rounds must come
to rest.
"""

import argparse
import functools
import heapq
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sumus.pacing import Conditions, Pacing
from sumus.protocol import round as server
from sumus.protocol import session as device
from sumus.protocol.round import ORDER, Facts, State
from sumus.protocol.session import DeviceState, Floor, Phase
from sumus.rng import generator
from sumus.rounds.circumstances import Circumstances
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.recording import record_fenced
from sumus.storage.memory import MemoryStore
from sumus.storage.store import Fenced

PACINGS = {
    "synchronous": Pacing(cohort=3, over_select=1.6, deadline=300, separation=2, most_rounds=4),
    "waits for all": Pacing(cohort=3, deadline=2000),
    "buffered": Pacing(cohort=2, concurrency=4, deadline=400, most_stale=4, separation=2),
}
DEVICES = 7
UNTIL = 3000.0
"""Simulated seconds of faults. After them there are none, and no device begins anything new."""
PATIENCE = 40_000.0
"""Simulated seconds after the faults within which every device must know what became of its report."""
_FLOOR = Floor(contributors=0)
_FREE = Conditions(True, True, True, 1.0, 1)

Rules = Callable[[Facts, server.Event], server.Decision]
Steps = Callable[[DeviceState, device.Event, Floor], device.Step]


class Broken(AssertionError):
    """Something that must hold does not; the message says what."""


# ── planted bugs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def accepts_before_commit(facts: Facts, event: server.Event) -> server.Decision:
    """Accept a report when it is staged."""
    decision = server.decide(facts, event)
    told = [server.AcceptReport(act.session) for act in decision.actions if isinstance(act, server.StageReport)]
    return replace(decision, actions=(*decision.actions, *told)) if isinstance(event, server.Report) else decision


def accepts_after_close(facts: Facts, event: server.Event) -> server.Decision:
    """Count a staged report in the round that it was given in, even if that round has closed."""
    if not isinstance(event, server.Commit):
        if isinstance(event, server.Report) and [one.state for one in facts.sessions] == ["out"]:
            return server.Decision(actions=(server.StageReport(facts.sessions[0].id),))
        return server.decide(facts, event)
    late = [one for one in facts.sessions if one.state == "out" and one.round != facts.round.number]
    written = tuple(replace(one, state="counted", sum=one.round) for one in late)
    rest = replace(facts, sessions=tuple(one for one in facts.sessions if one not in late))
    decision = server.decide(rest, event)
    accepted = (server.AcceptReport(one.id) for one in late)
    return replace(decision, sessions=(*decision.sessions, *written), actions=(*decision.actions, *accepted))


def counts_twice(facts: Facts, event: server.Event) -> server.Decision:
    """Stage a report again that is counted already."""
    if isinstance(event, server.Report) and [one.state for one in facts.sessions] == ["counted"]:
        return server.Decision(actions=(server.StageReport(facts.sessions[0].id),))
    if isinstance(event, server.Commit):
        facts = replace(facts, sessions=tuple(replace(one, state="out") for one in facts.sessions))
    return server.decide(facts, event)


def frees_a_place_twice(facts: Facts, event: server.Event) -> server.Decision:
    """Free a device's place when it lapses, and once more when it gives up, so that the place is given away twice."""
    if isinstance(event, server.Dropped):
        facts = replace(facts, sessions=tuple(_with_place(one) for one in facts.sessions))
    return server.decide(facts, event)


def counts_a_late_report_beside(facts: Facts, event: server.Event) -> server.Decision:
    """Count the report of a lapsed session without recording that it has a place again."""
    if isinstance(event, server.Commit):
        facts = replace(facts, sessions=tuple(_with_place(one) for one in facts.sessions))
    return server.decide(facts, event)


def _with_place(session: server.Session) -> server.Session:
    return replace(session, state="out") if session.state == "lapsed" else session


def gives_work_to_who_rests(facts: Facts, event: server.Event) -> server.Decision:
    """Forget that a device let places go."""
    known = facts.device
    return server.decide(replace(facts, device=known and replace(known, rests_until=0.0)), event)


def counts_rounds_for_models(facts: Facts, event: server.Event) -> server.Decision:
    """Count an abandoned round as a model between a device's two sums."""
    return server.decide(replace(facts, models=facts.round.number), event)


def forgets_to_resend(state: DeviceState, event: device.Event, floor: Floor) -> device.Step:
    """Treat a report without an answer as lost, and go on."""
    if isinstance(event, device.NoAnswer) and state.phase is Phase.REPORTING:
        return replace(state, phase=Phase.IDLE, session="", unsettled=False), (device.SleepFor(state.window),)
    return device.step(state, event, floor)


def keeps_early(state: DeviceState, event: device.Event, floor: Floor) -> device.Step:
    """Keep the client's new state when the report is sent."""
    after, actions = device.step(state, event, floor)
    early = (device.KeepState(state.session),) if isinstance(event, device.TrainingDone) and actions else ()
    return after, (*early, *actions)


BUGS: Mapping[str, tuple[Rules, Steps]] = {
    "accepts-before-commit": (accepts_before_commit, device.step),
    "accepts-after-close": (accepts_after_close, device.step),
    "counts-twice": (counts_twice, device.step),
    "frees-a-place-twice": (frees_a_place_twice, device.step),
    "counts-a-late-report-beside": (counts_a_late_report_beside, device.step),
    "gives-work-to-who-rests": (gives_work_to_who_rests, device.step),
    "counts-rounds-for-models": (counts_rounds_for_models, device.step),
    "forgets-to-resend": (server.decide, forgets_to_resend),
    "keeps-early": (server.decide, keeps_early),
}

# ── a schedule ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Phone:
    """A device.

    Attributes:
        state: Its row.
        asking: The number of the request whose answer it waits for.
        begun: The session that it trains for, in memory.
    """

    state: DeviceState = field(default_factory=DeviceState)
    asking: int = 0
    begun: str = ""


class Schedule:
    """The interleaving of one seed."""

    def __init__(
        self, seed: int, pacing: Pacing, rules: Rules = server.decide, steps: Steps = device.step, tell: bool = False
    ) -> None:
        self.seed = seed
        self._rng = generator(seed, "faults")
        self._steps, self._tell = steps, tell
        self._loses, self._doubles, self._crashes, self._restarts = self._rng.uniform(
            0, (0.35, 0.3, 0.06, 0.04)
        ).tolist()
        self.store = MemoryStore()
        self.pacing = pacing
        self.server = Coordinator(lambda: Circumstances(pacing, population=DEVICES), self.store, rules)
        self.phones = [Phone() for _ in range(DEVICES)]
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._up_from = 0.0
        self._zombie: Facts | None = None
        self.published: dict[int, tuple[str, ...]] = {}
        self.told: dict[str, str] = {}
        self.kept: Counter[str] = Counter()
        self.undone: Counter[str] = Counter()
        self._waiting: dict[str, list[tuple[int, int]]] = {}
        self.counted: dict[str, server.Session] = {}
        self._rows: dict[int, server.Round] = {}
        self._holds = set[str]()

    def run(self) -> None:
        """Play the schedule.

        Raises:
            Broken: Something that must hold does not.
        """
        self._at(0.0, self._tick)
        for who in range(DEVICES):
            self._at(float(self._rng.uniform(0, 30)), self._wake, who)
        while self._queue:
            self.now, _, act, args = heapq.heappop(self._queue)
            self._say(f"{act.__name__.strip('_')} {' '.join(str(each) for each in args if not callable(each))}")
            try:
                act(*args)
            except Fenced as error:
                raise Broken("the store refuses to count a report in two sums") from error
            self._check_rows()
            if self.now > UNTIL + PATIENCE and any(phone.state.unsettled for phone in self.phones):
                raise Broken(f"no rest by {self.now:.0f} s: {[phone.state for phone in self.phones]}")
        self._check_end()

    # what must hold

    def _check_rows(self) -> None:
        for number, row in self.store.rounds.items():
            before = self._rows.get(number, row)
            if (
                ORDER.index(row.state) < ORDER.index(before.state)
                or row.counted < before.counted
                or row.fence < before.fence
            ):
                raise Broken(f"round {number} went backwards: {before} → {row}")
            if row.counted > self.pacing.cohort or row.out < 0:
                raise Broken(f"round {number} counts more than it may: {row}")
        self._rows = dict(self.store.rounds)
        self._check_places()

    def _check_places(self) -> None:
        """Check that one session holds each place, and that no round gives more places than it has."""
        pacing, row = self.pacing, self.store.rounds[self.store.run.newest]
        holds = {
            session.id
            for session in self.store.sessions.values()
            if session.state == "out" and (pacing.buffered or session.round == row.number)
        }
        if row.state is State.OPEN and row.out != len(holds):
            raise Broken(f"round {row.number} has {row.out} places taken, and {sorted(holds)} hold one")
        most = pacing.concurrency or pacing.chosen - row.counted
        if holds - self._holds and row.state is State.OPEN and len(holds) > most:
            raise Broken(f"round {row.number} gives {sorted(holds - self._holds)} a place, and has {most}")
        self._holds = holds
        for device_row in self.store.devices.values():
            last = device_row.session
            if last is not None and last.state == "out" and last.began == self.now < device_row.rests_until:
                raise Broken(f"device {device_row.id} is given work, and rests until {device_row.rests_until:.0f}")

    def _check_end(self) -> None:
        """Check the state at rest: every device was told the truth, and each counted report is in a model, or in a
        round that is marked as abandoned."""
        pacing, rounds = self.pacing, self.store.rounds
        everywhere = Counter(session for sessions in self.store.sums.values() for session in sessions)
        if twice := [session for session, times in everywhere.items() if times > 1]:
            raise Broken(f"{twice} are counted twice")
        for session, outcome in self.told.items():
            if (outcome == "counted") != (session in everywhere):
                raise Broken(f"{session} was told {outcome}, and it is in {everywhere[session]} sums")
        for number, sessions in self.store.sums.items():
            row = rounds[number]
            if row.state is State.PUBLISHED and sorted(self.published[number]) != sorted(sessions):
                raise Broken(f"model {number} is of {self.published[number]}, and {sessions} are counted in it")
            if row.state is State.ABANDONED and not row.reason:
                raise Broken(f"round {number} is abandoned without a reason")
        for session in {*everywhere, *self.kept, *self.undone}:
            wanted = (1, 0) if session in everywhere else (0, 1)
            if (self.kept[session], self.undone[session]) != wanted:
                how = f"counted {everywhere[session]}, kept {self.kept[session]}, undone {self.undone[session]} times"
                raise Broken(f"{session}: {how}")
        by_device: dict[str, list[int]] = {}
        most = pacing.most_stale
        for session, row in self.counted.items():
            if most is not None and row.staleness > most:
                raise Broken(f"{session} is counted {row.staleness} versions late")
            if session in everywhere and row.sum is not None:
                by_device.setdefault(row.device, []).append(row.sum)
        for who, numbers in by_device.items():
            models = [number for number, row in rounds.items() if row.state is State.PUBLISHED]
            between = [sum(a < number < b for number in models) for a, b in itertools.pairwise(sorted(numbers))]
            if between and min(between) < pacing.separation - 1:
                raise Broken(
                    f"device {who} is in {sorted(numbers)}, and {pacing.separation - 1} models must lie between"
                )
            if pacing.most_rounds is not None and len(numbers) > pacing.most_rounds:
                raise Broken(f"device {who} is in {len(numbers)} rounds, and may be in {pacing.most_rounds}")
        if any(phone.state.unsettled for phone in self.phones):
            raise Broken("a device does not know what became of its report")

    # the clock, and chance

    def _at(self, moment: float, act: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (moment, next(self._order), act, args))

    def _chance(self, share: float) -> bool:
        return self.now < UNTIL and float(self._rng.random()) < share

    def _say(self, what: str) -> None:
        if self._tell:
            print(f"{self.now:9.2f}  {what}")

    # a device

    def _do(self, who: int, event: device.Event) -> None:
        phone = self.phones[who]
        phone.state, actions = self._steps(phone.state, event, _FLOOR)
        for action in actions:
            self._say(f"    {who}: {action}")
            match action:
                case device.SendCheckIn(session, serial, previous):
                    ask = server.CheckIn(session, serial, _FREE, previous)
                    self._request(who, functools.partial(self.server.check_in, str(who), ask))
                case device.StartWork(session):
                    phone.begun = session
                    self._at(self.now + float(self._rng.exponential(60)), self._train, who, session)
                case device.SendReport(session):
                    self._request(who, functools.partial(self.server.report, session))
                case device.SendAbort(session, reason):
                    self._request(who, functools.partial(self.server.drop, [session], reason), answered=False)
                case device.KeepState(session):
                    self.kept[session] += 1
                case device.UndoState(session):
                    self.undone[session] += 1
                case device.SleepFor(window):
                    phone.asking += 1
                    self._at(self.now + float(self._rng.uniform(*window)), self._wake, who)
        if self._chance(self._restarts):
            phone.asking += 1
            phone.begun = ""
            self._at(self.now + 1.0, self._restart, who)

    def _restart(self, who: int) -> None:
        self._do(who, device.Restarted())

    def _wake(self, who: int) -> None:
        phone = self.phones[who]
        if self.now < UNTIL or phone.state.unsettled:
            self._do(who, device.WakeUp(f"{who}/{phone.state.serial + 1}"))

    def _train(self, who: int, session: str) -> None:
        if self.phones[who].begun == session:
            self._do(who, device.Failed("conditions") if self._chance(0.1) else device.TrainingDone())

    # the network

    def _request(self, who: int, ask: Callable[[float], tuple[server.Action, ...]], answered: bool = True) -> None:
        """Send a request, which may be lost, late or doubled. The device waits a while for the answer."""
        phone = self.phones[who]
        if answered:
            phone.asking += 1
            self._at(self.now + device.PATIENCE, self._wait_no_longer, who, phone.asking)
        for _ in range(0 if self._chance(self._loses) else 2 if self._chance(self._doubles) else 1):
            delay = float(self._rng.exponential(60.0 if self._chance(0.1) else 1.0))
            self._at(self.now + delay, self._serve, who, phone.asking if answered else -1, ask)

    def _wait_no_longer(self, who: int, asking: int) -> None:
        if self.phones[who].asking == asking:
            self._do(who, device.NoAnswer())

    def _answer(self, who: int, asking: int, actions: tuple[server.Action, ...]) -> None:
        """Deliver an answer, if the device still waits for it."""
        if not self._chance(self._loses):
            self._at(self.now + float(self._rng.exponential(1.0)), self._hear, who, asking, actions)

    def _hear(self, who: int, asking: int, actions: tuple[server.Action, ...]) -> None:
        phone = self.phones[who]
        if phone.asking != asking:
            return
        phone.asking += 1
        for action in actions:
            match action:
                case server.AssignWork(session):
                    self._do(who, device.Assigned(device.WorkOffer(session.id)))
                case server.ComeLater(window, _):
                    self._do(who, device.ToldLater(window))
                case server.SettleSession(session, outcome):
                    self._do(who, device.Settled(session, outcome))
                case server.AcceptReport(session) | server.RefuseReport(session):
                    counted = isinstance(action, server.AcceptReport)
                    self._do(who, device.Settled(session, "counted" if counted else "discarded"))
                case _:
                    pass

    # the server

    def _serve(self, who: int, asking: int, ask: Callable[[float], tuple[server.Action, ...]]) -> None:
        """Serve one request: read, decide, write, act. The server may crash before or after it has written."""
        if self.now < self._up_from or self._crashed():
            return
        actions = ask(self.now)
        if self._crashed():
            return
        for action in actions:
            if isinstance(action, server.StageReport):
                self._waiting.setdefault(action.session, []).append((who, asking))
                self._at(self.now + 0.05, self._commit)
        self._act(actions)
        self._reply(who, asking, tuple(action for action in actions if not isinstance(action, server.StageReport)))

    def _reply(self, who: int, asking: int, actions: tuple[server.Action, ...]) -> None:
        for action in actions:
            if isinstance(action, server.AcceptReport):
                self.told[action.session] = "counted"
            elif isinstance(action, server.RefuseReport):
                self.told[action.session] = "discarded"
        if actions and asking >= 0:
            self._answer(who, asking, actions)

    def _commit(self) -> None:
        if self.now < self._up_from or not self.server.staged or self._crashed():
            return
        actions = self.server.commit(self.now)
        self._remember()
        if self._crashed():
            return
        self._act(actions)
        for action in actions:
            match action:
                case server.AcceptReport(session) | server.RefuseReport(session):
                    for who, asking in self._waiting.pop(session, []):
                        self._reply(who, asking, (action,))
                case server.StageReport():
                    self._at(self.now + 1.0, self._commit)
                case _:
                    pass

    def _remember(self) -> None:
        """Remember the rows of counted sessions, since the server forgets a device's older ones."""
        self.counted |= {one.id: one for one in self.store.sessions.values() if one.state == "counted"}

    def _act(self, actions: tuple[server.Action, ...]) -> None:
        for action in actions:
            if isinstance(action, server.CloseRound):
                self._at(self.now + float(self._rng.exponential(2.0)), self._publish, action.number)

    def _publish(self, number: int) -> None:
        """Make a model of the round's sum and publish it, in one transaction. An earlier leader fails here."""
        if self.now < self._up_from or self._crashed():
            return
        before = self.store.rounds[number].state
        value = tuple(self.store.sums.get(number, ()))
        self.server.publish(number, self.now)
        after = self.store.rounds[number].state
        if before is not State.PUBLISHED and after is State.PUBLISHED:
            if self.published and number <= max(self.published):
                raise Broken(f"model {number} is published after {max(self.published)}")
            self.published[number] = value
        elif after is State.CLOSING:  # the model before it is not there yet
            self._at(self.now + 1.0, self._publish, number)
        self._crashed()

    def _tick(self) -> None:
        """Let the leader's own clock tick."""
        if self.now < UNTIL + PATIENCE / 2:
            self._at(self.now + 5.0, self._tick)
        if self.now < self._up_from:
            return
        self._act(self.server.expire(self.now))
        if self.now < UNTIL or self.server.current.state is not State.PLANNED:
            self._act(self.server.tick(self.now))
        if self.server.staged:
            self._commit()

    def _crashed(self) -> bool:
        """Crash with some probability: the memory is lost, and another leader takes over after a while."""
        if not self._chance(self._crashes):
            return False
        self._say("    the server dies")
        self._zombie = self.server.facts(self.now)
        self.server.staged.clear()
        self._waiting = {}
        self._up_from = self.now + float(self._rng.uniform(1, 60))
        self._at(self._up_from, self._take_over)
        return True

    def _take_over(self) -> None:
        if self.now < self._up_from:
            return  # it has crashed again meanwhile
        self._act(self.server.recover(self.now))
        zombie = self._zombie
        if zombie is not None and zombie.round.state in (State.OPEN, State.CLOSING):
            moved = server.Decision((replace(zombie.round, state=State.PUBLISHED),))
            try:
                record_fenced(self.store, moved, zombie)
            except Fenced:
                return
            raise Broken("a leader that was taken over from could still write")


def schedules(
    first: int, count: int, pacing: Pacing, bug: str | None = None
) -> Iterator[tuple[int, Broken | None, Schedule]]:
    """Play seeds one after the other; yield (seed, what does not hold or None, the schedule)."""
    rules, steps = BUGS[bug] if bug else (server.decide, device.step)
    for seed in range(first, first + count):
        schedule = Schedule(seed, pacing, rules, steps)
        try:
            schedule.run()
        except Broken as broken:
            yield seed, broken, schedule
        else:
            yield seed, None, schedule


def main() -> int:
    """Play and count, and say which seeds failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=500, help="of each pacing (default 500)")
    parser.add_argument("--seed", type=int, help="one schedule alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--pacing", choices=PACINGS, help="one alone")
    parser.add_argument("--bug", choices=BUGS, help="plant a bug")
    parser.add_argument("--tell", action="store_true", help="print every event")
    args = parser.parse_args()
    failed = 0
    for name in [args.pacing] if args.pacing else PACINGS:
        if args.seed is not None:
            rules, steps = BUGS[args.bug] if args.bug else (server.decide, device.step)
            Schedule(args.seed, PACINGS[name], rules, steps, args.tell).run()
            continue
        began, published, accepted, broken = time.perf_counter(), 0, 0, 0
        for seed, wrong, schedule in schedules(args.first, args.schedules, PACINGS[name], args.bug):
            published += len(schedule.published)
            accepted += sum(outcome == "counted" for outcome in schedule.told.values())
            if wrong is not None:
                broken += 1
                if broken <= 3:
                    print(f"{name}, seed {seed}: {wrong}")
        failed += broken
        print(
            f"{name}: {args.schedules} schedules, {published} models, {accepted} reports accepted, {broken} schedules broken, "
            f"{time.perf_counter() - began:.0f} s"
        )
    return 1 if failed and not args.bug else 0


if __name__ == "__main__":
    sys.exit(main())
