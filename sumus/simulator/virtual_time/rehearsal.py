"""A rehearsal: the rounds of a plan on a fleet in simulated time, without any training.

report = sumus.rehearse(pacing, fleet, devices=1_000_000, days=7)
"""

import gc
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from sumus.errors import ExperimentError, expect, expect_number
from sumus.experiment import seed_of
from sumus.fleet import DAY, Fleet
from sumus.pacing import Pacing
from sumus.rng import generator
from sumus.simulator.virtual_time.fleet_model import RoundDemand
from sumus.simulator.virtual_time.fleet_report import Attendance, FleetReport
from sumus.simulator.virtual_time.server import ServerCost
from sumus.simulator.virtual_time.timeline import Timeline
from sumus.simulator.virtual_time.traces import devices_of
from sumus.types import plain_number

SERVER = ServerCost(commit=0.05, report=0.004, publish=2.0)
"""A server that commits every 50 ms, and takes at most 250 reports per second."""


def rehearse(
    pacing: Pacing,
    fleet: Fleet,
    devices: int,
    days: float = 7.0,
    seed: int = 0,
    down: int = 0,
    up: int = 0,
    server: ServerCost = SERVER,
    outages: Sequence[tuple[float, float]] = (),
    watch: Callable[[float], None] = lambda day: None,
) -> FleetReport:
    """Run a fleet for some simulated days. Two runs with the same seed are the same, event for event.

    Args:
        pacing: Which devices take part in a round, and when.
        fleet: The properties of the devices.
        devices: The number of devices.
        days: The number of simulated days.
        seed: The seed of everything random.
        down: Bytes of a broadcast.
        up: Bytes of a report.
        server: The time that the server takes for its work.
        outages: Periods (from, to), in seconds, in which the server cannot be reached.
        watch: Function that is called after each round with the current day.

    Returns:
        The report on the fleet.
    """
    expect(pacing, Pacing, "pacing=")
    expect(fleet, Fleet, "fleet=")
    devices, days, seed = plain_number(devices), plain_number(days), seed_of(seed)
    expect(devices, int, "devices=")
    expect_number(int(devices), 1, math.inf, "devices")
    expect_number(days, 0, math.inf, "days", open_low=True)
    for name, number in (("down", down), ("up", up)):
        expect_number(number, 0, math.inf, name)
    for outage in cast(Sequence[Any], outages):
        if not (
            isinstance(outage, tuple | list)
            and len(cast(list[Any], outage)) == 2
            and 0 <= outage[0] < outage[1] < math.inf
        ):
            raise ExperimentError(f"outages={outage!r}: give a pair (from, to) for each outage, in seconds")
    if pacing.cohort > devices:
        raise ExperimentError(
            f"a cohort of {pacing.cohort} is larger than {devices} devices: lower the cohort, or give more devices"
        )
    if not fleet.timed:
        raise ExperimentError(
            "nothing in this fleet takes time, so that the simulated time would not advance: give Fleet(seconds=, ...)"
        )
    drawn = devices_of(fleet, devices, generator(seed, "devices"))
    work = RoundDemand(down=down, up=up)
    timeline = Timeline(pacing, fleet, drawn, work, seed, cost=server, outages=outages)
    attendance = Attendance(drawn, work, pacing.checkins)
    with _uncollected():
        for played in timeline.until(days * DAY):
            attendance.note(played)
            watch(played.ended / DAY)
    return attendance.report(days * DAY, timeline.totals)


@contextmanager
def _uncollected() -> Generator[None, None, None]:
    """Return a context without garbage collection: it would search millions of rows for cycles repeatedly and find none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
