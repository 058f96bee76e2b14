"""One request with an enormous serial locks a device out for good.

A check-in carries a serial that grows; one that is lower than the last is refused, as a replay. The attacker lets a request with
serial 2^53 be answered in a device's name, and no later one of that device is ever higher. An edge could do so for any id, and a
person who has a device's key for a moment could do so for that device.
"""

import pytest

from sumus.storage.leases import MOST_JUMP
from sumus.wire.messages import Refused
from tests.attacks.parties import Parties, parties
from tests.server.devices import ScriptedDevice, tiny


def refused_at(device: ScriptedDevice, them: Parties, serial: int) -> int | None:
    """Where the server says that a device counts on from, that asked with this serial."""
    device.serial = serial - 1
    with pytest.raises(Refused, match="replayed") as error:
        device.check_in(them.plan)
    return error.value.problem.serial


@pytest.mark.parametrize("serial", [2**53, 2**40, MOST_JUMP + 6])
@pytest.mark.parametrize("known", [True, False])
def test_a_serial_does_not_jump_so_far_that_its_device_is_locked_out(serial: int, known: bool) -> None:
    with parties(tiny()) as them:
        device, last = them.device(), 0
        if known:
            device.serial = 4
            device.check_in(them.plan)
            last = 5
        assert refused_at(device, them, serial) == last
        device.serial = last
        assert device.work(them.plan) is not None, "control: its next check-in is answered"


def test_control_a_device_whose_requests_were_lost_goes_on() -> None:
    with parties(tiny()) as them:
        device = them.device()
        for serial in (1, 1000, MOST_JUMP):
            device.serial = serial
            assert device.check_in(them.plan).assignment is not None


def test_control_a_device_that_lost_its_memory_is_told_where_to_go_on() -> None:
    with parties(tiny()) as them:
        device = them.device()
        device.serial = 5000
        device.check_in(them.plan)
        assert refused_at(device, them, 3) == 5001
        device.serial = 5001
        assert device.work(them.plan) is not None


def test_control_a_server_that_lost_its_memory_knows_a_device_by_its_last_work() -> None:
    with parties(tiny()) as them:
        device = them.device()
        for serial in range(MOST_JUMP - 1, 4 * MOST_JUMP, MOST_JUMP - 1):
            device.serial = serial
            device.check_in(them.plan)
        them.server.replica.leases.forget_serial(device.id)  # as after a restart
        assert device.work(them.plan) is not None
        them.server.replica.leases.forget_serial(device.id)
        assert refused_at(device, them, 9 * MOST_JUMP) == device_serial_known(device)


def device_serial_known(device: ScriptedDevice) -> int:
    """The serial of the work that the device had last."""
    return 4 * (MOST_JUMP - 1) + 2
