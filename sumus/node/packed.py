"""Files that are packed: .gz, and .zip with files of readings in it. Nothing is unpacked beyond what is read.

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
"""Files in one archive."""
_UNSEEN = ("__MACOSX/",)
"""What programs add to an archive that nobody put there."""


def unpacked_gzip(packed: bytes, most: int) -> bytes:
    """Unpack a .gz file of one part or several.

    Args:
        packed: The file.
        most: The most bytes that it may have, unpacked.

    Raises:
        BadReading: It is no such file, it is cut off, or it has more bytes.
    """
    out, rest = bytearray(), packed
    while rest:
        unpacking = zlib.decompressobj(wbits=31)
        try:
            out += unpacking.decompress(rest, most + 1 - len(out))
        except zlib.error as error:
            raise BadReading(f"it is no .gz file: {error!s:.100}") from error
        if len(out) > most:
            raise BadReading(f"unpacked it has more than {amount(most)}, and no more is read: split it")
        if not unpacking.eof:
            raise BadReading("it is cut off: its end is not there")
        rest = unpacking.unused_data.lstrip(b"\0")
    return bytes(out)


def unpacked_zip(packed: bytes, most: int) -> Mapping[str, bytes]:
    """Unpack the files of a .zip archive, by name, in its order.

    Args:
        packed: The archive.
        most: The most bytes that all of them may have, unpacked.

    Raises:
        BadReading: It is no archive, is encrypted, or has more files or bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = [each for each in archive.infolist() if not (each.is_dir() or each.filename.startswith(_UNSEEN))]
            size = sum(member.file_size for member in members)
            if len(members) > MOST_MEMBERS or size > most:
                raise BadReading(
                    f"unpacked it has {many(len(members), 'file')} of at most {MOST_MEMBERS:,}, and {over(size, most)} are read: "
                    "split it"
                )
            if any(member.flag_bits & 1 for member in members):
                raise BadReading("it is encrypted: pack it without a password")
            if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                raise BadReading("it is packed in a way that is not read: use a usual .zip")
            if len({member.filename for member in members}) < len(members):
                raise BadReading("two of its files have one name: give each its own")
            found = dict[str, bytes]()
            for member in members:
                with archive.open(member) as stream:
                    found[member.filename] = stream.read(member.file_size)
            return found
    except (*NOT_A_ZIP, zlib.error) as error:
        raise BadReading(f"it is no .zip file: {error!s:.100}") from error
