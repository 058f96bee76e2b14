"""The time of a device's next action: windows of time, and a random moment within a window.

timer = WakeTimer(clock, keys, "alice")
timer.sleep_within(longer(row.window, failures), row)
timer.left()                                    seconds until the next action
"""

from collections.abc import Callable
from typing import Any

import sumus.protocol.session as session
from sumus.device.keys import Keys, share_of
from sumus.protocol.session import DeviceState
from sumus.wire.messages import Window

LEAST = 1.0
"""The earliest end of a window from a server, in seconds from now."""
SOON = (0.0, 0.1)
"""The window in which a device checks in again after its process has started; or after the outcome of its report is known, if
the server may hold its check-in."""
UNMET = (60.0, 300.0)
"""The window in which a device checks its own conditions again if they are not met."""


def ordered(window: Window) -> Window:
    """Return a server's window with its ends in order, and with an end of at least `LEAST`."""
    first, last = window
    return min(first, last), max(first, last, LEAST)


def longer(window: Window, failures: int) -> Window:
    """Return the retry window after a number of failures in a row: it doubles with each failure."""
    first = min(session.LONGEST / 2, session.PATIENCE * 2.0 ** max(0, failures - 1))
    return max(window[0], first), max(window[1], 2 * first)


class WakeTimer:
    """The moment at which a device acts next."""

    def __init__(self, clock: Callable[[], float], keys: Keys, name: Any) -> None:
        self._clock, self._keys, self._name = clock, keys, name
        self._due = clock()

    def left(self) -> float:
        """Return the seconds until the next action; negative if the moment has passed."""
        return self._due - self._clock()

    def sleep_within(self, window: Window, row: DeviceState) -> None:
        """Schedule the next action at a random moment in a window.

        Args:
            window: Seconds from now.
            row: The device's row. With keys that are not random, the moment is derived from its serial and tries.
        """
        first, last = window
        share = share_of(self._keys("sleep", self._name, row.serial, row.tries))
        self._due = self._clock() + first + share * (last - first)
