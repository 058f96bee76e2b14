"""Packed files: .gz, and .zip archives of files with readings. Only readable files are unpacked.

body = unpacked_gzip(packed, most)
members = unpacked_zip(packed, most)            name → bytes
"""

import io
import zipfile
import zlib
from collections.abc import Mapping

from sumus.node.reading import BadReading
from sumus.text import amount, many, over
from sumus.wire.bundle import NOT_A_ZIP

MOST_MEMBERS = 1000
"""The maximum number of files in one archive."""
_UNSEEN = ("__MACOSX/",)
"""Entries that archive programs add on their own."""


def unpacked_gzip(packed: bytes, most: int) -> bytes:
    """Unpack a .gz file of one or more members.

    Args:
        packed: The file's bytes.
        most: The maximum number of bytes that the file may have when unpacked.

    Raises:
        BadReading: It is not a .gz file, it is cut off, or it has too many bytes.
    """
    out, rest = bytearray(), packed
    while rest:
        unpacking = zlib.decompressobj(wbits=31)
        try:
            out += unpacking.decompress(rest, most + 1 - len(out))
        except zlib.error as error:
            raise BadReading(f"it is not a .gz file: {error!s:.100}") from error
        if len(out) > most:
            raise BadReading(f"unpacked, it has more than {amount(most)}, which is the limit: split it")
        if not unpacking.eof:
            raise BadReading("it is cut off: its end is missing")
        rest = unpacking.unused_data.lstrip(b"\0")
    return bytes(out)


def unpacked_zip(packed: bytes, most: int) -> Mapping[str, bytes]:
    """Unpack the files of a .zip archive; return them by name, in the archive's order.

    Args:
        packed: The archive's bytes.
        most: The maximum number of bytes that all files together may have when unpacked.

    Raises:
        BadReading: It is not an archive, is encrypted, or has too many files or bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = [each for each in archive.infolist() if not (each.is_dir() or each.filename.startswith(_UNSEEN))]
            size = sum(member.file_size for member in members)
            if len(members) > MOST_MEMBERS or size > most:
                raise BadReading(
                    f"it has {many(len(members), 'file')}, and at most {MOST_MEMBERS:,} are allowed; unpacked, it has "
                    f"{over(size, most)} are allowed: split it"
                )
            if any(member.flag_bits & 1 for member in members):
                raise BadReading("it is encrypted: pack it without a password")
            if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise BadReading("its compression is not supported: use an ordinary .zip")
            if len({member.filename for member in members}) < len(members):
                raise BadReading("two of its files have the same name: give each file its own")
            found = dict[str, bytes]()
            for member in members:
                with archive.open(member) as stream:
                    found[member.filename] = stream.read(member.file_size)
            return found
    except (*NOT_A_ZIP, zlib.error) as error:
        raise BadReading(f"it is not a .zip file: {error!s:.100}") from error
