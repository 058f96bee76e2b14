"""What clients keep is what was counted, in memory and in a folder alike, whatever happens in between."""

import itertools
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from safetensors.numpy import load, save

import sumus
from sumus.storage.client_states import ClientStates
from sumus.storage.files import write_whole
from sumus.types import Array
from sumus.work import ClientState

Open = Callable[[Path], ClientStates]

STORES: dict[str, Open] = {
    "memory": lambda folder: sumus.MemoryClientStates(),
    "directory": sumus.DirectoryClientStates,
}
ODD = ["", "1", "0/clients", "clients", "versions", "../../etc", "é \n\0 雪", "x" * 300]
CLIENTS = ["alice", "../bob"]


@pytest.fixture(params=STORES)
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ClientStates]:
    """The store as another process finds it: empty memory, or the same folder."""
    return lambda: STORES[request.param](tmp_path / "states")


def leaf(seed: int, dtype: str, shape: tuple[int, ...]) -> Array:
    """Any bits: NaNs with payloads, denormals, negative zeros."""
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).bytes(count * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def leaves() -> st.SearchStrategy[Array]:
    return st.builds(
        leaf,
        st.integers(0, 99),
        st.sampled_from(["float16", "float32", "float64"]),
        st.sampled_from([(), (0,), (1,), (2, 3)]),
    )


def states() -> st.SearchStrategy[ClientState]:
    tree = st.dictionaries(st.sampled_from(["0.weight", "0.bias", "odd/leaf"]), leaves(), min_size=1)
    return st.dictionaries(st.sampled_from(["control", "personal"]), tree)


def bits(state: Mapping[str, Mapping[str, Any]] | None) -> Any:
    """Every leaf's dtype, shape and bytes: equal only for equal bits."""
    if state is None:
        return None
    return {
        name: {leaf: (array.dtype.name, array.shape, array.tobytes()) for leaf, array in tree.items()}
        for name, tree in state.items()
    }


def through_a_checkpoint(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """A snapshot as a resumed run gets it: written as tensors, and read again."""
    return load(save(dict(tensors)))


def files_in(folder: Path) -> set[str]:
    """The names of the states' files."""
    return {path.name for path in folder.glob("*.safetensors*")}


class Machine(RuleBasedStateMachine):
    """A store beside two dicts that hold what it should hold."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__()
        self.open = lambda: STORES[name](folder)
        self.folder = folder if name == "directory" else None
        self.store = self.open()
        self.kept: dict[str, ClientState] = {}
        self.waiting: dict[str, ClientState] = {}
        self.snapshots: list[tuple[dict[str, Array], dict[str, ClientState]]] = [({}, {})]

    @rule(client=st.sampled_from(CLIENTS), state=states())
    def propose(self, client: str, state: ClientState) -> None:
        if client in self.waiting:
            with pytest.raises(sumus.UsageError, match="before its last report was settled"):
                self.store.propose(client, state)
        else:
            self.store.propose(client, state)
            self.waiting[client] = state

    @rule(client=st.sampled_from(CLIENTS))
    def counted(self, client: str) -> None:
        self.store.counted(client)
        if client in self.waiting:
            self.kept[client] = self.waiting.pop(client)

    @rule(client=st.sampled_from(CLIENTS))
    def discarded(self, client: str) -> None:
        self.store.discarded(client)
        self.waiting.pop(client, None)

    @rule(client=st.sampled_from(CLIENTS), state=states())
    def report(self, client: str, state: ClientState) -> None:
        self.counted(client)
        self.propose(client, state)
        self.counted(client)

    @rule()
    def snapshot(self) -> None:
        self.snapshots = [self.snapshots[-1], (through_a_checkpoint(self.store.snapshot()), dict(self.kept))]

    @rule()
    def crash(self) -> None:
        self.go_on_from(-1)

    @precondition(lambda self: len(self.snapshots) == 2)
    @rule()
    def crash_before_the_last_snapshot_was_written(self) -> None:
        self.go_on_from(-2)

    def go_on_from(self, index: int) -> None:
        tensors, kept = self.snapshots[index]
        self.store = self.open()
        self.store.restore(tensors)
        self.kept, self.waiting, self.snapshots = dict(kept), {}, [(tensors, kept)]

    @invariant()
    def holds_what_it_should(self) -> None:
        for client in CLIENTS:
            assert bits(self.store.get(client)) == bits(self.kept.get(client, {}))
            assert bits(self.store.pending(client)) == bits(self.waiting.get(client))

    @invariant()
    def has_no_more_files_than_can_still_be_asked_for(self) -> None:
        if self.folder is not None:
            listed = sum(len(kept) for _, kept in self.snapshots)
            assert len(files_in(self.folder)) <= len(self.kept) + len(self.waiting) + listed


@pytest.mark.parametrize("name", STORES)
def test_a_store_does_what_a_dict_does_through_snapshots_and_crashes(name: str, tmp_path: Path) -> None:
    number = itertools.count()

    def machine() -> Machine:
        folder = tmp_path / str(next(number) % 2)  # a run's folder is empty when it begins
        shutil.rmtree(folder, ignore_errors=True)
        return Machine(name, folder)

    run_state_machine_as_test(machine, settings=settings(stateful_step_count=25))


def test_a_second_state_before_the_first_is_settled_is_refused_and_changes_nothing(
    reopen: Callable[[], ClientStates],
) -> None:
    store = reopen()
    store.propose("alice", {"control": {"w": np.ones(2)}})
    with pytest.raises(sumus.UsageError, match="client 'alice' trained again before its last report was settled"):
        store.propose("alice", {"control": {"w": np.zeros(2)}})
    store.counted("alice")
    np.testing.assert_array_equal(store.get("alice")["control"]["w"], np.ones(2))


def test_ids_may_be_any_text(reopen: Callable[[], ClientStates]) -> None:
    store = reopen()
    for number, client in enumerate(ODD):
        store.propose(client, {"control": {"w": np.full(2, number)}})
        store.counted(client)
    again = reopen()
    again.restore(through_a_checkpoint(store.snapshot()))
    for number, client in enumerate(ODD):
        np.testing.assert_array_equal(again.get(client)["control"]["w"], np.full(2, number))


def test_a_snapshot_of_another_time_replaces_everything(reopen: Callable[[], ClientStates]) -> None:
    store = reopen()
    store.propose("alice", {"control": {"w": np.ones(2)}})
    store.counted("alice")
    earlier = through_a_checkpoint(store.snapshot())
    store.propose("bob", {"control": {"w": np.ones(2)}})
    store.counted("bob")
    store.propose("alice", {"control": {"w": np.zeros(2)}})
    store.restore(earlier)
    assert (bits(store.pending("alice")), bits(store.get("bob"))) == (None, {})
    np.testing.assert_array_equal(store.get("alice")["control"]["w"], np.ones(2))
    store.restore({})
    assert store.get("alice") == {}


def test_a_store_is_empty_where_nothing_would_be_forgotten(reopen: Callable[[], ClientStates]) -> None:
    """An unfinished round leaves it so, and one that was counted does not, also for whoever opens it next."""
    store = reopen()
    assert store.empty
    store.propose("alice", {"control": {"w": np.ones(2)}})
    store.discarded("alice")
    assert store.empty
    assert reopen().empty
    store.propose("alice", {"control": {"w": np.ones(2)}})
    store.counted("alice")
    snapshot = through_a_checkpoint(store.snapshot())
    assert not store.empty
    again = reopen()
    again.restore(snapshot)
    assert not again.empty
    again.restore({})
    assert again.empty


def test_a_snapshot_of_the_other_kind_of_store_is_refused(tmp_path: Path) -> None:
    memory, directory = (STORES[name](tmp_path) for name in ("memory", "directory"))
    for store in (memory, directory):
        store.propose("alice", {"control": {"w": np.ones(2)}})
        store.counted("alice")
    for store, other in ((memory, directory), (directory, memory)):
        with pytest.raises(sumus.ExperimentError, match="another kind of store"):
            store.restore(through_a_checkpoint(other.snapshot()))
        np.testing.assert_array_equal(store.get("alice")["control"]["w"], np.ones(2))


# ── a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def trained(store: ClientStates, rounds: int) -> None:
    """Alice's and bob's reports are counted, round after round."""
    for number in range(rounds):
        for client in ("alice", "bob"):
            store.propose(client, {"control": {"w": np.full(3, float(number))}})
            store.counted(client)


def test_files_of_superseded_states_go_and_those_of_a_snapshot_stay_until_later_ones_replace_it(tmp_path: Path) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 5)
    assert len(files_in(tmp_path)) == 2
    snapshot = store.snapshot()
    listed = files_in(tmp_path)
    trained(store, 5)
    assert listed < files_in(tmp_path)
    assert len(files_in(tmp_path)) == 4
    store.snapshot()  # whose checkpoint may never be written
    assert listed < files_in(tmp_path)
    trained(store, 1)
    store.snapshot()
    assert not listed & files_in(tmp_path)
    with pytest.raises(sumus.ExperimentError):
        sumus.DirectoryClientStates(tmp_path).restore(snapshot)


def test_a_snapshot_that_is_asked_for_again_keeps_the_files_of_the_one_before(tmp_path: Path) -> None:
    """Its checkpoint could not be written, and is tried again: the one before is still all there is to resume from."""
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 1)
    written = store.snapshot()
    trained(store, 2)
    for _ in range(3):
        store.snapshot()
    again = sumus.DirectoryClientStates(tmp_path)
    again.restore(written)
    np.testing.assert_array_equal(again.get("alice")["control"]["w"], np.zeros(3))


def test_a_state_that_cannot_be_kept_is_said_to_be_and_is_kept_once_it_can(tmp_path: Path) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 1)
    file = tmp_path / min(files_in(tmp_path))
    content = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(sumus.ExperimentError, match=f"client states in {tmp_path} cannot be kept: .*{file.name}"):
            store.snapshot()
    file.write_bytes(content)
    again = sumus.DirectoryClientStates(tmp_path)
    again.restore(store.snapshot())
    np.testing.assert_array_equal(again.get("alice")["control"]["w"], np.zeros(3))


def test_one_snapshot_can_be_restored_again_and_again(tmp_path: Path) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 3)
    snapshot = store.snapshot()
    for _ in range(3):  # each run crashes before it writes a checkpoint of its own
        again = sumus.DirectoryClientStates(tmp_path)
        again.restore(snapshot)
        np.testing.assert_array_equal(again.get("alice")["control"]["w"], np.full(3, 2.0))
        trained(again, 4)
        np.testing.assert_array_equal(again.get("alice")["control"]["w"], np.full(3, 3.0))


def test_files_of_other_people_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    foreign = ["notes.txt", "model.safetensors", "a-1.safetensors", f"{'0' * 32}-x.safetensors"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    store = sumus.DirectoryClientStates(tmp_path)
    assert store.empty
    trained(store, 2)
    assert not sumus.DirectoryClientStates(tmp_path).empty
    store.restore({})
    assert store.empty
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "owner"])


def test_what_a_crash_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 1)
    snapshot = store.snapshot()
    whole = files_in(tmp_path)
    store.propose("alice", {"control": {"w": np.ones(3)}})
    (tmp_path / f"{min(whole).partition('-')[0]}-9.safetensors.new").write_bytes(b"half")
    sumus.DirectoryClientStates(tmp_path).restore(snapshot)
    assert files_in(tmp_path) == whole


def test_a_state_that_is_gone_is_said_to_be_and_nothing_is_cleared_away(tmp_path: Path) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    trained(store, 1)
    snapshot = store.snapshot()
    lost = min(files_in(tmp_path))
    trained(store, 1)
    (tmp_path / lost).unlink()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(sumus.ExperimentError, match=f"{lost}, a client's state, is missing: restore the folder"):
        sumus.DirectoryClientStates(tmp_path).restore(snapshot)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("damage", [b"", b"not tensors at all"], ids=["empty", "garbage"])
def test_a_damaged_state_names_its_client_and_its_file(tmp_path: Path, damage: bytes) -> None:
    store = sumus.DirectoryClientStates(tmp_path)
    store.propose("alice", {"control": {"w": np.ones(3)}})
    store.counted("alice")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(damage)
    with pytest.raises(sumus.ExperimentError, match=f"the state of client 'alice' at .*{file.name} cannot be read"):
        store.get("alice")


def test_a_place_that_is_no_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            sumus.ExperimentError, match=f"client states cannot be kept in {place}: .*give another folder"
        ):
            sumus.DirectoryClientStates(place)


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """As on a disk that is nearly full: the beginning of a longer file is written, and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_file_is_the_old_one_or_the_new_one_and_whole(tmp_path: Path, lasting: bool) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old", lasting)
    said = f"{path} cannot be written: File too large; its old content is unchanged"
    with no_file_longer_than(1000), pytest.raises(sumus.ExperimentError, match=said):
        write_whole(path, b"new" * 1000, lasting)
    assert path.read_bytes() == b"old"
    write_whole(path, b"new" * 1000, lasting)
    assert path.read_bytes() == b"new" * 1000
    assert os.listdir(tmp_path) == ["file"]
