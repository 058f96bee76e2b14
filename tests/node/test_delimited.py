"""Text in columns is read as people have it, or refused with a reason that names what was seen; never read as something else."""

import csv
import io
import os
import random
from typing import Any

import pandas as pd
import pytest

from sumus.node.batch import Beginning
from sumus.node.delimited import LONGEST_FIELD, continues, read_delimited
from sumus.node.formats import read_file
from sumus.node.reading import BadReading

DRAWS = int(os.environ.get("SUMUS_CSV_DRAWS", "300"))


def read(text: str | bytes) -> list[Any]:
    """The readings; for one that is refused, where and why."""
    batch = read_file("a.csv", text.encode() if isinstance(text, str) else text)
    return [
        f"{batch.where(number)}: {one}" if isinstance(one, BadReading) else one
        for number, one in enumerate(batch.found)
    ]


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("\ufeffa,b\r\n1,x\r\n", [{"a": 1, "b": "x"}]),
        ("a;b\n21,5;x\n,5;y\n", [{"a": 21.5, "b": "x"}, {"a": 0.5, "b": "y"}]),
        ("a;b\n21.5;x\n", [{"a": 21.5, "b": "x"}]),
        ("a\tb\n1,5\t2\n", [{"a": 1.5, "b": 2}]),
        ("a|b\n1|2\n", [{"a": 1, "b": 2}]),
        ("sep=;\na;b,c\n1;2,5\n", [{"a": 1, "b,c": 2.5}]),
        ('\ufeff"sep=\t"\na\tb\n1\t2\n', [{"a": 1, "b": 2}]),
        ("# device: A1\n\n# start: 2026-01-01T00:00:00\na,b\n1,2\n", [{"a": 1, "b": 2}]),
        ('"a (°C)",b\n1,2\n', [{"a (°C)": 1, "b": 2}]),
        ('a,b\n1,"window\nopen"\n2,"x, ""y"""\n', [{"a": 1, "b": "window\nopen"}, {"a": 2, "b": 'x, "y"'}]),
        ('a, b\n1, "x, y"\n', [{"a": 1, "b": "x, y"}]),
        ('a,b\n"1,5","2,25"\n', [{"a": 1.5, "b": 2.25}]),
        ("a;b\n12,345;1\n0,123;2\n", [{"a": 12.345, "b": 1}, {"a": 0.123, "b": 2}]),
        ("a,b\r1,2\r3,4\r", [{"a": 1, "b": 2}, {"a": 3, "b": 4}]),
        (",a\n0,1\n", [{"": 0, "a": 1}]),
        ("key,a\n007,1\n", [{"key": "007", "a": 1}]),
        ("a\n12345678901234567890\n", [{"a": 12345678901234567890}]),
        ("a,b\n1,2\na,b\n3,4\n", [{"a": 1, "b": 2}, {"a": 3, "b": 4}]),
        ("a,b\n", []),
        ("a,b\n1,2\n1,2\n", [{"a": 1, "b": 2}] * 2),
        ("a,b\n٣,1\n", [{"a": "٣", "b": 1}]),
    ],
)
def test_what_is_read(text: str, readings: list[Any]) -> None:
    assert read(text) == readings


OPEN = "line 3 opens a quote that is never closed"
ROW = "line 2 opens a quote, but the quoted text contains a line like a row: close the quote"


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ('a,b\n1,x\n2,"y\n3,z\n4,z\n', [{"a": 1, "b": "x"}, f"line 3: {OPEN}", f"line 4: {OPEN}", f"line 5: {OPEN}"]),
        ('a,b\n1,"kitchen\n2,attic"\n3,x\n', [f"line 2: {ROW}", f"line 3: {ROW}", {"a": 3, "b": "x"}]),
        ('a,b,c\n"kitchen,1,2\nattic",3,4\n', [f"line 2: {ROW}", f"line 3: {ROW}"]),
        ('a,b\n1,"x"y\n3,4\n',
         ["line 2: the quote that line 2 opens ends in the middle of a value", {"a": 3, "b": 4}]),
        ('a,b\n1,"x\n2,"y"\n3,z\n',
         [f"line {n}: the quote that line 2 opens ends in the middle of a value" for n in (2, 3, 4)]),
        ('a,b\n"1,021.5",2\n', ["line 2: its 'a' is 1,021.5, with separators between its thousands: "
          "write the number without them"]),
        ("a;b\n1.021,5;2\n0,5;1\n",
         ["line 2: its 'a' is 1.021,5, with separators between its thousands: "
          "write the number without them", {"a": 0.5, "b": 1}]),
        ("a,b\n1 021,2\n", ["line 2: its 'a' is 1 021, with separators between its thousands: "
          "write the number without them"]),
        ("a,b\n1'021.5,2\n", ["line 2: its 'a' is 1'021.5, with separators between its thousands: "
          "write the number without them"]),
        ('a,b\n1.5,2\n"1,021",3\n',
         [{"a": 1.5, "b": 2}, "line 3: its 'a' is 1,021, but other numbers in the file are written with '.'"]),
        ("a,b\n1,2\nb,a\n3,4\n", [{"a": 1, "b": 2}, *(f"line {n}: line 3 has other column names, or has them in another order: "
                                      "begin a new file with this line" for n in (3, 4))]),
        ("a,b\n1,2\n3\n", [{"a": 1, "b": 2}, "line 3: it has 1 values, but the line of names has 2"]),
        ("a,b\n1," + "x" * (LONGEST_FIELD + 1) + "\n3,4\n",
         [f"line 2: its 'b' has {LONGEST_FIELD + 1} characters, but at most {LONGEST_FIELD} are allowed", {"a": 3, "b": 4}]),
    ],
)  # fmt: skip
def test_what_is_refused_by_its_line(text: str, readings: list[Any]) -> None:
    assert read(text) == readings


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a;b\n1,021;2\n", "the comma in 1,021 could be a decimal comma, or separate thousands"),
        ("a;b\n1,5;2\n1.5;3\n", "numbers are written in two ways, as 1.5 and as 1,5"),
        ("a;b\n1.021;2\n3;0,5\n", "numbers are written in two ways, as 1.021 and as 0,5"),
        ("a;b,c\n1;2,3\n", "the separator of its values could be ';' or ','"),
        ("sep=x\naxb\n", "line 1 is 'sep=x', but this separator is not supported"),
        ("a,b,\n1,2,\n", "line 1 names the columns, but the name of column 3 of 3 is empty"),
        ("a,b,a\n1,2,3\n", "line 1 gives two columns the name 'a'"),
        ("# x\n\na,a\n1,2\n", "line 3 gives two columns the name"),
        ("21.5,40,cold\n22,41,cold\n", "line 1 has numbers such as 21.5 where the names of the columns are expected"),
        ("Logger 5\na,b\n1,2\n3,4\n", r"line 1 has 1 names \('Logger 5'\), but each line after it has 2 values"),
        ("a,b\n1,5,2\n2,5,3\n", "line 1 has 2 names"),
        ("", "it is empty"),
        ("# only this\n\n", "it is empty"),
        ('"a\n', "line 1 has no names: line 1 opens a quote that is never closed"),
        ("a,b\n1,2\n".encode("utf-16"), "it is UTF-16, and not text in UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-be"), "it is UTF-16 without a byte order mark"),
        ("a,b\n1,2\n".encode("utf-32"), "it is UTF-32, and not text in UTF-8"),
        (b"a,b\n1,\x002\n", "it contains zero bytes, so it is not text"),
        ("a (°C),b\n1,2\n".encode("latin-1"), "it is not UTF-8: line 1 has the byte 0xb0"),
        (b"PK\x03\x04rest", "it is a ZIP archive .as .xlsx is."),
        (b"\x1f\x8brest", "it is packed by gzip"),
        (b"SQLite format 3\0rest", "it is an SQLite database"),
    ],
)  # fmt: skip
def test_what_is_refused_with_one_reason(text: str | bytes, why: str) -> None:
    with pytest.raises(BadReading, match=why):
        read(text)


def test_a_part_is_read_as_the_whole_file_is() -> None:
    """Lines that come later have the separator and the decimal sign of those before."""
    whole = read_delimited(b"# x\na;b\n0,5;1\n")
    assert whole.beginning == Beginning(b"# x\na;b\n", ",", ";")
    later = read_delimited(whole.beginning.head + b"1,021;2\n1.5;3\n", whole.beginning)
    assert later.found[0] == {"a": 1.021, "b": 2}
    assert str(later.found[1]) == "its 'a' is 1.5, but other numbers in the file are written with ','"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b\n1,2\n3,4\n", "a,b\n3,4\n"),
        ("\ufeff# x\na;b\n0,5;1\n1,021;2\n", "sep=;\n# decimal=,\n# x\na;b\n1,021;2\n"),
        ("sep=;\na;b\n0,5;1\n1,021;2\n", "sep=;\n# decimal=,\na;b\n1,021;2\n"),
        ('a,b\n"0,5",1\n"1,021",2', '# decimal=,\na,b\n"1,021",2\n'),
        ("\ufeffa\tb\n0.5\t1\n1.021\t2\n", "sep=\t\na\tb\n1.021\t2\n"),
    ],
)
def test_a_part_of_a_file_says_what_the_other_rows_showed(text: str, part: str) -> None:
    batch = read_delimited(text.encode())
    assert batch.subset([1]).decode() == part
    assert read_delimited(part.encode()).found == [batch.found[1]]


@pytest.mark.parametrize(
    ("body", "goes_on"),
    [(b"1,2\n", True), (b"x,2\n", True), (b"a,b\n", False), (b"c,d\n", False), (b"1,2,3\n", False), (b"", False)],
)
def test_a_file_without_names_goes_on_under_those_of_before(body: bytes, goes_on: bool) -> None:
    assert continues(body, Beginning(b"a,b\n", "", ",")) == goes_on


def test_against_the_readers_of_python_and_pandas() -> None:
    """Each text is read as they read it, or refused; no row is lost without a word."""
    refused = sum(_differs(random.Random(seed)) for seed in range(DRAWS))
    assert refused < 0.05 * DRAWS, "most are read"


def _differs(rng: random.Random) -> bool:
    separator, names = rng.choice(",;\t|"), [f"n{number}" for number in range(rng.randint(2, 5))]
    rows = [[_cell(rng) for _ in names] for _ in range(rng.randint(1, 6))]
    out = io.StringIO(newline="")
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    csv.writer(out, delimiter=separator, lineterminator=rng.choice(["\n", "\r\n"]), quoting=quoting).writerows(
        [names, *rows]
    )
    text = out.getvalue()
    body = (rng.choice(["", "\ufeff"]) + text).encode()
    try:
        found = read_delimited(body).found
    except BadReading:
        return True
    known = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row][1:]
    frame = pd.read_csv(io.BytesIO(body), sep=separator, keep_default_na=False, dtype=str)
    assert len(found) >= len(known) == len(frame), text
    if any(isinstance(one, BadReading) for one in found):
        return True
    for one, row, other in zip(found, known, frame.to_numpy().tolist(), strict=True):
        assert isinstance(one, dict)
        for value, cell, seen in zip(one.values(), row, other, strict=True):
            assert _same(value, cell.strip()), (text, value, cell)
            assert _same(value, seen.strip()) or "\r" in cell + seen, (text, value, seen)
    return False


def _cell(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return str(rng.randint(-999, 999))
    if kind < 0.6:
        return f"{rng.uniform(-99, 99):.3g}"
    return "" if kind < 0.65 else "".join(rng.choice("ab ,;\"\n\t|'x") for _ in range(rng.randint(1, 6)))


def _same(value: Any, text: str) -> bool:
    if isinstance(value, int | float):
        return value == float(text.replace(",", "."))
    return (value or "") == text
