"""Real devices for the clients of an experiment. Their randomness has the same keys as in the simulator.

bundle, training = served(wanted)
devices = clients(url, token, training, range(6))
train(devices, 3)                                   until each was counted three times
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from sumus.device.conditions import AllConditionsMet
from sumus.device.device import Device
from sumus.device.keys import keyed
from sumus.device.options import Consent, DeviceProfile, DeviceSystem, ServerConnection
from sumus.device.store import MemoryDeviceStore
from sumus.device.training import Training
from sumus.experiment import Experiment
from sumus.simulator.wire import NO_FLOOR
from sumus.training.program import Program
from sumus.transport.transport import Transport
from sumus.wire.bundle import Bundle
from tests.simulator.test_wire import PEOPLE, person


def served(wanted: Experiment) -> tuple[Bundle, Training]:
    """Return the bundle that is served, and the devices' training."""
    task, seed = wanted.plan.task, wanted.seed
    training = Training(task, person(0), "sequential", seed=seed)  # pyright: ignore[reportArgumentType]
    program = Program(task, "cpu", seed)  # pyright: ignore[reportArgumentType]
    data = program.learn_schema(0, *program.reader.read(PEOPLE, 0))
    plan = replace(wanted.plan.with_data(data), trusts_devices=True)
    return Bundle(plan, program.initial), training


def clients(
    url: str,
    token: str,
    training: Training,
    numbers: Iterable[int],
    seed: int,
    transport: Callable[[], Transport | None] = lambda: None,
) -> list[Device]:
    """Return an enrolled device for each of these clients. transport: makes a device's transport; None means one to the
    URL."""
    found = [
        Device(
            url,
            training,
            person(number),
            folder=MemoryDeviceStore(),
            token=token,
            consent=Consent(NO_FLOOR, evaluates=False),
            connection=ServerConnection(wait_s=10.0, transport=transport()),
            profile=DeviceProfile(number, sensors=AllConditionsMet(), system=DeviceSystem(keyed(seed))),
        )
        for number in numbers
    ]
    for device in found:
        device.enrol()
    return found


def train(devices: Sequence[Device], rounds: int, before: Callable[[int], object] = lambda number: None) -> None:
    """Let one device after the other be counted, this many times. before: called with the number of each time, from 1,
    as it begins."""
    for number in range(1, rounds + 1):
        before(number)
        for device in devices:
            device.run(until=lambda status, number=number: status.counts.get("counted", 0) >= number)
