"""A week of a million phones: the rounds' own tables on the virtual clock, without any training.

    python -m benchmarks.week                                      1,000,000 devices, 7 days (ten minutes)
    python -m benchmarks.week --devices 100000 --days 1          a tenth of them, for a day
    python -m benchmarks.week --write                              also put table and picture into docs/

A phone is online for about eight hours a day, mostly at night. A round chooses 1,300 phones and wants reports of 1,000
within ten minutes. The plan is for 20 check-ins a second. On the third day (the first day of a shorter run) the server
is away for an hour.
"""

import argparse
import resource
import time

import sumus
from benchmarks.figures import DOCS
from benchmarks.results import write_table
from sumus.fleet import DAY

PLANNED = 20.0
HOUR = 3600.0


def main() -> None:
    """Run and print; with --write also write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1_000_000)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/")
    args = parser.parse_args()
    share = args.devices / 1_000_000
    cohort = max(10, round(1000 * share))
    pacing = sumus.Pacing(cohort, over_select=1.3, deadline=600, checkins=PLANNED * share)
    fleet = sumus.Fleet(seconds=60, spread=10, hours=8, waits=False, lost=0.03, timing=sumus.FleetTiming(jitter=0.2))
    away = min(2.0, args.days / 4) * DAY
    began, used = time.perf_counter(), time.process_time()
    report = sumus.rehearse(pacing, fleet, args.devices, args.days, down=10**6, up=10**6, outages=[(away, away + HOUR)])
    wall, used = time.perf_counter() - began, time.process_time() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    minute = int((away + HOUR) // 60)
    after = max(report.load.checkins[minute : minute + 120]) / 60
    rows = [
        ["wall time, processor time", f"{wall / 60:.1f} minutes, {used / 60:.1f} minutes of one core"],
        ["peak memory", f"{memory / 1000:.2f} GB"],
        ["models a day", f"{report.rounds_a_day:.0f}, and {report.abandoned} rounds abandoned"],
        ["devices that took part", f"{int((report.participations > 0).sum()):,} of {args.devices:,}"],
        ["participations, fastest and slowest tenth", f"{report.by_speed[0]:.2f}, {report.by_speed[-1]:.2f}"],
        ["device time that is in no model", f"{report.wasted_share:.1%}"],
        ["check-ins a second, planned", f"{report.load.planned:g}"],
        ["in the busiest minute", f"{report.busiest:.1f}, {report.busiest / report.load.planned:.2f} of the plan"],
        ["in the two hours after the outage", f"{after:.1f} at most, {after / report.load.planned:.2f} of the plan"],
        ["worst queue", f"{report.load.staged} reports waited for one commit, {report.load.waited:.2f} s at most"],
        ["traffic", f"{report.traffic.down / 1e9:,.0f} GB down, {report.traffic.up / 1e9:,.0f} GB up"],
    ]
    caption = (
        f"`python -m benchmarks.week`: {args.devices:,} devices, {args.days:g} simulated days, rounds of {cohort:,} of "
        f"{round(1.3 * cohort):,}, a model of 1 MB, the server away for an hour"
    )
    write_table("week", caption, ["figure", "value"], rows, args.write)
    if args.write:
        report.plot(DOCS / "week.png")


if __name__ == "__main__":
    main()
