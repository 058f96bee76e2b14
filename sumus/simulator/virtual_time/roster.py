"""Which devices of a fleet may take part now, as arrays, so that only devices that the server would accept check in."""

import numpy as np

from sumus.fleet import DeviceArrays
from sumus.pacing import Pacing
from sumus.protocol.round import DeviceRow
from sumus.simulator.populations.participation import FIRST_ROUND
from sumus.types import Array

_LONG_AGO = -(2**31)


class Roster:
    """Keeps for each device whether it is idle, and the facts that decide whether it may take part.

    Args:
        pacing: The plan's pacing.
        devices: The devices.
        joined: The first round of each device, from 1, int64 `(n,)`; None if all take part from the start.
    """

    def __init__(self, pacing: Pacing, devices: DeviceArrays, joined: Array | None) -> None:
        self._pacing, self._devices, self._joined = pacing, devices, joined
        count = len(devices)
        self._idle = np.ones(count, bool)
        self._last_sum = np.full(count, _LONG_AGO)
        self._models = np.full(count, _LONG_AGO)
        self._contributions = np.zeros(count, np.int64)
        self._rests_until = np.zeros(count)

    def may_come(self, who: Array, number: int, models: int, now: float | None) -> Array:
        """Return for each of these devices whether it is idle and allowed to take part; bool, as `who`.

        Args:
            who: Positions of devices.
            number: The newest round.
            models: The number of models published so far.
            now: The moment at which the devices must be online and not resting; None to ignore both.
        """
        pacing = self._pacing
        may = self._idle[who] & (number > self._last_sum[who])
        if self._joined is not None:
            may &= self._joined[who] <= number + FIRST_ROUND
        if pacing.separation > 1:
            may &= models - self._models[who] >= pacing.separation - 1
        if pacing.most_rounds is not None:
            may &= self._contributions[who] < pacing.most_rounds
        if now is None:
            return may
        return may & (self._rests_until[who] <= now) & (self._devices.online_until(who, now) > now)

    def set_idle(self, who: int, idle: bool) -> None:
        """Note that a device begins work (not idle), or has ended its work (idle)."""
        self._idle[who] = idle

    def is_counted_in(self, who: int, number: int) -> bool:
        """Return whether a device is already counted in this round or a later one."""
        return bool(self._last_sum[who] >= number)

    def count(self, who: int, number: int) -> None:
        """Note that a device's report is in the sum of a round."""
        self._last_sum[who] = number
        self._rests_until[who] = 0.0
        self._contributions[who] += 1

    def note_rest(self, who: int, row: DeviceRow | None) -> None:
        """Note the time until which the server gives a device no work."""
        self._rests_until[who] = 0.0 if row is None else row.rests_until

    def note_models(self, who: int, row: DeviceRow | None) -> None:
        """Note the number of models published at the time when a device's last sum became a model."""
        self._models[who] = _LONG_AGO if row is None else row.models
