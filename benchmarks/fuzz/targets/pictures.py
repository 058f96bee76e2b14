"""Pictures in a node's folder: JPEG and PNG as they are, or readable PNG (`framing.picture`)."""

import io
import struct
from collections.abc import Mapping
from unittest.mock import patch

import numpy as np
from PIL import Image

from benchmarks.fuzz.framing import BREAK, picture
from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.readings import shown
from sumus.node.formats import is_whole, read_file
from sumus.node.reading import BadReading

FEW_POINTS = 2**18
"""The most points of a picture here, so that no input takes long: fifty bytes may unpack to the sixteen million points
that are allowed."""


def check(data: bytes) -> None:
    """Check that a picture that was read has points of eight bits in one or three colours, and is read again unchanged."""
    with patch("sumus.node.pictures.MOST_POINTS", FEW_POINTS):
        _check(picture(data))


def _check(body: bytes) -> None:
    is_whole("a.png", body)
    try:
        batch = read_file("a.png", body)
    except BadReading:
        return
    points = batch.found[0]["inputs"]  # pyright: ignore[reportIndexIssue] - a picture is one reading
    assert shown(read_file("a.png", batch.subset([0])).found) == shown(batch.found)
    assert isinstance(points, np.ndarray)
    assert points.dtype == np.uint8
    assert points.ndim == 2 or points.shape[2:] == (3,)
    assert points.size


def seeds() -> Mapping[str, bytes]:
    """Return small pictures of every kind that is read, and of kinds that are not."""
    return {
        "readable": _png(4, 2, 2, b"\0" + bytes(range(12)) + b"\0" + bytes(12)),
        "grey": _png(3, 1, 0, b"\0abc"),
        "deep": _png(1, 1, 0, b"\0ab", depth=16),
        "clear": _png(1, 1, 6, b"\0abcd"),
        "chunks": _png(1, 1, 0, b"\0a") + BREAK + b"tEXta\0b" + BREAK + b"zTXta\0\0x" + BREAK + b"iTXtx",
        "enormous": _png(2**30, 2**30, 0, b""),
        "too-large": _png(2**13, 2**12, 0, b"\0"),
        "no-points": _png(0, 0, 0, b""),
        "palette": _saved("PNG", "P"),
        "palette-clear": _saved("PNG", "P", transparency=0),
        "one-bit": _saved("PNG", "1"),
        "jpeg": _saved("JPEG", "RGB"),
        "jpeg-grey": _saved("JPEG", "L"),
        "jpeg-four-inks": _saved("JPEG", "CMYK"),
        "turned": _turned(),
        "progressive": _saved("JPEG", "RGB", progressive=True),
        "another-kind": _saved("GIF", "L"),
        "cut": _saved("PNG", "RGB")[:-20],
        "empty": b"",
    }


def _png(width: int, height: int, colours: int, points: bytes, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return b"PNG:" + BREAK.join((b"IHDR" + head, b"IDAT" + points, b"IEND"))


def _saved(form: str, mode: str, **how: object) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (9, 7)).save(out, form, **how)
    return out.getvalue()


def _turned() -> bytes:
    """Return a picture that must be rotated to be shown."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(out, "JPEG", exif=exif)
    return out.getvalue()


TARGET = Target(
    "pictures",
    check,
    seeds,
    {"sumus.node.pictures": ()},
    (
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"PLTE",
        b"tRNS",
        b"eXIf",
        b"iCCP",
        b"acTL",
        b"fdAT",
        BREAK,
        b"\xff\xd8",
        b"\xff\xe1",
        b"\xff\xd9",
    ),
    memory=4096,
)
