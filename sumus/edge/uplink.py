"""An edge's uplink: relays check-ins, fetches the work that is assigned to them, and sends the edge's sums.

    uplink = Uplink(requests, server, blobs, rows, relay, runs, take_up, wanted)
    uplink.learn()                         asks the server above for its runs
    uplink.turn()                          one round trip; returns the seconds until the next one
    uplink.run(over)                       takes turns until an event is set

If the server above is unreachable, the edge still accepts and keeps its devices' reports. It sends the sums when that server is
back.
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import msgspec

from sumus.device.requests import Requests
from sumus.edge.edge_run import EdgeRun, ReadySum
from sumus.edge.relay import Relay, RelayBatch
from sumus.errors import SumusError
from sumus.logs import logger
from sumus.server.server import Server
from sumus.storage.blobs import Blobs
from sumus.storage.store import OF_THE_RUN, Store
from sumus.text import amount, many
from sumus.transport.transport import Unreachable
from sumus.wire.messages import (
    AGAIN,
    Body,
    CheckInAnswer,
    EndedSession,
    EndReason,
    Refused,
    RelayedAnswer,
    RelayRequest,
    Served,
    Tasks,
    Window,
)

LOG = logger("sumus.edge")
REFRESH = 60.0
"""Seconds between two requests for the server above's runs."""
GATHER = 0.05
"""The seconds for which check-ins are gathered, so that one request carries many."""
SOON, LATE = 1.0, 60.0
"""The seconds after which a request that did not reach the server above is tried again: the first time, and the maximum."""
REFUSED = (30.0, 90.0)
"""The retry window, in seconds, of a device whose check-in the server above has refused."""
TO_MEND = frozenset({"not_edge", "revoked", "unknown_device", "bad_signature", "old_protocol"})
"""Codes of refusals whose cause a person must remove; until then, every sum is kept and tried again."""


def quiet(line: str) -> None:
    """Ignore the line."""


class _Taken(NamedTuple):
    """The content of an uplink's turn.

    Attributes:
        members: The number of the edge's devices.
        batch: Check-ins and ended sessions.
        sums: Sums, each with its run.
    """

    members: int
    batch: RelayBatch
    sums: list[tuple[EdgeRun, ReadySum]]


class EdgeRuns:
    """The current runs of an edge's server."""

    def __init__(self, server: Server) -> None:
        """Show the runs of a server's tasks."""
        self._server = server

    def all(self) -> list[EdgeRun]:
        """Return all runs."""
        return [run for task in self._server.tasks for run in task.runs if isinstance(run, EdgeRun)]

    def holds(self, device: str) -> bool:
        """Return whether a device's report is in an unsent sum of any run."""
        return any(run.holds(device) for run in self.all())

    def forget_work(self, device: str, now: float) -> None:
        """Count no further report of a device for its current work, since it asks for other work."""
        for run in self.all():
            run.forget_work(device, now)


class Uplink:
    """The connection from an edge to the server above.

    Attributes:
        trouble: Why the server above cannot be reached; empty if it can.
        sent: The number of sums that the server above has counted.
        bytes_up: The bytes of these sums.
        waiting: The number of sums on their way.
    """

    def __init__(
        self,
        requests: Requests,
        server: Server,
        blobs: Blobs,
        rows: Store,
        relay: Relay,
        runs: EdgeRuns,
        take_up: Callable[[Sequence[Served], float], None],
        wanted: threading.Event,
        say: Callable[[str], None] = quiet,
    ) -> None:
        """Prepare the uplink; `run` starts sending.

        Args:
            requests: Sends the edge's requests to the server above.
            server: The edge's own server.
            blobs: The store of plans and models for devices.
            rows: The store in which the runs of the server above are remembered.
            relay: Holds the check-ins for the server above, and the work that has arrived for them.
            runs: The runs of the edge's server.
            take_up: Makes runs, given the server above's runs and the time.
            wanted: An event that is set if the uplink has something to send.
            say: Called with a line of text about each sum that was sent.
        """
        self._requests, self._server, self._blobs, self._rows = requests, server, blobs, rows
        self._relay, self._runs, self._take_up, self._wanted, self._say = relay, runs, take_up, wanted, say
        self._said = -1
        self._failures = 0
        self._learnt = False
        self._full = False
        self.trouble = ""
        self.sent = self.bytes_up = self.waiting = 0

    def wake(self) -> None:
        """Let the next turn begin soon, since there is something to send. Any thread may call this."""
        self._wanted.set()

    def run(self, over: threading.Event) -> None:
        """Take turns until `over` is set."""
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
        """Send everything that waits, once.

        Returns:
            Seconds until the next turn is due, even if nothing new is to be sent.
        """
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
        """Ask the server above for its runs, and fetch their plans and released models."""
        tasks = self._requests.tasks()
        for served in tasks.runs:
            self._fetch(served.plan)
            if served.released is not None:
                self._fetch(served.released.model)
        with self._rows.transaction() as rows:
            rows.put_note(OF_THE_RUN, "served", msgspec.json.encode(tasks))
        self._on_server(lambda now: self._take_up(tasks.runs, now)).result()
        self._learnt = True
        self._on_server(self._sweep).result()  # on the deciding thread, where a site makes models of its own

    def remember(self, now: float) -> bool:
        """Take up the runs that the server above listed last. Return whether any are known."""
        with self._rows.transaction() as rows:
            note = rows.note(OF_THE_RUN, "served")
        if note is None:
            return False
        self._take_up(msgspec.json.decode(note, type=Tasks).runs, now)
        return True

    def _unheard(self, why: str, window: Window | None = None) -> float:
        """Record why the server above cannot be reached, and return the seconds until the next attempt.

        Args:
            why: The reason, in a sentence.
            window: The retry window that the server above has named; None if it has named none.
        """
        if self.trouble != why:
            LOG.warning("the server above: %s; the sums are kept, and sent later", why)
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
            self._on_server(lambda now: self._relay.put_back(taken.batch)).result()
            raise
        for run, waiting in taken.sums:
            self._send(run, waiting)
            self.waiting -= 1

    def _take(self, now: float) -> _Taken:
        sums = [(run, ready) for run in self._runs.all() for ready in run.sums_to_send.values()]
        return _Taken(self._server.crowd.count(), self._relay.batch(), sums)

    def _pass_on(self, taken: _Taken) -> None:
        """Relay check-ins, and fetch the answers, with the plans and models that the devices need."""
        batch = taken.batch
        if not (batch.asked or batch.ended or taken.members != self._said):
            return
        asked = tuple(each.signed for each in batch.asked.values() if each.signed is not None)
        ended = tuple(
            EndedSession(task, kind, *_parts(session), cast(EndReason, reason))
            for (task, kind, session), reason in batch.ended.items()
        )
        answers = self._requests.relay(RelayRequest(taken.members, asked, ended)).answers
        self._said = taken.members
        for each in answers:
            if each.answer is not None and (work := each.answer.assignment) is not None:
                self._fetch(work.plan)
                self._fetch(work.broadcast)

        def bring(now: float) -> None:
            runs = {(run.task, run.kind): run for run in self._runs.all()}
            self._relay.going_up.clear()
            for (device, asked), each in zip(batch.asked.items(), answers, strict=True):
                request, answer = asked.request, each.answer or self._refused(each)
                work = answer.assignment
                run = None if work is None else runs.get((work.task, work.kind))
                if run is not None and work is not None:
                    run.give(device, request, work, now)
                else:
                    self._relay.send_away(device, request, answer, now)
                    for each_run in runs.values():
                        each_run.no_work(answer.reason, now)

        self._on_server(bring).result()

    def _refused(self, told: RelayedAnswer) -> CheckInAnswer:
        """Return the answer for a device whose check-in the server above has refused."""
        if told.code == "not_edge" and not self._full:
            LOG.warning(
                "the server above does not let this edge speak for more devices, so %s waits: ask there for a link for more",
                told.device[:12],
            )
            self._full = True
        if (
            told.serial is not None
        ):  # the next check-in is refused here, and its device is told from which serial to go on
            self._server.replica.leases.raise_serials({told.device: told.serial})
        return CheckInAnswer(retry_after_s=REFUSED, reason=told.code)

    def _send(self, run: EdgeRun, waiting: ReadySum) -> None:
        """Send a sum. If the server above refuses it for good, give it up, and log the reason."""
        try:
            self._requests.report_sum(waiting.task, waiting.kind, waiting.body)
        except Refused as refused:
            code = refused.problem.code
            if code in AGAIN or (
                code in TO_MEND and code != "not_edge"
            ):  # a sum of too many devices can never be counted
                raise
            LOG.warning("round %d of %s was not counted by the server above: %s", waiting.number, waiting.task, refused)
            why = str(refused)
            self._on_server(lambda now: run.refused(waiting.number, why, now)).result()
        else:
            self.sent += 1
            self.bytes_up += len(waiting.body)
            of, size = many(waiting.sessions, "report"), amount(len(waiting.body))
            self._say(f"{waiting.task}  a sum of {of} was sent, {size}")
            self._on_server(lambda now: run.delivered(waiting.number, now)).result()
        self._learnt = False  # there may be a new released model

    def _fetch(self, body: Body) -> None:
        """Fetch an object, unless it is already stored here."""
        if self._blobs.size(body.sha256) is None:
            self._blobs.put(self._requests.object(body))

    def _sweep(self, now: float) -> None:
        """Delete the objects that devices may no longer fetch."""
        kept = frozenset[str]().union(*(run.objects for run in self._runs.all()))
        for sha256 in set(self._blobs) - kept:
            self._blobs.delete(sha256)


def _parts(session: str) -> tuple[str, str]:
    device, _, word = session.partition("/")
    return device, word
