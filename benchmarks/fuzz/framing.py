"""Turns readable inputs into the binary forms that parsers take, so that a mutation of one byte does not break a length
elsewhere.

An input that does not begin like the readable form is given to the parser unchanged.
"""

import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib
from typing import Any

BREAK = b"\n====\n"
"""Separates two members of an archive."""


def tensors(data: bytes) -> bytes:
    """Return safetensors for a JSON header, a line feed and the bytes of the leaves: the header's length is put before it."""
    if data[:1] != b"{":
        return data
    header, _, leaves = data.partition(b"\n")
    return struct.pack("<Q", len(header)) + header + leaves


def readable(body: bytes) -> bytes:
    """Return the readable form of safetensors: the inverse of `tensors`, except for spaces after the header."""
    begin = 8 + struct.unpack("<Q", body[:8])[0]
    return body[8:begin].rstrip() + b"\n" + body[begin:]


def archive(data: bytes) -> bytes:
    """Return a zip file for members that each are a name, a line feed and a body, with `BREAK` between two members."""
    if data[:2] == b"PK":
        return data
    out = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore", category=UserWarning),
        zipfile.ZipFile(out, "w") as zipped,
    ):  # a name that occurs twice
        for member in data.split(BREAK)[:100]:
            name, _, body = member.partition(b"\n")
            zipped.writestr(zipfile.ZipInfo(name.decode("latin-1")[:200]), body)
    return out.getvalue()


def members(**bodies: bytes) -> bytes:
    """Return the readable form of an archive of these `.npy` members."""
    return BREAK.join(f"{name}.npy\n".encode() + body for name, body in bodies.items())


def text(value: Any) -> bytes:
    """Return a value as JSON, in bytes."""
    return json.dumps(value, ensure_ascii=False).encode()


PNG = b"\x89PNG\r\n\x1a\n"


def picture(data: bytes) -> bytes:
    """Return a PNG picture for its chunks, each a kind of four bytes and a body, with `BREAK` between two, behind `PNG:`.

    Lengths and checksums are put in, and the points of a chunk `IDAT` are packed.
    """
    if data[:4] != b"PNG:":
        return data
    out = PNG
    for chunk in data[4:].split(BREAK)[:100]:
        kind, body = chunk[:4].ljust(4, b"x"), chunk[4:]
        if kind == b"IDAT":
            body = zlib.compress(body)
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def packed(data: bytes) -> bytes:
    """Return a gzip file of the bytes after `GZ:`."""
    return gzip.compress(data[3:], mtime=0) if data[:3] == b"GZ:" else data
