"""Whatever comes is read with limits, and never unpickled; one bad reading does not spoil the others."""

import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.node.batch import MOST_BYTES, MOST_READINGS, MOST_TEXT, Batch
from sumus.node.formats import (
    LONGEST_HEADER,
    is_whole,
    read_file,
    read_json,
    read_safetensors,
)
from sumus.node.intake import Intake
from sumus.node.reading import BadReading
from sumus.node.readings import Readings
from sumus.wire.tensors import encode_tree


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **arrays)
    return out.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return out.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data


def whats_wrong(batch: Batch) -> dict[int, str]:
    return {number: str(one) for number, one in enumerate(batch.found) if isinstance(one, BadReading)}


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_of_json() -> None:
    batch = read_file("a.jsonl", b'{"inputs": [1, 2.5], "target": 0}\n\n{"t": "warm", "u": null}\n')
    assert batch.found == [{"inputs": [1, 2.5], "target": 0}, {"t": "warm", "u": None}]


def test_csv_as_programs_and_people_write_it() -> None:
    text = '\ufefft, u ,place\r\n1,-2.5e-3,"kitchen, left"\r\n,nan,\r\n\r\n1_0,007,0x1\r\n'
    batch = read_file("A.CSV", text.encode())
    assert batch.found[0] == {"t": 1, "u": -2.5e-3, "place": "kitchen, left"}
    second: Any = batch.found[1]
    assert (second["t"], np.isnan(second["u"]), second["place"]) == (None, True, None)
    assert batch.found[2] == {"t": "1_0", "u": 7, "place": "0x1"}


def test_arrays_have_a_row_a_reading() -> None:
    arrays = {
        "inputs": np.arange(6, dtype=np.float32).reshape(2, 3),
        "target": np.array([1, 0]),
        "key": np.array(["a", "b"]),
        "order": np.asfortranarray(np.arange(4).reshape(2, 2)),
        "big": np.array([1, 2], ">i4"),
    }
    for body in (npz(**arrays), zipped({f"{n}.npy": _saved(a) for n, a in arrays.items()})):
        _, second = read_file("a.npz", body).found
        assert isinstance(second, dict)
        assert second["inputs"].tolist() == [3, 4, 5]
        assert (second["target"], second["key"], second["order"].tolist(), second["big"]) == (0, "b", [2, 3], 2)
    tensors = read_safetensors(encode_tree({name: arrays[name] for name in ("inputs", "target")}))
    assert isinstance(tensors[0], dict)
    assert tensors[0]["inputs"].tolist() == [0, 1, 2]


def _saved(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": 2}\n[3]\n{"x": 4}\n'),
        ("a.csv", b'x\n1\n2\n3,3\n"4"\n'),
        ("a.npz", npz(x=np.array([1, 2, 3, 4]))),
    ],
)
def test_a_part_of_a_file_is_such_a_file(name: str, body: bytes) -> None:
    batch = read_file(name, body)
    part = read_file(name, batch.subset([1, 2]))
    assert part.found[0] == batch.found[1] == {"x": 2}
    assert str(part.found[1]) == str(batch.found[2])
    assert is_whole(name, batch.subset([1]))


def test_a_bad_reading_is_said_by_its_number() -> None:
    lines = read_file("a.json", b'{"x": 1}\n{"x": NaN}\n{"x": \n7\n"\xff"\n{"x": 5}\n')
    assert list(whats_wrong(lines)) == [1, 2, 3, 4]
    assert whats_wrong(lines)[3] == "it is not a JSON object: send each reading as an object with values by name"
    rows = read_file("a.csv", b"x,y\n1,2\n1\n1,2,3\n")
    assert whats_wrong(rows) == {
        1: "it has 1 values, but the line of names has 2",
        2: "it has 3 values, but the line of names has 2",
    }


# ── what is not ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Pwned:
    """What a pickle could do, were it read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("pwned"),)


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        ("a.npz", b"", "not a .npz file"),
        ("a.npz", b"PK\x03\x04" + b"\0" * 50, "not a .npz file"),
        ("a.npz", npz(x=np.arange(1000))[:-30], "not a .npz file"),
        ("a.npz", zipped({"x.npy": b"\0" * (MOST_BYTES + 1)}), f"1 array, and at most 64 "
         f"are allowed; unpacked, it has {MOST_BYTES + 1:,} bytes, "),
        ("a.npz", zipped({f"{n}.npy": b"\0" * 2**21 for n in range(40)}), "40 arrays, and at most 64 "
         "are allowed; unpacked, it has 83.9 MB, and at most"),
        ("a.npz", zipped({f"{n}.npy": b"" for n in range(65)}), "65 arrays"),
        ("a.npz", zipped({"x.npy": b"x"}, zipfile.ZIP_LZMA), "its compression is not supported: write the file with numpy.savez"),
        ("a.npz", zipped({"x.npy": pickle.dumps(Pwned())}), "'x.npy' is none|x.npy was not written by numpy.save"),
        ("a.npz", zipped({"x.npy": _saved(np.array([Pwned(), None]))}), "holds object, which are neither numbers nor text"),
        ("a.npz", zipped({"x.npy": _saved(np.zeros(2, [("a", "i4")]))}), "neither numbers nor text"),
        ("a.npz", zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }")}),
         r"declares the shape \(10000000000,\), but has 0 bytes"),
        ("a.npz", zipped({"x.npy": npy("{'descr': '<U0', 'fortran_order': False, 'shape': (10000000000,), }")}),
         r"declares the shape \(10000000000,\), but has 0 bytes"),
        ("a.npz", zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"\0" * 4)}),
         "declares the shape"),
        ("a.npz", zipped({"x.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': " + "(" * 3000)}),
         "was not written by numpy.save"),
        ("a.npz", zipped({"x.npy": npy(" " * (LONGEST_HEADER + 1))}), "was not written by numpy.save"),
        ("a.npz", zipped({"x.npy": npy("{}", version=b"\x03\x00")}), "was not written by numpy.save"),
        ("a.npz", npz(x=np.zeros((0, 2))), "declares the shape"),
        ("a.npz", npz(x=np.float32(1)), "do not all have one row per reading: {'x': -1}"),
        ("a.npz", npz(x=np.zeros(2), y=np.zeros(3)), "do not all have one row per reading"),
        ("a.npz", npz(x=np.zeros(MOST_READINGS + 1, np.uint8)), f"give 1 to {MOST_READINGS:,}"),
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"a, a\n1,2\n", "line 1 gives two columns the name 'a'"),
        ("a.csv", b"a\n\xff\n", "it is not UTF-8: line 2 has the byte 0xff"),
        ("a.csv", b"a\n" + b"1\n" * (MOST_READINGS + 200), f"and {MOST_READINGS:,} readings, are read: split it"),
        ("a.json", b" \n", "it contains no reading"),
        ("a.json", b" " * (MOST_TEXT + 1), f"at most {MOST_TEXT:,}"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_readings(
    name: str, body: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadReading, match=why):
        read_file(name, body)
    assert not Path("pwned").exists()


def test_an_archive_that_lies_about_its_lengths_is_unpacked_no_further() -> None:
    """A member says that it has 100 bytes, and would become 100 MB."""
    body = bytearray(zipped({"x.npy": b"\x93NUMPY" + b"\0" * 10**8}))
    entry = body.rindex(b"PK\x01\x02")
    body[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    assert len(body) < 200_000
    with pytest.raises(BadReading):
        read_file("a.npz", bytes(body))


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b'{"x": NaN}', b'{"x": 1}{"y": 2}', b"[]", b"[" * 100_000, b'"\xed\xa0\x80"'],
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(BadReading):
        read_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        b"\x02" + b"\0" * 7 + b"{}",
        encode_tree({"x": np.zeros(2, np.float32), "y": np.zeros(3, np.float32)}),
        encode_tree({"x": np.float32(1)}),
        encode_tree({"x": np.zeros((0, 3), np.float32)}),
    ],
)
def test_what_is_no_safetensors_of_readings(body: bytes) -> None:
    with pytest.raises(BadReading):
        read_safetensors(body)


@given(st.binary(max_size=200), st.sampled_from(["a.npz", "a.csv", "a.json"]), st.binary(max_size=4))
def test_any_bytes_are_read_or_refused(body: bytes, name: str, more: bytes) -> None:
    valid = {"a.npz": npz(x=np.zeros(3, np.float32)), "a.csv": b"x\n1\n", "a.json": b'{"x": 1}\n'}[name]
    at = len(body) % len(valid)
    for tried in (body, valid[:at] + more + valid[at:], valid[:at] + body):
        try:
            batch = read_file(name, tried)
        except BadReading:
            continue
        assert len(batch.found) >= (name != "a.csv"), "names alone are a table without rows"


def test_whole_files_end_as_such() -> None:
    assert is_whole("a.csv", b"a\n1\n")
    assert not is_whole("a.csv", b"a\n1")
    assert not is_whole("a.json", b"")
    assert is_whole("a.NPZ", npz(x=np.zeros(1)))
    assert not is_whole("a.npz", npz(x=np.zeros(1000))[:-1000])


# ── what is prepared ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def readings(tmp_path: Path) -> Any:
    with Readings(tmp_path / "node") as readings:
        yield readings


def warm(raw: Any) -> tuple[Any, Any]:
    """A user's `prepare`."""
    return [raw["t"] / 10, raw["u"]], {"cold": 0, "warm": 1, None: None}[raw.get("felt")]


def test_a_users_file_makes_an_example_of_what_came(readings: Readings) -> None:
    intake = Intake(readings, warm)
    taken = intake.take(read_file("a.csv", b"t,u,felt,key\n200,5,warm,a\n100,4,,b\n100,4,hot,c\nx,1,cold,d\n").found)
    assert (taken.kept, taken.labelled, taken.again) == (2, 0, 0)
    assert taken.refused == {
        2: "prepare: KeyError: 'hot'; it has 't', 'u', 'felt', 'key'",
        3: "prepare: TypeError: unsupported operand type(s) for /: 'str' and 'int'",
    }
    assert readings.examples()[0].tolist() == [[20, 5]]
    assert intake.take([{"t": 100, "u": 4, "felt": "cold", "key": "b"}]).labelled == 1
    assert intake.inputs([{"t": 50, "u": 2}]).tolist() == [[5, 2]]
    with pytest.raises(BadReading, match="reading 1: prepare: KeyError: 'u'; it has 't'"):
        intake.inputs([{"t": 50, "u": 2}, {"t": 50}])


def test_without_one_a_reading_has_inputs_and_perhaps_a_target(readings: Readings) -> None:
    intake = Intake(readings)
    taken = intake.take([{"inputs": [1, 2], "target": 1}, {"inputs": [1, 2]}, {"t": 1, "u": 2}, {}])
    assert (taken.kept, list(taken.refused)) == (2, [2, 3])
    assert taken.refused[2] == "it has no 'inputs', but 't', 'u': send inputs, or define `prepare(reading)`"


def test_what_came_together_is_kept_once(readings: Readings) -> None:
    intake = Intake(readings)
    raws = [{"inputs": [n], "target": 0} for n in range(3)]
    assert intake.take(raws, "batch").kept == 3
    assert intake.take([*raws, {"inputs": [3], "target": 0}], "batch").again == 3
    assert intake.take(raws[:1], "one").kept == 1
    intake.label({"key": "one", "target": 5})
    assert intake.take([{"inputs": [0], "target": 0, "key": "own"}], "x").kept == 1
    assert intake.take([{"inputs": [0], "target": 0, "key": "own"}], "y").again == 1
    assert intake.take([{"inputs": [0], "key": 7}]).refused == {0: "its key is not a text"}


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ({"key": "x", "target": 1}, "no reading has this key"),
        ({"key": "x"}, r"it is not a label: give a key \(a text\) and a target"),
        ({"target": 1}, r"it is not a label: give a key \(a text\) and a target"),
        (BadReading("no object"), "no object"),
    ],
)
def test_a_label_is_for_a_reading(label: Any, why: str, readings: Readings) -> None:
    with pytest.raises(BadReading, match=why):
        Intake(readings).label(label)


def test_inputs_of_many_shapes_are_none(readings: Readings) -> None:
    with pytest.raises(BadReading, match="reading 1: its input does not have the shape"):
        Intake(readings).inputs([{"inputs": [1]}, {"inputs": [1, 2]}])


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.jsonl", b'{"x": 1}\r\n{"x": 2}\r\n{"x": 3}'),
        ("a.lp", b"m x=1\r\nm x=2\r\nm x=3"),
        ("a.csv", b"x\r\n1\r\n2\r\n3"),
        ("a.csv", b"x\r1\r2\r3"),
        ("a.jsonl.gz", gzip.compress(b'{"x": 1}\r\n{"x": 2}\r\n{"x": 3}', mtime=0)),
    ],
)
def test_a_part_of_a_file_of_windows_has_the_same_readings(name: str, body: bytes) -> None:
    batch = read_file(name, body)
    assert read_file(name, batch.subset([0, 2])).found == [batch.found[0], batch.found[2]]


def test_archives_within_an_archive_are_bounded_by_what_they_hold() -> None:
    def zipped(name: str, members: int, body: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(members):
                archive.writestr(f"{number}{name}", body)
        return out.getvalue()

    arrays = io.BytesIO()
    np.savez_compressed(arrays, x=np.zeros((2, 2**24), np.uint8))
    assert len(read_file("a.zip", zipped(".npz", 2, arrays.getvalue())).found) == 4
    with pytest.raises(BadReading, match="together, its arrays and pictures have more than 268435456 bytes: split it"):
        read_file("a.zip", zipped(".npz", 20, arrays.getvalue()))
