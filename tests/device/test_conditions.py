"""Conditions, of file systems made for the purpose."""

from pathlib import Path
from typing import Any

import pytest

from sumus.device.conditions import AllConditionsMet, Linux, NoConditionKnown, here, output_of
from sumus.pacing import Conditions

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
ETHERNET = ROUTES + "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
MODEM = ROUTES + "wwan0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
LOCAL = ROUTES + "eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n"
SIX = "0" * 32 + " 00 " + "0" * 32 + " 00 " + "fe80" + "0" * 28 + " 00000400 00000001 00000000 00000003 "
CORES = "processor\t: 0\nmodel name\t: any\n\nprocessor\t: 1\n"


def a_system(root: Path, supplies: dict[str, dict[str, str]] | None = None, **files: str) -> Path:
    for name, values in (supplies or {}).items():
        folder = root / "sys/class/power_supply" / name
        folder.mkdir(parents=True)
        for file, text in values.items():
            (folder / file).write_text(text + "\n")
    (root / "proc/net").mkdir(parents=True)
    for name, text in {"proc/loadavg": "0.10 0.20 0.30 1/100 1\n", "proc/cpuinfo": CORES, **files}.items():
        (root / name).write_text(text)
    return root


def silent(command: list[str]) -> None:
    """No command is there."""


BATTERY = {"type": "Battery", "capacity": "83"}


@pytest.mark.parametrize(
    ("supplies", "charging", "battery"),
    [
        ({}, True, 1.0),
        ({"BAT0": {**BATTERY, "status": "Discharging"}}, False, 0.83),
        ({"BAT0": {**BATTERY, "status": "Charging"}}, True, 0.83),
        ({"BAT0": {**BATTERY, "status": "Full"}}, True, 0.83),
        ({"BAT0": {**BATTERY, "status": "NoConditionKnown"}, "AC": {"type": "Mains", "online": "1"}}, True, 0.83),
        ({"BAT0": {**BATTERY, "status": "NoConditionKnown"}, "AC": {"type": "Mains", "online": "0"}}, False, 0.83),
        ({"BAT0": {**BATTERY, "status": "Discharging"}, "BAT1": {**BATTERY, "capacity": "20"}}, False, 0.2),
        ({"mouse": {**BATTERY, "scope": "Device", "status": "Discharging", "capacity": "3"}}, True, 1.0),
    ],
)
def test_power(tmp_path: Path, supplies: dict[str, dict[str, str]], charging: bool, battery: float) -> None:
    read = Linux(a_system(tmp_path, supplies), silent).read()
    assert (read.charging, read.battery) == (charging, battery)


@pytest.mark.parametrize(
    ("said", "files", "unmetered"),
    [
        ("no (guessed)\n100 (connected)\n\nunknown\n100 (connected (externally))\n", {}, True),
        ("yes\n100 (connected)\n", {"proc/net/route": ETHERNET}, False),
        ("yes (guessed)\n100 (connected)\n\nno\n30 (disconnected)\n", {}, False),
        ("yes\n30 (disconnected)\n\nno\n100 (connected)\n", {}, True),
        ("yes\n30 (disconnected)\n", {"proc/net/route": ETHERNET}, True),
        (None, {"proc/net/route": ETHERNET}, True),
        (None, {"proc/net/route": MODEM}, False),
        (None, {"proc/net/route": LOCAL}, False),
        (None, {"proc/net/ipv6_route": SIX + "   wlan0\n"}, True),
        (None, {"proc/net/ipv6_route": SIX + "   wwan0\n"}, False),
        (None, {"proc/net/ipv6_route": SIX + "      lo\n"}, False),
        (None, {}, False),
    ],
)
def test_network(tmp_path: Path, said: str | None, files: dict[str, str], unmetered: bool) -> None:
    def run(command: list[str]) -> str | None:
        return said if command[0] == "nmcli" else None

    assert Linux(a_system(tmp_path, **files), run).read().unmetered == unmetered


@pytest.mark.parametrize(
    ("load", "hint", "idle"),
    [
        ("0.10", None, True),
        ("0.99", None, True),
        ("1.00", None, False),
        ("0.10", "no\n", False),
        ("0.10", "yes\n", True),
    ],
)
def test_use(tmp_path: Path, load: str, hint: str | None, idle: bool) -> None:
    def run(command: list[str]) -> str | None:
        return hint if command[0] == "loginctl" else None

    system = a_system(tmp_path, **{"proc/loadavg": f"{load} 0.20 0.30 1/100 1\n"})
    assert Linux(system, run).read().idle == idle


def test_nothing_is_known_of_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert Linux(tmp_path, silent).read() == Conditions(charging=True, battery=1.0)


@pytest.mark.parametrize(
    ("check", "value", "read"),
    [("charging", False, False), ("battery", 7.0, 1.0), ("unmetered", True, True), ("idle", False, False)],
)
def test_each_check_can_be_replaced(tmp_path: Path, check: str, value: Any, read: Any) -> None:
    replaced: dict[str, Any] = {check: lambda: value}
    assert getattr(Linux(a_system(tmp_path), silent, **replaced).read(), check) == read


def test_a_server_in_a_rack_meets_all_and_what_nobody_knows_is_not_met() -> None:
    everything = Conditions(charging=True, unmetered=True, idle=True, battery=1.0)
    assert everything.unmet(AllConditionsMet().read()) is None
    assert NoConditionKnown().read() == Conditions()
    assert isinstance(here().read(), Conditions)


def test_a_command_that_is_not_there_or_fails_says_nothing() -> None:
    assert output_of(["sumus-no-such-command"]) is None
    assert output_of(["false"]) is None
    assert output_of(["echo", "words"]) == "words\n"
