"""Readings as they come: JSON, JSON lines, CSV, .npz and safetensors. All of it is untrusted: lengths are looked at before memory
is taken, and nothing is ever unpickled.

    batch = read_file("kitchen.csv", body)
    batch.found[3]                     a reading: a mapping of names to values, or a BadReading in its place
    batch.subset([3])                  the same form of file with these readings alone
"""

import csv
import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np

from sumus.errors import ParticipantError
from sumus.node.readings import BadReading
from sumus.types import Array
from sumus.wire.tensors import decode_tree

Raw: TypeAlias = Mapping[str, Any]
"""A reading as it came: values by name."""

MOST_READINGS = 100_000
"""In one file or one body."""
MOST_BYTES = 64 * 2**20
"""Of a file, as it is and unpacked."""
MOST_TEXT = 8 * 2**20
"""Of a file of text, or a body of JSON: in memory it is many times that."""
LONGEST_HEADER = 10_000
"""Of an array in a file, in bytes."""
_MOST_ARRAYS = 64
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d{1,18}")

SUFFIXES = (".npz", ".csv", ".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Batch:
    """The readings of a file. found: each, or what is wrong with it.  subset: a file of some of them, by number."""

    found: Sequence[Raw | BadReading]
    subset: Callable[[Sequence[int]], bytes]


def read_file(name: str, body: bytes) -> Batch:
    """The readings of a file, by its name's ending. BadReading where it is no such file."""
    suffix = name[name.rfind(".") :].lower()
    most, lines = (MOST_BYTES, 0) if suffix == ".npz" else (MOST_TEXT, body.count(b"\n"))
    if len(body) > most or lines > MOST_READINGS + 1:
        raise BadReading(
            f"it has {len(body)} bytes, and at most {most}, and {MOST_READINGS} readings, are read: split it"
        )
    batch = {".npz": read_npz, ".csv": read_csv}.get(suffix, read_lines)(body)
    if not batch.found:
        raise BadReading("there is no reading in it")
    return batch


def is_whole(name: str, body: bytes) -> bool:
    """Whether a file ends as one that was written to its end does."""
    if name.lower().endswith(".npz"):
        return zipfile.is_zipfile(io.BytesIO(body))
    return body.endswith(b"\n")


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_json(body: bytes) -> list[Raw | BadReading]:
    """A reading, or a list of them."""
    value = _decoded(body)
    found = [_mapping(each) for each in (cast(list[Any], value) if isinstance(value, list) else [value])]
    if not found or len(found) > MOST_READINGS:
        raise BadReading(f"it has {len(found)} readings: give 1 to {MOST_READINGS}")
    return found


def read_lines(body: bytes) -> Batch:
    """A JSON object a line."""
    lines = [line for line in body.split(b"\n") if line.strip()]

    def one(line: bytes) -> Raw | BadReading:
        try:
            return _mapping(_decoded(line))
        except BadReading as bad:
            return bad

    return Batch([one(line) for line in lines], lambda rows: b"".join(lines[row] + b"\n" for row in rows))


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadReading(f"it is no JSON: {error!s:.100}") from error


def _mapping(value: Any) -> Raw | BadReading:
    if isinstance(value, dict):
        return cast(Raw, value)
    return BadReading("a reading is a JSON object, with values by name")


def read_csv(body: bytes) -> Batch:
    """A first line of names, and a reading a line. Numbers are numbers, nothing is None, and the rest is text."""
    try:
        rows = [row for row in csv.reader(io.StringIO(body.decode("utf-8-sig"), newline="")) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadReading(f"it is no CSV file: {error!s:.100}") from error
    names = [name.strip() for name in rows[0]] if rows else []
    if not names or len(set(names)) != len(names):
        raise BadReading("its first line is no list of names, each once")

    def one(row: list[str]) -> Raw | BadReading:
        if len(row) != len(names):
            return BadReading(f"it has {len(row)} values, and the first line {len(names)} names")
        return {name: _value(text.strip()) for name, text in zip(names, row, strict=True)}

    def subset(numbers: Sequence[int]) -> bytes:
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n").writerows([rows[0], *(rows[1 + number] for number in numbers)])
        return out.getvalue().encode()

    return Batch([one(row) for row in rows[1:]], subset)


def _value(text: str) -> Any:
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text or None


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_npz(body: bytes) -> Batch:
    """Arrays with one row a reading, as `numpy.savez` writes them. Never unpickled; refused before it is unpacked, if that were
    too much."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if len(members) > _MOST_ARRAYS or unpacked > MOST_BYTES:
                raise BadReading(
                    f"unpacked it has {len(members)} arrays and {unpacked} bytes, and at most {_MOST_ARRAYS} and {MOST_BYTES} "
                    "are read: split it"
                )
            if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise BadReading("it is packed otherwise than numpy.savez packs")
            arrays = {member.filename.removesuffix(".npy"): _member(archive, member) for member in members}
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise BadReading(f"it is no .npz file: {error!s:.100}") from error
    found = rows_of(arrays)

    def subset(numbers: Sequence[int]) -> bytes:
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **{name: array[list(numbers)] for name, array in arrays.items()})
        return out.getvalue()

    return Batch(found, subset)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """An array of an archive. Never more is unpacked than the archive's list says, which was looked at."""
    with archive.open(member) as stream:
        return _array_of(member.filename, stream.read(member.file_size))


def _array_of(name: str, body: bytes) -> Array:
    """An array of a .npy file; its header is believed only as far as the bytes are there."""
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=LONGEST_HEADER)
    except Exception as error:  # the header is read as Python, which raises whatever that does
        raise BadReading(f"its array {name:.50} is none that numpy.save writes: {error!s:.100}") from error
    if dtype.kind not in "biufU":
        raise BadReading(f"its array {name:.50} holds {dtype!s:.50}, and neither numbers nor text: it is not unpickled")
    begin = stream.tell()
    size = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or not size or size != len(body) - begin:
        raise BadReading(f"its array {name:.50} says {shape!s:.50}, and has {len(body) - begin} bytes")
    array = np.frombuffer(body, dtype, offset=begin)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def read_safetensors(body: bytes) -> list[Raw | BadReading]:
    """Tensors with one row a reading."""
    try:
        return rows_of(decode_tree(body))
    except ParticipantError as error:
        raise BadReading(str(error)) from error


def rows_of(arrays: Mapping[str, Array]) -> list[Raw | BadReading]:
    """A reading for each row of some arrays, which have equally many."""
    lengths = {name: array.shape[0] if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise BadReading(f"its arrays do not have one row a reading each: {dict(list(lengths.items())[:8])}")
    count = next(iter(lengths.values()))
    if not 0 < count <= MOST_READINGS:
        raise BadReading(f"it has {count} readings: give 1 to {MOST_READINGS}")
    return [
        {name: str(array[row]) if array.dtype.kind == "U" else array[row] for name, array in arrays.items()}
        for row in range(count)
    ]
