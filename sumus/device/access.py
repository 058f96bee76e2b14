"""A device's access to its server: certificates, enrolment, moving to another address, and signed requests."""

from collections.abc import Callable
from dataclasses import replace

from sumus.device.link import Link, fetch_authority, pin_of
from sumus.device.memory import DeviceMemory
from sumus.device.requests import Requests
from sumus.device.store import Membership, Record
from sumus.device.words import refused_enrolment
from sumus.errors import ExperimentError
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Transport, Unreachable
from sumus.wire.messages import AGAIN, Body, Refused

TRIES = 3
"""The number of attempts to fetch an object before its round is given up."""


class ServerAccess:
    """One device's access to its server.

    Args:
        link: The server's address, and the token with which the device enrols. An empty address means the server at which the
            device is enrolled.
        memory: Holds the device's key, its membership and the server's authority.
        new_key: Returns a new private key; called if the device has none yet.
        transport: Carries the requests; None for HTTP.
    """

    def __init__(
        self, link: Link, memory: DeviceMemory, new_key: Callable[[], bytes], transport: Transport | None = None
    ) -> None:
        self._link, self._memory, self._new_key = link, memory, new_key
        self._transport, self._closes_transport = transport, transport is None
        self._requests: Requests | None = None
        member = memory.record.membership
        self._enrols_again = member is not None and lets_in_elsewhere(link, member)
        self._authority = "" if self._enrols_again else memory.record.authority

    @property
    def server(self) -> str:
        """The server's address; empty if none is known."""
        member = self._memory.record.membership
        return self._link.server or (member.server if member else "")

    @property
    def requests(self) -> Requests:
        """The requests to the server, signed with this device's key.

        Raises:
            ExperimentError: No server is known.
        """
        if self._requests is None:
            if self._transport is None:
                if not self.server:
                    raise ExperimentError("this device has no server: give it an address or a link")
                self._transport = HttpTransport(self.server, self._vouching() or None)
            if (key := self._memory.store.key()) is None:
                self._memory.store.put_key(key := self._new_key())
            member = self._memory.record.membership
            self._requests = Requests(self._transport, key, member.population if member else "")
        return self._requests

    def enrol(self) -> Membership | None:
        """Enrol the device at its server with its token, unless it is enrolled already.

        Returns:
            The new membership; None if the device was enrolled already.

        Raises:
            Unreachable: The server cannot be reached, or cannot enrol the device at the moment.
            ExperimentError: A person must act; the message says how.
        """
        requests, member = self.requests, self._memory.record.membership
        if member is not None and not self._enrols_again:
            return None
        if self._link.token is None:
            raise ExperimentError("this device is not enrolled: give it a link or a token, from the server's operator")
        try:
            enrolment = requests.enrol(self._link.token)
        except Refused as refused:
            if refused.problem.code in AGAIN:
                raise Unreachable(f"the server cannot enrol this device now: {refused}") from refused
            raise ExperimentError(refused_enrolment(refused)) from refused
        if member is not None and enrolment.population != member.population:
            raise ExperimentError(
                f"{self._link.server} serves the population {enrolment.population}, but this device belongs to "
                f"{member.population}: give another --folder"
            )
        member = Membership(self._link.server, enrolment.population, enrolment.device)
        self._memory.write(replace(self._memory.record, membership=member, authority=self._authority))
        self._enrols_again = False
        return member

    def enrol_again(self) -> bool:
        """Let the next `enrol` use the token, since the server no longer knows the device.

        Returns:
            Whether there is a token."""
        if self._link.token is None:
            return False
        self._enrols_again = True
        return True

    def server_answered(self) -> None:
        """Save the address and the authority of a server that knows this device. If they are new, the server has moved."""
        record = self._memory.record
        member = record.membership
        if member is not None:
            member = replace(member, server=self._link.server or member.server)
        if (member, self._authority) != (record.membership, record.authority):
            self._memory.write(replace(record, membership=member, authority=self._authority))

    def object(self, body: Body) -> bytes:
        """Fetch an object that the server announced, with a few attempts.

        Raises:
            Unreachable: The server does not provide the object.
        """
        for left in reversed(range(TRIES)):
            try:
                return self.requests.object(body)
            except Unreachable:
                if not left:
                    raise
            except Refused as refused:
                raise Unreachable(f"the server does not provide an object that it announced: {refused}") from refused
        raise AssertionError("the last try returns or raises")

    def forget_key(self) -> None:
        """Discard the request signer, because its key was erased."""
        self._requests = None

    def close(self) -> None:
        """Close the connections, unless the caller supplied the transport."""
        if self._transport is not None and self._closes_transport:
            self._transport.close()

    def _vouching(self) -> str:
        """Return the CA certificates (PEM) that verify the server: those that the link names or pins, or those of the record."""
        if self._link.authority:
            self._authority = self._link.authority
        if self._link.pin is not None and pin_of(self._authority) != self._link.pin:
            self._authority = fetch_authority(replace(self._link, server=self.server))
        return self._authority


def lets_in_elsewhere(link: Link, member: Membership) -> bool:
    """Return whether a link admits the device to a server other than its own. An address without a token means that the
    device's own server has moved."""
    return link.token is not None and link.server not in ("", member.server)


def expect_own_server(record: Record, link: Link, moves: bool) -> None:
    """Refuse a link to another server, unless the device may move there.

    Raises:
        ExperimentError: The device belongs to another server, or must first learn what happened to its last report.
    """
    member = record.membership
    if member is None or not lets_in_elsewhere(link, member):
        return
    if not moves:
        raise ExperimentError(
            f"this folder belongs to a device of {member.server}: give another --folder for {link.server}, or forget this "
            "device first. If the device's server has moved, give its new address alone, without a token. If the link is for "
            "another edge of the same population, add --move"
        )
    if record.row.session:
        raise ExperimentError(
            f"only {member.server} knows whether this device's last report was counted: run `sumus join --once` with "
            f"that address before the device moves to {link.server}"
        )
