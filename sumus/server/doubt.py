"""Senders in doubt: those in whose name a bad signature came a short time ago. Their requests wait in one line.

    doubt = Doubt()
    await doubt.turn(device, neighbourhood)          at once for nearly everybody; Refused("busy") if the line is too long
    doubt.note(device, neighbourhood)                the signature was not of this device

Checking a signature costs more than sending a wrong one. If wrong ones were checked as they come, they would take the time of
all other devices. So requests in a name that was misused are checked one after the other, and no faster than one every
`EACH_S`.

The owner of that name may be honest, since anybody who knows a name can misuse the name. So a sender in doubt waits, and is not
refused. A name is doubted in the neighbourhood of addresses where it was misused, and nowhere else.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from sumus.wire.messages import Refused, Window

DOUBTED_S = 10.0
"""Seconds that a sender is in doubt after a bad signature."""
EACH_S = 0.002
"""Seconds between two requests of senders in doubt."""
LONGEST_S = 4.0
"""The longest that a request waits for its turn, in seconds."""
LATER: Window = (1.0, 10.0)
"""When a request that found the line too long is to come again, in seconds."""


class Doubt:
    """The senders in doubt, and the line that they wait in. To be used on one event loop.

    Args:
        most: Senders that are remembered. If there are more, the ones that were noted first are forgotten.
        clock: Seconds that do not go back; None for the event loop's clock.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        most: int = 50_000,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._most, self._sleep = most, sleep
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._free = 0.0

    def note(self, device: str, neighbourhood: str) -> None:
        """Remember that a bad signature came in the name of a device, from a neighbourhood."""
        sender = device, neighbourhood
        self._until[sender] = self._clock() + DOUBTED_S
        self._until.move_to_end(sender)
        if len(self._until) > self._most:
            self._until.popitem(last=False)

    def has(self, device: str, neighbourhood: str) -> bool:
        """Whether a sender is in doubt now."""
        sender = device, neighbourhood
        until = self._until.get(sender)
        if until is None:
            return False
        if until > self._clock():
            return True
        del self._until[sender]
        return False

    async def turn(self, device: str, neighbourhood: str) -> None:
        """Return at once if a sender is not in doubt; else wait until it is the sender's turn.

        Raises:
            Refused: busy, if the turn would come too late.
        """
        if not self.has(device, neighbourhood):
            return
        now = self._clock()
        at = max(now, self._free)
        if at - now > LONGEST_S:
            raise Refused("busy", "too many requests in this name that the device did not sign: ask again later", LATER)
        self._free = at + EACH_S
        await self._sleep(at - now)
