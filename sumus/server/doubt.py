"""Senders in doubt: devices in whose name a bad signature came recently. Their requests wait in one queue.

    doubt = Doubt()
    await doubt.turn(device, neighbourhood)          returns at once for nearly all; Refused("busy") if the queue is too long
    doubt.note(device, neighbourhood)                the signature was not made by this device

Checking a signature costs more than sending a wrong one. If wrong ones were checked as they come, they would take the time of
all other devices. So requests in a misused name are checked one after the other, and no faster than one every `EACH_S`.

The owner of that name may be honest, since anybody who knows a name can misuse the name. So a sender in doubt waits, and is not
refused. A name is doubted only in the neighbourhood of addresses where it was misused.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from sumus.wire.messages import Refused, Window

DOUBTED_S = 10.0
"""How long a sender is in doubt after a bad signature, in seconds."""
EACH_S = 0.002
"""Seconds between two requests of senders in doubt."""
LONGEST_S = 4.0
"""The longest time that a request waits for its turn, in seconds."""
LATER: Window = (1.0, 10.0)
"""The retry window of a request that was refused because the queue was too long, in seconds."""


class Doubt:
    """The senders in doubt, and their queue. Use it on one event loop only.

    Args:
        most: The most senders that are remembered. Beyond that, those that were noted first are forgotten.
        clock: Returns monotonic seconds; None for the event loop's clock.
        sleep: Waits for the given number of seconds.
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
        """Remember that a bad signature came from this neighbourhood in the name of this device."""
        sender = device, neighbourhood
        self._until[sender] = self._clock() + DOUBTED_S
        self._until.move_to_end(sender)
        if len(self._until) > self._most:
            self._until.popitem(last=False)

    def has(self, device: str, neighbourhood: str) -> bool:
        """Return whether a sender is in doubt now."""
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
            Refused: `busy`, if the turn would come too late.
        """
        if not self.has(device, neighbourhood):
            return
        now = self._clock()
        at = max(now, self._free)
        if at - now > LONGEST_S:
            raise Refused("busy", "too many requests in this name that the device did not sign: ask again later", LATER)
        self._free = at + EACH_S
        await self._sleep(at - now)
