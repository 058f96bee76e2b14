"""Which devices ask through which edge: each through one, and through each edge no more than its token says."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from sumus.storage.identities import Identities, Identity, Member

DAY = 86400.0
MEMBER_S = 7 * DAY
"""Seconds after which a device that has not asked through its edge leaves its place there to another device, at the
earliest."""


class EdgeMembers:
    """The devices of edges. Any thread may call."""

    def __init__(self, identities: Identities, remembered: int, fresh_s: float) -> None:
        """Read and write the members of edges.

        Args:
            identities: Where they are kept.
            remembered: Devices kept in memory, so that their check-ins read no database.
            fresh_s: Seconds until one of these is read again.
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
        """Note which devices ask through an edge: each through one, and through each edge no more than its token says.

        A device that asked through another edge before comes to this one. The caller has seen its signature: no edge can bring
        a device that does not ask through it.

        Args:
            edge: The edge.
            devices: The serials of the check-ins that it passes on, by device.
            now: Seconds of the server's clock.
            stays: Whether a device has work through another edge; then it stays there, and is no error.
            lapses: Seconds after which a device that has not asked leaves its place to another. Longer than any round lasts, so
                that nobody is in one sum under more names than the token says.

        Returns:
            By device, the code that says why the edge may not speak for it: `revoked` (it left, or was shut out), `not_device`
            (it is an edge), `replayed` (it asked through another edge since) or `not_edge` (the token is for fewer devices).
        """
        refused = dict[str, str]()
        new = {device: serial for device, serial in devices.items() if not self._is_member(device, edge.id, now)}
        if not new:
            return refused
        members = list[str]()
        elsewhere = {row.device for row in self._identities.find_members(list(new)) if row.edge != edge.id}
        staying = set(filter(stays, elsewhere))  # before the transaction: it reads what transactions of rounds write
        with self._identities.transaction() as rows:
            rows.read_ahead(list(new))
            rows.drop_members(edge.id, day_of(now) - lapses)
            room = edge.speaks_for - rows.count_members(edge.id)
            for device, serial in new.items():
                before = rows.member(device)
                here = before is not None and before.edge == edge.id
                if before is not None and not here and (device in staying or device not in elsewhere):
                    continue  # it has work through that edge, or has come to it in this moment
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
        """Return whether a device asks through this edge, by what was read a short time ago."""
        with self._lock:
            known, read = self._members.get(device, ("", 0.0))
        return known == edge and 0 <= now - read <= self._fresh

    def _remember_members(self, edge: str, devices: Iterable[str], now: float) -> None:
        """Keep in memory that these devices ask through an edge, so that their next check-ins read no database."""
        with self._lock:
            for device in devices:
                self._members[device] = edge, now
                self._members.move_to_end(device)
            while len(self._members) > self._most:
                self._members.popitem(last=False)

    def forget(self, device: str) -> None:
        """Read a device's edge again when the device asks next."""
        with self._lock:
            self._members.pop(device, None)

    def forget_all(self) -> None:
        """Read the edges of all devices again."""
        with self._lock:
            self._members.clear()


def day_of(now: float) -> float:
    """The beginning of the day: nothing finer is kept of when a device was heard of."""
    return now // DAY * DAY


def _why_not(row: Identity | None, before: Member | None, here: bool, serial: int, room: int) -> str | None:
    """Say why an edge may not speak for a device; None if it may.

    Args:
        row: The device as it is enrolled here itself; None if it is not.
        before: The edge that it asked through last; None if it asked through none.
        here: Whether that is the edge that passes its check-in on.
        serial: The serial of that check-in.
        room: Devices that the edge may still speak for, besides those that it speaks for already.
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
