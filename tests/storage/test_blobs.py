"""One contract for blobs: what was put is there, whole, or an error says that it is not."""

import hashlib
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore as ObjectsInMemory

from sumus.errors import ExperimentError, UsageError
from sumus.storage import blobs as module
from sumus.storage.blobs import Blobs, DirectoryBlobs, MemoryBlobs, ObjectBlobs, open_blobs

BODY = b"\0 a model " * 1000
NAME = hashlib.sha256(BODY).hexdigest()
ABSENT = "0" * 64


@pytest.fixture(params=["memory", "directory", "objects"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    made: dict[str, Callable[[], Blobs]] = {
        "memory": MemoryBlobs,
        "directory": lambda: DirectoryBlobs(tmp_path / "blobs"),
        "objects": lambda: ObjectBlobs(ObjectsInMemory()),
    }
    return made[request.param]()


def test_what_is_put_is_got_by_its_hash(blobs: Blobs) -> None:
    assert blobs.put(BODY) == NAME
    assert (blobs.get(NAME), blobs.size(NAME), list(blobs)) == (BODY, len(BODY), [NAME])
    other = blobs.put(memoryview(BODY)[3:])
    assert (blobs.get(other), blobs.get(NAME)) == (BODY[3:], BODY)
    assert sorted(blobs) == sorted([NAME, other])
    assert blobs.get(blobs.put(b"")) == b""


def test_putting_it_again_changes_nothing(blobs: Blobs) -> None:
    assert [blobs.put(BODY) for _ in range(3)] == [NAME] * 3
    assert list(blobs) == [NAME]


def test_what_is_not_there_is_said_so(blobs: Blobs) -> None:
    with pytest.raises(ExperimentError, match=f"blob {ABSENT} is missing: restore it from a backup"):
        blobs.get(ABSENT)
    assert (blobs.size(ABSENT), blobs.path(ABSENT), list(blobs)) == (None, None, [])
    blobs.delete(ABSENT)


def test_what_is_deleted_is_gone_and_may_be_put_again(blobs: Blobs) -> None:
    blobs.put(BODY)
    blobs.delete(NAME)
    assert (blobs.size(NAME), blobs.path(NAME), list(blobs)) == (None, None, [])
    assert blobs.put(BODY) == NAME
    assert blobs.get(NAME) == BODY


@pytest.mark.parametrize("name", ["", "../../etc/passwd", NAME.upper(), NAME[:-1], f"{NAME}\n", f"{NAME[:62]}/x"])
def test_a_name_from_a_request_is_a_hash_or_names_nothing(blobs: Blobs, name: str) -> None:
    for verb in (blobs.get, blobs.size, blobs.path, blobs.delete):
        with pytest.raises(UsageError, match="is not the name of a blob"):
            verb(name)


def test_many_threads_put_the_same(blobs: Blobs) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(blobs.put, [BODY] * 16)) == {NAME}
    assert (blobs.get(NAME), list(blobs)) == (BODY, [NAME])


@given(bodies=st.lists(st.binary(max_size=40), max_size=6))
def test_any_bodies_are_got_as_they_were_put(bodies: list[bytes]) -> None:
    for blobs in (MemoryBlobs(), ObjectBlobs(ObjectsInMemory())):
        names = [blobs.put(body) for body in bodies]
        assert [blobs.get(name) for name in names] == bodies
        assert sorted(blobs) == sorted(set(names))


# ── a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_blob_is_a_file_under_the_beginning_of_its_name(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    blobs.put(BODY)
    path = tmp_path / NAME[:2] / NAME
    assert (blobs.path(NAME), path.read_bytes()) == (path, BODY)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(DirectoryBlobs(tmp_path)) == [NAME]


@pytest.mark.parametrize("damaged", [BODY[:-1], BODY[:-1] + b"!", b""], ids=["short", "a byte", "empty"])
def test_a_damaged_file_is_seen_and_put_right_by_putting_it_again(tmp_path: Path, damaged: bytes) -> None:
    blobs = DirectoryBlobs(tmp_path)
    blobs.put(BODY)
    path = blobs.path(NAME)
    assert path is not None
    path.write_bytes(damaged)
    with pytest.raises(ExperimentError, match="is damaged: its bytes have another hash"):
        blobs.get(NAME)
    blobs.put(BODY)
    assert blobs.get(NAME) == BODY


def test_a_crash_leaves_no_half_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(28, "No space left on device")

    blobs = DirectoryBlobs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync", fails)
        with pytest.raises(ExperimentError, match="cannot be written: No space left on device"):
            blobs.put(BODY)
    assert (list(blobs), blobs.size(NAME), list(tmp_path.rglob("*.new"))) == ([], None, [])
    (tmp_path / NAME[:2] / f"{NAME}.0123.new").write_bytes(BODY[:10])  # as a kill leaves it
    assert list(blobs) == []
    blobs.put(BODY)
    assert (list(blobs), blobs.get(NAME)) == ([NAME], BODY)


def test_a_put_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = list[str]()
    monkeypatch.setattr(module, "sync", lambda path: synced.append(path.suffix or path.name))
    blobs = DirectoryBlobs(tmp_path)
    blobs.put(BODY)
    assert synced == [".new", NAME[:2], tmp_path.name]
    synced.clear()
    blobs.put(BODY)  # whoever put it first may not have waited yet
    assert synced == [NAME, NAME[:2], tmp_path.name]


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "nowhere" / "blobs"):
        with pytest.raises(ExperimentError, match="blobs cannot be kept in .*; give a folder whose parent exists"):
            open_blobs(folder)
    blobs = open_blobs(str(tmp_path / "blobs"))
    assert isinstance(blobs, DirectoryBlobs)
    assert stat.S_ISDIR((tmp_path / "blobs").stat().st_mode)


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_object_lies_under_the_same_name_as_a_file_and_is_checked() -> None:
    objects = ObjectsInMemory()
    blobs = ObjectBlobs(objects)
    blobs.put(BODY)
    objects.put(f"{NAME[:2]}/{NAME}", BODY[:-1])
    objects.put("of/others", b"left alone")
    assert list(blobs) == [NAME]
    with pytest.raises(ExperimentError, match="is damaged: its bytes have another hash"):
        blobs.get(NAME)
    assert blobs.path(NAME) is None


def test_a_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret word")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    blobs = open_blobs("s3://bucket/prefix")
    for verb in (lambda: blobs.put(BODY), lambda: blobs.get(NAME), lambda: blobs.size(NAME), lambda: list(blobs)):
        with pytest.raises(ExperimentError, match="the object store .*: check that it is running") as refused:
            verb()
        assert "127.0.0.1:9" in str(refused.value)
        assert "retries" in str(refused.value)
        assert "a secret word" not in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "where", ["ftp://host/folder", "s3://", "S3://bucket", "s3://key:hushed@bucket", "s3://bucket?key=hushed"]
)
def test_a_place_that_is_none_is_one_line(where: str) -> None:
    with pytest.raises(UsageError, match="give a folder, or s3://BUCKET/PREFIX") as refused:
        open_blobs(where)
    assert "hushed" not in str(refused.value)
