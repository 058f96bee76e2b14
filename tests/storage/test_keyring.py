"""What is sealed opens with its own key and its own name only, and a key that is destroyed opens nothing, for any process."""

import base64
import multiprocessing
import os
import stat
import traceback
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from sumus.errors import ExperimentError, UsageError
from sumus.storage.keyring import KeyRing, SealError, new_key, seal, seal_pieces, unseal
from sumus.types import Array

KEY, DATA_KEY = bytes(range(32)), bytes(range(100, 132))
ABOUT = "sum 7 shard ab 3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def changed(body: bytes, at: int) -> bytes:
    """With one bit flipped."""
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ── sealing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(key=st.binary(min_size=32, max_size=32), body=st.binary(max_size=300), about=st.text(max_size=30))
def test_what_is_sealed_opens_to_the_bit(key: bytes, body: bytes, about: str) -> None:
    sealed = seal(key, body, about)
    assert len(sealed) == 12 + len(body) + 16
    assert unseal(key, sealed, about) == unseal(key, memoryview(sealed), about) == body


@pytest.mark.parametrize(
    "array",
    [
        np.arange(-3, 3),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(4, dtype=">i8"),
        np.array(7, np.int64),
        np.zeros((0, 3)),
        np.ones(3, complex),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_arrays_body_is_its_bytes(array: Array) -> None:
    assert unseal(KEY, seal(KEY, array, ABOUT), ABOUT) == array.tobytes()
    assert unseal(KEY, seal(KEY, array.data, ABOUT), ABOUT) == array.tobytes()


@pytest.mark.parametrize("body", [b"", b"a sum of everyone"])
def test_no_bit_of_a_sealed_body_can_be_changed(body: bytes) -> None:
    sealed = seal(KEY, body, ABOUT)
    assert unseal(KEY, sealed, ABOUT) == body
    for at in range(len(sealed)):  # the nonce, the ciphertext, the tag
        with pytest.raises(SealError, match=f"{ABOUT} cannot be decrypted: its bytes were changed"):
            unseal(KEY, changed(sealed, at), ABOUT)


def test_a_sealed_body_that_is_longer_or_shorter_does_not_open() -> None:
    sealed = seal(KEY, b"a sum of everyone", ABOUT)
    for other in (*(sealed[:length] for length in range(len(sealed))), sealed + b"\0", b"\0" + sealed, sealed[1:]):
        with pytest.raises(SealError, match="cannot be decrypted"):
            unseal(KEY, other, ABOUT)


@pytest.mark.parametrize("about", ["", "sum 7 shard ab 4", ABOUT + " ", ABOUT[:-1], ABOUT.upper()])
def test_a_sealed_body_opens_as_nothing_else(about: str) -> None:
    with pytest.raises(SealError, match=f"^{about} cannot be decrypted"):
        unseal(KEY, seal(KEY, b"a sum of everyone", ABOUT), about)


def test_no_other_key_opens_it() -> None:
    sealed = seal(KEY, b"a sum of everyone", ABOUT)
    for other in (changed(KEY, 0), changed(KEY, 31), bytes(32), new_key()):
        with pytest.raises(SealError, match="encrypted with another key"):
            unseal(other, sealed, ABOUT)


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    """AES would take 16 or 24, and be weaker."""
    with pytest.raises(UsageError, match=f"has {length} bytes, but it must have 32: make a key with new_key"):
        seal(bytes(length), b"", ABOUT)
    with pytest.raises(UsageError, match=f"has {length} bytes"):
        unseal(bytes(length), bytes(40), ABOUT)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_pieces_are_sealed_as_one_body(pieces: list[bytes]) -> None:
    sealed = seal_pieces(KEY, pieces, ABOUT)
    assert len(sealed) == 12 + sum(map(len, pieces)) + 16
    assert unseal(KEY, sealed, ABOUT) == b"".join(pieces)
    assert bytes(sealed[12:]) == AESGCM(KEY).encrypt(bytes(sealed[:12]), b"".join(pieces), ABOUT.encode())


def test_what_is_too_long_for_one_seal_is_refused() -> None:
    with pytest.raises(UsageError, match=f"{ABOUT} has 2147483648 bytes, .*seal parts"):
        seal(KEY, np.zeros(2**31, np.uint8), ABOUT)  # no page of it is touched


def test_no_nonce_and_no_key_comes_twice() -> None:
    sealed = [seal(KEY, b"the same", ABOUT) for _ in range(20_000)]
    assert len({body[:12] for body in sealed}) == len({body[12:] for body in sealed}) == len(sealed)
    keys = [new_key() for _ in range(1000)]
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == len(keys)


# ── a ring ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ring_wraps_under_its_newest_key_and_names_it(folder: Path) -> None:
    ring = KeyRing(folder)
    first, again = ring.wrap(DATA_KEY, "round 7"), ring.wrap(DATA_KEY, "round 7")
    assert (len(first), first[:4], first[4:] == again[4:]) == (4 + 12 + 32 + 16, b"\0\0\0\1", False)
    assert ring.rotate() == ring.current == 2
    second = ring.wrap(DATA_KEY, "round 7")
    assert second[:4] == b"\0\0\0\2"
    assert unseal((folder / "2.key").read_bytes(), second[4:], "round 7") == DATA_KEY
    for wrapped in (first, again, second):
        assert ring.unwrap(wrapped, "round 7") == KeyRing(folder).unwrap(wrapped, "round 7") == DATA_KEY


def test_no_bit_of_a_wrapped_key_can_be_changed(folder: Path) -> None:
    ring = KeyRing(folder)
    ring.rotate()
    wrapped = ring.wrap(DATA_KEY, "round 7")
    assert ring.unwrap(wrapped, "round 7") == DATA_KEY
    other_id = b"\0\0\0\1" + wrapped[4:]
    changes = [changed(wrapped, at) for at in range(len(wrapped))]
    shorter = [wrapped[:length] for length in range(len(wrapped))]
    for bad in (other_id, *changes, *shorter):
        with pytest.raises(SealError):
            ring.unwrap(bad, "round 7")
    with pytest.raises(SealError, match="^round 8 cannot be decrypted"):
        ring.unwrap(wrapped, "round 8")


def test_another_ring_does_not_unwrap(tmp_path: Path) -> None:
    wrapped = KeyRing(tmp_path / "a").wrap(DATA_KEY, "round 7")
    with pytest.raises(SealError, match="with another key"):
        KeyRing(tmp_path / "b").unwrap(wrapped, "round 7")


def test_the_tenth_key_is_newer_than_the_ninth(folder: Path) -> None:
    ring = KeyRing(folder)
    assert [ring.rotate() for _ in range(9)] == list(range(2, 11))
    assert (ring.current, KeyRing(folder).current) == (10, 10)
    assert ring.wrap(DATA_KEY, "")[:4] == b"\0\0\0\x0a"
    assert ring.destroy_before(10) == list(range(1, 10))


def test_keys_differ(folder: Path) -> None:
    ring = KeyRing(folder)
    for _ in range(20):
        ring.rotate()
    keys = {path.read_bytes() for path in folder.iterdir()}
    assert (len(keys), {len(key) for key in keys}) == (21, {32})


def test_another_ring_sees_rotation_and_destruction(folder: Path) -> None:
    here, there = KeyRing(folder), KeyRing(folder)
    old = there.wrap(DATA_KEY, "round 7")
    assert there.unwrap(old, "round 7") == DATA_KEY
    assert here.rotate() == there.current == 2
    new = there.wrap(DATA_KEY, "round 8")
    assert new[:4] == b"\0\0\0\2"
    assert here.destroy_before(2) == [1]
    with pytest.raises(SealError, match="round 7 cannot be used: key 1 is destroyed"):
        there.unwrap(old, "round 7")
    assert there.unwrap(new, "round 8") == DATA_KEY


def test_what_a_destroyed_key_wrapped_is_unreadable_for_good(folder: Path) -> None:
    ring = KeyRing(folder)
    wrapped = []
    for number in range(3):
        wrapped.append(ring.wrap(DATA_KEY, f"round {number}"))
        ring.rotate()
    assert ring.destroy_before(1) == []
    assert ring.destroy_before(3) == [1, 2]
    assert ring.destroy_before(3) == []
    assert names(folder) == ["3.key", "4.key"]
    for again in (ring, KeyRing(folder)):
        for number in (0, 1):
            with pytest.raises(SealError, match=f"round {number} cannot be .*: key {number + 1} is destroyed.*cancel"):
                again.unwrap(wrapped[number], f"round {number}")
        assert again.unwrap(wrapped[2], "round 2") == DATA_KEY
    assert ring.rotate() == 5


def test_a_destroyed_key_is_overwritten_before_its_name_goes(folder: Path, tmp_path: Path) -> None:
    ring = KeyRing(folder)
    os.link(folder / "1.key", tmp_path / "second name")
    assert any((tmp_path / "second name").read_bytes())
    ring.destroy_before(ring.rotate())
    assert (tmp_path / "second name").read_bytes() == bytes(32)


def test_the_newest_key_cannot_be_destroyed(folder: Path) -> None:
    ring = KeyRing(folder)
    ring.rotate()
    wrapped = ring.wrap(DATA_KEY, "round 7")
    for key_id in (3, 100):
        with pytest.raises(UsageError, match=f"before {key_id} would destroy the newest key, 2: call rotate"):
            ring.destroy_before(key_id)
    assert names(folder) == ["1.key", "2.key"]
    assert ring.unwrap(wrapped, "round 7") == DATA_KEY


# ── its folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_and_keys_are_the_owners_alone_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        KeyRing(folder).rotate()
    finally:
        os.umask(before)
    assert (mode(folder), mode(folder / "1.key"), mode(folder / "2.key")) == (0o700, 0o600, 0o600)


@pytest.mark.parametrize("right", [0o040, 0o004, 0o020, 0o002, 0o010, 0o001])
def test_what_others_have_a_right_to_is_refused_and_how_to_take_it_is_said(tmp_path: Path, right: int) -> None:
    folder = tmp_path / "our keys"
    ring = KeyRing(folder)
    wrapped = ring.wrap(DATA_KEY, "round 7")
    folder.chmod(0o700 | right)
    with pytest.raises(
        ExperimentError, match=f"open to other users .mode {0o700 | right:o}.: run `chmod 700 '{folder}'`"
    ):
        KeyRing(folder)
    folder.chmod(0o700)
    (folder / "1.key").chmod(0o600 | right)
    uses: list[Callable[[], object]] = [
        lambda: KeyRing(folder),
        lambda: ring.wrap(DATA_KEY, "round 7"),
        lambda: ring.unwrap(wrapped, "round 7"),
    ]
    for use in uses:
        with pytest.raises(ExperimentError, match=f"run `chmod 600 '{folder}/1.key'`, and rotate"):
            use()
    (folder / "1.key").chmod(0o600)
    assert KeyRing(folder).unwrap(wrapped, "round 7") == DATA_KEY


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_file_of_a_wrong_length_is_refused(folder: Path, length: int) -> None:
    ring = KeyRing(folder)
    wrapped = ring.wrap(DATA_KEY, "round 7")
    (folder / "1.key").write_bytes(b"k" * length)
    uses: list[Callable[[], object]] = [
        lambda: KeyRing(folder),
        lambda: ring.wrap(DATA_KEY, "round 7"),
        lambda: ring.unwrap(wrapped, "round 7"),
    ]
    for use in uses:
        with pytest.raises(ExperimentError, match=rf"1\.key has {length} bytes, but a key has 32: restore the file"):
            use()


def test_an_old_key_that_is_damaged_is_found_at_opening(folder: Path) -> None:
    KeyRing(folder).rotate()
    (folder / "1.key").write_bytes(b"short")
    with pytest.raises(ExperimentError, match=r"1\.key has 5 bytes"):
        KeyRing(folder)


def test_a_place_that_is_no_folder_is_refused_and_no_parent_is_made(tmp_path: Path) -> None:
    """Where a volume is not mounted, a new ring in its place would hide the real one."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "not mounted" / "keys"):
        with pytest.raises(ExperimentError, match=f"keys cannot be kept in {place}: .*give a folder"):
            KeyRing(place)
    assert names(tmp_path) == ["file"]


def test_a_ring_without_keys_says_so(folder: Path) -> None:
    ring = KeyRing(folder)
    (folder / "1.key").unlink()
    uses: list[Callable[[], object]] = [
        lambda: ring.current,
        lambda: ring.wrap(DATA_KEY, ""),
        ring.rotate,
        lambda: ring.destroy_before(1),
    ]
    for use in uses:
        with pytest.raises(ExperimentError, match=f"there are no keys in {folder} any more: restore them"):
            use()
    folder.rmdir()
    with pytest.raises(ExperimentError, match=f"{folder} cannot be read: .*restore the folder"):
        ring.current


def test_a_ring_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ring = KeyRing("keys")
    wrapped = ring.wrap(DATA_KEY, "round 7")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ring.unwrap(wrapped, "round 7") == DATA_KEY


def test_other_files_are_no_keys_and_are_left_alone(folder: Path) -> None:
    ring = KeyRing(folder)
    foreign = ["0.key", "01.key", "9.key.new", "9.key.bak", "key", "x.key", "-3.key", "٣.key", "9999999999.key"]
    for name in foreign:
        (folder / name).write_text("mine")
    assert KeyRing(folder).rotate() == ring.current == 2
    assert ring.destroy_before(2) == [1]
    assert names(folder) == sorted([*foreign, "2.key"])
    assert {(folder / name).read_text() for name in foreign} == {"mine"}


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Crash(BaseException):
    """The process ends here."""


def crash(*_: object, **__: object) -> None:
    raise Crash


def test_a_half_written_file_of_a_crash_is_no_key(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "1.0123456789abcdef.new").write_bytes(b"half")
    ring = KeyRing(folder)
    assert (ring.current, ring.rotate(), ring.destroy_before(2)) == (1, 2, [1])
    assert ring.unwrap(ring.wrap(DATA_KEY, "round 7"), "round 7") == DATA_KEY


def test_a_second_name_that_a_crash_left_does_not_keep_a_destroyed_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(Crash):
            KeyRing(folder)
    (left,) = folder.glob("*.new")
    ring = KeyRing(folder)
    key = (folder / "1.key").read_bytes()
    assert (ring.current, left.read_bytes()) == (1, key)
    ring.destroy_before(ring.rotate())
    assert all(path.read_bytes() != key for path in folder.iterdir())


def test_a_destruction_that_crashed_has_destroyed_and_is_finished_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(folder)
    wrapped = ring.wrap(DATA_KEY, "round 7")
    ring.rotate()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(Crash):
            ring.destroy_before(2)
    again = KeyRing(folder)
    with pytest.raises(SealError, match="key 1 is destroyed"):
        again.unwrap(wrapped, "round 7")
    assert again.destroy_before(2) == [1]
    assert names(folder) == ["2.key"]


def test_nothing_is_wrapped_under_a_key_of_zeros(folder: Path) -> None:
    ring = KeyRing(folder)
    (folder / "1.key").write_bytes(bytes(32))
    with pytest.raises(SealError, match="key 1 is destroyed"):
        ring.wrap(DATA_KEY, "round 7")
    ring.rotate()
    assert ring.unwrap(ring.wrap(DATA_KEY, "round 7"), "round 7") == DATA_KEY


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_could_not_be_done_is_said_and_can_be_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(folder)
    failures: list[tuple[Callable[[], object], str]] = [
        (ring.rotate, f"no key can be added to {folder}: No space left on device; check the disk"),
        (lambda: ring.wrap(DATA_KEY, "round 7"), f"keys in {folder} cannot be kept: No space .*; check the disk"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for use, said in failures:
            with pytest.raises(ExperimentError, match=said):
                use()
    assert names(folder) == ["1.key"]
    wrapped = ring.wrap(DATA_KEY, "round 7")
    assert (ring.unwrap(wrapped, "round 7"), ring.rotate()) == (DATA_KEY, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ExperimentError, match=f"keys in {folder} cannot be destroyed: .*; run sumus as .* try again"
        ):
            ring.destroy_before(2)
    assert ring.destroy_before(2) == [1]


def test_a_parent_that_may_not_be_read_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def closed(path: Path, *given: int) -> int:
        if path == folder.parent:
            raise PermissionError(13, "Permission denied")
        return real(path, *given)

    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "open", closed)
    assert KeyRing(folder).current == 1


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to files and folders, in order, by kind and name."""
    done: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "unlink")}

    def fsync(descriptor: int) -> None:
        entry = os.fstat(descriptor)
        done.append(f"sync {'folder' if stat.S_ISDIR(entry.st_mode) else f'file of {entry.st_size}'}")
        real["fsync"](descriptor)

    def link(source: object, name: Path) -> None:
        done.append(f"link {name.name}")
        real["link"](source, name)

    def unlink(name: Path) -> None:
        done.append("unlink new" if name.suffix == ".new" else f"unlink {name.name}")
        real["unlink"](name)

    for name, step in (("fsync", fsync), ("link", link), ("unlink", unlink)):
        monkeypatch.setattr(os, name, step)
    return done


def test_a_key_is_on_the_disk_before_it_wraps_and_gone_from_it_when_destroyed(folder: Path, steps: list[str]) -> None:
    ring = KeyRing(folder)
    assert steps == [
        "sync folder",
        "sync file of 32",
        "link 1.key",
        "unlink new",
    ]  # the folder that was synced is above
    steps.clear()
    ring.wrap(DATA_KEY, "round 7")
    assert steps == ["sync folder"]
    ring.wrap(DATA_KEY, "round 7")
    assert steps == ["sync folder"]
    steps.clear()
    ring.rotate()
    assert steps == ["sync file of 32", "link 2.key", "unlink new", "sync folder"]
    steps.clear()
    ring.destroy_before(2)
    assert steps == ["sync file of 32", "unlink 1.key", "sync folder"]


def test_what_another_ring_added_is_on_the_disk_before_it_is_relied_on(folder: Path, steps: list[str]) -> None:
    """Whoever linked it may not have come to sync the folder yet."""
    here, there, elsewhere = KeyRing(folder), KeyRing(folder), KeyRing(folder)
    here.wrap(DATA_KEY, "round 7")
    there.rotate()
    steps.clear()
    here.wrap(DATA_KEY, "round 7")
    assert steps == ["sync folder"]
    steps.clear()
    elsewhere.destroy_before(2)
    assert steps == ["sync folder", "sync file of 32", "unlink 1.key", "sync folder"]


# ── several at once ──────────────────────────────────────────────────────────────────────────────────────────────────

RACERS, RACES = 4, 25


def race(root: Path, racer: int, start: Barrier) -> None:
    """Open folder after folder, each at the same moment as the others do, and leave a key wrapped."""
    for number in range(RACES):
        start.wait(60)
        wrapped = KeyRing(root / str(number)).wrap(DATA_KEY, f"racer {racer}")
        (root / f"{number}-{racer}").write_bytes(wrapped)


def test_processes_that_open_at_once_agree_on_the_first_key(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(RACERS)
    racers = [spawn.Process(target=race, args=(tmp_path, racer, start)) for racer in range(RACERS)]
    for process in racers:
        process.start()
    for process in racers:
        process.join()
    assert [process.exitcode for process in racers] == [0] * RACERS
    for number in range(RACES):
        assert names(tmp_path / str(number)) == ["1.key"]
        ring = KeyRing(tmp_path / str(number))
        for racer in range(RACERS):
            assert ring.unwrap((tmp_path / f"{number}-{racer}").read_bytes(), f"racer {racer}") == DATA_KEY


def before_once(monkeypatch: pytest.MonkeyPatch, name: str, other: Callable[[], object]) -> None:
    """Let something else happen just before the next call of a function of `os`."""
    real = getattr(os, name)

    def late(*given: object) -> object:
        monkeypatch.setattr(os, name, real)
        other()
        return real(*given)

    monkeypatch.setattr(os, name, late)


def test_whoever_comes_second_uses_the_first_ones_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[bytes] = []
    before_once(monkeypatch, "link", lambda: wrapped.append(KeyRing(folder).wrap(DATA_KEY, "round 7")))
    assert KeyRing(folder).unwrap(wrapped[0], "round 7") == DATA_KEY
    assert names(folder) == ["1.key"]


def test_two_rotations_at_once_give_one_new_key_to_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = KeyRing(folder), KeyRing(folder)
    wrapped: list[bytes] = []

    def rotated() -> None:
        assert there.rotate() == 2
        wrapped.append(there.wrap(DATA_KEY, "round 7"))

    before_once(monkeypatch, "link", rotated)
    assert here.rotate() == 2
    assert here.unwrap(wrapped[0], "round 7") == DATA_KEY


def test_a_rotation_that_others_overtook_returns_the_newest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = KeyRing(folder), KeyRing(folder)
    before_once(monkeypatch, "link", lambda: (there.rotate(), there.destroy_before(there.rotate())))
    assert here.rotate() == there.current == 3
    assert here.wrap(DATA_KEY, "round 7")[:4] == b"\0\0\0\3"


@pytest.mark.parametrize("overwritten", [16, 32])
def test_a_key_that_is_destroyed_while_it_is_read_wraps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overwritten: int
) -> None:
    """Zeros, whole or half, would be a key that anyone can guess."""
    ring = KeyRing(folder)

    def destroyed() -> None:
        KeyRing(folder).rotate()
        with (folder / "1.key").open("r+b") as file:
            file.write(bytes(overwritten))

    before_once(monkeypatch, "fstat", destroyed)
    wrapped = ring.wrap(DATA_KEY, "round 7")
    assert wrapped[:4] == b"\0\0\0\2"
    assert KeyRing(folder).unwrap(wrapped, "round 7") == DATA_KEY


def test_two_destructions_at_once_are_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = KeyRing(folder), KeyRing(folder)
    here.rotate()
    before_once(monkeypatch, "unlink", lambda: there.destroy_before(2))
    assert here.destroy_before(2) == [1]
    assert names(folder) == ["2.key"]


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(secret: bytes, text: str) -> bool:
    """Whether a text holds eight bytes in a row of a secret, as hex, base64 (in any of three places), numbers or repr."""
    for at in range(len(secret) - 7):
        part = secret[at : at + 8]
        forms = [part.hex(), repr(part)[2:-1], str(list(part))[1:-1]]
        for skipped in range(3):
            forms.append(base64.b64encode(part[skipped : skipped + 6]).decode())
            forms.append(base64.urlsafe_b64encode(part[skipped : skipped + 6]).decode())
        if any(form.lower() in text.lower() for form in forms):
            return True
    return False


def test_a_secret_is_found_where_it_is_shown() -> None:
    secret = new_key()
    for text in (secret.hex().upper(), base64.b64encode(b"x" + secret).decode(), repr(secret), str(list(secret))):
        assert shown(secret, f"key: {text}")
    assert not shown(secret, new_key().hex())


def test_no_key_is_shown_by_a_ring_or_by_an_error(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    data_key, body = new_key(), new_key()
    ring = KeyRing(folder)
    keys = [(folder / "1.key").read_bytes()]
    wrapped, sealed = ring.wrap(data_key, "round 7"), seal(data_key, body, ABOUT)
    assert ring.rotate() == 2
    keys.append((folder / "2.key").read_bytes())
    texts = [repr(ring), str(ring), repr(vars(ring))]

    def failing(kind: type[Exception], use: Callable[[], object]) -> None:
        with pytest.raises(kind) as caught:
            use()
        texts.append("".join(traceback.format_exception(caught.value)))
        texts.append(repr(caught.value) + repr(vars(caught.value)))

    failing(SealError, lambda: unseal(data_key, changed(sealed, 20), ABOUT))
    failing(SealError, lambda: unseal(data_key, sealed[:5], ABOUT))
    failing(UsageError, lambda: seal(data_key[:31], body, ABOUT))
    failing(SealError, lambda: ring.unwrap(wrapped, "round 8"))
    failing(UsageError, lambda: ring.destroy_before(9))
    (folder / "2.key").chmod(0o640)
    failing(ExperimentError, lambda: ring.wrap(data_key, "round 7"))
    (folder / "2.key").chmod(0o600)
    (folder / "2.key").write_bytes(keys[1] + b"\n")
    failing(ExperimentError, lambda: ring.wrap(data_key, "round 7"))
    failing(ExperimentError, lambda: KeyRing(folder))
    (folder / "2.key").write_bytes(keys[1])
    ring.destroy_before(2)
    failing(SealError, lambda: ring.unwrap(wrapped, "round 7"))
    texts += [*capfd.readouterr(), caplog.text]
    for secret in (data_key, body, *keys):
        assert not any(shown(secret, text) for text in texts)
