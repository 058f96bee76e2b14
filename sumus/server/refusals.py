"""Records why devices took no part recently, so that an operator can see why a round makes no progress.

    refusals.note("health", "train", "floor-rounds", device, now)
    refusals.seen(now)             [Refusal("health", "train", "floor-rounds", 12, "already took part in as many rounds …")]
    refusals.took_part("health", "train", device)

Each device is counted once for each reason, for ten minutes. Reasons come from a closed list, and memory is bounded, whatever
devices send. All calls must come from the deciding thread.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from sumus.protocol.session import Floor
from sumus.text import amount
from sumus.wire.messages import Kind

LASTS_S = 600.0
"""The time for which a refusal is remembered, in seconds."""
MOST = 10_000
"""The largest number of devices that are remembered for each reason. Beyond it, the devices that were recorded first are
forgotten.
"""
_FLOOR = Floor()
WORDS: Mapping[str, str] = {
    "floor-rounds": f"already took part in as many rounds today as the owner consents to ({_FLOOR.rounds} by "
    "default; --floor rounds=N)",
    "floor-contributors": f"the owner consents to sums of {_FLOOR.contributors} or more contributors (by default), "
    "but the plan allows sums of fewer (--floor contributors=N, or a larger min_contributors)",
    "floor-steps": f"the round takes more local steps than the owner consents to ({_FLOOR.steps:,} by default; "
    "--floor steps=N)",
    "floor-seconds": f"the round trains for longer than the owner consents to ({_FLOOR.seconds:,.0f} s by default; "
    "--floor seconds=N)",
    "floor-bytes": f"the round takes more bytes than the owner consents to ({amount(_FLOOR.bytes)} by default; "
    "--floor bytes=N)",
    "floor-memory": f"a step takes more memory than the owner consents to ({amount(_FLOOR.memory)} by default; "
    "--floor memory=N)",
    "floor-task": "its file has another model or other data than the plan",
    "wrong_task": "its file has another model or other data than any task here: give it the file of this release",
    "conditions": "no longer met the plan's conditions when work came",
    "charging": "not charging, but the plan requires it (--always, for machines that are always charging)",
    "unmetered": "in a metered network, but the plan requires an unmetered one (--always, if the network is not metered)",
    "idle": "in use, but the plan requires an idle device (--always, for machines that nobody uses)",
    "battery": "less battery than the plan requires",
    "version": "an older version of its program than the plan requires",
    "diverged": "trained to NaN, to infinity or beyond the plan's bounds: lower the learning rate",
    "data": "could not read its examples",
    "task": "could not run the model, its loss or its metrics",
    "plan": "could not carry out the plan",
    "memory": "ran out of memory",
    "stopped": "stopped by its owner during a round",
    "other": "gave up for another reason, which is shown to its owner",
    "cap": "took part in as many rounds as the plan allows one device (most_rounds=)",
    "resting": "must wait, since earlier work was not finished in time",
    "separation": "was in one of the last sums, and must wait for later ones (separation=)",
    "left": "enrolled with the same link as a device that is in this sum and has left",
    "keeps_state": "keeps no state between rounds, but the plan requires it",
    "only measures": "measures models, and does not train (--evaluate-only)",
    "only trains": "trains, and does not measure models (--train-only)",
    "bad_report": "sent a report that does not fit this plan",
    "not_finite": "reported NaN or infinity",
    "out_of_bounds": "reported numbers beyond the plan's bounds",
    "empty": "reported without any examples",
    "too_large": "sent a report that is too long",
}
"""Reason → text about the refused devices, which follows their number. Other reasons are not remembered."""


class Refusal(NamedTuple):
    """Devices that took no part recently, for one reason.

    Attributes:
        task: The task; empty if the refusal concerns all tasks.
        kind: The kind of the run; empty if the refusal concerns all tasks.
        why: The reason, as a code.
        devices: The number of devices.
        said: The reason as text that follows the number of devices.
    """

    task: str
    kind: Kind | str
    why: str
    devices: int
    said: str


class Refusals:
    """The devices that took no part recently, by reason."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str], OrderedDict[str, float]] = {}

    def note(self, task: str, kind: Kind | str, why: str, device: str, now: float) -> None:
        """Record a device that refused work or got no work, or whose report was refused."""
        if why not in WORDS:
            return
        devices = self._seen.setdefault((task, kind, why), OrderedDict())
        devices[device] = now
        devices.move_to_end(device)
        if len(devices) > MOST:
            devices.popitem(last=False)

    def took_part(self, task: str, kind: Kind, device: str) -> None:
        """Forget why a device took no part, since a report from it has now been counted."""
        for (of, its, _), devices in self._seen.items():
            if of in (task, "") and its in (kind, ""):
                devices.pop(device, None)

    def seen(self, now: float) -> tuple[Refusal, ...]:
        """List the refusals of the last minutes, sorted by their number of devices, largest first.

        Devices that must wait after unfinished work come last, since the list also has the reason why it was not finished.
        """
        for devices in self._seen.values():
            while devices and next(iter(devices.values())) < now - LASTS_S:
                devices.popitem(last=False)
        self._seen = {key: devices for key, devices in self._seen.items() if devices}
        found = [Refusal(*key, len(devices), WORDS[key[2]]) for key, devices in self._seen.items()]
        return tuple(sorted(found, key=lambda each: (each.why == "resting", -each.devices, each[:3])))
