"""Requests and answers that are cut, lost, late, doubled and out of order: nothing is lost or counted twice, and a client's own
state is what the server has counted."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import uvicorn

from benchmarks.kills.served import QUIET
from sumus import Bundle, Pacing, Plan, scaffold, sgd
from sumus.aggregate import Update
from sumus.device.requests import Requests, may_be_repeated
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.protocol import session as device
from sumus.protocol.round import State
from sumus.rng import generator
from sumus.task import Data, Description, Leaf
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.http import HttpTransport
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Transport, Unreachable
from sumus.types import Array
from sumus.wire.messages import Assignment, CheckInRequest, PreviousSession, Refused
from sumus.wire.reports import encode_report
from tests.server.proxy import HARMS, Proxy
from tests.server.standing import standing


class Network:
    """A server on a port, behind a proxy."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.proxy: Proxy | None = None

    def reach(self, service: Service, number: int) -> Transport:
        """A device's way to it."""
        if self.proxy is None:
            listening = socket.create_server(("127.0.0.1", 0), backlog=64)
            config = uvicorn.Config(service.device_app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
            self._server = uvicorn.Server(config)
            self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
            self._thread.start()
            self.proxy = Proxy(listening.getsockname()[1], 0.06, self._seed)
        return HttpTransport(self.proxy.url, connections=1)

    def close(self) -> None:
        """End both."""
        assert self.proxy is not None
        self.proxy.__exit__()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def network() -> Iterator[Network]:
    found = Network(3)
    yield found
    found.close()


@pytest.mark.parametrize("kind", ["synchronous", "buffered"])
def test_a_network_that_does_everything_wrong(tmp_path: Path, network: Network, kind: str) -> None:
    with standing(tmp_path / "data", kind, devices=8, twice=0.1, reach=network.reach) as at:
        proxy = network.proxy
        assert proxy is not None

        def enough() -> bool:
            done = len(at.book.acknowledged) >= 60 and all(proxy.met[harm] >= 3 for harm in HARMS)
            if done:
                proxy.harm = 0.0
            return done

        at.work(enough)
        found = at.audit()
        assert found.good, f"{found} {found.wrong} {at.book.answers}"
        assert "failed" not in at.book.answers


# ── what clients keep ────────────────────────────────────────────────────────────────────────────────────────────────

PEOPLE, SIZE = 8, 6


def of_scaffold() -> Bundle:
    """Every number in it is a multiple of 2⁻¹⁰, and there are eight people: sums and means are exact."""
    leaves = (Leaf("w", (SIZE,), "float32", "shared", True),)
    task = Description("scaffold", leaves, "loss", (), Data((3,), "float32", (), "int64", 2))
    plan = Plan(task, scaffold(sgd(0.1)), Pacing(4, over_select=1.5), 2, trusts_devices=True)
    return Bundle(plan, {"w": np.zeros(SIZE, np.float32)})


class Client:
    """A device by the table of `protocol.session`, which sleeps no time. control: what it has kept, by session, until now."""

    def __init__(self, number: int, plan: Plan, transport: Transport, forgetful: bool) -> None:
        self.plan, self.control = plan, dict[str, Array]()
        self._rng, self._forgetful = np.random.default_rng([5, number]), forgetful
        self.requests = Requests(transport, self._rng.bytes(32), "default")
        self.state = device.DeviceState()
        self._work: Assignment | None = None
        self._pending: tuple[Array, bytes] | None = None

    def wake(self) -> None:
        """Its time has come."""
        self._do(device.WakeUp(f"s{self.state.serial + 1}"))

    def _do(self, event: device.Event) -> None:
        floor = device.Floor(contributors=1, rounds=10**6)
        self.state, actions = device.step(self.state, event, floor)
        for action in actions:
            match action:
                case device.SendCheckIn():
                    self._ask(action)
                case device.StartWork():
                    self._train()
                case device.SendReport():
                    self._send(action.session)
                case device.KeepState(session):
                    assert self._pending is not None
                    self.control[session] = self._pending[0]
                case _:
                    pass

    def _ask(self, ask: device.SendCheckIn) -> None:
        previous = None
        if ask.previous is not None:
            assert self._work is not None
            previous = PreviousSession(self._work.task, self._work.kind, ask.previous)
        request = CheckInRequest(
            ask.serial, ask.session, (self.plan.description.fingerprint,), kinds=("train",), previous=previous
        )
        try:
            answer = self.requests.check_in(request)
        except (Unreachable, Refused):
            self._do(device.NoAnswer())
            return
        if answer.settled is not None:
            self._do(device.Settled(answer.settled.session, answer.settled.outcome))
        if answer.assignment is not None:
            self._work = answer.assignment
            self._do(device.Assigned(device.WorkOffer(answer.assignment.session)))
        elif answer.retry_after_s is not None:
            self._do(device.ToldLater(answer.retry_after_s))

    def _train(self) -> None:
        moved, change = (self._rng.integers(-2000, 2000, SIZE).astype(np.float32) / 1024 for _ in range(2))
        update = Update(
            self.requests.device, {"params": {"w": moved}, "control": {"w": change}}, 10, {"loss": (1.0, 10)}
        )
        self._pending = change, encode_report(update)
        self._do(device.TrainingDone())

    def _send(self, session: str) -> None:
        assert self._work is not None
        assert self._pending is not None
        try:
            self.requests.report(self._work, self._pending[1])
            self._do(device.Settled(session, "counted"))
        except Unreachable:
            self._do(device.Settled(session, "discarded") if self._forgetful else device.NoAnswer())
        except Refused as refused:
            if refused.problem.code == "unknown_session":
                self._do(device.SessionUnknown())
            elif may_be_repeated(refused):
                self._do(device.NoAnswer())
            else:
                self._do(device.Settled(session, "discarded"))


@pytest.mark.parametrize("forgetful", [False, True], ids=["as it is", "the control: no answer is taken for a no"])
def test_controls_move_with_the_server_where_a_tenth_of_acknowledgements_is_lost(
    tmp_path: Path, forgetful: bool
) -> None:
    bundle = of_scaffold()
    service = open_service({"scaffold": bundle}, Storage(tmp_path / "data"), replace(QUIET, group=0.0))
    service.server.start()
    with InProcess(service.device_app) as transport:
        token = service.server.roll.new_token("default", service.server.clock(), uses=PEOPLE)
        network = FaultyTransport(transport, Faults(unanswered=0.1), generator(1, "network"))
        clients = [Client(number, bundle.plan, network, forgetful) for number in range(PEOPLE)]
        for client in clients:
            Requests(transport, client.requests._key).enrol(token)
        run = service.server.tasks[0].training
        while run.version < 20:
            for client in clients:
                client.wake()
        for client in clients:
            while client.state.unsettled:
                client.wake()
        service.server.ask_to_do(lambda now: None).result()
        with run.store.transaction() as rows:
            counted = {row.number: list(rows.counted_in(row.number)) for row in rows.rounds()}
            published = {row.number for row in rows.rounds() if row.state is State.PUBLISHED}
            common = run.state(rows.models()[-1]).memory["control"]["w"]
    service.close()
    kept = {f"{client.requests.device}/{session}": c for client in clients for session, c in client.control.items()}
    moved = [kept.get(session, np.zeros(SIZE)) for number in published for session in counted[number]]
    same = set(kept) == {session for those in counted.values() for session in those}
    assert network.met["unanswered"] > 10
    assert (same and np.array_equal(common * PEOPLE, np.sum(moved, axis=0))) is not forgetful
