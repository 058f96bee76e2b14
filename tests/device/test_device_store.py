"""One contract for a device's memory: what was written is there, whole, whenever the process ends."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import sumus.device.store as stores
from sumus.device.store import (
    DeviceStore,
    FolderDeviceStore,
    KeptModel,
    KeptState,
    Membership,
    MemoryDeviceStore,
    Record,
    WorkStarts,
    counted,
)
from sumus.errors import ExperimentError
from sumus.protocol.session import DeviceState, Phase
from sumus.wire.messages import Assignment, Body

WORK = Assignment("a", "train", "s1", 3, Body("ab" * 32, 10), Body("cd" * 32, 20), "01" * 32, 10, 60.0)
ROW = DeviceState(Phase.REPORTING, 5, "s1", "s1", True, 2, (1.5, 60.0), 730_000, 4)

Reopen = Callable[[], DeviceStore]


class Crash(Exception):
    """The process ends here."""


@pytest.fixture(params=["memory", "folder"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reopen]:
    """The store as the next process finds it."""
    memory, opened = MemoryDeviceStore(), list[DeviceStore]()

    def open_it() -> DeviceStore:
        for one in opened:
            one.close()
        opened[:] = [memory if request.param == "memory" else FolderDeviceStore(tmp_path / "device")]
        return opened[0]

    yield open_it
    for one in opened:
        one.close()


def test_what_was_written_is_there_in_the_next_process(reopen: Reopen) -> None:
    store = reopen()
    assert (store.read(), store.key()) == (Record(), None)
    names = [store.put(body) for body in (b"report", b"pending", b"state", b"model")]
    record = Record(
        Membership("https://example.org", "people", "ab" * 32),
        "a certificate",
        ROW,
        WORK,
        names[0],
        KeptState(names[1], "f"),
        {"a": KeptState(names[2], "f")},
        {"a": KeptModel(3, names[3])},
        "a",
        {"a": WorkStarts(3, 2)},
        1,
        0.25,
        counted({"trained": 1}, "trained", "counted"),
    )
    store.write(record)
    store.put_key(bytes(32))
    store = reopen()
    assert store.read() == record
    assert store.key() == bytes(32)
    assert [store.get(name) for name in names] == [b"report", b"pending", b"state", b"model"]
    assert record.counts == {"trained": 2, "counted": 1}


def test_the_same_object_under_two_names_stays_until_neither_names_it(reopen: Reopen) -> None:
    store = reopen()
    name = store.put(b"same")
    assert store.put(b"same") == name
    store.write(Record(report=name, pending=KeptState(name, "f")))
    store.write(Record(pending=KeptState(name, "f")))
    assert store.get(name) == b"same"
    store.write(Record())
    with pytest.raises((ExperimentError, KeyError)):
        store.get(name)


def test_everything_is_forgotten(reopen: Reopen) -> None:
    store = reopen()
    store.put_key(bytes(32))
    store.write(Record(row=ROW, report=store.put(b"report")))
    store.erase()
    for again in (store, reopen()):
        assert (again.read(), again.key()) == (Record(), None)


# ── a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def a_folder(tmp_path: Path) -> FolderDeviceStore:
    """One that reports: with a report, a pending state and a model."""
    store = FolderDeviceStore(tmp_path)
    store.put_key(bytes(32))
    report, pending, model = (store.put(body) for body in (b"report", b"pending", b"model"))
    store.write(
        Record(row=ROW, work=WORK, report=report, pending=KeptState(pending, "f"), models={"a": KeptModel(3, model)})
    )
    return store


def test_nobody_else_may_read_any_of_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        a_folder(tmp_path / "device").close()
    finally:
        os.umask(before)
    for path in (tmp_path / "device").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "device").stat().st_mode & 0o777 == 0o700


def test_it_does_not_grow(tmp_path: Path) -> None:
    store = a_folder(tmp_path)
    with_one = files_in(tmp_path)
    for number in range(5):
        model = store.put(b"model %d" % number)
        store.write(replace(store.read(), models={"a": KeptModel(number, model)}))
    assert len(files_in(tmp_path)) == len(with_one)


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    a_folder(tmp_path).close()
    whole = files_in(tmp_path)
    (tmp_path / "objects" / ("0" * 64)).write_bytes(b"of no record")
    (tmp_path / "objects" / f"{'1' * 64}.new").write_bytes(b"half")
    FolderDeviceStore(tmp_path).close()
    assert files_in(tmp_path) == whole


def test_two_processes_cannot_be_one_device_but_one_may_look(tmp_path: Path) -> None:
    store = a_folder(tmp_path)
    with pytest.raises(ExperimentError, match="another process uses"):
        FolderDeviceStore(tmp_path)
    looking = FolderDeviceStore(tmp_path, look=True)
    assert looking.read() == store.read()
    store.close()
    FolderDeviceStore(tmp_path).close()


@pytest.mark.parametrize("place", ["nothing", "empty"])
def test_a_folder_of_no_device_is_said_to_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExperimentError, match="is not a device's folder: give the folder of `sumus join`"):
        FolderDeviceStore(tmp_path / place, look=True)


@pytest.mark.parametrize(
    "there",
    [
        {"notes.txt": b"mine"},
        {"objects/mine": b"mine"},
        {f"objects/{'0' * 64}": b"mine"},
        {"record.json": b'{"songs": []}', f"objects/{'0' * 64}": b"mine"},
        {"record.json": b"[1", "draft.new": b"mine"},
        {"key": b"to the house"},
    ],
    ids=["a file", "objects", "objects by hash", "a record", "a record that is none", "a key"],
)
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path, there: dict[str, bytes]) -> None:
    for name, body in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    tmp_path.chmod(0o755)
    with pytest.raises(ExperimentError, match="is not a device's folder, and is not empty: give a new folder"):
        FolderDeviceStore(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)} == there
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_what_is_not_a_devices_stays_beside_it(tmp_path: Path) -> None:
    a_folder(tmp_path).close()
    (tmp_path / "objects" / "notes.txt").write_bytes(b"mine")
    (tmp_path / "draft.new").write_bytes(b"mine")
    (tmp_path / "record.json.new").write_bytes(b"half")
    store = FolderDeviceStore(tmp_path)
    store.erase()
    store.close()
    assert files_in(tmp_path) == {"lock", "draft.new", "objects/notes.txt"}


@pytest.mark.parametrize("left", [("lock",), ("lock", "key"), ("lock", "key.new")], ids=" ".join)
def test_what_a_first_enrolment_left_is_a_devices(tmp_path: Path, left: tuple[str, ...]) -> None:
    FolderDeviceStore(tmp_path).close()
    for name in left:
        (tmp_path / name).write_bytes(bytes(32) if name == "key" else b"")
    FolderDeviceStore(tmp_path).close()


def test_damage_is_said_with_what_to_do(tmp_path: Path) -> None:
    store = a_folder(tmp_path)
    record = store.read()
    assert record.report is not None
    (tmp_path / "objects" / record.report).write_bytes(b"rep")
    with pytest.raises(ExperimentError, match="gone or damaged: delete .* and enrol this device again"):
        store.get(record.report)
    store.close()
    (tmp_path / "record.json").write_bytes(b'{"row": 3}')
    with pytest.raises(ExperimentError, match=r"record.json is damaged .* delete .* and enrol this device again"):
        FolderDeviceStore(tmp_path)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="a device cannot store anything in"):
        FolderDeviceStore(tmp_path / "file")


MOMENTS = ("before anything is written", "half of the new file", "the new file beside the old one", "in its place")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("nth", range(3), ids=["the report", "what is pending", "the record"])
def test_a_crash_while_a_report_is_kept_leaves_the_record_before_or_the_one_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, nth: int
) -> None:
    store = FolderDeviceStore(tmp_path)
    before = Record(row=DeviceState(Phase.TRAINING, 5, "s1", "s1"), work=WORK)
    store.write(before)
    left = nth
    whole = stores.write_whole

    def crashing(path: Path, body: bytes, lasting: bool = False, private: bool = False) -> None:
        nonlocal left
        assert lasting
        assert private
        if left:
            left -= 1
            return whole(path, body, lasting, private)
        new = path.with_name(path.name + ".new")
        if moment != MOMENTS[0]:
            new.write_bytes(body[: len(body) // 2] if moment == MOMENTS[1] else body)
        if moment == MOMENTS[3]:
            new.replace(path)
        raise Crash

    monkeypatch.setattr(stores, "write_whole", crashing)
    after = before
    with suppress(Crash):
        report, pending = store.put(b"report"), store.put(b"pending")
        after = replace(before, row=ROW, report=report, pending=KeptState(pending, "f"))
        store.write(after)
    monkeypatch.setattr(stores, "write_whole", whole)
    store.close()
    again = FolderDeviceStore(tmp_path)
    assert again.read() == (after if (nth, moment) == (2, MOMENTS[3]) else before)
    assert all(again.get(name) for name in again.read().objects)
    assert len(files_in(tmp_path)) == 2 + len(again.read().objects)  # the record and the lock
    again.close()
