"""The devices of each edge: a device checks in through one edge only, and an edge has at most as many devices as its token
allows.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from sumus.storage.identities import Identities, Identity, Member

DAY = 86400.0
MEMBER_S = 7 * DAY
"""The shortest time without a check-in, in seconds, after which a device's place at its edge may go to another device."""


class EdgeMembers:
    """The devices of edges. The methods are safe to call from any thread."""

    def __init__(self, identities: Identities, remembered: int, fresh_s: float) -> None:
        """Read and write the members of edges.

        Args:
            identities: The store of their rows.
            remembered: The number of devices kept in memory, so that their check-ins need no database access.
            fresh_s: The number of seconds after which a device in memory is read again.
        """
        self._identities, self._most, self._fresh = identities, remembered, fresh_s
        self._lock = threading.Lock()
        self._members: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def speak_for(
        self,
        edge: Identity,
        devices: Mapping[str, int],
        now: float,
        stays: Callable[[str], bool] = lambda device: False,
        lapses: float = MEMBER_S,
    ) -> dict[str, str]:
        """Store which devices check in through an edge; refuse devices for which the edge may not send.

        A device that checked in through another edge before is moved to this edge. The caller has checked the device's
        signature, so an edge cannot claim a device that does not use it.

        Args:
            edge: The edge.
            devices: The serials of the relayed check-ins, by device.
            now: Seconds of the server's clock.
            stays: Returns whether a device has work through another edge. If it has, it stays there, and is not refused.
            lapses: The time without a check-in, in seconds, after which a device's place goes to another device. It must be
                longer than any round, so that a sum never has more devices of an edge than its token allows.

        Returns:
            The error code of each refused device: `revoked` (it was withdrawn or revoked), `not_device` (it is an edge),
            `replayed` (it has checked in through another edge meanwhile) or `not_edge` (the token is for fewer devices).
        """
        refused = dict[str, str]()
        new = {device: serial for device, serial in devices.items() if not self._is_member(device, edge.id, now)}
        if not new:
            return refused
        members = list[str]()
        elsewhere = {row.device for row in self._identities.find_members(list(new)) if row.edge != edge.id}
        staying = set(filter(stays, elsewhere))  # before the transaction, since it reads the rows of rounds
        with self._identities.transaction() as rows:
            rows.read_ahead(list(new))
            rows.drop_members(edge.id, day_of(now) - lapses)
            room = edge.speaks_for - rows.count_members(edge.id)
            for device, serial in new.items():
                before = rows.member(device)
                here = before is not None and before.edge == edge.id
                if before is not None and not here and (device in staying or device not in elsewhere):
                    continue  # it has work through that edge, or has just moved to it
                if (code := _why_not(rows.identity(device), before, here, serial, room)) is not None:
                    refused[device] = code
                    continue
                room -= not here
                since = before.serial if before is not None and here else serial
                rows.put_member(Member(device, edge.id, since, day_of(now)))
                members.append(device)
        self._remember_members(edge.id, members, now)
        return refused

    def _is_member(self, device: str, edge: str, now: float) -> bool:
        """Return whether a device belongs to this edge according to recently read rows."""
        with self._lock:
            known, read = self._members.get(device, ("", 0.0))
        return known == edge and 0 <= now - read <= self._fresh

    def _remember_members(self, edge: str, devices: Iterable[str], now: float) -> None:
        """Keep in memory that these devices belong to an edge, so that their next check-ins need no database access."""
        with self._lock:
            for device in devices:
                self._members[device] = edge, now
                self._members.move_to_end(device)
            while len(self._members) > self._most:
                self._members.popitem(last=False)

    def forget(self, device: str) -> None:
        """Remove a device from memory: its edge is read again at its next check-in."""
        with self._lock:
            self._members.pop(device, None)

    def forget_all(self) -> None:
        """Remove all devices from memory: their edges are read again."""
        with self._lock:
            self._members.clear()


def day_of(now: float) -> float:
    """Return the start of the day. Only the day of a device's last request is stored."""
    return now // DAY * DAY


def _why_not(row: Identity | None, before: Member | None, here: bool, serial: int, room: int) -> str | None:
    """Return the error code if an edge may not send for a device; None if it may.

    Args:
        row: The device's own enrolment at this server; None if it has none.
        before: The membership from the device's last check-in through an edge; None if it used no edge before.
        here: Whether that edge is also the one that relays this check-in.
        serial: The serial of this check-in.
        room: The number of further devices that the edge may have.
    """
    if row is not None and row.state != "enrolled":
        return "revoked"
    if row is not None and row.speaks_for:
        return "not_device"
    if here:
        return None
    if before is not None and serial <= before.serial:
        return "replayed"
    return "not_edge" if room < 1 else None
