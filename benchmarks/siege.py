"""A siege: the effect of a flood of requests on honest devices, and on the server's memory.

    python -m benchmarks.siege                            each flood against ours and a bare server, in turns (twenty minutes)
    python -m benchmarks.siege --seconds 2 --turns 1      a quick look
    python -m benchmarks.siege --write                    also put the table into docs/results.md

Three kinds of processes run over loopback: a server with its limits of requests lifted, a flood, and honest devices.
The devices check in and upload at an even rate, and each request is timed from the moment at which it was due. The bare
server is uvicorn with a raw ASGI application that receives a body, and Starlette with msgspec for check-ins. Like ours,
it answers once a line of the request is on the disk, and syncs the requests of a twentieth of a second at once. It
checks no signature, adds nothing, and has no limits. Ours and the bare one meet the same flood one after the other, and
the median of the turns is shown. Memory is resident memory: before the flood, the maximum, and ten seconds after.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import three_digits, times
from benchmarks.results import write_table
from benchmarks.server_load import floods, generator
from benchmarks.server_load.devices import Device, Pieces, report_body
from benchmarks.server_load.generator import Generator, Load
from benchmarks.server_load.served import Job, Process, bundle, process
from sumus.server.server import GROUP

SIZE = 2**16
"""Parameters of what honest devices upload: float32, so 256 KiB."""
MODEL = 2**20
"""Parameters of the model that lazy readers ask for, and of reports that are cut or announced: 4 MiB."""
CHECK_INS, UPLOADS = 60, 20
"""Honest requests a second."""
CUT, SILENT, HONEST = 1, 101, 1101
"""The first device whose uploads are cut, the first of those that fall silent, and the first honest one; device 0
fetches a model."""
BACK_S = 10.0
"""Seconds for the memory to go back."""
HEADER = [
    "flood",
    "check-ins, 99 %: ours, bare",
    "ours / bare",
    "uploads, 99 %: ours, bare",
    "ours / bare",
    "refused of honest",
    "memory: before, most, 10 s after",
]


@dataclass(frozen=True)
class Scale:
    """The length of the measurements.

    Attributes:
        seconds: Seconds of a turn.
        turns: Turns of each flood.
        part: The share of each flood's numbers.
        back_s: See BACK_S.
    """

    seconds: float = 8.0
    turns: int = 3
    part: float = 1.0
    back_s: float = BACK_S

    def many(self, number: int) -> int:
        """Return this number at this scale."""
        return max(1, round(number * self.part))

    @property
    def honest_s(self) -> float:
        """The seconds of a turn in which honest devices send requests: the flood begins before and ends after."""
        return self.seconds * 3 / 4

    def honest(self, rate: float) -> int:
        """Return the number of their requests in a turn."""
        return max(1, round(rate * self.honest_s))


@dataclass
class Besieged:
    """A server in a siege.

    Attributes:
        server: The server's process.
        fingerprints: The fingerprints of its tasks; none for a bare one.
        model: The hash of a large object.
        devices: The number of the next honest device, since each takes part once.
    """

    server: Process
    fingerprints: tuple[str, ...]
    model: str
    devices: int = HONEST


@dataclass
class Measured:
    """The turns of one flood on one server."""

    check_ins: list[Load] = field(default_factory=list[Load])
    uploads: list[Load] = field(default_factory=list[Load])
    memory: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def refused(self) -> int:
        """Return the number of honest requests that did not get the right answer."""
        loads = [*self.check_ins, *self.uploads]
        return sum(count for load in loads for status, count in load.answers.items() if status != 200)


@dataclass(frozen=True)
class Flood:
    """A function of `floods`, and its arguments besides a port."""

    function: Callable[..., int]
    arguments: Callable[[Besieged, Scale], tuple[object, ...]]

    def begin(self, siege: Besieged, scale: Scale, attackers: Generator) -> "Future[int]":
        """Start it in the attackers' process."""
        return attackers.begin(self.function, siege.server.port, *self.arguments(siege, scale))


FLOODS = {
    "none": Flood(floods.quiet, lambda siege, scale: (scale.seconds,)),
    "2,000 half heads": Flood(floods.half_heads, lambda siege, scale: (scale.many(2000), scale.seconds)),
    "200 cut uploads a second": Flood(
        floods.cut_uploads, lambda siege, scale: (scale.many(200), range(CUT, SILENT), MODEL, scale.seconds)
    ),
    "100 readers that do not read": Flood(
        floods.lazy_readers, lambda siege, scale: (scale.many(100), siege.model, scale.seconds)
    ),
    "50 unsigned announcements": Flood(
        floods.announcements, lambda siege, scale: (scale.many(50), MODEL, scale.seconds)
    ),
    "2,400 bad signatures a second": Flood(
        floods.bad_signatures, lambda siege, scale: (scale.many(2400), scale.seconds)
    ),
    "a silent device in every round": Flood(
        floods.silent, lambda siege, scale: (siege.fingerprints or ("0" * 64,), SILENT, scale.seconds)
    ),
}


class Siege:
    """Plays floods. load, attackers: the processes."""

    def __init__(self, scale: Scale, load: Generator, attackers: Generator) -> None:
        self.scale, self._load, self._attackers = scale, load, attackers

    def turn(self, flood: Flood, siege: Besieged, into: Measured) -> None:
        """Play one flood against one server, with honest devices."""
        check_ins, uploads = self._requests(siege)
        before = most = siege.server.rss
        attack = flood.begin(siege, self.scale, self._attackers)
        time.sleep(min(0.5, self.scale.seconds / 4))
        honest = self._load.begin(floods.honest, siege.server.port, check_ins, uploads, self.scale.honest_s)
        while not (honest.done() and attack.done()):
            time.sleep(0.05)
            most = max(most, siege.server.rss)
        attack.result()
        found = honest.result()
        into.check_ins.append(found[0])
        into.uploads.append(found[1])
        time.sleep(self.scale.back_s)
        into.memory.append((before, most, siege.server.rss))

    def _requests(self, siege: Besieged) -> tuple[list[Pieces], list[Pieces]]:
        """Return the signed requests of honest devices; those that upload have work."""
        uploads, check_ins = (self.scale.honest(rate) for rate in (UPLOADS, CHECK_INS))
        reporting = range(siege.devices, siege.devices + uploads)
        asking = range(reporting.stop, reporting.stop + check_ins)
        siege.devices = asking.stop
        prints = siege.fingerprints[:1] or ("0" * 64,)
        self._load.begin(generator.check_ins, siege.server.port, reporting, 0, prints, 16).result()
        body, digest = report_body(SIZE)
        return (
            [Device(number).check_in(prints, 0) for number in asking],
            [Device(number).report(f"load{SIZE}", 0, body, digest) for number in reporting],
        )


def besiege(scale: Scale, only: Sequence[str]) -> list[list[str]]:
    """Return the rows of the table."""
    rows: list[list[str]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sumus-siege-")))
        load, attackers = stack.enter_context(Generator()), stack.enter_context(Generator())
        turns = 1 + scale.turns * len(only)
        devices = HONEST + turns * (scale.honest(UPLOADS) + scale.honest(CHECK_INS))
        job = Job(str(folder / "server"), None, (SIZE, MODEL), 0, devices)
        prints = tuple(bundle(size, job).plan.description.fingerprint for size in job.sizes)
        ours = stack.enter_context(process(job))
        work = load.begin(generator.work_for, ours.port, 0, 0, prints[1]).result()
        sides = (
            Besieged(ours, prints, work.broadcast.sha256),
            Besieged(stack.enter_context(process(group=GROUP)), (), "0" * 64),
        )
        siege = Siege(scale, load, attackers)
        for side in sides:  # what is imported and made at the first request must not count for a flood
            siege.turn(FLOODS["none"], side, Measured())
        for what in only:
            measured = Measured(), Measured()
            for _ in range(scale.turns):
                for side, into in zip(sides, measured, strict=True):
                    siege.turn(FLOODS[what], side, into)
            rows.append(_row(what, *measured))
            print(rows[-1], flush=True)
    return rows


def _row(what: str, ours: Measured, bare: Measured) -> list[str]:
    def late(loads: Sequence[Load]) -> float:
        return statistics.median(load.percentile(99) for load in loads) * 1e3

    cells = [what]
    for mine, other in ((ours.check_ins, bare.check_ins), (ours.uploads, bare.uploads)):
        cells += [
            f"{three_digits(late(mine))} ms, {three_digits(late(other))} ms",
            f"**{times(late(mine) / late(other))}**",
        ]
    memory = [three_digits(statistics.median(each) / 1e6) for each in zip(*ours.memory, strict=True)]
    return [*cells, str(ours.refused()), f"{memory[0]}, {memory[1]}, **{memory[2]}** MB"]


def main() -> None:
    """Run and print; with --write also write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(FLOODS), help="of the floods, by name")
    parser.add_argument("--write", action="store_true", help="put the table into docs/results.md")
    args = parser.parse_args()
    rows = besiege(Scale(args.seconds, args.turns), args.only)
    caption = f"`python -m benchmarks.siege`: median of {args.turns} turns of {args.seconds:g} s"
    write_table("siege", caption, HEADER, rows, args.write)


if __name__ == "__main__":
    main()
