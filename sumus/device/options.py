"""Options for making a device, grouped into values.

consent = Consent(floor=Floor(contributors=50), trains=False)
connection = ServerConnection(authority="ca.pem", wait_s=60.0)
profile = DeviceProfile(name="kitchen", version=3)
device = Device(link, task, examples, folder="~/.health", consent=consent, connection=connection, profile=profile)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from sumus.device.conditions import Sensors
from sumus.device.keys import Keys, system
from sumus.pacing import Conditions
from sumus.protocol.session import Floor
from sumus.transport.transport import Transport
from sumus.wire.messages import Kind

ANY_CONDITIONS = Conditions()


@dataclass(frozen=True)
class Consent:
    """The owner's consent to a device's work.

    Attributes:
        floor: Limits for the work that the device accepts, and the minimum number of contributors to a sum.
        requires: Conditions that must be met before the device does anything, even a check-in.
        trains: Whether the device accepts training work.
        evaluates: Whether the device accepts evaluation work.
        keeps_model: Whether the device fetches the models that the server releases, to predict with them.
    """

    floor: Floor = field(default_factory=Floor)
    requires: Conditions = field(default_factory=Conditions)
    trains: bool = True
    evaluates: bool = True
    keeps_model: bool = True

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of work that the device accepts."""
        return (*(("train",) if self.trains else ()), *(("evaluate",) if self.evaluates else ()))


@dataclass(frozen=True)
class ServerConnection:
    """The connection of a device to its server.

    Attributes:
        wait_s: Seconds for which the server may hold a check-in open until it has work, at most `LONGEST_WAIT`.
        insecure: Whether http:// to another machine is allowed.
        moves: Whether the device may move to the server of a new link, and keep its key. The new server must be another edge
            of the same population, or the server above the edges.
        authority: A file of CA certificates (PEM), one of which must have issued the server's certificate. The device stores
            them. None means the stored certificates or, if there are none, those of the system.
        transport: Carries the requests in place of HTTP, in tests and simulations.
    """

    wait_s: float = 20.0
    insecure: bool = False
    moves: bool = False
    authority: str | Path | None = None
    transport: Transport | None = None


def _today() -> int:
    return date.today().toordinal()


@dataclass(frozen=True)
class DeviceSystem:
    """The system services that a device uses. Tests and simulations supply their own.

    Attributes:
        keys: Returns 32 random bytes for a purpose, named in words.
        clock: Returns seconds that never go backwards.
        sleep: Waits for a number of seconds. None means a sleep that `Device.stop` interrupts.
        today: Returns the number of the day, for the floor's limit on rounds a day.
    """

    keys: Keys = system
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Any] | None = None
    today: Callable[[], int] = _today


@dataclass(frozen=True)
class DeviceProfile:
    """A description of a device.

    Attributes:
        name: The device's name, for messages to its owner and for randomness that is derived from keys.
        version: The version of the program that contains the device, for plans that require one.
        sensors: Reads the device's conditions. None means the sensors of this system.
        executor: The executor for training; see `Compute.executor` of a simulation.
        system: The sources of randomness, time and sleep.
    """

    name: Any = "this device"
    version: int = 0
    sensors: Sensors | None = None
    executor: str = "auto"
    system: DeviceSystem = field(default_factory=DeviceSystem)
