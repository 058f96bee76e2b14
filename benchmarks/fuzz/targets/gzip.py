"""Files of readings that are packed with gzip: as they are, or readable ones (`framing.packed`)."""

import gzip
import zlib
from collections.abc import Mapping

import numpy as np

from benchmarks.fuzz.framing import archive, members, packed
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.npy import saved
from benchmarks.fuzz.targets.readings import check_file

CSV = b"x,y\n1,2\n3,kitchen\n"


def check(data: bytes) -> None:
    """Check that a part of a file that was read is such a file, with the same readings. Bytes that begin with N hold
    arrays."""
    if data[:1] == b"N":
        check_file("a.npz.gz", packed(data[1:]))
    else:
        check_file("a.jsonl.gz", packed(data))


def seeds() -> Mapping[str, bytes]:
    """Return packed files, and files that are not."""
    whole = gzip.compress(b'{"x": 1}\n{"x": 2}\n', mtime=0)
    named = whole[:3] + b"\x08" + whole[4:10] + b"a.jsonl\0" + whole[10:]
    return {
        "readable": b'GZ:{"x": 1}\n[1, 2]\n',
        "raw": whole,
        "named": named,
        "two-parts": whole + whole,
        "zeros-behind": whole + bytes(100),
        "something-behind": whole + b"x",
        "arrays": b"NGZ:" + archive(members(x=saved(np.arange(2)))),
        "bomb": gzip.compress(bytes(9 * 2**20), mtime=0),
        "bomb-of-parts": gzip.compress(b" " * 2**20, mtime=0) * 9,
        "cut": whole[:-9],
        "another-sum": whole[:-8] + b"\0" * 8,
        "another-way": b"\x1f\x8b\x07" + whole[3:],
        "not-gzip": zlib.compress(CSV),
        "empty-within": b"GZ:",
        "empty": b"",
    }


TARGET = Target(
    "gzip",
    check,
    seeds,
    {"sumus.node.packed": ("unpacked_gzip",)},
    (b"\x1f\x8b\x08\x00", b"\x1f\x8b\x08\x1f", b"GZ:", b"NGZ:", b'{"x": 1}\n', b"\0\0"),
    memory=4096,  # packed a thousand to one, read up to `batch.MOST_TEXT`, and copied once
)
