"""Readings as JSON: a file with one object in each line, and a body with one reading or a list of readings."""

from collections.abc import Mapping

import msgspec

from benchmarks.fuzz.target import Target
from benchmarks.fuzz.targets.readings import check_file, shown
from sumus.node.formats import read_json
from sumus.node.reading import BadReading


def check(data: bytes) -> None:
    """Check that a part of a file is such a file, and that a body that is read can be written and is read again
    unchanged."""
    check_file("a.jsonl", data)
    try:
        found = read_json(data)
    except BadReading:
        return
    good = [each for each in found if not isinstance(each, BadReading)]
    if good:
        assert shown(read_json(msgspec.json.encode(good))) == shown(good)


def seeds() -> Mapping[str, bytes]:
    """Return lines and bodies, and bytes that are neither."""
    return {
        "lines": b'{"inputs": [1, 2.5], "target": 0}\n\n{"t": "warm", "u": null}\n7\n{"x": \n',
        "body": b'[{"inputs": [[1], [2]], "key": "a"}, 7]',
        "one": b'{"x": true}',
        "numbers": b'[{"x": 1e400}, {"x": -0}, {"x": 18446744073709551616}, {"x": 1E-400}]',
        "many-digits": b'{"x": ' + b"9" * 5000 + b"}",
        "not-a-number": b'{"x": NaN}',
        "half-a-letter": b'{"x": "\\ud800"}\n',
        "no-text": b'{"x": "\xff"}\n',
        "deep": b'{"x":' + b"[" * 1500 + b"]" * 1500 + b"}\n",
        "no-reading": b"[]",
        "too-many": b"[" + b"{}," * 100_000 + b"{}]",
        "two-values": b'{"x": 1}{"y": 2}',
        "name-twice": b'{"x": 1, "x": 2}\n',
        "carriage-return": b'{"x": 1}\r{"y": 2}\r\n',
        "empty": b"",
    }


TARGET = Target(
    "json",
    check,
    seeds,
    {"sumus.node.formats": ("read_json", "read_lines", "_decoded", "_mapping")},
    (b'{"x":', b"[", b"}\n", b"null", b"1e9", b'"\\u00e9"', b"\\ud83d\\ude00", b'"key":', b'"inputs":', b'"target":'),
    memory=32,
)
