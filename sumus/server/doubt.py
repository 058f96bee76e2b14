"""Senders in doubt: devices in whose name a request with a bad signature came recently. Their requests wait in one queue.

    doubt = Doubt()
    await doubt.turn(device, neighbourhood)          nearly always returns at once; Refused("busy") if the queue is too long
    doubt.note(device, neighbourhood)                records that a signature was not made by this device

To check a signature costs more than to send a wrong one. If the server checked all wrong signatures at once, it would have no
time for other devices. So requests in a misused name are checked one after the other, at most one in each period of `EACH_S`.

The device itself may be honest, since anybody who knows its name can misuse the name. So a sender in doubt must wait, but is
not refused. A name is doubted only in the neighbourhood of addresses where it was misused.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from sumus.wire.messages import Refused, Window

DOUBTED_S = 10.0
"""The time for which a sender is in doubt after a bad signature, in seconds."""
EACH_S = 0.002
"""The time between the checks of two requests of senders in doubt, in seconds."""
LONGEST_S = 4.0
"""The longest time that a request waits for its turn, in seconds."""
LATER: Window = (1.0, 10.0)
"""The retry window, in seconds, of a request that was refused because the queue was too long."""


class Doubt:
    """The senders in doubt, and their queue. All calls must come from one event loop.

    Args:
        most: The largest number of senders that are remembered. Beyond it, the senders that were recorded first are forgotten.
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
        """Record that a bad signature in the name of this device came from this neighbourhood (network of addresses)."""
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
        """Return at once if a sender is not in doubt; otherwise wait for the sender's turn.

        Raises:
            Refused: With the code `busy`, if the sender would have to wait too long.
        """
        if not self.has(device, neighbourhood):
            return
        now = self._clock()
        at = max(now, self._free)
        if at - now > LONGEST_S:
            raise Refused(
                "busy", "too many requests with bad signatures came in the name of this device: try again later", LATER
            )
        self._free = at + EACH_S
        await self._sleep(at - now)
