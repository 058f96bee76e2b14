"""An edge's way up: it passes on who asks for work, brings what they are given, and sends what was added.

    uplink = Uplink(requests, server, blobs, rows, relay, take_up)
    uplink.learn()                         what there is to do, from the server above; else as it was last time
    uplink.turn()                          one round trip; seconds until the next, at most
    uplink.run(over)                       until then

The server above may be away: devices' reports are taken and kept meanwhile, and go up when it is back.
"""

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple, cast

import msgspec

from sumus.device.requests import Requests
from sumus.edge.adder import AdderRun, ReadySum, Relay
from sumus.errors import SumusError
from sumus.logs import logger
from sumus.rounds.run import DeviceCheckIn
from sumus.server.server import Server
from sumus.storage.blobs import Blobs
from sumus.storage.store import OF_THE_RUN, Store
from sumus.text import amount, many
from sumus.transport.transport import Unreachable
from sumus.wire.messages import (
    AGAIN,
    MAX_RELAY,
    MOST_RELAYED,
    Body,
    CheckInAnswer,
    EndedSession,
    EndReason,
    Kind,
    Refused,
    RelayedAnswer,
    RelayRequest,
    Served,
    Tasks,
    Window,
)

LOG = logger("sumus.edge")
REFRESH = 60.0
"""Seconds from asking what there is to do to asking again."""
GATHER = 0.05
"""Seconds for which check-ins are gathered, so that many go up together."""
SOON, LATE = 1.0, 60.0
"""Seconds after which what did not reach the server above is tried again: the first time, and at most."""
OTHERS = 512
"""Bytes that a check-in takes which is passed on, besides what the device said."""
REFUSED = (30.0, 90.0)
"""The window to come back in, of a device whose check-in the server above has refused."""
TO_MEND = frozenset({"not_edge", "revoked", "unknown_device", "bad_signature", "old_protocol"})
"""Codes after which a person must do something, and nothing is given up meanwhile."""


def quiet(line: str) -> None:
    """Nobody listens."""


class _Taken(NamedTuple):
    """What is to go up."""

    members: int
    asked: dict[str, DeviceCheckIn]
    ended: dict[tuple[str, Kind, str], str]
    sums: list[tuple[AdderRun, ReadySum]]


class Uplink:
    """requests: of the edge, to the server above.  blobs: where plans and models are kept for devices.  rows: where what there is
    to do is remembered.  relay: of the server's runs.  take_up: makes runs of what there is to do.
    say: is told of each sum that went up.

    trouble: why the server above does not hear; empty where it does.  sent, bytes_up: sums that it has counted, and their bytes.
    waiting: sums that are on their way.
    """

    def __init__(
        self,
        requests: Requests,
        server: Server,
        blobs: Blobs,
        rows: Store,
        relay: Relay,
        take_up: Callable[[Sequence[Served], float], None],
        say: Callable[[str], None] = quiet,
    ) -> None:
        self._requests, self._server, self._blobs, self._rows = requests, server, blobs, rows
        self._relay, self._take_up = relay, take_up
        relay.wake, relay.holds, relay.forgets = self.wake, self._holds, self._forgets
        self._say = say
        self._wanted = threading.Event()
        self._said = -1
        self._failures = 0
        self._learnt = False
        self._full = False
        self.trouble = ""
        self.sent = self.bytes_up = self.waiting = 0

    def wake(self) -> None:
        """There is something to do; from any thread."""
        self._wanted.set()

    def run(self, over: threading.Event) -> None:
        """Until it is over."""
        pause = 0.0
        while not over.is_set():
            self._wanted.wait(pause)
            if over.wait(GATHER):
                return
            self._wanted.clear()
            pause = self.turn()
            if self._failures and over.wait(pause):
                return

    def turn(self) -> float:
        """Everything once. Seconds until the next is due, though nothing comes."""
        try:
            if not self._learnt:
                self.learn()
            self._go_up()
        except Refused as refused:
            return self._unheard(str(refused), refused.problem.retry_after_s)
        except (Unreachable, SumusError) as error:
            return self._unheard(str(error))
        if self.trouble:
            LOG.info("the server above answers again")
        self.trouble, self._failures = "", 0
        return REFRESH

    def learn(self) -> None:
        """What there is to do; and the models that devices answer with."""
        tasks = self._requests.tasks()
        for served in tasks.runs:
            self._fetch(served.plan)
            if served.released is not None:
                self._fetch(served.released.model)
        with self._rows.transaction() as rows:
            rows.put_note(OF_THE_RUN, "served", msgspec.json.encode(tasks))
        self._on_server(lambda now: self._take_up(tasks.runs, now)).result()
        self._learnt = True
        self._on_server(self._sweep).result()  # where models of a site's own are made

    def remember(self, now: float) -> bool:
        """What there was to do when the server above was heard last; whether that is known."""
        with self._rows.transaction() as rows:
            note = rows.note(OF_THE_RUN, "served")
        if note is None:
            return False
        self._take_up(msgspec.json.decode(note, type=Tasks).runs, now)
        return True

    def _unheard(self, why: str, window: Window | None = None) -> float:
        """Seconds until the next attempt. window: that the server above has named."""
        if self.trouble != why:
            LOG.warning("the server above: %s; what was added is kept, and sent later", why)
        self.trouble = why
        self._failures += 1
        if window is not None:
            return random.uniform(*window)
        return min(LATE, SOON * 2.0 ** (self._failures - 1)) * random.uniform(0.75, 1.25)

    def _on_server(self, do: Callable[[float], Any]) -> "Future[Any]":
        return self._server.ask_to_do(do)

    def _go_up(self) -> None:
        taken: _Taken = self._on_server(self._take).result()
        self.waiting = len(taken.sums)
        try:
            self._pass_on(taken)
        except (Unreachable, Refused):
            self._on_server(lambda now: self._put_back(taken)).result()
            raise
        for run, waiting in taken.sums:
            self._send(run, waiting)
            self.waiting -= 1

    def _runs(self) -> list[AdderRun]:
        return [run for task in self._server.tasks for run in task.runs if isinstance(run, AdderRun)]

    def _take(self, now: float) -> _Taken:
        relay, members = self._relay, self._server.crowd.count()
        asked = {device: relay.asking.pop(device) for device in _that_fit(relay.asking)}
        relay.going_up |= asked
        ended = {which: relay.ended.pop(which) for which in list(islice(relay.ended, MOST_RELAYED))}
        if relay.asking or relay.ended:
            self.wake()
        sums = [(run, waiting) for run in self._runs() for waiting in run.sums_to_send.values()]
        return _Taken(members, asked, ended, sums)

    def _put_back(self, taken: _Taken) -> None:
        self._relay.going_up.clear()
        self._relay.asking = taken.asked | self._relay.asking
        self._relay.ended = taken.ended | self._relay.ended

    def _pass_on(self, taken: _Taken) -> None:
        """Pass on who asks; bring what they are told, and what they need for it."""
        if not (taken.asked or taken.ended or taken.members != self._said):
            return
        asked = tuple(each.signed for each in taken.asked.values() if each.signed is not None)
        ended = tuple(
            EndedSession(task, kind, *_parts(session), cast(EndReason, reason))
            for (task, kind, session), reason in taken.ended.items()
        )
        answers = self._requests.relay(RelayRequest(taken.members, asked, ended)).answers
        self._said = taken.members
        for each in answers:
            if each.answer is not None and (work := each.answer.assignment) is not None:
                self._fetch(work.plan)
                self._fetch(work.broadcast)

        def bring(now: float) -> None:
            runs = {(run.task, run.kind): run for run in self._runs()}
            self._relay.going_up.clear()
            for (device, asked), each in zip(taken.asked.items(), answers, strict=True):
                request, answer = asked.request, each.answer or self._refused(each)
                work = answer.assignment
                run = None if work is None else runs.get((work.task, work.kind))
                if run is not None and work is not None:
                    run.give(device, request, work, now)
                else:
                    self._relay.send_away(device, request, answer, now)
                    for each_run in runs.values():
                        each_run.send_away(answer.reason, now)

        self._on_server(bring).result()

    def _refused(self, told: RelayedAnswer) -> CheckInAnswer:
        """What a device is told whose check-in the server above has refused."""
        if told.code == "not_edge" and not self._full:
            LOG.warning(
                "the server above lets this edge speak for no more devices, and %s waits: ask there for a link that is for more",
                told.device[:12],
            )
            self._full = True
        if told.serial is not None:  # the next check-in is refused here, and told where to count on
            self._server.replica.leases.raise_serials({told.device: told.serial})
        return CheckInAnswer(retry_after_s=REFUSED, reason=told.code)

    def _send(self, run: AdderRun, waiting: ReadySum) -> None:
        """Send a sum; what the server above will never count is given up, and said."""
        try:
            self._requests.report_sum(waiting.task, waiting.kind, waiting.body)
        except Refused as refused:
            code = refused.problem.code
            if code in AGAIN or (
                code in TO_MEND and code != "not_edge"
            ):  # not_edge: of too many devices, which stays so
                raise
            LOG.warning("round %d of %s was not counted above: %s", waiting.number, waiting.task, refused)
            why = str(refused)
            self._on_server(lambda now: run.refused(waiting.number, why, now)).result()
        else:
            self.sent += 1
            self.bytes_up += len(waiting.body)
            of, size = many(waiting.sessions, "report"), amount(len(waiting.body))
            self._say(f"{waiting.task}  a sum of {of} went up, {size}")
            self._on_server(lambda now: run.delivered(waiting.number, now)).result()
        self._learnt = False  # there may be a new model to answer with

    def _fetch(self, body: Body) -> None:
        """Have an object here."""
        if self._blobs.size(body.sha256) is None:
            self._blobs.put(self._requests.object(body))

    def _holds(self, device: str) -> bool:
        return any(run.holds(device) for run in self._runs())

    def _forgets(self, device: str, now: float) -> None:
        for run in self._runs():
            run.forget_work(device, now)

    def _sweep(self, now: float) -> None:
        """Let go of what no device may fetch any more."""
        kept = frozenset[str]().union(*(run.objects for run in self._runs()))
        for sha256 in set(self._blobs) - kept:
            self._blobs.delete(sha256)


def _that_fit(asking: Mapping[str, DeviceCheckIn]) -> list[str]:
    """The first devices whose check-ins go up in one request, by their number and their bytes: a letter of a check-in takes two
    bytes at most, in the text of another message."""
    left, devices = MAX_RELAY // 2, list[str]()
    for device, asked in islice(asking.items(), MOST_RELAYED):
        left -= OTHERS + (0 if asked.signed is None else 2 * len(asked.signed.check_in.encode()))
        if devices and left < 0:
            break
        devices.append(device)
    return devices


def _parts(session: str) -> tuple[str, str]:
    device, _, word = session.partition("/")
    return device, word
