"""Devices that come by themselves: each wakes within the window that the server gave it last."""

import numpy as np

from sumus.fleet import DeviceArrays
from sumus.pacing import Pacing
from sumus.protocol.steering import window
from sumus.simulator.virtual_time.calendar import Calendar
from sumus.types import Array, Floats

_SLICE = 10.0
"""Seconds of check-ins that one answer can serve, if nothing else happens between them."""
_AWAKE = -1.0


class Sleepers:
    """The times at which idle devices wake.

    At first it is as if the server had run for long: each device has a window, and is somewhere within it.
    """

    def __init__(self, pacing: Pacing, devices: DeviceArrays, rng: np.random.Generator) -> None:
        count = len(devices)
        self._devices, self._rng = devices, rng
        self._windows: Array = np.zeros((count, 2), np.float32)
        self._due = np.full(count, _AWAKE)
        self._calendar = Calendar()
        first, last = window(pacing, count, 0.0, 0.0)
        self._windows[:] = first, last
        self.sleep(np.arange(count), self._rng.uniform(0.0, last, count))

    def next(self) -> float:
        """Return when the next device wakes; infinity if none does."""
        return self._calendar.next()

    def take(self, until: float) -> tuple[Array, Floats]:
        """Wake devices up to a moment, but no more than one answer can serve; return their positions, and when each wakes."""
        who, moments = self._calendar.take(min(until, self._calendar.next() + _SLICE))
        due = self._due[who] == moments  # a device has one alarm: the last that was set
        return who[due], moments[due]

    def put_back(self, who: Array, moments: Floats) -> None:
        """Put back devices that were taken too early; they wake at these moments."""
        self._calendar.put(who, moments)

    def sleep(self, who: Array, moments: Floats) -> None:
        """Let devices sleep until these moments; those that are offline then, until some time after they are online again."""
        online = self._devices.online_from(who, moments)
        late = online > moments
        if late.any():  # not all at once
            left = self._devices.online_until(who[late], online[late]) - online[late]
            online[late] += self._rng.uniform(0.0, 0.9, int(late.sum())) * left
        self._due[who] = online
        self._calendar.put(who, online)

    def sleep_one(self, who: int, moment: float) -> None:
        """Let one device sleep, as `sleep` does, without arrays."""
        online = self._devices.one_online_from(who, moment)
        if online > moment:
            online += self._rng.uniform(0.0, 0.9) * (self._devices.one_online_until(who, online) - online)
        self._due[who] = online
        self._calendar.put_one(who, online)

    def stay_awake(self, who: int) -> None:
        """Cancel a device's alarm."""
        self._due[who] = _AWAKE

    def windows(self, who: Array) -> Floats:
        """Return the windows that these devices were given last, in seconds, `(n, 2)`."""
        return np.asarray(self._windows[who], np.float64)

    def window(self, who: int) -> tuple[float, float]:
        """Return the window that a device was given last, in seconds."""
        first, last = self._windows[who].tolist()
        return first, last

    def set_window(self, who: Array | int, seconds: tuple[float, float]) -> None:
        """Note the window that devices are given."""
        self._windows[who] = seconds
