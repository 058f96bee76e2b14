"""Who may take part. A device makes its own key, a token lets it in once, and from then on its signature is all that it shows.

    roll = Roll(identities, {"phones": 10_000})
    token = roll.new_token("phones", now)                        shown once; only its hash is kept
    enrolment, new = roll.enrol(request, now)                    the same key again: the same answer, no token's use spent
    identity = roll.authenticate(device, signature, text, now)
    refused = roll.speak_for(identity, {device: serial}, now)        the edge speaks for no more devices than its token says

For whatever a device sends, these raise `messages.Refused` with a code of its closed list, and nothing else. `now` is in
seconds of the server's clock.
"""

import hmac
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

from sumus.errors import ExperimentError, ParticipantError
from sumus.storage.identities import Identities, Identity, IdentityRows, Member, Token
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

DAY = 86400.0
CHALLENGE_S = 300.0
"""Seconds in which a challenge is to be answered."""
TOKEN_S = 7 * DAY
"""Seconds that a token lasts, where nothing else is said; and for as long afterwards who comes with it is told so."""
MEMBER_S = 7 * DAY
"""Seconds after which a device that has not asked through its edge leaves its place there to another, at the earliest."""
_BATCH = 1000
"""Rows that are written in one transaction."""
_ID = re.compile("[0-9a-f]{64}")


def count_enrolled(identities: Identities, population: str) -> int:
    """Count the devices that are enrolled in a population, here or at its edges."""
    with identities.transaction() as rows:
        return rows.count(population)


class DeviceRegister:
    """The devices that are enrolled, by population.

    quotas: by population, how many may be.  secret: what challenges are made with; replicas that answer each other's share
    it, and a server with a new one makes devices ask again.  random: bytes that nobody can guess.
    remembered: devices kept in memory, so that their requests read no database.  fresh_s: seconds until one is read again,
    and so until a revocation by another process holds here; one by this process holds at once.
    left: is told who is revoked or withdrawn before it is so, to write it down elsewhere.

    Any thread may call.
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
        self._identities = identities
        self._quotas = dict(quotas)
        self._secret = random(32) if secret is None else secret
        self._random = random
        self._most = remembered
        self._fresh = fresh_s
        self._left = left
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._members: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._changes = 0
        self._heard: dict[str, float] = {}

    # ── coming in ────────────────────────────────────────────────────────────────────────────────────────────────────

    def new_token(self, population: str, now: float, uses: int = 1, lasts: float = TOKEN_S, speaks_for: int = 0) -> str:
        """Make one token, see `new_tokens`."""
        return self.new_tokens(1, population, now, uses, lasts, speaks_for)[0]

    def new_tokens(
        self, count: int, population: str, now: float, uses: int = 1, lasts: float = TOKEN_S, speaks_for: int = 0
    ) -> list[str]:
        """Make tokens, of 43 letters each. Who has one may enrol: show them once, and keep them out of logs.

        Args:
            count: How many tokens.
            population: The population that their devices enrol in.
            now: Seconds of the server's clock.
            uses: How many keys may enrol with each. With more than one, one person may enrol as several devices.
            lasts: Seconds that they last.
            speaks_for: How many devices an edge that enrols with one may speak for; 0 for devices' tokens.
        """
        if population not in self._quotas:
            raise ExperimentError(f"no population {population!r} here: give one of {', '.join(sorted(self._quotas))}")
        if uses < 1 or not 0 < lasts <= 3650 * DAY:
            raise ExperimentError(
                f"a token for {uses} devices and {lasts:g} seconds: at least one, and up to ten years"
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
        """A nonce to sign. Nothing is kept of it: it is the time, under a MAC."""
        time = round(now * 1000).to_bytes(8, "big", signed=True)
        return Challenge(to_base64url(time + self._mac(time)), CHALLENGE_S)

    def enrol(self, request: EnrolmentRequest, now: float) -> tuple[Enrolment, bool]:
        """Let a device in, and whether it is new. A key that is enrolled stays where it is, whatever the token; one that
        withdrew does not come back: its owner makes a new one.

        Refused: malformed, old_nonce, bad_signature, revoked, bad_token, token_used, quota.
        """
        with _well_formed("malformed"):
            key, signature = read_public_key(request.public_key), from_base64url(request.signature)
            text = enrolment_text(request.nonce, request.public_key, request.token)
        self._check_nonce(request.nonce, now)
        if not verify(key, signature, text):
            raise Refused("bad_signature", "the enrolment is not signed by the key that it gives")
        device = device_id(key)
        with self._identities.transaction() as rows:
            row = rows.identity(device)
            if row is not None and row.state == "revoked":
                raise _revoked()
            if (
                row is not None and row.state == "withdrawn"
            ):  # else it could be in one sum as often as it leaves and returns
                raise Refused("revoked", "this key has left; who comes back makes a new one")
            rows.drop_member(device)  # it asks here itself from now on
            new = row is None
            if row is None:
                token = self._spend(rows, _hash(request.token), now)
                link = token.hash if token.made > 1 else ""
                row = Identity(device, token.population, key, "enrolled", now, _day(now), token.speaks_for, link=link)
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
            raise Refused("old_nonce", "the challenge is over, or of another server: ask for a new one")

    def _spend(self, rows: IdentityRows, hash: str, now: float) -> Token:
        token = rows.token(hash)
        if token is None or token.population not in self._quotas:
            raise Refused("bad_token", "no enrolment token of this server: ask who runs it for one")
        if token.uses < 1 or token.expires < now:
            raise Refused("token_used", "the enrolment token's uses are up, or its time: ask for a new one")
        if rows.count(token.population) >= self._quotas[token.population]:
            raise Refused("quota", f"the population {token.population} is full")
        rows.put_token(replace(token, uses=token.uses - 1))
        return token

    # ── being in ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, device: str, now: float) -> Identity:
        """The device that a request says it is of: its population, and the key that must have signed. Strangers can so be
        refused before a body is read. Refused: unknown_device, revoked."""
        row = self._remember(device, now) if _ID.fullmatch(device) else None
        if row is None or row.state == "withdrawn" or row.population not in self._quotas:
            raise Refused("unknown_device", "not enrolled here: enrol with a token")
        if row.state == "revoked":
            raise _revoked()
        return row

    def link_of(self, device: str) -> str:
        """Hash of the token that a device enrolled with, if that token was made for several uses; else empty."""
        row = self._identities.find(device)
        return "" if row is None else row.link

    def remembers(self, device: str, now: float) -> bool:
        """Whether `find` would read no database."""
        with self._lock:
            known = self._known.get(device)
        return known is not None and 0 <= now - known[1] <= self._fresh

    def authenticate(self, device: str, signature: str, text: bytes, now: float) -> Identity:
        """The device that signed this text. signature: base64url.  Refused: unknown_device, revoked, bad_signature."""
        row = self.find(device, now)
        with _well_formed("bad_signature"):
            signed = from_base64url(signature)
        if not verify(row.public_key, signed, text):
            raise Refused("bad_signature", "not signed by this device, or not over this request")
        return self._hear(row, _day(now))

    def note_members(self, edge: str, members: int, now: float) -> bool:
        """Write down how many devices an edge has, as far as its token goes; whether that is another number than before."""
        row = self.find(edge, now)
        members = min(members, row.speaks_for)  # the others are refused one by one, see `speak_for`
        if members == row.members:
            return False
        with self._changed(edge) as rows:
            found = rows.identity(edge)
            if found is not None and found.state == "enrolled":
                rows.put_identity(replace(found, members=members))
        return True

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
            rows.drop_members(edge.id, _day(now) - lapses)
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
                rows.put_member(Member(device, edge.id, since, _day(now)))
                members.append(device)
        self._remember_members(edge.id, members, now)
        return refused

    def _is_member(self, device: str, edge: str, now: float) -> bool:
        """Whether a device asks through this edge, by what was read a short time ago."""
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
            if row is not None and changes == self._changes:  # else it may be of before a revocation
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
        """Write down on which day devices were heard of, and how many those are: call it now and then. A crash forgets some."""
        with self._lock:
            heard, self._heard = list(self._heard.items()), {}
        for first in range(0, len(heard), _BATCH):
            with self._identities.transaction() as rows:
                for device, day in heard[first : first + _BATCH]:
                    row = rows.identity(device)
                    if row is not None and row.state == "enrolled" and row.seen < day:
                        rows.put_identity(replace(row, seen=day))
        return len(heard)

    # ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def devices(self, after: str = "", limit: int = 100) -> Sequence[Identity]:
        """Devices by their id, from the first one after another on, also those that left or were shut out."""
        with self._identities.transaction() as rows:
            return rows.identities(after, limit)

    def revoke(self, device: str) -> None:
        """Shut a device out, for good. Refused with not_found where there is none; once more is no error."""
        with self._changed(device) as rows:
            row = rows.identity(device)
            if row is None:
                raise Refused("not_found", "no device has this id")
            if row.state != "revoked":
                self._leave(rows, replace(row, state="revoked"))

    def withdraw(self, device: str) -> None:
        """A device leaves. Of it remain its id, its population, when it enrolled, and that it left; its key is erased. Once
        more is no error, and one that was revoked stays so."""
        with self._changed(device) as rows:
            row = rows.identity(device)
            if row is not None and row.state == "enrolled":
                self._leave(rows, replace(row, state="withdrawn", public_key=b"", seen=0.0, link=""))

    def _leave(self, rows: IdentityRows, row: Identity) -> None:
        self._left(row)
        rows.put_identity(row)
        if row.speaks_for:
            rows.drop_members(row.id)
            with self._lock:
                self._members.clear()

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
            self._members.pop(device, None)


def signed_by_device(relayed: Relayed, population: str) -> bool:
    """Whether a check-in that an edge passes on was signed by its device, to be asked of this population's server."""
    try:
        key, signature = read_public_key(relayed.public_key), from_base64url(relayed.signature)
        text = signed_text("POST", CHECK_IN, population, relayed.device, relayed.check_in.encode())
    except ParticipantError:
        return False
    return device_id(key) == relayed.device and verify(key, signature, text)


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


def _hash(token: str) -> str:
    """Tokens are 256 random bits: a plain hash of one cannot be turned back."""
    return sha256(token.encode()).hexdigest()


def _day(now: float) -> float:
    """The beginning of the day, which is as much as is kept of when a device was heard of."""
    return now // DAY * DAY


def _revoked() -> Refused:
    return Refused("revoked", "this device was shut out")


@contextmanager
def _well_formed(code: str) -> Generator[None, None, None]:
    try:
        yield
    except ParticipantError as error:
        raise Refused(code, str(error)) from error
