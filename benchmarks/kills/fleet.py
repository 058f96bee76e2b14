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
"""Seconds for devices to finish after the last kill."""


@dataclass
class Book:
    """What devices record.

    Attributes:
        sent: What was sent, by `DEVICE/SESSION`.
        acknowledged: Sessions whose reports the server acknowledged.
        discarded: Sessions that the server discarded.
        broadcasts: The hashes of the broadcasts that devices got, by version.
        answers: How often each answer came.
        lock: Guards the rest.
        over: Set to stop all retries.
    """

    sent: dict[str, "Sent"] = field(default_factory=dict[str, "Sent"])
    acknowledged: set[str] = field(default_factory=set[str])
    discarded: set[str] = field(default_factory=set[str])
    broadcasts: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    answers: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Sent:
    """An update, and the work that it was made for."""

    work: Assignment
    update: Update
    body: bytes


class Address:
    """The server's present address, which changes with each of its lives."""

    def __init__(self) -> None:
        self.port = 0
        self._changed = threading.Condition()

    def move(self, port: int) -> None:
        """Note that the server lives again at this port."""
        with self._changed:
            self.port = port
            self._changed.notify_all()

    def wait(self, seconds: float, port: int) -> None:
        """Wait this long, or until the server is at another port."""
        with self._changed:
            self._changed.wait_for(lambda: self.port != port, seconds)


class Following:
    """A `Transport` to the server at its present address."""

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
        """Send a request once."""
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
        """Close the connections."""
        if self._inner is not None:
            self._inner.close()


class Anywhere:
    """A `Transport` to several servers. Each request goes to a random one."""

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
        """Send a request once."""
        return self._rng.choice(self._ways).request(method, path, body, headers, patience, most)

    def close(self) -> None:
        """Close the connections."""
        for way in self._ways:
            way.close()


class Scripted:
    """A scripted device.

    Args:
        number: Its number.
        plan: The plan.
        book: Records what it does.
        transport: The way to the server.
        twice: The probability that it sends a counted report again.
    """

    def __init__(self, number: int, plan: Plan, book: Book, transport: Transport, twice: float = 0.1) -> None:
        self.number, self.plan, self.book, self.twice = number, plan, book, twice
        self._rng = np.random.default_rng([77, number])
        self._key = self._rng.bytes(32)
        self.go_to(transport)
        self.serial = 0
        self.unsettled: Sent | None = None

    def go_to(self, transport: Transport) -> None:
        """Use another transport."""
        self._transport, self.requests = transport, Requests(transport, self._key, "default")

    def enrol(self, token: str) -> None:
        """Enrol, with as many attempts as needed."""
        self._until_answered(lambda: self.requests.enrol(token))

    def check_in(self, wait: float = 0.0) -> CheckInAnswer | None:
        """Ask for work, and for the end of an unsettled session. Return None if no answer came."""
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
        """Draw an update for this work, and keep it."""
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
        """Send the kept report; return whether it is settled now."""
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
        """Send a counted report once more, and accept any answer."""
        try:
            self.requests.report(sent.work, sent.body)
            self._note("duplicate")
        except (Unreachable, Refused) as error:
            self._note(error)

    def run(self, done: Callable[[], bool], wait: float = 0.5) -> None:
        """Work until `done`, and until nothing is unsettled."""
        tries = 0
        while (self.unsettled is not None or not done()) and not self.book.over.is_set():
            if self.unsettled is not None and tries < 6 and not self.send():
                tries += 1
                continue
            answer, tries = self.check_in(wait), 0
            if answer is not None and answer.assignment is not None and self.unsettled is None and not done():
                self.train(answer.assignment)

    def decline(self) -> None:
        """Ask for work, which ends forgotten sessions, and give the work back."""
        answer = self.check_in()
        if answer is not None and answer.assignment is not None:
            try:
                self.requests.abort(answer.assignment, "other")
            except (Unreachable, Refused) as error:
                self._note(error)

    def close(self) -> None:
        """Close the connections."""
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
    """Let devices work while `disturb` runs, and then without it until each knows what became of its last report.
    Return what went wrong."""
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
    """Wait for a few more reports, or hardly at all; then wait a random time of at most `more` seconds."""
    until = time.monotonic() + PEACE / 4
    wanted = len(book.acknowledged) + rng.choice((0, 1, 3, 6))
    while len(book.acknowledged) < wanted and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(more * rng.random())
