"""Checks whether a device is charging, on an unmetered network, and idle. Each check can be replaced.

sensors = Linux()                                        asks the system
sensors = AllConditionsMet()                             for a machine in a rack, and for tests
sensors = Linux(idle=lambda: keyboard.quiet(300))        a check of your own in place of one of them
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sumus.pacing import Conditions

BUSY = 0.5
"""The load per core at or above which a machine counts as in use."""
_METERED_NAMES = re.compile(r"(wwan|ppp|rmnet|usb|bnep)")
"""Names of network interfaces of a modem, or of a telephone that is connected by cable or Bluetooth."""


class Sensors(Protocol):
    """Reads a device's conditions."""

    def read(self) -> Conditions:
        """Return the current conditions."""
        ...


class AllConditionsMet:
    """Sensors that always report that every condition is met."""

    def read(self) -> Conditions:
        return Conditions(charging=True, unmetered=True, idle=True, battery=1.0)


class NoConditionKnown:
    """Sensors for a system that sumus cannot read: no condition is known to be met."""

    def read(self) -> Conditions:
        return Conditions()


class Linux:
    """Sensors that ask Linux about power, network and use.

    Args:
        root: The root of the file system.
        run: Returns a command's standard output; None if the command cannot be run.
        charging: A check in place of /sys/class/power_supply. A machine without a battery counts as charging.
        battery: A level from 0 to 1, in place of the level in /sys/class/power_supply. Without a battery, the level is 1.
        unmetered: A check in place of NetworkManager, which is asked about the connections in use. If NetworkManager does
            not run, the kind of interface of the default route decides. Without a route, the network does not count as unmetered.
        idle: A check in place of two others: the load of the last minute must be below 0.5 per core, and logind must not
            report a session in use.
    """

    def __init__(
        self,
        root: str | Path = "/",
        run: "Callable[[list[str]], str | None] | None" = None,
        charging: Callable[[], bool] | None = None,
        battery: Callable[[], float] | None = None,
        unmetered: Callable[[], bool] | None = None,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        self._root = Path(root)
        self._run = run or output_of
        self._checks = (
            charging or self._charging,
            unmetered or self._unmetered,
            idle or self._idle,
            battery or self._battery,
        )

    def read(self) -> Conditions:
        charging, unmetered, idle, battery = self._checks
        return Conditions(charging(), unmetered(), idle(), min(1.0, max(0.0, battery())))

    def _supplies(self, kind: str) -> list[Path]:
        """Return the power supplies of a kind that power the machine itself, not a peripheral such as a mouse."""
        folder = self._root / "sys/class/power_supply"
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [one for one in found if _text(one / "type") == kind and _text(one / "scope") != "Device"]

    def _charging(self) -> bool:
        if not (batteries := self._supplies("Battery")):
            return True
        if any(_text(one / "online") == "1" for kind in ("Mains", "USB") for one in self._supplies(kind)):
            return True
        return any(_text(one / "status") in ("Charging", "Full", "Not charging") for one in batteries)

    def _battery(self) -> float:
        levels = [int(text) / 100 for one in self._supplies("Battery") if (text := _text(one / "capacity")).isdecimal()]
        return min(levels, default=1.0)

    def _unmetered(self) -> bool:
        said = self._run(["nmcli", "--terse", "--get-values", "GENERAL.METERED,GENERAL.STATE", "device", "show"])
        if said is not None:
            blocks = [block.split("\n") for block in said.strip().split("\n\n")]
            used = [block[0] for block in blocks if len(block) > 1 and block[1].startswith("100")]
            if used:
                return not any(metered.startswith("yes") for metered in used)
        interfaces = self._default_routes()
        return bool(interfaces) and not any(_METERED_NAMES.match(name) for name in interfaces)

    def _default_routes(self) -> list[str]:
        """Return the interfaces of the default routes for IPv4 and IPv6."""
        four = [line.split() for line in _text(self._root / "proc/net/route").splitlines()[1:]]
        six = [line.split() for line in _text(self._root / "proc/net/ipv6_route").splitlines()]
        names = [row[0] for row in four if len(row) > 7 and row[1] == row[7] == "00000000"]
        names += [row[9] for row in six if len(row) > 9 and set(row[0]) == {"0"} and row[1] == "00" and row[9] != "lo"]
        return sorted(set(names))

    def _idle(self) -> bool:
        words = _text(self._root / "proc/loadavg").split()
        cores = _text(self._root / "proc/cpuinfo").count("processor\t") or 1
        if not words or float(words[0]) / cores >= BUSY:
            return False
        said = self._run(["loginctl", "show-seat", "seat0", "--property=IdleHint", "--value"])
        return said is None or said.strip() != "no"


def here() -> Sensors:
    """Return the sensors for this system; on a system that sumus cannot read, no condition is known to be met."""
    return Linux() if sys.platform == "linux" else NoConditionKnown()


def output_of(command: list[str]) -> str | None:
    """Return a command's standard output in English; None if the command does not exist, fails or prints nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, env={**os.environ, "LC_ALL": "C"}, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def _text(path: Path) -> str:
    """Return a file's text, stripped; empty if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
