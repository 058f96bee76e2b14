"""Arrays of `numpy.save`, as the one member of an `.npz` file."""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.fuzz.framing import archive, members
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.readings import check_file, shown
from sumus.node.formats import read_npz
from sumus.node.reading import BadReading


def check(data: bytes) -> None:
    """Check that an array that is read is the one that numpy reads, and that a part of it can be written and read
    again."""
    body = archive(members(x=data))
    check_file("a.npz", body)
    try:
        rows = read_npz(body).found
    except BadReading:
        return
    theirs = np.load(io.BytesIO(data), allow_pickle=False)
    assert len(rows) == len(theirs)
    for mine, row in zip(rows[:3], theirs, strict=False):
        assert isinstance(mine, dict)
        assert shown(mine["x"]) == shown(str(row) if theirs.dtype.kind == "U" else row)


def saved(array: Any) -> bytes:
    """Return an array as `numpy.save` writes it."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def written(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return a `.npy` file with this header."""
    length = len(header).to_bytes(4 if version == b"\x02\x00" else 2, "little")
    return b"\x93NUMPY" + version + length + header.encode() + data


def seeds() -> Mapping[str, bytes]:
    """Return arrays of every kind, and headers that are wrong in one way each."""
    of = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}".format
    kinds = ["?", "i1", "<u2", ">i4", "<f2", "<f8", "<U3", ">U1"]
    arrays = {f"of-{kind.strip('<>?') or 'bool'}": saved(np.ones((2, 1)).astype(kind)) for kind in kinds}
    return arrays | {
        "fortran": saved(np.asfortranarray(np.arange(6).reshape(2, 3))),
        "scalar": saved(np.float32(1)),
        "no-rows": saved(np.zeros((0, 2))),
        "version-2": written(of("'<f4'", "(1,)"), b"\0" * 4, b"\x02\x00"),
        "version-3": written(of("'<f4'", "(1,)"), b"\0" * 4, b"\x03\x00"),
        "letters-beyond": written(of("'<U1'", "(1,)"), b"\xff" * 4),
        "half-a-letter": written(of("'<U1'", "(1,)"), b"\x00\xd8\x00\x00"),
        "letters-of-zeros": saved(np.array(["", "a\0b\0"])),
        "complex": saved(np.ones(2, complex)),
        "of-fields": saved(np.zeros(2, [("a", "i4")])),
        "no-such-width": written(of("'<f3'", "(1,)"), b"\0" * 3),
        "times": saved(np.array(["2020-01-01"], "M8[D]")),
        "pickle": pickle.dumps({"a": 1}),
        "objects": written(of("'|O'", "(1,)"), b"\x80\x04N."),
        "shape-huge": written(of("'<f4'", "(10000000000,)")),
        "shape-negative": written(of("'<f4'", "(-1, -1)"), b"\0" * 4),
        "shape-true": written(of("'|b1'", "(True,)"), b"\0"),
        "width-zero": written(of("'<U0'", "(10000000000,)")),
        "shape-with-zero": written(of("'<f4'", "(2, 0)")),
        "many-sides": written(of("'|b1'", f"({'1, ' * 40})"), b"\1"),
        "long-integer": written(of("'<f4'", "(1L,)"), b"\0" * 4),
        "brackets": written("(" * 3000),
        "header-long": written(" " * 10_001),
        "header-no-text": b"\x93NUMPY\x01\x00\x02\x00\xff\xff",
        "more-than-said": saved(np.ones(2)) + b"\0",
        "cut": saved(np.ones(2))[:-1],
        "magic-alone": b"\x93NUMPY",
        "empty": b"",
    }


TARGET = Target(
    "npy",
    check,
    seeds,
    {"sumus.node.formats": ("_member", "_array_of", "_header_of")},
    (
        b"'descr': '<f4'",
        b"'<U1'",
        b"'|b1'",
        b"'fortran_order': True",
        b"'shape': (",
        b"1L",
        b"\x93NUMPY\x01\x00",
        b"'V1'",
        b"'M8'",
    ),
)
