"""Archives of arrays: zip files as they are, or readable ones (`framing.archive`)."""

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from benchmarks.fuzz.framing import BREAK, archive, members
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.npy import saved
from benchmarks.fuzz.targets.readings import check_file


def check(data: bytes) -> None:
    """Check that a part of an archive that was read is such an archive, with the same readings."""
    check_file("a.npz", archive(data))


def seeds() -> Mapping[str, bytes]:
    """Return archives of arrays, and files that are not."""
    two = members(x=saved(np.arange(2)), y=saved(np.array(["a", "b"])))
    raw = archive(two)
    directory = raw.index(b"PK\x01\x02")
    end = raw.rindex(b"PK\x05\x06")

    def patched(at: int, new: bytes) -> bytes:
        return raw[: directory + at] + new + raw[directory + at + len(new) :]

    return {
        "two": two,
        "raw": raw,
        "packed": packed_member(saved(np.zeros(2000, np.int8))),
        "bomb": packed_member(saved(np.zeros(2_000_000, np.int8))),
        "packed-otherwise": packed_member(b"x", method=zipfile.ZIP_BZIP2),
        "same-name": members(x=saved(np.arange(2))) + BREAK + members(x=saved(np.arange(3, 5))),
        "same-name-but-its-ending": b"x\n" + saved(np.arange(2)) + BREAK + members(x=saved(np.arange(3, 5))),
        "name-of-an-argument": members(file=saved(np.arange(2)), allow_pickle=saved(np.arange(2))),
        "name-of-a-path": b"../x.npy\n" + saved(np.arange(2)),
        "name-empty": b"\n" + saved(np.arange(2)),
        "name-no-text": patched(8, b"\0\x08").replace(b"x.npy", b"\xff.npy"),
        "name-with-zero": raw.replace(b"x.npy", b"\0.npy"),
        "other-lengths": members(x=saved(np.arange(2)), y=saved(np.arange(3))),
        "scalar": members(x=saved(np.float64(1))),
        "too-many-rows": members(x=saved(np.zeros(100_001, np.int8))),
        "too-many": BREAK.join(f"{n}\n".encode() for n in range(65)),
        "encrypted": patched(8, b"\1\0"),
        "patched-data": patched(8, b"\x20\0"),
        "version": patched(6, b"\xff\0"),
        "another-sum": patched(16, b"\0\0\0\0"),
        "says-less": patched(24, b"\1\0\0\0"),
        "says-too-much": patched(24, b"\xfe\xff\xff\xff"),
        "packed-size": patched(20, b"\xfe\xff\xff\xff"),
        "offset-beyond": patched(42, b"\xff\xff\xff\x7f"),
        "time": patched(12, b"\xff\xff\xff\xff"),
        "extra": patched(30, b"\xff\xff"),
        "sixty-four": _of_64_bits(raw, end),
        "directory-beyond": raw[: end + 16] + b"\xfe\xff\xff\xff" + raw[end + 20 :],
        "cut": raw[:-30],
        "no-member": b"PK\x05\x06" + bytes(18),
        "empty": b"",
    }


def packed_member(body: bytes, name: str = "x.npy", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return an archive of one packed member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo(name), body, method)
    return out.getvalue()


def _of_64_bits(raw: bytes, end: int) -> bytes:
    """Return an archive whose end gives its numbers in 64 bits, as large as they can be."""
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2, 2, 2**63, 2**63)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    return raw[:end] + record + locator + b"PK\x05\x06" + b"\xff" * 16 + b"\0\0"


TARGET = Target(
    "npz",
    check,
    seeds,
    {"sumus.node.formats": ("read_npz", "rows_of")},
    (
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"PK\x06\x07",
        b"\x93NUMPY\x01\x00",
        BREAK,
        b"x.npy\n",
    ),
    memory=2048,  # packed a thousand to one, and read up to `formats.MOST_BYTES`
)
