"""The relay, which all runs of an edge share: check-ins for the server above, work that has arrived, and ended sessions.

    relay = Relay(wake_uplink, runs)
    relay.ask(asked, now)                  relays a check-in; returns the answer for the meantime
    relay.note_ended("health", "train", ["device/session"], "other")
    relay.batch()                          the content of the uplink's next request

All methods are called on the server's deciding thread. Nothing survives the process: see "What survives a crash" in
`sumus/protocol/edge.py`.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, get_args

from sumus.protocol.edge import ASKING, NOT_NOW, WaitingWork
from sumus.protocol.round import ComeLater
from sumus.rounds.run import DeviceCheckIn
from sumus.wire.messages import MAX_RELAY, MOST_RELAYED, Assignment, CheckInAnswer, CheckInRequest, EndReason, Kind

REASONS = frozenset(get_args(EndReason))
ASK_AGAIN = 5.0
"""The longest time, in seconds, after which a held check-in is relayed again. This may be shorter than its retry window, since
one request carries many check-ins.
"""
MOST_SENT_AWAY = 100_000
"""The number of devices whose next time to check in is remembered."""
OTHERS = 512
"""The bytes that a check-in takes in a relay request in addition to the device's own message."""


class GrantedWork(NamedTuple):
    """Work that has arrived for a device.

    Attributes:
        work: The assignment of the server above.
        serial: The serial of the check-in that asked for the work.
        since: When the work arrived, by the server's clock.
    """

    work: Assignment
    serial: int
    since: float

    def waiting(self, device: str) -> WaitingWork:
        """Return this work in the form that the edge's table needs."""
        return WaitingWork(f"{device}/{self.work.session}", device, self.serial, self.since)


class WorkHolders(Protocol):
    """The methods of an edge's runs that the relay needs."""

    def holds(self, device: str) -> bool:
        """Return whether a device's report is in a sum that the server above has not counted yet."""
        ...

    def forget_work(self, device: str, now: float) -> None:
        """Count no further report of a device for its current work, since it asks for other work."""
        ...


class RelayBatch(NamedTuple):
    """The content of one request to the server above.

    Attributes:
        asked: Check-ins, by device.
        ended: Reasons for the end of sessions, by (task, kind, device and session).
    """

    asked: dict[str, DeviceCheckIn]
    ended: dict[tuple[str, Kind, str], str]


class Relay:
    """Check-ins for the server above, and the work that has arrived for their devices.

    Attributes:
        asking: The newest check-in that waits to be relayed, by device.
        going_up: The check-ins in a request to the server above, by device.
        granted: Work that has arrived and waits to be fetched, by device.
        waiting: The number of pieces of such work, by (task, kind).
        ended: Why sessions ended without a report, by (task, kind, device and session).
        members: The number of the edge's devices.
    """

    def __init__(self, wake_uplink: Callable[[], None], runs: WorkHolders) -> None:
        """Make an empty relay.

        Args:
            wake_uplink: Called if the uplink has something to send.
            runs: The runs of the edge.
        """
        self.asking: dict[str, DeviceCheckIn] = {}
        self.going_up: dict[str, DeviceCheckIn] = {}
        self.granted: dict[str, GrantedWork] = {}
        self.waiting: Counter[tuple[str, Kind]] = Counter()
        self.ended: dict[tuple[str, Kind, str], str] = {}
        self.members = 0
        self._wake_uplink, self._runs = wake_uplink, runs
        self._later: OrderedDict[str, tuple[int, float, ComeLater]] = OrderedDict()
        self._next = math.inf

    def clear(self) -> None:
        """Drop all pending check-ins and all unfetched work."""
        for pending in (self.asking, self.going_up, self.granted, self.waiting):
            pending.clear()

    def wake(self) -> None:
        """Make the uplink look for something to send."""
        self._wake_uplink()

    def ask(self, asked: DeviceCheckIn, now: float) -> ComeLater:
        """Relay a check-in, unless it is already on its way, or the last answer asks the device to wait longer.

        A device whose report is in an unsent sum must wait. The server above would take a new check-in to mean that the device
        has forgotten its work, and would refuse the whole sum.

        Returns:
            The answer to the device for the meantime.
        """
        device = asked.device
        serial, until, later = self._later.get(device, (-1, now, NOT_NOW))
        if serial == asked.request.serial and now < until:
            return later
        if device not in self.granted and asked not in (self.going_up.get(device), self.asking.get(device)):
            if self._runs.holds(device):
                return ComeLater(ASKING, "closed")
            self._runs.forget_work(device, now)
            self.asking[device] = asked
            self._wake_uplink()
        return NOT_NOW

    def keep(self, device: str, work: Assignment, serial: int, now: float) -> None:
        """Keep work that has arrived for a device until the device fetches it.

        Args:
            device: The device's id.
            work: The assignment of the server above.
            serial: The serial of the check-in that asked for the work.
            now: The server's clock, in seconds.
        """
        self.remove((device,))
        self.granted[device] = GrantedWork(work, serial, now)
        self.waiting[work.task, work.kind] += 1

    def remove(self, devices: Iterable[str]) -> None:
        """Remove the work for these devices."""
        for device in devices:
            if (gone := self.granted.pop(device, None)) is not None:
                self.waiting[gone.work.task, gone.work.kind] -= 1

    def send_away(self, device: str, request: CheckInRequest, answer: CheckInAnswer, now: float) -> None:
        """Relay the device's check-in again only after the retry window of the answer."""
        window = answer.retry_after_s or ASKING
        until = math.inf if answer.reason == "replayed" else now + min(window[0], ASK_AGAIN)
        self._later[device] = request.serial, until, ComeLater(window, answer.reason)
        self._next = min(self._next, until)
        self._later.move_to_end(device)
        while len(self._later) > MOST_SENT_AWAY:
            self._later.popitem(last=False)

    def note_members(self, members: int) -> None:
        """Set the number of the edge's devices; if it has changed, the server above is told."""
        if members != self.members:
            self.members = members
            self._wake_uplink()

    def is_due(self, now: float) -> bool:
        """Return whether the waiting time of any device has ended since the last call."""
        if now < self._next:
            return False
        left = [until for _, until, _ in self._later.values() if until > now]
        self._next = min(left, default=math.inf)
        return True

    def note_ended(self, task: str, kind: Kind, sessions: Iterable[str], reason: str) -> None:
        """Record that these sessions will not report.

        Args:
            task: The task's name.
            kind: The kind of run.
            sessions: The sessions, each with its device.
            reason: Why they ended; "edge" if their devices did not cause this."""
        told = "edge" if reason == "closed" else reason if reason in REASONS else "other"
        self.ended |= {(task, kind, session): told for session in sessions}
        if self.ended:
            self._wake_uplink()

    def batch(self) -> RelayBatch:
        """Take the content of the next request; if more is left, wake the uplink again."""
        asked = {device: self.asking.pop(device) for device in _that_fit(self.asking)}
        self.going_up |= asked
        ended = {session: self.ended.pop(session) for session in list(islice(self.ended, MOST_RELAYED))}
        if self.asking or self.ended:
            self._wake_uplink()
        return RelayBatch(asked, ended)

    def put_back(self, batch: RelayBatch) -> None:
        """Put back a batch that did not reach the server above. Newer entries take precedence."""
        self.going_up.clear()
        self.asking = batch.asked | self.asking
        self.ended = batch.ended | self.ended


def _that_fit(asking: Mapping[str, DeviceCheckIn]) -> list[str]:
    """Return the first devices whose check-ins fit into one request, by number and bytes.

    A character of a check-in takes at most two bytes in the text of another message.
    """
    left, devices = MAX_RELAY // 2, list[str]()
    for device, asked in islice(asking.items(), MOST_RELAYED):
        left -= OTHERS + (0 if asked.signed is None else 2 * len(asked.signed.check_in.encode()))
        if devices and left < 0:
            break
        devices.append(device)
    return devices
