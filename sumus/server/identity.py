"""The devices that may take part. A device makes its own key and enrols the key once with a token. After that, its signatures
identify it.

    roll = DeviceRegister(identities, {"phones": 10_000})
    token = roll.new_token("phones", now)                        shown once; only its hash is kept
    enrolment, new = roll.enrol(request, now)                    a repeated key gets the same answer, and is not counted again
    identity = roll.authenticate(device, signature, text, now)

Whatever a device sends, these methods raise only `messages.Refused`, with a code from its closed list. `now` is in
seconds of the server's clock.
"""

import hmac
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

from sumus.errors import ExperimentError, ParticipantError
from sumus.server.membership import DAY, EdgeMembers, day_of
from sumus.storage.identities import Identities, Identity, IdentityRows, Token
from sumus.wire.messages import (
    CHECK_IN,
    Challenge,
    Enrolment,
    EnrolmentRequest,
    Refused,
    Relayed,
    enrolment_text,
    signed_text,
)
from sumus.wire.signing import device_id, from_base64url, read_public_key, to_base64url, verify

CHALLENGE_S = 300.0
"""The time within which a challenge must be answered, in seconds."""
TOKEN_S = 7 * DAY
"""The time for which a token is valid by default, in seconds. For the same time after its end, a device that uses the token
gets the error that it has expired.
"""
_BATCH = 1000
"""The largest number of rows that are written in one transaction."""
_ID = re.compile("[0-9a-f]{64}")


def count_enrolled(identities: Identities, population: str) -> int:
    """Count the devices that are enrolled in a population, at this server or at its edges."""
    with identities.transaction() as rows:
        return rows.count(population)


class DeviceRegister:
    """The enrolled devices, by population. The methods are safe to call from any thread.

    Attributes:
        members: The devices that check in through edges.
    """

    def __init__(
        self,
        identities: Identities,
        quotas: Mapping[str, int],
        secret: bytes | None = None,
        random: Callable[[int], bytes] = secrets.token_bytes,
        remembered: int = 100_000,
        fresh_s: float = 60.0,
        left: Callable[[Identity], None] = lambda row: None,
    ) -> None:
        """Read and write enrolled devices.

        Args:
            identities: The store of their rows.
            quotas: The largest number of enrolled devices, by population.
            secret: The secret from which challenges are made. Replicas that accept each other's challenges share the secret;
                after a change of the secret, devices must ask for new challenges.
            random: Returns random bytes that cannot be guessed.
            remembered: The number of devices kept in memory, so that their requests need no database access.
            fresh_s: The number of seconds after which a device in memory is read again. A revocation by another process takes
                effect in this process within this time; a revocation by this process takes effect at once.
            left: Called with each device that is about to be revoked or withdrawn, so that other stores can record it.
        """
        self._identities = identities
        self._quotas = dict(quotas)
        self._secret = random(32) if secret is None else secret
        self._random = random
        self._most = remembered
        self._fresh = fresh_s
        self._left = left
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self.members = EdgeMembers(identities, remembered, fresh_s)
        self._changes = 0
        self._heard: dict[str, float] = {}

    # ── enrolment ────────────────────────────────────────────────────────────────────────────────────────────────────

    def new_token(self, population: str, now: float, uses: int = 1, lasts: float = TOKEN_S, speaks_for: int = 0) -> str:
        """Make one token; see `new_tokens` for the arguments."""
        return self.new_tokens(1, population, now, uses, lasts, speaks_for)[0]

    def new_tokens(
        self, count: int, population: str, now: float, uses: int = 1, lasts: float = TOKEN_S, speaks_for: int = 0
    ) -> list[str]:
        """Make tokens of 43 characters each. Anybody who has a token may enrol: show each token once, and keep it out of logs.

        Args:
            count: The number of tokens.
            population: The population in which devices enrol with the tokens.
            now: Seconds of the server's clock.
            uses: The number of keys that may enrol with each token. If it is more than 1, one person may enrol as several
                devices.
            lasts: How long the tokens are valid, in seconds.
            speaks_for: The largest number of devices of an edge that enrols with a token; 0 for tokens for devices.
        """
        if population not in self._quotas:
            raise ExperimentError(
                f"this server has no population {population!r}: give one of {', '.join(sorted(self._quotas))}"
            )
        if uses < 1 or not 0 < lasts <= 3650 * DAY:
            raise ExperimentError(
                f"cannot make a token for {uses} devices and {lasts:g} seconds: give at least one device, and at most ten years"
            )
        tokens = [to_base64url(self._random(32)) for _ in range(count)]
        with self._identities.transaction() as rows:
            for old in rows.tokens():
                if old.expires + TOKEN_S < now:
                    rows.drop_token(old.hash)
            for token in tokens:
                rows.put_token(Token(_hash(token), population, uses, now + lasts, speaks_for, made=uses))
        return tokens

    def challenge(self, now: float) -> Challenge:
        """Make a nonce to sign. The nonce is not stored, since it contains the time and a MAC (message authentication code)
        of the time.
        """
        time = round(now * 1000).to_bytes(8, "big", signed=True)
        return Challenge(to_base64url(time + self._mac(time)), CHALLENGE_S)

    def enrol(self, request: EnrolmentRequest, now: float) -> tuple[Enrolment, bool]:
        """Enrol a device.

        A key that is already enrolled stays in its population, whatever the token is. A withdrawn key cannot enrol again: its
        owner must make a new key.

        Returns:
            The enrolment, and whether the device is new.

        Raises:
            Refused: malformed, old_nonce, bad_signature, revoked, bad_token, token_used or quota.
        """
        with _well_formed("malformed"):
            key, signature = read_public_key(request.public_key), from_base64url(request.signature)
            text = enrolment_text(request.nonce, request.public_key, request.token)
        self._check_nonce(request.nonce, now)
        if not verify(key, signature, text):
            raise Refused("bad_signature", "the enrolment is not signed with the key that it contains")
        device = device_id(key)
        with self._identities.transaction() as rows:
            row = rows.identity(device)
            if row is not None and row.state == "revoked":
                raise _revoked()
            if (
                row is not None and row.state == "withdrawn"
            ):  # otherwise it could leave, return, and be in one sum twice
                raise Refused("revoked", "this key was withdrawn; to enrol again, make a new key")
            rows.drop_member(device)  # from now on the device checks in here directly
            new = row is None
            if row is None:
                token = self._spend(rows, _hash(request.token), now)
                link = token.hash if token.made > 1 else ""
                row = Identity(device, token.population, key, "enrolled", now, day_of(now), token.speaks_for, link=link)
                rows.put_identity(row)
        self._forget(device)
        return Enrolment(device, row.population), new

    def _mac(self, time: bytes) -> bytes:
        return hmac.digest(self._secret, b"sumus challenge" + time, "sha256")[:24]

    def _check_nonce(self, nonce: str, now: float) -> None:
        with _well_formed("old_nonce"):
            body = from_base64url(nonce)
        known = hmac.compare_digest(self._mac(body[:8]), body[8:])
        if not known or abs(now - int.from_bytes(body[:8], "big", signed=True) / 1000) > CHALLENGE_S:
            raise Refused("old_nonce", "the challenge has expired, or is from another server: request a new one")

    def _spend(self, rows: IdentityRows, hash: str, now: float) -> Token:
        token = rows.token(hash)
        if token is None or token.population not in self._quotas:
            raise Refused(
                "bad_token", "this is not an enrolment token of this server: ask the server's operator for one"
            )
        if token.uses < 1 or token.expires < now:
            raise Refused("token_used", "the enrolment token has no uses left, or has expired: ask for a new one")
        if rows.count(token.population) >= self._quotas[token.population]:
            raise Refused("quota", f"the population {token.population} is full: ask the operator for a larger quota")
        rows.put_token(replace(token, uses=token.uses - 1))
        return token

    # ── enrolled devices ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, device: str, now: float) -> Identity:
        """Return the row of the device in a request's header, with its population and its key. Thus unknown senders are refused
        before their body is read.

        Raises:
            Refused: unknown_device or revoked.
        """
        row = self._remember(device, now) if _ID.fullmatch(device) else None
        if row is None or row.state == "withdrawn" or row.population not in self._quotas:
            raise Refused("unknown_device", "this device is not enrolled here: enrol it with a token")
        if row.state == "revoked":
            raise _revoked()
        return row

    def link_of(self, device: str) -> str:
        """Return the hash of the token with which a device enrolled, if the token was made for several uses; else an empty
        string.
        """
        row = self._identities.find(device)
        return "" if row is None else row.link

    def remembers(self, device: str, now: float) -> bool:
        """Return whether `find` can answer without reading the database."""
        with self._lock:
            known = self._known.get(device)
        return known is not None and 0 <= now - known[1] <= self._fresh

    def authenticate(self, device: str, signature: str, text: bytes, now: float) -> Identity:
        """Return the row of the device that signed a text. The signature is in base64url.

        Raises:
            Refused: unknown_device, revoked or bad_signature.
        """
        row = self.find(device, now)
        with _well_formed("bad_signature"):
            signed = from_base64url(signature)
        if not verify(row.public_key, signed, text):
            raise Refused("bad_signature", "the signature was not made by this device, or was made for another request")
        return self._hear(row, day_of(now))

    def note_members(self, edge: str, members: int, now: float) -> bool:
        """Store the number of devices of an edge; at most the number that its token allows.

        Returns:
            Whether the number has changed.
        """
        row = self.find(edge, now)
        members = min(members, row.speaks_for)  # `EdgeMembers.speak_for` refuses each further device
        if members == row.members:
            return False
        with self._changed(edge) as rows:
            found = rows.identity(edge)
            if found is not None and found.state == "enrolled":
                rows.put_identity(replace(found, members=members))
        return True

    def _remember(self, device: str, now: float) -> Identity | None:
        with self._lock:
            if device in self._known:
                row, read = self._known[device]
                if 0 <= now - read <= self._fresh:
                    self._known.move_to_end(device)
                    return row
            changes = self._changes
        row = self._identities.find(device)
        with self._lock:
            if row is not None and changes == self._changes:  # otherwise the row may be older than a revocation
                self._known[device] = row, now
                self._known.move_to_end(device)
                while len(self._known) > self._most:
                    self._known.popitem(last=False)
        return row

    def _hear(self, row: Identity, day: float) -> Identity:
        if row.seen >= day:
            return row
        heard = replace(row, seen=day)
        with self._lock:
            self._heard[row.id] = day
            while len(self._heard) > self._most:
                del self._heard[next(iter(self._heard))]
            if (known := self._known.get(row.id)) is not None and known[0] is row:
                self._known[row.id] = heard, known[1]
        return heard

    def write_seen(self) -> int:
        """Store the day of each device's last request; return the number of devices. This is called from time to time, so after
        a crash some days are missing.
        """
        with self._lock:
            heard, self._heard = list(self._heard.items()), {}
        for first in range(0, len(heard), _BATCH):
            with self._identities.transaction() as rows:
                for device, day in heard[first : first + _BATCH]:
                    row = rows.identity(device)
                    if row is not None and row.state == "enrolled" and row.seen < day:
                        rows.put_identity(replace(row, seen=day))
        return len(heard)

    # ── departure ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def devices(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        """List up to `limit` devices with ids after `after`, in the order of their ids, including withdrawn and revoked
        devices.
        """
        with self._identities.transaction() as rows:
            return rows.identities(after, limit)

    def revoke(self, device: str) -> None:
        """Revoke a device's enrolment permanently. If it is already revoked, do nothing.

        Raises:
            Refused: not_found.
        """
        with self._changed(device) as rows:
            row = rows.identity(device)
            if row is None:
                raise Refused("not_found", "no device has this id")
            if row.state != "revoked":
                self._leave(rows, replace(row, state="revoked"))

    def withdraw(self, device: str) -> None:
        """Withdraw a device. If it is already withdrawn, do nothing; a revoked device stays revoked.

        The device's key is erased. Its id, its population, the time of its enrolment and the record that it left remain.
        """
        with self._changed(device) as rows:
            row = rows.identity(device)
            if row is not None and row.state == "enrolled":
                self._leave(rows, replace(row, state="withdrawn", public_key=b"", seen=0.0, link=""))

    def _leave(self, rows: IdentityRows, row: Identity) -> None:
        self._left(row)
        rows.put_identity(row)
        if row.speaks_for:
            rows.drop_members(row.id)
            self.members.forget_all()

    @contextmanager
    def _changed(self, device: str) -> Generator[IdentityRows, None, None]:
        with self._identities.transaction() as rows:
            yield rows
        self._forget(device)

    def _forget(self, device: str) -> None:
        with self._lock:
            self._changes += 1
            self._known.pop(device, None)
            self._heard.pop(device, None)
        self.members.forget(device)


def signed_by_device(relayed: Relayed, population: str) -> bool:
    """Return whether a relayed check-in was signed by its device, for the server of this population."""
    try:
        key, signature = read_public_key(relayed.public_key), from_base64url(relayed.signature)
        text = signed_text("POST", CHECK_IN, population, relayed.device, relayed.check_in.encode())
    except ParticipantError:
        return False
    return device_id(key) == relayed.device and verify(key, signature, text)


def _hash(token: str) -> str:
    """Return the hash of a token. Tokens have 256 random bits, so a plain hash cannot be inverted."""
    return sha256(token.encode()).hexdigest()


def _revoked() -> Refused:
    return Refused("revoked", "the server's operator has revoked this device: it can no longer take part")


@contextmanager
def _well_formed(code: str) -> Generator[None, None, None]:
    try:
        yield
    except ParticipantError as error:
        raise Refused(code, str(error)) from error
