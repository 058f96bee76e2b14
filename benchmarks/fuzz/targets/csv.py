"""CSV files that are put into a node's folder."""

from collections.abc import Mapping

from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.readings import check_file


def check(data: bytes) -> None:
    """A part of a file that was read is such a file, with the same readings in it."""
    check_file("a.csv", data)


def seeds() -> Mapping[str, bytes]:
    """Return CSV as programs and people write it, and files that are none."""
    return {
        "plain": b"t,u,place\n1,-2.5e-3,kitchen\n+07,nan,\n",
        "quoted": b'\xef\xbb\xbft, u \r\n"a, ""b""","c\r\nd"\r\n\r\n1_0,0x1\r\n',
        "one-column": b'x\n""\n1\n',
        "numbers": b"x\n1.\n.5\n1e400\n-Infinity\n12345678901234567890\n" + b"9" * 400 + b"\n",
        "rows-of-other-lengths": b"x,y\n1\n1,2,3\n1,2\n",
        "mark-in-a-name": b"\xef\xbb\xbf\xef\xbb\xbfx,y\n1,2\n",
        "carriage-returns": b'x,y\r1,2\r"a\rb",3\r',
        "zero-byte": b"x\0y,z\n1,\0\n",
        "name-twice": b"x, x\n1,2\n",
        "names-alone": b"x,y\n",
        "open-quote": b'x\n"1\n2\n',
        "long-field": b'x\n"' + b"y" * 132_000 + b'"\n',
        "too-many-rows": b"x\n" + b"\n" * 100_003,
        "too-long": b"x\n" + b" " * (8 * 2**20),
        "no-text": b"x\n\xff\n",
        "empty": b"",
        "blank-lines": b"\n\n\n",
    }


TARGET = Target(
    "csv",
    check,
    seeds,
    {"sumus.node.formats": ("read_file", "is_whole", "read_csv", "_value")},
    (b'"', b'""', b",", b"\r\n", b"\xef\xbb\xbf", b"nan", b"1e9", b"_", b"\0", b"\xe2\x80\xa8", b"\x85"),
)
