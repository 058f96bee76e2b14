"""What devices report to an edge is one sum for the server above, and the model is the one that they had made without it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from sumus.device.link import Link
from sumus.edge.edge import Edge, open_edge
from sumus.operations.service import Conduct, Service, Where, open_service
from sumus.plan import Plan
from sumus.transport.inprocess import InProcess
from sumus.tree import sha256
from sumus.wire.bundle import Bundle
from sumus.wire.tensors import decode_tree
from tests.server.devices import ScriptedDevice, tiny, together, update_of

PEOPLE = 8


class Tree:
    """A server, with edges below it."""

    def __init__(self, bundle: Bundle, stack: ExitStack) -> None:
        self.bundle, self._stack = bundle, stack
        self.service = open_service({"tiny": bundle}, Where(), Conduct(group=0.0))
        stack.callback(self.service.close)
        self.service.server.start()
        self.top = stack.enter_context(InProcess(self.service.device_app))

    def edge(self, above: "Service | Edge | None" = None, transport: InProcess | None = None, **more: object) -> Edge:
        """One more edge, below the server or another edge."""
        server = (above or self.service).server
        token = server.roll.new_token(server.population, server.clock(), speaks_for=100)
        edge = open_edge(
            Link("http://127.0.0.1:1", token),
            conduct=Conduct(group=0.0),
            transport=transport or self.top,
            linger=0.3,
            **more,  # pyright: ignore[reportArgumentType]
        )
        edge.start()
        self._stack.callback(edge.close)
        edge.uplink.learn()
        return edge

    def below(self, edge: Edge) -> InProcess:
        """A way to an edge."""
        return self._stack.enter_context(InProcess(edge.device_app))

    def model(self, version: int) -> str:
        """Of the server, once it is there."""
        run = self.service.server.tasks[0].training
        deadline = time.monotonic() + 30
        while run.version < version:
            assert time.monotonic() < deadline, f"there are {run.version} models"
            time.sleep(0.01)
        return sha256(decode_tree(self.service.blobs.get(run.model(version).model)))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def devices(of: Service | Edge, transport: InProcess, numbers: range) -> list[ScriptedDevice]:
    token = of.server.roll.new_token("default", of.server.clock(), uses=len(numbers))
    found = [ScriptedDevice(transport, number) for number in numbers]
    for device in found:
        device.enrol(token)
    return found


def take_part(plan: Plan, people: list[tuple[int, ScriptedDevice]]) -> None:
    """One round: all ask, all report."""
    works = together(*(partial(device.work, plan, wait_s=20.0) for _, device in people))
    assert all(work is not None for work in works)
    together(
        *(
            partial(device.report, work, update_of(plan, number, 0.1 * (number + 1), 5 + number))
            for (number, device), work in zip(people, works, strict=True)
        )
    )


def flat(bundle: Bundle, rounds: int) -> str:
    with ExitStack() as stack:
        tree = Tree(bundle, stack)
        people = list(enumerate(devices(tree.service, tree.top, range(PEOPLE))))
        for _ in range(rounds):
            take_part(bundle.plan, people)
        return tree.model(rounds)


@pytest.mark.parametrize("shape", ["two edges", "an edge and devices", "two levels"])
def test_the_model_is_the_one_without_edges(stack: ExitStack, shape: str) -> None:
    bundle = tiny(cohort=PEOPLE)
    tree = Tree(bundle, stack)
    one = tree.edge()
    if shape == "two edges":
        other = tree.edge()
        people = devices(one, tree.below(one), range(5)) + devices(other, tree.below(other), range(5, PEOPLE))
    elif shape == "an edge and devices":
        people = devices(one, tree.below(one), range(5)) + devices(tree.service, tree.top, range(5, PEOPLE))
    else:
        below = tree.edge(one, tree.below(one))
        people = devices(one, tree.below(one), range(5)) + devices(below, tree.below(below), range(5, PEOPLE))
    for _ in range(2):
        take_part(bundle.plan, list(enumerate(people)))
    assert tree.model(2) == flat(bundle, 2)
