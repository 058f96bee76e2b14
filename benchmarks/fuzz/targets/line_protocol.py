"""InfluxDB's line protocol, in a node's folder."""

from collections.abc import Mapping

from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.readings import check_file


def check(data: bytes) -> None:
    """Check that a part of a file that was read is such a file, with the same readings."""
    check_file("a.lp", data)


def seeds() -> Mapping[str, bytes]:
    """Return lines as loggers and agents write them, and lines of other forms."""
    return {
        "plain": b"climate,room=kitchen celsius=21.5,humidity=40i 1764431159000000000\nclimate celsius=20\n",
        "kinds": b'm a=1i,b=2u,c=-1.5e3,d=t,e=FALSE,f="x, \\"y\\" =z",g=.5\n',
        "escaped": b"a\\,b\\ c,t\\=u=v\\,w f\\ g=1\n",
        "comments": b"# about\n\n\xef\xbb\xbfm a=1\r\n  m a=2  \n",
        "no-number": b"m a=1x,b=nan\nm a=--1\nm a=0x1\n",
        "no-line": b"m\nm a\nm,=x a=1\nm a=\nm a=1 2 3\nm a=1,\n,t=u a=1\n",
        "name-twice": b"m,a=x a=1\nm measurement=1\nm,time=1 a=1 5\n",
        "open-quote": b'm a="x\nm b=1\n',
        "long": b"m " + b",".join(b"a%d=1" % n for n in range(500)) + b"\n",
        "backslashes": b"m" + b"\\" * 5000 + b" a=1\n",
        "equal-signs": b"m a=" + b"=" * 5000 + b"\n",
        "enormous": b"m a=" + b"9" * 400 + b",b=1e999 99999999999999999999\n",
        "too-many-rows": b"m a=1\n" * 100_001,
        "no-text": b"m a=\xff\n",
        "empty": b"",
    }


TARGET = Target(
    "line_protocol",
    check,
    seeds,
    {"sumus.node.line_protocol": ("read_line_protocol", "_reading", "_value", "_plain")},
    (b"\\ ", b"\\,", b'\\"', b"=", b" ", b",", b'"', b"1i", b"true", b"\xef\xbb\xbf", b"\r\n"),
    memory=256,
)
