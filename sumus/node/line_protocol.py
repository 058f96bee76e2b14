"""InfluxDB's line protocol, which loggers and agents write.

    climate,room=kitchen celsius=21.5,humidity=40i 1764431159000000000

becomes {"measurement": "climate", "room": "kitchen", "celsius": 21.5, "humidity": 40, "time": 1764431159000000000}. Lines that
begin with # are comments.
"""

import re
from typing import Any

from sumus.node.batch import Batch, Beginning, Raw, of_lines
from sumus.node.reading import BadReading

_WORD = r"(?:\\.|[^,= \\])+"
_TEXT = r'"(?:\\.|[^"\\])*"'
_PLAIN = r"[^,\" ]+"
_LINE = re.compile(
    rf"(?P<measurement>(?:\\.|[^, \\])+)(?P<tags>(?:,{_WORD}={_WORD})*) +"
    rf"(?P<fields>{_WORD}=(?:{_TEXT}|{_PLAIN})(?:,{_WORD}=(?:{_TEXT}|{_PLAIN}))*)(?: +(?P<time>-?\d{{1,19}}))? *",
    re.ASCII,
)
_TAG = re.compile(rf",({_WORD})=({_WORD})")
_FIELD = re.compile(rf"({_WORD})=({_TEXT}|{_PLAIN}),?")
_WHOLE = re.compile(r"(-?\d{1,19})[iu]", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_ESCAPED = re.compile(r"\\([,= \"\\])")
_TRUTH = {word: value for value in (True, False) for word in (str(value)[0], str(value)[0].lower(), str(value),
                                                              str(value).lower(), str(value).upper())}  # fmt: skip


def read_line_protocol(body: bytes) -> Batch:
    """Read one reading per line: the measurement, the tags and fields by their names, and the time as it stands in the line."""
    found, pieces, begins, lines = list[Raw | BadReading](), list[bytes](), list[int](), list[int]()
    begin = 0
    for number, piece in enumerate(body.split(b"\n"), 1):
        text = piece.decode().strip("\r\ufeff ")
        if text and not text.startswith("#"):
            found.append(_reading(text))
            pieces.append(piece)
            begins.append(begin)
            lines.append(number)
        begin += len(piece) + 1
    return of_lines(found, pieces, begins, lines, Beginning())


def _reading(text: str) -> Raw | BadReading:
    matched = _LINE.fullmatch(text)
    if matched is None:
        return BadReading("it is not a line of InfluxDB's line protocol")
    pairs: list[tuple[str, Any]] = [("measurement", _plain(matched["measurement"]))]
    pairs += [(_plain(name), _plain(value)) for name, value in _TAG.findall(matched["tags"])]
    for name, value in _FIELD.findall(matched["fields"]):
        try:
            pairs.append((_plain(name), _value(value)))
        except ValueError:
            return BadReading(
                f"its {name!r:.50} is {value:.50}, which is not a number, a truth value or a text in quotes"
            )
    if matched["time"]:
        pairs.append(("time", int(matched["time"])))
    values = dict(pairs)
    if len(values) < len(pairs):
        return BadReading("two of its values have the same name: give each value its own")
    return values


def _value(text: str) -> Any:
    if text.startswith('"'):
        return _plain(text[1:-1])
    if (whole := _WHOLE.fullmatch(text)) is not None:
        return int(whole[1])
    if text in _TRUTH:
        return _TRUTH[text]
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(text)
    return float(text)


def _plain(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)
