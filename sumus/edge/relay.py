"""What all runs of an edge share: check-ins that go up, work that has come down, and sessions that are said to have ended.

    relay = Relay(wake_uplink, runs)
    relay.ask(asked, now)                  pass a check-in on; what the device is told meanwhile
    relay.note_ended("health", "train", ["device/session"], "other")
    relay.batch()                          what the uplink takes up next

Everything here happens on the server's deciding thread. Nothing of it survives the process: see "What survives a crash" in
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
"""Seconds after which a held check-in is passed on again, even if its retry window is longer: it goes up together with others."""
MOST_SENT_AWAY = 100_000
"""Devices whose next time to ask is remembered."""
OTHERS = 512
"""Bytes that a check-in takes in a relay request, besides what the device said."""


class GrantedWork(NamedTuple):
    """Work that came down for a device.

    Attributes:
        work: What the server above gives.
        serial: The serial of the check-in that asked for the work.
        since: When the work came down, by the server's clock.
    """

    work: Assignment
    serial: int
    since: float

    def waiting(self, device: str) -> WaitingWork:
        """Return the same as the edge's table knows it."""
        return WaitingWork(f"{device}/{self.work.session}", device, self.serial, self.since)


class WorkHolders(Protocol):
    """The runs of an edge, as far as the relay needs them."""

    def holds(self, device: str) -> bool:
        """Return whether what a device has done is in a sum that has not gone up yet."""
        ...

    def forget_work(self, device: str, now: float) -> None:
        """Count no report any more of the work that a device has, since it asks for other work."""
        ...


class RelayBatch(NamedTuple):
    """What goes up in one request.

    Attributes:
        asked: Check-ins, by device.
        ended: Reasons for the end of sessions, by (task, kind, device and session).
    """

    asked: dict[str, DeviceCheckIn]
    ended: dict[tuple[str, Kind, str], str]


class Relay:
    """Check-ins that go up, and what came down for them.

    Attributes:
        asking: By device, the last check-in that is to be passed on.
        going_up: By device, check-ins that are on their way up.
        granted: By device, work that came down and waits to be fetched.
        waiting: How much of it there is, by (task, kind).
        ended: Reasons for the end of sessions of which no report will come, by (task, kind, device and session).
        members: Devices that the edge has.
    """

    def __init__(self, wake_uplink: Callable[[], None], runs: WorkHolders) -> None:
        """Begin with nothing.

        Args:
            wake_uplink: Is called if there is something to pass on.
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
        """Drop all pending check-ins and all work that no device has fetched."""
        for pending in (self.asking, self.going_up, self.granted, self.waiting):
            pending.clear()

    def wake(self) -> None:
        """Let the uplink look for what goes up."""
        self._wake_uplink()

    def ask(self, asked: DeviceCheckIn, now: float) -> ComeLater:
        """Pass a check-in on, unless that was done, or the answer that came down says when it may be done again.

        A device whose report is in a sum that has not gone up must wait. To the server above, a device that asks anew has
        forgotten its work, and for that the whole sum would be refused.

        Returns:
            What the device is told meanwhile.
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
        """Keep work that came down for a device until the device fetches it.

        Args:
            device: The device's id.
            work: What the server above gives.
            serial: The serial of the check-in that asked for the work.
            now: The server's clock, in seconds.
        """
        self.remove((device,))
        self.granted[device] = GrantedWork(work, serial, now)
        self.waiting[work.task, work.kind] += 1

    def remove(self, devices: Iterable[str]) -> None:
        """Keep the work for these devices no longer."""
        for device in devices:
            if (gone := self.granted.pop(device, None)) is not None:
                self.waiting[gone.work.task, gone.work.kind] -= 1

    def send_away(self, device: str, request: CheckInRequest, answer: CheckInAnswer, now: float) -> None:
        """Pass this check-in of a device on again only after the retry window of the answer."""
        window = answer.retry_after_s or ASKING
        until = math.inf if answer.reason == "replayed" else now + min(window[0], ASK_AGAIN)
        self._later[device] = request.serial, until, ComeLater(window, answer.reason)
        self._next = min(self._next, until)
        self._later.move_to_end(device)
        while len(self._later) > MOST_SENT_AWAY:
            self._later.popitem(last=False)

    def note_members(self, members: int) -> None:
        """Note how many devices the edge has: the server above is told if that has changed."""
        if members != self.members:
            self.members = members
            self._wake_uplink()

    def is_due(self, now: float) -> bool:
        """Return whether a device that was sent away may ask again since the last call."""
        if now < self._next:
            return False
        left = [until for _, until, _ in self._later.values() if until > now]
        self._next = min(left, default=math.inf)
        return True

    def note_ended(self, task: str, kind: Kind, sessions: Iterable[str], reason: str) -> None:
        """Note that no report will come of these sessions. reason: "edge" if that is not their devices' doing."""
        told = "edge" if reason == "closed" else reason if reason in REASONS else "other"
        self.ended |= {(task, kind, session): told for session in sessions}
        if self.ended:
            self._wake_uplink()

    def batch(self) -> RelayBatch:
        """Take what goes up in the next request; if more is left, the uplink is woken for it."""
        asked = {device: self.asking.pop(device) for device in _that_fit(self.asking)}
        self.going_up |= asked
        ended = {session: self.ended.pop(session) for session in list(islice(self.ended, MOST_RELAYED))}
        if self.asking or self.ended:
            self._wake_uplink()
        return RelayBatch(asked, ended)

    def put_back(self, batch: RelayBatch) -> None:
        """Pass a batch on later, since the server above did not hear it. What was noted meanwhile is newer."""
        self.going_up.clear()
        self.asking = batch.asked | self.asking
        self.ended = batch.ended | self.ended


def _that_fit(asking: Mapping[str, DeviceCheckIn]) -> list[str]:
    """Return the first devices whose check-ins go up in one request, by their number and their bytes.

    A letter of a check-in takes two bytes at most in the text of another message.
    """
    left, devices = MAX_RELAY // 2, list[str]()
    for device, asked in islice(asking.items(), MOST_RELAYED):
        left -= OTHERS + (0 if asked.signed is None else 2 * len(asked.signed.check_in.encode()))
        if devices and left < 0:
            break
        devices.append(device)
    return devices
