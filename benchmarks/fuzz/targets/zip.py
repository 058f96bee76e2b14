"""Archives of files of readings: zip files as they are, or readable ones (`framing.archive`)."""

import zipfile
from collections.abc import Mapping

import numpy as np

from benchmarks.fuzz.framing import BREAK, archive, members
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.npy import saved
from benchmarks.fuzz.targets.npz import packed_member
from benchmarks.fuzz.targets.readings import check_file


def check(data: bytes) -> None:
    """Check that a part of an archive that was read is such an archive, with the same readings."""
    check_file("a.zip", archive(data))


def seeds() -> Mapping[str, bytes]:
    """Return archives of files of readings, and files that are not."""
    lines = b'a.jsonl\n{"x": 1}\n{"x": 2}\n'
    raw = archive(lines)
    directory = raw.index(b"PK\x01\x02")

    def patched(at: int, new: bytes) -> bytes:
        return raw[: directory + at] + new + raw[directory + at + len(new) :]

    return {
        "lines": lines,
        "two": lines + BREAK + b"b/c.csv\nx,y\n1,2\n",
        "raw": raw,
        "arrays": b"a.npz\n" + archive(members(x=saved(np.arange(2)))),
        "bomb-within": packed_member(archive(members(x=saved(np.zeros(2_000_000, np.int8)))), "a.npz"),
        "archives-within": b"a.zip\n" + archive(b"b.csv\nx\n1\n") + BREAK + b"a.csv.gz\nx",
        "not-readings": b"a.txt\nhello\n",
        "not-seen": b"__MACOSX/a.csv\nx" + BREAK + b"b/\n" + BREAK + lines,
        "same-name": lines + BREAK + lines,
        "bad-within": b"a.npz\nx",
        "no-reading": b"a.csv\nx,y\n",
        "packed": packed_member(b"x\n1\n" * 100, "a.csv"),
        "packed-otherwise": packed_member(b"x\n1\n", "a.csv", zipfile.ZIP_LZMA),
        "encrypted": patched(8, b"\1\0"),
        "says-too-much": patched(24, b"\xfe\xff\xff\xff"),
        "says-less": patched(24, b"\1\0\0\0"),
        "another-sum": patched(16, b"\0\0\0\0"),
        "offset-beyond": patched(42, b"\xff\xff\xff\x7f"),
        "cut": raw[:-30],
        "no-member": b"PK\x05\x06" + bytes(18),
        "empty": b"",
    }


TARGET = Target(
    "zip",
    check,
    seeds,
    {"sumus.node.packed": ("unpacked_zip",), "sumus.node.formats": ("_of_zip", "_size")},
    (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", BREAK, b"a.jsonl\n", b"b.csv\n", b"c.npz\n", b"__MACOSX/"),
    memory=4096,
)
