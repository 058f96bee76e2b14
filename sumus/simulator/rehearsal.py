"""The system alone: rounds of a plan on a fleet in simulated time, with nobody training.

report = sumus.rehearse(pacing, fleet, devices=1_000_000, days=7)
"""

from collections.abc import Callable, Sequence

from sumus.errors import ExperimentError
from sumus.fleet import DAY, Fleet
from sumus.pacing import Pacing
from sumus.rng import generator
from sumus.simulator.fleet_report import Attendance, FleetReport
from sumus.simulator.timeline import ServerCost, Timeline, Work
from sumus.simulator.traces import devices_of

SERVER = ServerCost(commit=0.05, report=0.004, publish=2.0)
"""A server that commits every 50 ms, 250 reports a second at most."""


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
    """Let a fleet of so many devices run for so many simulated days.

    down, up: bytes of a broadcast and of a report.  outages: (from, to) in seconds, in which the server cannot be reached.
    watch: is told the day, now and then.  Two runs with one seed are the same, event for event.
    """
    if devices < 1 or not days > 0:
        raise ExperimentError(f"{devices} devices for {days} days: give at least one, and some time")
    if pacing.cohort > devices:
        raise ExperimentError(f"a cohort of {pacing.cohort} is larger than {devices} devices: lower it, or give more")
    if not fleet.timed:
        raise ExperimentError("in a fleet where nothing takes time no time goes by: give Fleet(seconds=, ...)")
    drawn = devices_of(fleet, devices, generator(seed, "devices"))
    timeline = Timeline(pacing, fleet, drawn, Work(down=down, up=up), seed, cost=server, outages=outages)
    attendance = Attendance(drawn, pacing.checkins)
    for played in timeline.until(days * DAY):
        attendance.note(played)
        watch(played.ended / DAY)
    return attendance.report(days * DAY, timeline.totals.checkins)
