"""Devices that come by themselves: each wakes within its *window*, the time span that the server gave it last."""

import numpy as np

from sumus.fleet import DeviceArrays
from sumus.pacing import Pacing
from sumus.protocol.steering import window
from sumus.simulator.virtual_time.calendar import Calendar
from sumus.types import Array, Floats

_SLICE = 10.0
"""Seconds of check-ins that may receive the same response, if no other event happens between them."""
_AWAKE = -1.0


class Sleepers:
    """The times at which idle devices wake.

    The start is that of a server that has run for a long time: each device has a window, and wakes at a random time in it.
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
        """Return the time at which the next device wakes; infinity if none does."""
        return self._calendar.next()

    def take(self, until: float) -> tuple[Array, Floats]:
        """Wake the devices that are due up to a moment, but at most those that may receive the same response.

        Returns:
            The positions of the devices, and the moments at which they wake.
        """
        who, moments = self._calendar.take(min(until, self._calendar.next() + _SLICE))
        due = self._due[who] == moments  # only the last planned time of a device is valid
        return who[due], moments[due]

    def put_back(self, who: Array, moments: Floats) -> None:
        """Put back devices that were taken too early; they wake at these moments."""
        self._calendar.put(who, moments)

    def sleep(self, who: Array, moments: Floats) -> None:
        """Let devices sleep until these moments.

        A device that is offline at its moment sleeps until a random time after it is online again.
        """
        online = self._devices.online_from(who, moments)
        late = online > moments
        if late.any():  # spread them, so that they do not all wake at once
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
        """Cancel the planned time at which a device wakes."""
        self._due[who] = _AWAKE

    def windows(self, who: Array) -> Floats:
        """Return the windows that these devices were given last, in seconds, `(n, 2)`."""
        return np.asarray(self._windows[who], np.float64)

    def window(self, who: int) -> tuple[float, float]:
        """Return the window that a device was given last, in seconds."""
        first, last = self._windows[who].tolist()
        return first, last

    def set_window(self, who: Array | int, seconds: tuple[float, float]) -> None:
        """Note the window that the server gives to devices."""
        self._windows[who] = seconds
