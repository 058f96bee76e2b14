"""Line protocol, JSON documents, packed files and pictures: read with limits, or refused with a reason."""

import gzip
import io
import zipfile
from functools import partial
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sumus.node.batch import MOST_BYTES, MOST_TEXT
from sumus.node.formats import is_read, is_whole, read_file
from sumus.node.pictures import MOST_POINTS
from sumus.node.reading import BadReading
from sumus.text import amount

packed = partial(gzip.compress, mtime=0)
"""The same bytes whenever it is called: they are in the names of tests."""

TABLE = b"a,b\n1,2\n3\n5,6\n"


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return out.getvalue()


# ── line protocol ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "reading"),
    [
        ("climate,room=kitchen celsius=21.5,humidity=40i 1764431159000000000",
         {"measurement": "climate", "room": "kitchen", "celsius": 21.5, "humidity": 40, "time": 1764431159000000000}),
        ("climate celsius=21.5", {"measurement": "climate", "celsius": 21.5}),
        ('m,a\\ b=c\\,d on=true,say="x, \\"y\\" = z",n=-1e3 5',
         {"measurement": "m", "a b": "c,d", "on": True, "say": 'x, "y" = z', "n": -1000.0, "time": 5}),
        ("m a=1,b=x", "its 'b' is x, which is not a number, a truth value or a text in quotes"),
        ("m,a=1 a=2", "two of its values have the same name: give each value its own"),
        ("climate", "it is not a line of InfluxDB's line protocol"),
        ("m a=1 noon", "it is not a line of InfluxDB's line protocol"),
    ],
)  # fmt: skip
def test_line_protocol(line: str, reading: Any) -> None:
    (found,) = read_file("a.lp", f"# comment\n\n{line}\n".encode()).found
    assert (str(found) if isinstance(found, BadReading) else found) == reading


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize(
    "body",
    [
        b'[{"x": 1}, {"x": 2}]\n',
        b'[\n  {"x": 1},\n  {"x": 2}\n]\n',
        b'\xef\xbb\xbf{"x": 1}\n{"x": 2}\n',
        b'{"x": 1}\r\n\r\n{"x": 2}',
        b'{"x": 1}\n\xef\xbb\xbf{"x": 2}\n',
    ],
)
def test_json_as_it_comes(name: str, body: bytes) -> None:
    batch = read_file(name, body)
    assert batch.found == [{"x": 1}, {"x": 2}]
    assert read_file(name, batch.subset([1])).found == [{"x": 2}]


def test_one_object_over_several_lines() -> None:
    assert read_file("a.json", b'{\n  "x": 1,\n  "y": {"z": 2}\n}\n').found == [{"x": 1, "y": {"z": 2}}]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'[{"x": 1}, {"x": NaN}]', "it is neither a JSON document nor one JSON object per line; it contains NaN"),
        (b'{\n"x": 1,\n}\n', "neither a JSON document"),
        (b"[]", "it contains no reading"),
        ('{"x": 1}\n'.encode("utf-16"), "it is UTF-16"),
    ],
)
def test_a_document_that_is_none(body: bytes, why: str) -> None:
    with pytest.raises(BadReading, match=why):
        read_file("a.json", body)


def test_not_a_number_is_refused_alone() -> None:
    batch = read_file("a.jsonl", b'{"x": 1}\n{"x": NaN}\n{"x": null}\n')
    assert [batch.found[0], str(batch.found[1]), batch.found[2]] == [
        {"x": 1}, "it contains NaN, which is not a JSON value: write null", {"x": None},
    ]  # fmt: skip
    assert batch.where(1) == "line 2"


# ── packed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_packed_files_are_read_and_their_parts_are_packed() -> None:
    batch = read_file("a.CSV.gz", packed(TABLE[:8]) + packed(TABLE[8:]))
    assert batch.found[0] == {"a": 1, "b": 2}
    assert batch.where(1) == "line 3"
    assert gzip.decompress(batch.subset([1, 2])) == b"a,b\n3\n5,6\n"
    archive = read_file("a.zip", zipped({"x/one.csv": TABLE, "__MACOSX/._one.csv": b"?", "two.jsonl": b'{"c": 7}\n'}))
    assert [one for one in archive.found if isinstance(one, dict)] == [{"a": 1, "b": 2}, {"a": 5, "b": 6}, {"c": 7}]
    assert archive.where(1) == "x/one.csv, line 3"
    again = read_file("a.zip", archive.subset([1, 3]))
    assert [again.where(number) for number in range(2)] == ["x/one.csv, line 2", "two.jsonl, line 1"]


BOMB = packed(b"a\n" + b"1\n" * (MOST_TEXT // 2))


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("a.csv.gz", BOMB, f"unpacked, it has more than {amount(MOST_TEXT)}"),
        ("a.csv.gz", packed(b"")[:10] + BOMB[10:] + BOMB, f"unpacked, it has more than {amount(MOST_TEXT)}"),
        ("a.csv.gz", packed(TABLE)[:-4], "it is cut off"),
        ("a.csv.gz", TABLE, "it is not a .gz file"),
        ("a.csv.gz", packed(packed(TABLE)), "it is packed by gzip"),
        ("a.zip", zipped({"a.csv": b"x" * (MOST_BYTES + 1)}), f"1 file, and at most 1,000 "
         f"are allowed; unpacked, it has {MOST_BYTES + 1:,} bytes"),
        ("a.zip", zipped({f"{n}.csv": b"" for n in range(1001)}), "1,001 files, and at most 1,000 are allowed"),
        ("a.zip", zipped({"a.zip": b""}), "it contains 'a.zip', which is not a file of readings"),
        ("a.zip", zipped({"readme.txt": b""}), "it contains 'readme.txt', which is not a file of readings"),
        ("a.zip", zipped({"a.csv": b"a,a\n"}), "a.csv: line 1 gives two columns the name"),
        ("a.zip", zipped({}), "it has 0 readings"),
        ("a.zip", b"nothing", "it is not a .zip file"),
    ],
)  # fmt: skip
def test_what_is_not_unpacked(name: str, body: bytes, why: str) -> None:
    with pytest.raises(BadReading, match=why):
        read_file(name, body)


def test_an_encrypted_archive_is_said_to_be_one() -> None:
    body = bytearray(zipped({"a.csv": TABLE}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(mark) + at] |= 1
    with pytest.raises(BadReading, match="it is encrypted"):
        read_file("a.zip", bytes(body))


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def picture(points: Any, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(points).save(out, kind, **more)
    return out.getvalue()


def test_a_picture_is_a_reading() -> None:
    points = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    (found,) = read_file("front.png", picture(points)).found
    assert isinstance(found, dict)
    assert found["file"] == "front.png"
    np.testing.assert_array_equal(found["inputs"], points)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    (found,) = read_file("a.JPG", picture(np.zeros((8, 16), np.uint8), "JPEG", exif=turned)).found
    assert isinstance(found, dict)
    assert (found["inputs"].shape, found["inputs"].dtype) == ((16, 8), np.uint8)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not a .jpg or .png picture that can be read"),
        (picture(np.zeros((8, 8), np.uint8))[:45], "not a .jpg or .png picture that can be read"),
        (picture(np.zeros((8, 8), np.uint16)), "has more than 8 bits per color, or transparency"),
        (picture(np.zeros((8, 8, 4), np.uint8)), "has more than 8 bits per color, or transparency"),
        (picture(np.zeros((4097, 4097), bool)), f"4097 x 4097 pixels, but at most {MOST_POINTS} are allowed"),
    ],
)
def test_what_is_no_picture(body: bytes, why: str) -> None:
    with pytest.raises(BadReading, match=why):
        read_file("a.png", body)


# ── names and ends ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a.csv", True), ("A.TSV.GZ", True), ("a.zip", True), ("a.jpeg", True), ("a.xlsx", False), ("a.gz", False),
     ("a.csv.bz2", False), ("a.lp", True), ("csv", False)],
)  # fmt: skip
def test_names_that_are_read(name: str, is_one: bool) -> None:
    assert is_read(name) == is_one


@pytest.mark.parametrize(
    ("name", "body"),
    [("a.csv.gz", packed(TABLE)), ("a.zip", zipped({"a.csv": TABLE})), ("a.csv", TABLE),
     ("a.png", picture(np.zeros((2, 2), np.uint8))), ("a.jpg", picture(np.zeros((2, 2), np.uint8), "JPEG"))],
)  # fmt: skip
def test_a_file_that_is_cut_off_is_waited_for(name: str, body: bytes) -> None:
    assert is_whole(name, body)
    assert not is_whole(name, body[:-3])
    assert not is_whole(name, b"")


def test_utf_16_is_not_waited_for() -> None:
    assert is_whole("a.csv", "a,b\n1,2".encode("utf-16"))
