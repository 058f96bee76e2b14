"""A device's folder that was copied to another machine, or put back from a backup, is noticed and named."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sumus.device.device import Device
from sumus.device.keys import system
from sumus.device.news import CLEAN, DeviceNews
from sumus.operations.service import Service
from sumus.rng import generator
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Transport
from tests.device.served import a_device
from tests.device.test_real_server import a_token, serving, training

SAID = "this device's key is in use elsewhere"
assert training  # a fixture


class Machines:
    """Machines with a folder each, and a real server that has nothing to do for them."""

    def __init__(self, service: Service, folder: Path, stack: ExitStack) -> None:
        self.way: Transport = stack.enter_context(InProcess(service.device_app))
        self.folder, self.news = folder, list[DeviceNews]()
        self._stack, self._token = stack, a_token(service)

    def device(self, name: str) -> Device:
        """What runs on one of them."""
        found = a_device(
            self.way, folder=self.folder / name, token=self._token, keys=system, wait_s=0.0, watch=self.news.append
        )
        self._stack.callback(found.close)
        return found

    def copy(self, name: str, other: str) -> None:
        shutil.copytree(self.folder / name, self.folder / other)

    def said(self) -> list[str]:
        """What their owners were told of copies, since this was asked last."""
        found, self.news[:] = [news.said for news in self.news if SAID in news.said], []
        return found


def ask(device: Device, times: int = 1) -> None:
    """Let it check in so often."""
    for _ in range(times):
        before = device.status.checkins
        while device.status.checkins == before:
            device._sleep(device.wake())


@pytest.fixture
def machines(training: Any, tmp_path: Path) -> Iterator[Machines]:
    with serving(training, cohort=50) as service, ExitStack() as stack:
        yield Machines(service, tmp_path, stack)


def test_both_machines_of_a_copied_folder_are_told(machines: Machines) -> None:
    one = machines.device("one")
    ask(one, 2)
    machines.copy("one", "two")
    ask(one, 3)
    two = machines.device("two")
    assert two.status.trouble == ""
    ask(two)
    (said,) = machines.said()
    assert "has answered check-in 5, and the last one of this folder is 3" in said
    assert "let only one of them continue" in said
    ask(two, 2)
    assert SAID in two.status.trouble  # not only once
    ask(one)
    assert len(machines.said()) == 1
    assert SAID in one.status.trouble
    for _ in range(3):  # and again, whoever asks more often
        ask(one, 2)
        ask(two)
    assert machines.said()


def test_a_folder_that_was_put_back_is_told_once_and_goes_on(machines: Machines) -> None:
    one = machines.device("one")
    ask(one, 2)
    machines.copy("one", "backup")
    ask(one, 4)
    one.close()
    again = machines.device("backup")
    ask(again)
    assert len(machines.said()) == 1
    ask(again, CLEAN + 1)
    assert machines.said() == []
    assert again.status.trouble == ""


def test_a_bad_network_and_a_new_process_are_no_copies(machines: Machines) -> None:
    good = machines.way
    machines.way = FaultyTransport(good, Faults(lost=0.2, unanswered=0.2, twice=0.3, cut=0.1), generator(0))
    for _ in range(3):
        device = machines.device("one")
        ask(device, 12)
        device.close()
    assert machines.said() == []
