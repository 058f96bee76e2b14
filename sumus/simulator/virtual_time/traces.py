"""Measured devices, read from a CSV file (a *trace*) with one line per device, instead of randomly drawn devices.

    seconds,down,up,clock,online
    48,1200000,300000,1.0,79200-25200
    150,800000,100000,1.0002,75600-21600 43200-46800

seconds   the time that a round's work takes
down, up  bytes per second; empty if transfers take no time
clock     the speed of the device's clock, 1.0 if it is right; empty means 1.0
online    intervals of each day in seconds, which may cross midnight; empty if the device is always online

If a population is larger than the file, the lines are used again from the first.
"""

import csv
import hashlib
import math
import re
from pathlib import Path

import numpy as np

from sumus.errors import ExperimentError, unread
from sumus.fleet import DAY, DeviceArrays, Fleet
from sumus.spec import canonical_json

COLUMNS = ("seconds", "down", "up", "clock", "online")


def devices_of(fleet: Fleet, count: int, rng: np.random.Generator) -> DeviceArrays:
    """Return the devices of a fleet: from its trace if it has one, else drawn at random."""
    if fleet.trace is None:
        return fleet.devices(count, rng)
    measured = read(Path(fleet.trace))
    who = np.arange(count) % len(measured)
    columns = (getattr(measured, name)[who] for name in ("seconds", "down", "up", "clock", "begins", "lasts"))
    return DeviceArrays(*columns)


def fleet_identity(fleet: Fleet) -> str:
    """Return the part of a fleet that must be equal to continue a run: its parameters, and a hash of its trace."""
    figures = canonical_json({"name": "fleet", "with": {**fleet.figures, "trace": None}})
    try:
        measured = b"" if fleet.trace is None else Path(fleet.trace).read_bytes()
    except OSError as error:
        raise ExperimentError(f"the trace {fleet.trace} cannot be read: {unread(error)}") from error
    return figures + ("" if fleet.trace is None else hashlib.sha256(measured).hexdigest())


def read(path: Path) -> DeviceArrays:
    """Read the devices from a file.

    Raises:
        ExperimentError: The file, or a line of it, cannot be read; the message names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval=None, strict=True)
            lines = [(reader.line_num, line) for line in reader]
            named = sorted(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExperimentError(f"the trace {path} cannot be read: {unread(error)}") from error
    if not lines or named != sorted(COLUMNS):
        raise ExperimentError(f"the trace {path} must have one line per device, and the columns {', '.join(COLUMNS)}")
    numbers, intervals = list[list[float]](), list[list[tuple[float, float]]]()
    for number, line in lines:
        try:
            if None in line or None in line.values():
                raise ValueError(f"give {len(COLUMNS)} fields, with a comma between them")
            row = [
                _number(name, line[name], default)
                for name, default in zip(COLUMNS, ("", math.inf, math.inf, 1), strict=False)
            ]
            if not all(value > 0 for value in row) or math.inf in (row[0], row[3]):
                raise ValueError("seconds, down, up and clock must be positive, and seconds and clock finite")
            numbers.append(row)
            intervals.append([_interval(text) for text in (line["online"] or "").split()])
        except (ValueError, TypeError) as error:
            raise ExperimentError(f"the trace {path}, line {number}: {error}") from error
    widest = max(map(len, intervals))
    begins, lasts = np.zeros((len(lines), widest)), np.zeros((len(lines), widest))
    for row, found in enumerate(intervals):
        for place, (begin, length) in enumerate(found):
            begins[row, place], lasts[row, place] = begin, length
        if not found:
            lasts[row] = DAY
    seconds, down, up, clock = np.array(numbers).T
    return DeviceArrays(seconds, down, up, clock, begins, lasts)


def _number(column: str, text: str, default: float | str = "") -> float:
    """Read a decimal number. `float()` alone would also accept 1_000 and digits of other scripts."""
    if not text.strip() and default != "":
        return float(default)
    if not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", text, re.ASCII):
        raise ValueError(f"column {column!r} holds {text!r:.60}, which is not a number")
    return float(text)


def _interval(text: str) -> tuple[float, float]:
    first, dash, last = text.partition("-")
    begin, end = _number("online", first), _number("online", last)
    if not dash or not (0 <= begin <= DAY and 0 <= end <= DAY) or begin == end:
        raise ValueError(f"{text!r} is not an interval of a day: write it as BEGIN-END, in seconds from 0 to 86400")
    return begin, (end - begin) % DAY or DAY
