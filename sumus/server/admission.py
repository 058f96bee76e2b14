"""Admits check-ins of enrolled devices: for each device only the check-in with the highest serial number, and only through an
edge that may send for the device.

admitted = admission.admit(check_ins, now)          admits or answers each check-in
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sumus.protocol.round import ComeLater, outcome
from sumus.rounds.run import DeviceCheckIn
from sumus.server.committer import PendingRequest
from sumus.server.identity import DeviceRegister
from sumus.server.membership import MEMBER_S
from sumus.server.requests import Item
from sumus.server.tasks import ServedTasks
from sumus.storage.identities import Identity
from sumus.storage.leases import MOST_JUMP, Leases
from sumus.wire.messages import CheckInRequest, Refused, Settlement


@dataclass(eq=False)
class OpenCheckIn:
    """A check-in that is being decided.

    Attributes:
        waiting: The request that waits for the answer.
        asked: The check-in.
        until: The moment, on the monotonic clock, until which the check-in may be held.
        identity: The identity of the device, or of the edge that relayed the check-in, once it has been looked up.
        settled: The outcome of the earlier session that the device asked about.
        later: Of the runs' answers that the device must come later, the one with the earliest time.
        known: Whether the device's fingerprint is that of one of the server's tasks.
    """

    waiting: PendingRequest[Item]
    asked: DeviceCheckIn
    until: float
    identity: Identity | None = None
    settled: Settlement | None = None
    later: ComeLater | None = None
    known: bool = False

    @property
    def device(self) -> str:
        """The device's id."""
        return self.asked.device

    @property
    def request(self) -> CheckInRequest:
        """The device's request."""
        return self.asked.request

    @property
    def parent(self) -> str:
        """The edge that relayed the check-in; empty if the device sent it here directly."""
        return self.asked.parent

    def say(self, answer: Any) -> None:
        """Answer the check-in."""
        self.waiting.say(answer)


class Admission:
    """Admits check-ins, or answers them."""

    def __init__(
        self, tasks: ServedTasks, register: DeviceRegister, leases: Leases, clock: Callable[[], float]
    ) -> None:
        """Admit check-ins for these tasks.

        Args:
            tasks: The tasks of the server.
            register: The devices that are enrolled.
            leases: Stores the highest serial of each device.
            clock: Returns the server's time, in seconds.
        """
        self._tasks, self._register, self._leases, self._clock = tasks, register, leases, clock

    def admit(self, check_ins: Sequence[OpenCheckIn], now: float) -> list[OpenCheckIn]:
        """Return the latest check-in of each admitted device; answer all other check-ins."""
        enrolled = list[OpenCheckIn]()
        for check_in in check_ins:
            try:
                check_in.identity = self._register.find(check_in.parent or check_in.device, self._clock())
                if check_in.identity.speaks_for and not check_in.parent:
                    raise Refused(
                        "not_device", "this device enrolled with a link for edges: enrol it with a link for devices"
                    )
                enrolled.append(check_in)
            except Refused as refused:
                check_in.say(refused)
        return self._latest(self._spoken_for(enrolled, now))

    def refuse_replayed(self, check_in: OpenCheckIn) -> None:
        """Refuse a check-in if a run has already assigned work for it, or for a later check-in of the device."""
        given = self._last_serials([check_in.device]).get(check_in.device, 0)
        check_in.say(_replayed(check_in.request.serial, max(given, check_in.request.serial)))

    def _spoken_for(self, check_ins: Sequence[OpenCheckIn], now: float) -> list[OpenCheckIn]:
        """Refuse check-ins that came through an edge which may not send for the device; return the other check-ins."""
        refused = dict[tuple[str, str], str]()
        edges = {
            check_in.parent: check_in.identity
            for check_in in check_ins
            if check_in.parent and check_in.identity is not None
        }
        for id, edge in edges.items():
            serials = _highest(check_in for check_in in check_ins if check_in.parent == id)
            works = partial(self._works_elsewhere, id, now)
            codes = self._register.members.speak_for(edge, serials, self._clock(), works, self._membership_s())
            refused |= {(id, device): code for device, code in codes.items()}
        for check_in in check_ins:
            if (code := refused.get((check_in.parent, check_in.device))) is not None:
                check_in.say(
                    Refused(
                        code,
                        "the edge may not send check-ins for this device, or has as many devices as its token allows",
                    )
                )
        return [check_in for check_in in check_ins if (check_in.parent, check_in.device) not in refused]

    def _works_elsewhere(self, edge: str, now: float, device: str) -> bool:
        """Return whether a device has work that was not assigned through this edge."""
        return any(
            session.parent != edge and outcome(session, run.coordinator.facts(now)) == "unknown"
            for run in self._tasks.runs()
            for session in run.coordinator.last_sessions([device])
        )

    def _membership_s(self) -> float:
        """Return the time after which a device leaves its edge, in seconds; no sum stays open for so long."""
        return max([MEMBER_S, *(2 * (run.pacing.deadline or 0.0) for run in self._tasks.runs())])

    def _latest(self, check_ins: Sequence[OpenCheckIn]) -> list[OpenCheckIn]:
        """Answer every check-in that is not its device's latest; return the latest ones."""
        if not check_ins:
            return []
        serials = _highest(check_ins)
        last = self._leases.raise_serials(serials)
        if far := {device: serial for device, serial in serials.items() if serial > last[device]}:
            last = {
                **last,
                **self._leases.raise_serials(far, self._last_serials(far)),
            }  # the rows may have higher serials
        for check_in in check_ins:
            if check_in.request.serial != last[check_in.device]:
                check_in.say(_replayed(check_in.request.serial, max(0, last[check_in.device])))
        return [check_in for check_in in check_ins if check_in.request.serial == last[check_in.device]]

    def _last_serials(self, devices: Iterable[str]) -> dict[str, int]:
        """Return, for each device, the highest serial of a check-in that was answered with work."""
        found = dict[str, int]()
        for run in self._tasks.runs():
            for session in run.coordinator.last_sessions(list(devices)):
                found[session.device] = max(session.serial, found.get(session.device, 0))
        return found


def _highest(check_ins: Iterable[OpenCheckIn]) -> dict[str, int]:
    """Return the highest serial of these check-ins for each device."""
    serials = dict[str, int]()
    for check_in in check_ins:
        serials[check_in.device] = max(check_in.request.serial, serials.get(check_in.device, 0))
    return serials


def _replayed(serial: int, last: int) -> Refused:
    """Make the refusal of a check-in with an old serial.

    Args:
        serial: The serial of the check-in.
        last: The highest known serial of the device; the device's next serial must be higher.
    """
    said = (
        "was already answered"
        if serial <= last
        else f"was the last, but the next serial may be at most {MOST_JUMP} higher"
    )
    return Refused("replayed", f"a check-in with serial {last} {said}", serial=min(last, 2**52))
