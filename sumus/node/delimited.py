"""Text in columns, written by programs or by people: CSV as in RFC 4180, with any usual separator and decimal sign, and with or
without lines before the column names.

    batch = read_delimited(body)
    batch.found[0]                       {"celsius": 21.5, "felt": "cold"}; a BadReading if the row is refused

Nothing is guessed: if a file can be read in two ways, it is refused, and the message names both ways. If a row cannot be
split into values, only that row is refused, and reported by its line number; the other rows are read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from sumus.node.batch import Batch, Beginning, NothingReadable, Raw, of_lines
from sumus.node.reading import BadReading

LONGEST_FIELD = 2**17
"""The maximum number of characters in one value."""
SEPARATORS = "\t;,|"
_OTHER_SEPARATORS = SEPARATORS + ":^~!/"
_SHORT = 40
"""The longest value, in characters, whose kind is cached: short values often repeat."""
_TRIED_ROWS = 100
"""The number of rows that are tried in order to detect the separator."""
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_DECIMAL = re.compile(r"#\s*decimal=(?P<sign>[.,])\s*")
_SEP = re.compile(r'"?sep=(?P<sign>[^\r\n])"?', re.IGNORECASE)
_CELL = re.compile(
    r"(?P<whole>[+-]?\d{1,308})"
    r"|(?P<special>[+-]?(?:nan|inf|infinity)|[+-]?\d+[eE][+-]?\d+|[+-]?\d{309,})"
    r"|(?P<point>[+-]?(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<either>[+-]?[1-9]\d{0,2},\d{3})"
    r"|(?P<comma>[+-]?(?:\d+,\d*|,\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<grouped>[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+(?:,\d+)?"
    r"|\d{1,3}(?:[ '\u2019\u00a0\u202f]\d{3})+(?:[.,]\d+)?))",
    re.IGNORECASE | re.ASCII,
)
"""The ways of writing a number. `either` can be read in two ways: with a decimal comma, or with commas between thousands."""


def _way(text: str) -> str:
    """Return how a text writes a number, as the name of a group of `_CELL`; "text" if the text is not a number."""
    return _way_of_short(text) if len(text) <= _SHORT else _way_of_short.__wrapped__(text)


@lru_cache(2**14)
def _way_of_short(text: str) -> str:
    matched = _CELL.fullmatch(text)
    return str(matched.lastgroup) if matched else "text"


def _is_number(text: str) -> bool:
    return _way(text.strip()) != "text"


@dataclass(frozen=True)
class _Row:
    """One row of a file.

    Attributes:
        cells: The row's values as text; None if the row cannot be split.
        why: The reason why the row cannot be split; empty if it can.
        count: The number of lines in the row.
    """

    line: int
    count: int
    cells: list[str] | None
    why: str = ""
    open: bool = False


def read_delimited(body: bytes, before: Beginning | None = None) -> Batch:
    """Read a line of names, and one reading from each row after it. Numerals become numbers; empty values become None; other
    values stay text.

    Args:
        body: UTF-8, with or without a byte order mark.
        before: The facts from an earlier part of the same file, if `body` is the file's head and a later part.

    Raises:
        BadReading: The file as a whole cannot be read; the message says why.
    """
    pieces: list[bytes] = _LINE.findall(body)
    lines = [piece.decode() for piece in pieces]
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    first, separator = _first_line(lines)
    if first == len(lines):
        raise NothingReadable("it is empty")
    separator = separator or (before.separator if before else "") or _separator(lines, first)
    rows = list(_rows(lines, first, separator))
    names = _names(rows[0])
    width = rows[0].count
    begins = [0]
    for piece in pieces:
        begins.append(begins[-1] + len(piece))
    head = b"".join(pieces[: first + width])
    rows, repeated = _without_repeated_names(list(_singly(rows[1:], lines, names, separator)), names)
    _check_width(rows, names, first + 1)
    numbers = _numbers([row.cells for row in rows if row.cells and len(row.cells) == len(names)], len(names))
    said = next((found["sign"] for line in lines[:first] if (found := _DECIMAL.fullmatch(line.strip("\r\n")))), "")
    decimal = said or (before.decimal if before else "") or numbers.decimal()
    found = [_reading(row, names, decimal, numbers.columns, repeated) for row in rows]
    opened = next((begins[row.line] for row in rows if row.open), None)
    batch = of_lines(
        found,
        [b"".join(pieces[row.line : row.line + row.count]) for row in rows],
        [begins[row.line] for row in rows],
        [row.line + 1 for row in rows],
        Beginning(head, decimal, separator if rows else ""),
        opened,
    )

    def subset(numbers: Sequence[int]) -> bytes:
        return _settled(head, separator, decimal) + batch.subset(numbers)[len(head) :]

    return replace(batch, subset=subset)


def _settled(head: bytes, separator: str, decimal: str) -> bytes:
    """Return the head for a file with only some of the rows. It declares the separator and the decimal sign, since these rows may
    not show them."""
    first, *rest = _LINE.findall(head.removeprefix(b"\xef\xbb\xbf"))
    named = _SEP.fullmatch(first.decode().strip("\r\n ")) is not None
    lines = [first] if named else [f"sep={separator}\n".encode()] if separator != "," else []
    if not lines and decimal != ",":
        return head
    hint = [b"# decimal=,\n"] if decimal == "," else []
    return b"".join([*lines, *hint, *([] if named else [first]), *rest])


def continues(body: bytes, before: Beginning) -> bool:
    """Return whether a file without a line of names continues an earlier file, so that the names of that file apply.

    It does if its first line contains a number, and has as many values as there were names.
    """
    try:
        lines = [piece.decode() for piece in _LINE.findall(body[:LONGEST_FIELD])[:2]]
        names = _names_of(before)
    except (BadReading, UnicodeDecodeError):
        return False
    if not lines:
        return False
    row = next(_rows(lines[:1], 0, before.separator or ","), None)
    cells = [cell.strip() for cell in (row.cells or [] if row else [])]
    return len(cells) == len(names) and cells != names and any(map(_is_number, cells))


# ── lines and rows ─────────────────────────────────────────────────────────────────────────────────────────────────


def _first_line(lines: Sequence[str]) -> tuple[int, str]:
    """Find the index of the line of names, and the separator that a line such as `sep=;` declares, if there is one."""
    separator = ""
    for index, line in enumerate(lines):
        said = line.strip("\r\n")
        if index == 0 and (named := _SEP.fullmatch(said.strip(" "))) is not None:
            separator = named["sign"]
            if separator not in _OTHER_SEPARATORS:
                raise BadReading(f"line 1 is {said!r:.20}, but this separator is not supported: use , ; | or a tab")
        elif said.strip() and not said.lstrip().startswith("#"):
            return index, separator
    return len(lines), separator or ","


def _separator(lines: Sequence[str], first: int) -> str:
    """Find the separator between the names. Raise BadReading if several separators are possible."""
    fits = dict[str, float]()
    for sign in SEPARATORS:
        if sign not in lines[first]:
            continue
        rows = [row for _, row in zip(range(_TRIED_ROWS + 1), _rows(lines, first, sign), strict=False) if row.cells]
        if rows and rows[0].line == first and len(rows[0].cells or ()) > 1:
            widths = [len(row.cells or ()) for row in rows]
            fits[sign] = widths[1:].count(widths[0]) / max(len(widths) - 1, 1)
    if not fits:
        return ","
    best = max(fits.values())
    likely = [sign for sign, share in fits.items() if share == best]
    if len(likely) > 1 and (best or len(lines) > first + 1):
        signs = " or ".join(map(repr, likely))
        raise BadReading(
            f"the separator of its values could be {signs}: add a first line such as sep={likely[0]} to the file"
        )
    return max(likely, key=lines[first].count)


def _rows(lines: Sequence[str], first: int, separator: str) -> Iterator[_Row]:
    """Split lines into rows, from the line with index `first` on. After a quote that is never closed, no line can be split."""
    index = first
    while index < len(lines):
        text = lines[index]
        if '"' not in text:
            if text.strip("\r\n"):
                yield _Row(index, 1, text.rstrip("\r\n").split(separator))
            index += 1
            continue
        cells, after, why = _quoted(lines, index, separator)
        if cells is not None:
            yield _Row(index, after - index, cells)
            index = after
            continue
        alone = why and text.count('"') % 2 == 0  # the error affects only this line
        last = index + 1 if alone else len(lines)
        why = why or f"line {index + 1} opens a quote that is never closed"
        for each in range(index, last):
            yield _Row(each, 1, None, why, open=not alone and after >= len(lines))
        index = last


def _quoted(lines: Sequence[str], index: int, separator: str) -> tuple[list[str] | None, int, str]:
    """Read a row with quotes.

    Returns:
        The row's values, the index of the next line, and the error. If a quote is never closed, the values are None and the
        error is empty.
    """
    cells, text, at, position = list[str](), lines[index], index, 0
    while True:
        begin = position
        while text.startswith(" ", begin):
            begin += 1
        if not text.startswith('"', begin):
            end = text.find(separator, position)
            cells.append(text[position:end] if end >= 0 else text[position:].rstrip("\r\n"))
            if end < 0:
                return cells, at + 1, ""
            position = end + 1
            continue
        parts, position = list[str](), begin + 1
        while True:
            quote = text.find('"', position)
            if quote < 0:
                parts.append(text[position:])
                at += 1
                if at == len(lines):
                    return None, at, ""
                text, position = lines[at], 0
                continue
            parts.append(text[position:quote])
            position = quote + 1
            if not text.startswith('"', position):
                break
            parts.append('"')
            position += 1
        cells.append("".join(parts))
        while text.startswith(" ", position):
            position += 1
        if text.startswith(separator, position):
            position += 1
        elif not text[position:].strip("\r\n"):
            return cells, at + 1, ""
        else:
            return None, at, f"the quote that line {index + 1} opens ends in the middle of a value"


def _singly(rows: Sequence[_Row], lines: Sequence[str], names: Sequence[str], separator: str) -> Iterator[_Row]:
    """Split a row into lines if quoted text in it contains a line that is itself a row: then a quote was left open."""
    for row in rows:
        swallowed = row.count > 1 and row.cells is not None and len(names) > 1 and _swallows(row, lines, separator)
        if not swallowed:
            yield row
            continue
        for line in range(row.line, row.line + row.count):
            yield _Row(
                line,
                1,
                None,
                f"line {row.line + 1} opens a quote, but the quoted text contains a line like a row: close the quote",
            )


def _swallows(row: _Row, lines: Sequence[str], separator: str) -> bool:
    """Return whether a line within a row's quotes has as many values as the row, and numbers in the same columns."""
    cells = row.cells or []
    numbers = [column for column, cell in enumerate(cells) if _is_number(cell)]
    spread = next(column for column, cell in enumerate(cells) if "\n" in cell or "\r" in cell)
    # The first or the last of these lines has as many values as the row even if all quotes are right, so it is not examined.
    first, last = (0, 1) if spread == 0 else (1, 0)
    for line in lines[row.line + first : row.line + row.count - last]:
        within = line.rstrip("\r\n").split(separator)
        if numbers and len(within) == len(cells) and all(_is_number(within[at]) for at in numbers):
            return True
    return False


def _names_of(before: Beginning) -> list[str]:
    """Read the names from the head of a file."""
    lines = [piece.decode() for piece in _LINE.findall(before.head)]
    lines[:1] = [line.removeprefix("\ufeff") for line in lines[:1]]
    first, separator = _first_line(lines)
    return _names(next(_rows(lines, first, separator or before.separator or _separator(lines, first))))


def _names(row: _Row) -> list[str]:
    at = f"line {row.line + 1}"
    names = [name.strip() for name in row.cells or ()]
    if not names:
        raise BadReading(f"{at} has no names: {row.why}")
    for number, name in enumerate(names):
        if not name and (number or len(names) == 1):  # the first may be empty: programs write row numbers so
            raise BadReading(f"{at} names the columns, but the name of column {number + 1} of {len(names)} is empty")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise BadReading(f"{at} gives two columns the name {twice[0]!r:.60}: give each column its own name")
    digits = [name for name in names if _is_number(name)]
    if 2 * len(digits) > len(names):
        raise BadReading(f"{at} has numbers such as {digits[0]:.30} where the names of the columns are expected")
    return names


def _without_repeated_names(rows: Sequence[_Row], names: Sequence[str]) -> tuple[list[_Row], int | None]:
    """Leave out lines that repeat the names: some programs write the names again at each start.

    Returns:
        The rows, and the line at which the names change; None if they never change.
    """
    kept, known = list[_Row](), set(names)
    other: int | None = None
    for row in rows:
        texts = [cell.strip().removeprefix("\ufeff") for cell in row.cells or ()]
        if texts == names:
            continue
        if other is None and len(texts) > 1 and 2 * sum(text in known for text in texts if text) >= len(texts):
            other = row.line
        kept.append(row)
    return kept, other


def _check_width(rows: Sequence[_Row], names: Sequence[str], line: int) -> None:
    widths = Counter(len(row.cells) for row in rows if row.cells is not None)
    if len(rows) > 1 and len(names) not in widths and len(widths) == 1:
        width = next(iter(widths))
        raise BadReading(
            f"line {line} has {len(names)} names ({', '.join(map(repr, names[:3])):.80}), but each line after it has {width} "
            f"values: begin the file with a line that has a name for each value"
        )


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Numbers:
    """The way in which a file writes numbers.

    Attributes:
        columns: The columns that hold mostly numbers.
        seen: An example of each way in which these columns write numbers.
    """

    columns: frozenset[int]
    seen: dict[str, str]

    def decimal(self) -> str:
        """Return the decimal sign; empty if no number shows it. Raise BadReading if numbers use both signs, or if a
        comma could be either."""
        point, comma, either = (self.seen.get(way) for way in ("point", "comma", "either"))
        if comma and point:
            raise BadReading(
                f"numbers are written in two ways, as {point} and as {comma}: write all of them in one way"
            )
        if either and not (comma or point):
            raise BadReading(
                f"the comma in {either} could be a decimal comma, or separate thousands: write a decimal point"
            )
        return "," if comma else "." if point else ""


def _numbers(rows: Sequence[Sequence[str]], width: int) -> _Numbers:
    columns, seen = set[int](), dict[str, str]()
    for column in range(width):
        ways, first = Counter[str](), dict[str, str]()
        for row in rows:
            text = row[column].strip()
            if text:
                way = _way(text)
                ways[way] += 1
                first.setdefault(way, text)
        if 2 * ways["text"] <= ways.total() > 0:
            columns.add(column)
            for way, text in first.items():
                seen.setdefault(way, text)
    return _Numbers(frozenset(columns), seen)


def _reading(
    row: _Row, names: Sequence[str], decimal: str, columns: frozenset[int], other: int | None
) -> Raw | BadReading:
    if row.cells is None:
        return BadReading(row.why)
    if other is not None and row.line >= other:
        return BadReading(
            f"line {other + 1} has other column names, or has them in another order: begin a new file with this line"
        )
    if len(row.cells) != len(names):
        return BadReading(f"it has {len(row.cells)} values, but the line of names has {len(names)}")
    values = dict[str, Any]()
    for column, (name, cell) in enumerate(zip(names, row.cells, strict=True)):
        text = cell.strip()
        if len(text) > LONGEST_FIELD:
            return BadReading(f"its {name!r:.50} has {len(text)} characters, but at most {LONGEST_FIELD} are allowed")
        try:
            values[name] = (text or None) if name == "key" else _value(text, decimal, column in columns)
        except BadReading as bad:
            return BadReading(f"its {name!r:.50} {bad}")
    return values


def _value(text: str, decimal: str, among_numbers: bool) -> Any:
    match _way(text):
        case "text":
            return text or None
        case "whole":
            return int(text)
        case "special":
            return float(text)
        case "point" if decimal != ",":
            return float(text)
        case "comma" | "either" if decimal == ",":
            return float(text.replace(",", "."))
        case "grouped" if among_numbers:
            raise BadReading(f"is {text:.40}, with separators between its thousands: write the number without them")
        case _ if among_numbers:
            raise BadReading(f"is {text:.40}, but other numbers in the file are written with {decimal or 'a point'!r}")
        case _:
            return text
