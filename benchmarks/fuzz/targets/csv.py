"""CSV files that are put into a node's folder."""

from collections.abc import Mapping
from typing import Any

from benchmarks.fuzz.target import Target
from sumus.node.formats import is_whole, read_file
from sumus.node.reading import BadReading


def check(data: bytes) -> None:
    """Check that a part of a file that was read is such a file, and that a number in it is the same number, or is
    refused."""
    is_whole("a.csv", data)
    try:
        batch = read_file("a.csv", data)
    except BadReading:
        return
    good = [number for number, one in enumerate(batch.found) if not isinstance(one, BadReading)][:3]
    try:
        again = read_file("a.csv", batch.subset(good)).found
    except BadReading:  # these rows alone do not show what the other rows showed
        return
    assert len(again) == len(good)
    for one, number in zip(again, good, strict=True):
        if not isinstance(one, BadReading):
            check_same(one, batch.found[number])


def check_same(one: Any, before: Any) -> None:
    """Assert that two readings have the same numbers, if both have numbers."""
    assert list(one) == list(before)
    for value, was in zip(one.values(), before.values(), strict=True):
        if isinstance(value, int | float) and isinstance(was, int | float):
            assert repr(value) == repr(was)


def seeds() -> Mapping[str, bytes]:
    """Return CSV as programs and people write it, and files that are no CSV."""
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
        "separator-named": b"sep=;\n# a\nx;y\n21,5;1\n",
        "no-separator": b"sep=x\nx\n",
        "two-separators": b"x;y,z\n1;2,3\n",
        "thousands": b'x,y\n"1,021.5",2\n3.5,"1,021"\nkitchen,4\n',
        "decimal-commas": b"x;y\n1,021;a\n0,5;1.5\n",
        "either": b"x;y\n1,021;2\n",
        "two-ways": b"x;y\n1,5;2\n1.5;2\n",
        "names-again": b"x,y\n1,2\nx,y\n3,4\ny,x\n5,6\n",
        "numbers-as-names": b"1,2\n3,4\n",
        "no-name": b"x,\n1,2\n",
        "lines-before": b"logger\nx,y\n1,2\n3,4\n",
        "row-in-quotes": b'x,y,z\n1,2,"a\n3,4,b"\n"c\nd",5,6\n7, "e" ,8\n1,"a"b,3\n1,"a\n2,"b"c\n',
        "key": b"key,x\n007,1\n",
    }


TARGET = Target(
    "csv",
    check,
    seeds,
    {
        "sumus.node.delimited": (
            "read_delimited",
            "_first_line",
            "_separator",
            "_rows",
            "_quoted",
            "_singly",
            "_swallows",
            "_names",
            "_without_repeated_names",
            "_check_width",
            "_Numbers.decimal",
            "_numbers",
            "_reading",
            "_value",
        ),
    },
    (b'"', b'""', b",", b"\r\n", b"\xef\xbb\xbf", b"nan", b"1e9", b"_", b"\0", b"\xe2\x80\xa8", b"\x85"),
    memory=96,
)
