"""Scripted devices, without torch. They draw their updates, keep them until they learn how the session ended, and
record everything.

The audit uses these records, and not what a server says.
"""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from sumus.aggregate import Update
from sumus.device.requests import Requests, may_be_repeated
from sumus.plan import Plan
from sumus.transport.http import HttpTransport
from sumus.transport.transport import MOST, Answer, Transport, Unreachable
from sumus.wire.messages import Assignment, CheckInAnswer, CheckInRequest, PreviousSession, Refused
from sumus.wire.reports import encode_report

PATIENCE = 10.0
PEACE = 60.0
"""Seconds for devices to come to an end once nothing is killed any more."""


@dataclass
class Book:
    """What devices say. sent: by session of the rows, `DEVICE/SESSION`.  acknowledged, discarded: sessions that devices were told
    so of.  broadcasts: hashes that they were given, by version.  answers: how often which.  over: set to let nobody try again."""

    sent: dict[str, "Sent"] = field(default_factory=dict[str, "Sent"])
    acknowledged: set[str] = field(default_factory=set[str])
    discarded: set[str] = field(default_factory=set[str])
    broadcasts: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    answers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Sent:
    """An update, and what it was made for."""

    work: Assignment
    update: Update
    body: bytes


class Address:
    """Where the server is now; it changes with each of its lives."""

    def __init__(self) -> None:
        self.port = 0
        self._changed = threading.Condition()

    def move(self, port: int) -> None:
        """It lives again, here."""
        with self._changed:
            self.port = port
            self._changed.notify_all()

    def wait(self, seconds: float, port: int) -> None:
        """Wait so long, or until it is elsewhere."""
        with self._changed:
            self._changed.wait_for(lambda: self.port != port, seconds)


class Following:
    """A `Transport` to wherever the server is."""

    def __init__(self, address: Address) -> None:
        self._address, self._port = address, 0
        self._inner: HttpTransport | None = None

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] = {},  # noqa: B006
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Ask once."""
        port = self._address.port
        if self._inner is None or port != self._port:
            self.close()
            self._inner, self._port = HttpTransport(f"http://127.0.0.1:{port}", connections=1), port
        try:
            answer = self._inner.request(method, path, body, headers, min(patience, PATIENCE), most)
            if answer.status == 503:
                self._address.wait(0.03, port)
            return answer
        except Unreachable:
            self._address.wait(0.2, port)
            raise

    def close(self) -> None:
        """Close its connections."""
        if self._inner is not None:
            self._inner.close()


class Anywhere:
    """A `Transport` to several servers: each request goes to any of them."""

    def __init__(self, addresses: Sequence[Address], seed: int) -> None:
        self._ways = [Following(address) for address in addresses]
        self._rng = random.Random(seed)

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] = {},  # noqa: B006
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Ask once."""
        return self._rng.choice(self._ways).request(method, path, body, headers, patience, most)

    def close(self) -> None:
        """Close its connections."""
        for way in self._ways:
            way.close()


class Scripted:
    """A device. number: its own.  twice: how likely it is to send a report again that was counted."""

    def __init__(self, number: int, plan: Plan, book: Book, transport: Transport, twice: float = 0.1) -> None:
        self.number, self.plan, self.book, self.twice = number, plan, book, twice
        self._rng = np.random.default_rng([77, number])
        self._key = self._rng.bytes(32)
        self.go_to(transport)
        self.serial = 0
        self.unsettled: Sent | None = None

    def go_to(self, transport: Transport) -> None:
        """Another way to the server."""
        self._transport, self.requests = transport, Requests(transport, self._key, "default")

    def enrol(self, token: str) -> None:
        """Be known, however often one has to ask."""
        self._until_answered(lambda: self.requests.enrol(token))

    def check_in(self, wait: float = 0.0) -> CheckInAnswer | None:
        """Ask for work, and for the end of what is not settled. None where no answer came."""
        self.serial += 1
        previous = None
        if self.unsettled is not None:
            work = self.unsettled.work
            previous = PreviousSession(work.task, work.kind, work.session)
        asked = CheckInRequest(
            self.serial, f"s{self.serial}", (self.plan.description.fingerprint,), previous=previous, wait_s=wait
        )
        try:
            answer = self.requests.check_in(asked)
        except (Unreachable, Refused) as error:
            self._note(error)
            return None
        if answer.settled is not None and self.unsettled is not None:
            self._note(f"settled {answer.settled.outcome}")
            if answer.settled.outcome != "unknown":
                self._settle(answer.settled.outcome == "counted")
        return answer

    def train(self, work: Assignment) -> None:
        """Draw an update for this work; it is kept."""
        tree = {
            name: self._rng.normal(scale=0.05, size=shape).astype(np.float32)
            for name, shape in self.plan.description.trained_layout.items()
        }
        examples, loss = int(self._rng.integers(1, 100)), float(self._rng.random())
        update = self.plan.algorithm.report(
            self.requests.device, {"params": tree}, examples, {"loss": (loss, 3)}, bytes.fromhex(work.seed), self._rng
        )
        self.unsettled = Sent(work, update, encode_report(update))
        with self.book.lock:
            self.book.sent[self._id(self.unsettled)] = self.unsettled
            self.book.broadcasts[work.version].add(work.broadcast.sha256)

    def send(self) -> bool:
        """Send what is kept; whether it is settled now."""
        sent = self.unsettled
        assert sent is not None
        try:
            self.requests.report(sent.work, sent.body)
        except Unreachable as error:
            self._note(error)
            return False
        except Refused as refused:
            self._note(refused)
            if refused.problem.code not in ("closed", "stale", "phase"):
                return False
            self._settle(False)
            return True
        self._settle(True)
        if self._rng.random() < self.twice:
            self.again(sent)
        return True

    def again(self, sent: Sent) -> None:
        """Send once more what was counted: whatever is said of it."""
        try:
            self.requests.report(sent.work, sent.body)
            self._note("duplicate")
        except (Unreachable, Refused) as error:
            self._note(error)

    def run(self, done: Callable[[], bool], wait: float = 0.5) -> None:
        """Work until it is enough, and until nothing is unsettled."""
        tries = 0
        while (self.unsettled is not None or not done()) and not self.book.over.is_set():
            if self.unsettled is not None and tries < 6 and not self.send():
                tries += 1
                continue
            answer, tries = self.check_in(wait), 0
            if answer is not None and answer.assignment is not None and self.unsettled is None and not done():
                self.train(answer.assignment)

    def decline(self) -> None:
        """Ask for work, which ends what was forgotten, and give it back."""
        answer = self.check_in()
        if answer is not None and answer.assignment is not None:
            try:
                self.requests.abort(answer.assignment, "other")
            except (Unreachable, Refused) as error:
                self._note(error)

    def close(self) -> None:
        """Close its connections."""
        self._transport.close()

    def _id(self, sent: Sent) -> str:
        return f"{self.requests.device}/{sent.work.session}"

    def _settle(self, counted: bool) -> None:
        assert self.unsettled is not None
        with self.book.lock:
            (self.book.acknowledged if counted else self.book.discarded).add(self._id(self.unsettled))
        self._note("counted" if counted else "discarded")
        self.unsettled = None

    def _note(self, what: object) -> None:
        name = what.problem.code if isinstance(what, Refused) else what if isinstance(what, str) else "no answer"
        with self.book.lock:
            self.book.answers[name] += 1

    def _until_answered(self, ask: Callable[[], object]) -> None:
        while True:
            try:
                ask()
                return
            except Unreachable:
                continue
            except Refused as refused:
                if not may_be_repeated(refused):
                    raise


def while_they_work(devices: Sequence[Scripted], book: Book, disturb: Callable[[], object]) -> list[str]:
    """Let devices work while they are disturbed, and then in peace, until each is told what became of its last report. What went
    wrong in that."""
    enough = threading.Event()
    with ThreadPoolExecutor(len(devices)) as pool:
        working = [pool.submit(device.run, enough.is_set) for device in devices]
        try:
            disturb()
            enough.set()
            wait(working, PEACE, FIRST_EXCEPTION)
        finally:
            enough.set()
            book.over.set()
    for one in working:
        one.result()
    waiting = [device.number for device in devices if device.unsettled is not None]
    return [f"devices {waiting} were not told what became of their reports"] if waiting else []


def let_go_on(book: Book, rng: random.Random, more: float = 0.1) -> None:
    """Wait as long as it takes for a few more reports, or hardly at all; and a moment, of so many seconds at most."""
    until = time.monotonic() + PEACE / 4
    wanted = len(book.acknowledged) + rng.choice((0, 1, 3, 6))
    while len(book.acknowledged) < wanted and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(more * rng.random())
