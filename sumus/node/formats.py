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
import sys
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
from sumus.wire.bundle import NOT_A_ZIP
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
_MOST_ARRAYS, _MOST_SIDES = 64, 32
_NPY = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': (?:'(?P<kind>[|<>=]?[?biufcmMOSUV]\d{0,9}(?:\[\w+\])?)'|\[.*\]), 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:(?:-?(?:0|[1-9]\d{0,17}), ?)+(?:-?(?:0|[1-9]\d{0,17}))?)?)\), ?\} *\n?",
    re.DOTALL,
)
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
        try:
            return zipfile.is_zipfile(io.BytesIO(body))
        except NOT_A_ZIP:  # of several disks, for example
            return False
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
        # all in quotes: the writer leaves carriage returns bare, and a first letter may look like a byte order mark
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerows([rows[0], *(rows[1 + number] for number in numbers)])
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
            if len(arrays) < len(members):
                raise BadReading("two of its arrays have one name: give each its own")
    except (*NOT_A_ZIP, zlib.error) as error:
        raise BadReading(f"it is no .npz file: {error!s:.100}") from error
    found = rows_of(arrays)

    def subset(numbers: Sequence[int]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:  # numpy.savez takes names as arguments, and some are its own
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array[list(numbers)], allow_pickle=False)
        return out.getvalue()

    return Batch(found, subset)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """An array of an archive. Never more is unpacked than the archive's list says, which was looked at."""
    with archive.open(member) as stream:
        return _array_of(member.filename, stream.read(member.file_size))


def _array_of(name: str, body: bytes) -> Array:
    """Read an array of a .npy file; its header is believed only as far as the bytes are there."""
    begin, header = _header_of(body)
    if header is None:
        raise BadReading(f"its array {name:.50} is none that numpy.save writes")
    kind = (header["kind"] or b"V").decode()  # fields have no kind of one word
    try:
        dtype = np.dtype(kind)
    except (TypeError, ValueError) as error:
        raise BadReading(f"its array {name:.50} holds {kind}: {error!s:.100}") from error
    if dtype.kind not in "biufU":
        raise BadReading(f"its array {name:.50} holds {dtype!s:.50}, and neither numbers nor text: it is not unpickled")
    shape = tuple(int(side) for side in header["shape"].split(b",") if side.strip())
    size = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or not size or size != len(body) - begin or len(shape) > _MOST_SIDES:
        raise BadReading(f"its array {name:.50} says {shape!s:.50}, and has {len(body) - begin} bytes")
    if dtype.kind == "U" and np.frombuffer(body, f"{dtype.str[0]}u4", offset=begin).max() > sys.maxunicode:
        raise BadReading(f"its array {name:.50} holds text with letters that there are not")
    array = np.frombuffer(body, dtype, offset=begin)
    return array.reshape(shape[::-1]).T if header["fortran"] == b"True" else array.reshape(shape)


def _header_of(body: bytes) -> tuple[int, re.Match[bytes] | None]:
    """Find where the numbers of a .npy file begin, and its header; None if numpy.save writes no such header.

    The header looks like Python, and numpy evaluates it as such. Here it is only matched.
    """
    width = {_NPY + b"\x01\x00": 2, _NPY + b"\x02\x00": 4}.get(body[:8], 0)
    begin = 8 + width + int.from_bytes(body[8 : 8 + width], "little")
    return begin, _HEADER.fullmatch(body[8 + width : begin]) if begin <= 8 + width + LONGEST_HEADER else None


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
