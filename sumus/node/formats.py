"""Reads files of readings: text in columns, JSON, InfluxDB's line protocol, arrays and pictures; files may be compressed. Input
is not trusted: lengths are checked before memory is allocated, and data are never unpickled.

    batch = read_file("kitchen.csv", body)
    batch.found[3]                     a reading: a mapping of names to values; a BadReading if it is refused
    batch.subset([3])                  a file of the same format with only these readings
"""

import codecs
import gzip
import io
import itertools
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from sumus.errors import ParticipantError
from sumus.json_names import repeated
from sumus.node.batch import MOST_BYTES, MOST_READINGS, MOST_TEXT, Batch, Beginning, NothingReadable, Raw, of_lines
from sumus.node.delimited import read_delimited
from sumus.node.line_protocol import read_line_protocol
from sumus.node.packed import unpacked_gzip, unpacked_zip
from sumus.node.pictures import read_picture
from sumus.node.reading import BadReading
from sumus.text import amount, many, over
from sumus.types import Array
from sumus.wire.bundle import NOT_A_ZIP
from sumus.wire.tensors import decode_tree

LONGEST_HEADER = 10_000
"""The longest header of an array in a file, in bytes."""
_MOST_ARRAYS, _MOST_SIDES = 64, 32
_NPY = b"\x93NUMPY"
_HEADER = re.compile(
    rb"\{'descr': (?:'(?P<kind>[|<>=]?[?biufcmMOSUV]\d{0,9}(?:\[\w+\])?)'|\[.*\]), 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:(?:-?(?:0|[1-9]\d{0,17}), ?)+(?:-?(?:0|[1-9]\d{0,17}))?)?)\), ?\} *\n?",
    re.DOTALL,
)
MOST_CONTAINERS = 4 * MOST_READINGS
"""The maximum number of lists and objects in one JSON text: in memory, each takes many times the two bytes of its brackets."""
_NO_NUMBER = re.compile(rb"[:\[,]\s*(-?(?:NaN|Infinity|nan|inf))\b")
_COLUMNS = (".csv", ".tsv", ".tab")
_JSON = (".jsonl", ".ndjson", ".json")
_PROTOCOL = (".lp",)
LINES = (*_COLUMNS, *_JSON, *_PROTOCOL)
"""The endings of files that are read line by line."""
_PICTURES = (".jpg", ".jpeg", ".png")
_WHOLE = (".npz", *_PICTURES)
MOST_TOGETHER = 4 * MOST_BYTES
"""The maximum number of bytes that all arrays and pictures of one archive may have when unpacked."""
SUFFIXES = (*LINES, *_WHOLE, ".zip", *(f"{suffix}.gz" for suffix in (*LINES, ".npz")))
"""The endings of all files that are read."""
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
    b"PK\x03\x04": "a ZIP archive (as .xlsx is)", b"\x1f\x8b": "packed by gzip", b"%PDF": "a PDF document",
    b"SQLite format 3\0": "an SQLite database", b"\xd0\xcf\x11\xe0": "an old Office document", b"PAR1": "a Parquet file",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"BZh": "packed by bzip2", b"\xfd7zXZ": "packed by xz",
    b"(\xb5/\xfd": "packed by zstd",
}  # fmt: skip


def read_file(name: str, body: bytes, before: Beginning | None = None) -> Batch:
    """Read the readings of a file; the ending of its name decides the format.

    Args:
        name: The file's name.
        body: The file's bytes.
        before: The facts from the beginning of a text file, if the bytes are a later part of it.

    Raises:
        BadReading: The file does not have the format that its name indicates.
    """
    lower = name.lower()
    if lower.endswith(".gz"):
        return _of_gzip(name[:-3], body)
    if lower.endswith(".zip"):
        return _of_zip(body)
    if lower.endswith(".npz"):
        _check_length(body, MOST_BYTES)
        return read_npz(body)
    if lower.endswith(_PICTURES):
        _check_length(body, MOST_BYTES)
        return read_picture(name, body)
    _check_text(body, lower.endswith(_JSON))
    if lower.endswith(_COLUMNS):
        batch = read_delimited(body, before)  # names alone are a file without readings
    else:
        batch = read_line_protocol(body) if lower.endswith(_PROTOCOL) else read_lines(body)
        if not batch.found:
            raise NothingReadable("it contains no reading")
    if len(batch.found) > MOST_READINGS:
        raise BadReading(f"it has {len(batch.found):,} readings, but at most {MOST_READINGS:,} are read: split it")
    return batch


def is_read(name: str) -> bool:
    """Return whether files with this name are read."""
    return name.lower().endswith(SUFFIXES)


def grows(name: str) -> bool:
    """Return whether files with this name are read line by line, so that lines can be appended."""
    return name.lower().endswith(LINES)


def is_whole(name: str, body: bytes) -> bool:
    """Return whether a file is complete, judging by its end. Formats whose end need not be checked count as complete."""
    lower = name.lower()
    if lower.endswith((".npz", ".zip")):
        try:
            return zipfile.is_zipfile(io.BytesIO(body))
        except NOT_A_ZIP:  # an archive that is split over several disks, for example
            return False
    if lower.endswith(".gz"):
        try:
            unpacked_gzip(body, MOST_BYTES)
        except BadReading as bad:
            return bool(body) and "cut off" not in str(bad)
        return bool(body)
    if lower.endswith(_PICTURES):
        return body.rstrip(b"\0\r\n").endswith((b"\xff\xd9", b"IEND\xaeB`\x82"))
    return body.endswith((b"\n", b"\r", b"\n\0")) or body.startswith((codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE))


def _check_length(body: bytes, most: int) -> None:
    if len(body) > most:
        raise BadReading(f"it has {over(len(body), most)} are read: split it")


def _check_text(body: bytes, each_line: bool) -> None:
    """Refuse bytes that are not UTF-8 text, or are too long.

    Args:
        body: The bytes.
        each_line: Whether each line is decoded separately later, so that the text need not be decoded here.
    """
    if len(body) > MOST_TEXT or max(body.count(b"\n"), body.count(b"\r")) > MOST_READINGS + 100:
        raise BadReading(f"it has {over(len(body), MOST_TEXT)}, and {MOST_READINGS:,} readings, are read: split it")
    for mark, kind in _MARKS.items():
        if body.startswith(mark):
            raise BadReading(f"it is {kind}, and not text in UTF-8: save it as text, in UTF-8")
    if b"\0" in body:
        kind = "UTF-16 without a byte order mark" if body.count(b"\0") * 3 > len(body) else "not text"
        raise BadReading(f"it contains zero bytes, so it is {kind}: save it as text, in UTF-8")
    try:
        if not each_line:
            body.decode()
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise BadReading(
            f"it is not UTF-8: line {line} has the byte {body[error.start]:#04x}, as in Latin-1 or another code page: "
            "save it in UTF-8"
        ) from error


def _of_gzip(name: str, body: bytes) -> Batch:
    if name.lower().endswith((".gz", ".zip")) or not is_read(name):
        raise BadReading(f"it contains {name!r:.100}, which is not a file of readings")
    _check_length(body, MOST_BYTES)
    batch = read_file(name, unpacked_gzip(body, MOST_TEXT if grows(name) else MOST_BYTES))
    return Batch(batch.found, lambda numbers: gzip.compress(batch.subset(numbers), mtime=0), batch.where)


def _size(batch: Batch) -> int:
    """Return the size of all arrays in a batch's readings, in bytes. Compressed, they may have been a thousand times smaller."""
    good = (one for one in batch.found if not isinstance(one, BadReading))
    return sum(value.nbytes for one in good for value in one.values() if isinstance(value, np.ndarray | np.generic))


def _of_zip(body: bytes) -> Batch:
    """Read the readings of all files in an archive, in the archive's order."""
    _check_length(body, MOST_BYTES)
    parts, size = dict[str, Batch](), 0
    for name, member in unpacked_zip(body, MOST_BYTES).items():
        if name.lower().endswith((".gz", ".zip")) or not is_read(name):
            raise BadReading(f"it contains {name!r:.100}, which is not a file of readings: leave that file out")
        try:
            parts[name] = read_file(name, member)
        except BadReading as bad:
            raise BadReading(f"{name:.100}: {bad}") from bad
        size += _size(parts[name])
        if size > MOST_TOGETHER:
            raise BadReading(f"together, its arrays and pictures have more than {MOST_TOGETHER} bytes: split it")
    places = [(name, number) for name, batch in parts.items() for number in range(len(batch.found))]
    if not parts or len(places) > MOST_READINGS:
        raise BadReading(f"it has {many(len(places), 'reading')}: give 1 to {MOST_READINGS:,}")

    def subset(numbers: Sequence[int]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, each in itertools.groupby((places[number] for number in numbers), lambda place: place[0]):
                archive.writestr(name, parts[name].subset([number for _, number in each]))
        return out.getvalue()

    def where(number: int) -> str:
        name, at = places[number]
        return f"{name}, {parts[name].where(at)}"

    return Batch([one for batch in parts.values() for one in batch.found], subset, where)


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_json(body: bytes) -> list[Raw | BadReading]:
    """Read one reading, or a list of readings."""
    value = _decoded(body)
    found = cast(list[Any], value) if isinstance(value, list) else [value]
    if not found or len(found) > MOST_READINGS:
        raise BadReading(f"it has {many(len(found), 'reading')}: give 1 to {MOST_READINGS:,}")
    return [_mapping(each) for each in found]


def read_lines(body: bytes) -> Batch:
    """Read one JSON object per line; or one document, which is a list of objects or one object over several lines."""
    found, pieces, begins, numbers, begin = list[Raw | BadReading](), list[bytes](), list[int](), list[int](), 0
    for number, line in enumerate(body.split(b"\n"), 1):
        if line.strip().removeprefix(codecs.BOM_UTF8):
            try:
                one = _mapping(_decoded(line))
            except BadReading as bad:
                one = bad
            found.append(one)
            pieces.append(line)
            begins.append(begin)
            numbers.append(number)
        begin += len(line) + 1
    if found and isinstance(found[0], BadReading) and (document := _document(body)) is not None:
        return document
    return of_lines(found, pieces, begins, numbers, Beginning())


def _document(body: bytes) -> Batch | None:
    """Read the readings of one JSON document; None if the text is not one."""
    try:
        value = _decoded(body)
    except BadReading as bad:
        text = body.removeprefix(codecs.BOM_UTF8).lstrip()
        spread = text.startswith(b"[") or text[1:].lstrip(b" \t").startswith((b"\n", b"\r"))
        if spread and text[:1] in (b"[", b"{") and b"}\n{" not in text:
            raise BadReading(f"it is neither a JSON document nor one JSON object per line; {bad}") from bad
        return None
    values = cast(list[Any], value) if isinstance(value, list) else [value]
    return Batch(
        [_mapping(each) for each in values],
        lambda rows: msgspec.json.encode([values[row] for row in rows]) + b"\n",
    )


def _decoded(body: bytes) -> Any:
    body = body.removeprefix(codecs.BOM_UTF8)
    if (many := body.count(b"[") + body.count(b"{")) > MOST_CONTAINERS:
        raise BadReading(
            f"it has {many} lists and objects, but at most {MOST_CONTAINERS} are read: give fewer readings at once"
        )
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if (word := _NO_NUMBER.search(body)) is not None:
            raise BadReading(f"it contains {word[1].decode()}, which is not a JSON value: write null") from error
        raise BadReading(f"it is not JSON: {error!s:.100}") from error
    if not _plain(body, value) and (twice := repeated(body)) is not None:
        name, line = twice
        where = f", the second time in line {line}" if b"\n" in body.strip() else ""
        raise BadReading(f"the name {name!r:.80} appears twice in one object{where}: keep one of the two values")
    return value


def _plain(body: bytes, value: Any) -> bool:
    """Return whether a text of flat objects has as many colons as its objects have names; if so, no name is repeated."""
    objects = cast(list[Any], value) if isinstance(value, list) else [value]
    names = [len(cast(dict[str, Any], each)) for each in objects if isinstance(each, dict)]
    return len(names) == body.count(b"{") and sum(names) == body.count(b":")


def _mapping(value: Any) -> Raw | BadReading:
    if isinstance(value, dict):
        return cast(Raw, value)
    return BadReading("it is not a JSON object: send each reading as an object with values by name")


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_npz(body: bytes) -> Batch:
    """Read arrays that `numpy.savez` wrote, with one row for each reading. They are never unpickled; if they are too large,
    they are refused before they are unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if len(members) > _MOST_ARRAYS or unpacked > MOST_BYTES:
                raise BadReading(
                    f"it has {many(len(members), 'array')}, and at most {_MOST_ARRAYS} are allowed; unpacked, it has "
                    f"{over(unpacked, MOST_BYTES)} are allowed: split it"
                )
            if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise BadReading("its compression is not supported: write the file with numpy.savez")
            arrays = {member.filename.removesuffix(".npy"): _member(archive, member) for member in members}
            if len(arrays) < len(members):
                raise BadReading("two of its arrays have the same name: give each array its own")
    except (*NOT_A_ZIP, zlib.error) as error:
        raise BadReading(f"it is not a .npz file: {error!s:.100}") from error
    found = rows_of(arrays)

    def subset(numbers: Sequence[int]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:  # numpy.savez takes names as keywords, and uses some itself
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array[list(numbers)], allow_pickle=False)
        return out.getvalue()

    return Batch(found, subset)


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """Read an array of an archive. Never unpack more than the archive's list declares, which was checked before."""
    with archive.open(member) as stream:
        return _array_of(member.filename, stream.read(member.file_size))


def _array_of(name: str, body: bytes) -> Array:
    """Read an array of a .npy file; its header is trusted only if it matches the number of bytes."""
    begin, header = _header_of(body)
    if header is None:
        raise BadReading(f"its array {name:.50} was not written by numpy.save")
    kind = (header["kind"] or b"V").decode()  # a dtype with fields has no kind in one word
    try:
        dtype = np.dtype(kind)
    except (TypeError, ValueError) as error:
        raise BadReading(f"its array {name:.50} holds {kind}: {error!s:.100}") from error
    if dtype.kind not in "biufU":
        raise BadReading(
            f"its array {name:.50} holds {dtype!s:.50}, which are neither numbers nor text: pickled objects are not read"
        )
    shape = tuple(int(side) for side in header["shape"].split(b",") if side.strip())
    size = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or not size or size != len(body) - begin or len(shape) > _MOST_SIDES:
        raise BadReading(f"its array {name:.50} declares the shape {shape!s:.50}, but has {amount(len(body) - begin)}")
    if dtype.kind == "U" and np.frombuffer(body, f"{dtype.str[0]}u4", offset=begin).max() > sys.maxunicode:
        raise BadReading(f"its array {name:.50} holds text with invalid characters")
    array = np.frombuffer(body, dtype, offset=begin)
    return array.reshape(shape[::-1]).T if header["fortran"] == b"True" else array.reshape(shape)


def _header_of(body: bytes) -> tuple[int, re.Match[bytes] | None]:
    """Find the offset of the numbers in a .npy file, and its header; None if numpy.save does not write such a header.

    The header is a Python literal, which numpy would evaluate. Here it is only compared with a pattern.
    """
    width = {_NPY + b"\x01\x00": 2, _NPY + b"\x02\x00": 4}.get(body[:8], 0)
    begin = 8 + width + int.from_bytes(body[8 : 8 + width], "little")
    return begin, _HEADER.fullmatch(body[8 + width : begin]) if begin <= 8 + width + LONGEST_HEADER else None


def read_safetensors(body: bytes) -> list[Raw | BadReading]:
    """Read tensors with one row for each reading."""
    try:
        return rows_of(decode_tree(body))
    except ParticipantError as error:
        raise BadReading(str(error)) from error


def rows_of(arrays: Mapping[str, Array]) -> list[Raw | BadReading]:
    """Make one reading from each row of arrays that all have the same number of rows."""
    lengths = {name: array.shape[0] if array.ndim else -1 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise BadReading(f"its arrays do not all have one row per reading: {dict(list(lengths.items())[:8])}")
    count = next(iter(lengths.values()))
    if not 0 < count <= MOST_READINGS:
        raise BadReading(f"it has {many(count, 'reading')}: give 1 to {MOST_READINGS:,}")
    return [
        {name: str(array[row]) if array.dtype.kind == "U" else array[row] for name, array in arrays.items()}
        for row in range(count)
    ]
