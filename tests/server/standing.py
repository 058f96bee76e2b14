"""A server in this process with devices that send it requests, so that a test may break the storage below; and an
audit."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks.kills.audit import Found, Ledger, left_behind
from benchmarks.kills.fleet import Book, Scripted
from benchmarks.kills.served import COHORT, QUIET, TASK, bundle
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Answer, Transport
from sumus.wire.messages import Assignment


class Standing:
    """A server with its devices.

    Attributes:
        service: The service, started.
        devices: Enrolled devices. Each has its own transport, which `reach` makes from service and number.
    """

    def __init__(
        self, where: Storage, kind: str, devices: int, twice: float, reach: Callable[[Service, int], Transport]
    ) -> None:
        self.bundle, self.book, self.ledger = bundle(kind), Book(), Ledger()
        self._where, self._reach = where, reach
        self.service = self._opened()
        token = self.service.server.roll.new_token("default", self.service.server.clock(), uses=devices)
        self.devices = [
            Scripted(number, self.bundle.plan, self.book, reach(self.service, number), twice)
            for number in range(devices)
        ]
        for device in self.devices:
            device.enrol(token)

    def _opened(self) -> Service:
        service = open_service({TASK: self.bundle}, self._where, QUIET)
        service.server.start()
        return service

    def open_again(self) -> None:
        """Begin the next life of the server."""
        self.close()
        self.service = self._opened()
        for device in self.devices:
            device.go_to(self._reach(self.service, device.number))

    def assignment(self, device: Scripted) -> Assignment:
        """Return work for a device, as soon as there is some."""
        for _ in range(50):
            answer = device.check_in(5.0)
            if answer is not None and answer.assignment is not None:
                return answer.assignment
        raise AssertionError("there is no work")

    def train(self) -> None:
        """Give an update to every device that has nothing unsettled."""
        for device in self.devices:
            if device.unsettled is None:
                device.train(self.assignment(device))

    def round(self) -> None:
        """Let every device report, and learn the result."""
        self.train()
        for device in self.devices:
            assert device.send()

    def work(self, until: Callable[[], bool]) -> None:
        """Let all devices work at once, until a condition holds and nothing is unsettled."""
        with ThreadPoolExecutor(len(self.devices)) as pool:
            for running in [pool.submit(device.run, until) for device in self.devices]:
                running.result()

    def look_again(self) -> None:
        """Let the server decide again now, as it would by itself a little later."""
        self.service.server.ask_to_do(lambda now: None).exception()

    def ready(self) -> Answer:
        """Return the answer that a load balancer gets."""
        with InProcess(self.service.device_app) as transport:
            return transport.request("GET", "/readyz")

    def audit(self) -> Found:
        """Check every promise, as a campaign of kills does, once no request is on its way."""
        self.look_again()
        store = self.service.server.tasks[0].training.store
        self.ledger.read(store)
        found = self.ledger.audit(self.bundle, self.book, len(self.devices), self.service.blobs)
        found.wrong += left_behind(store)
        return found

    def close(self) -> None:
        """Close everything."""
        for device in self.devices:
            device.close()
        self.service.close()


def in_process(service: Service, number: int) -> Transport:
    """Return a transport to the service, without sockets."""
    return InProcess(service.device_app)


@contextmanager
def standing(
    where: Storage | Path,
    kind: str = "synchronous",
    devices: int = COHORT,
    twice: float = 0.0,
    reach: Callable[[Service, int], Transport] = in_process,
) -> Iterator[Standing]:
    """Run a server in this process, with devices."""
    found = Standing(where if isinstance(where, Storage) else Storage(where), kind, devices, twice, reach)
    try:
        yield found
    finally:
        found.close()
