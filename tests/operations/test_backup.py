"""Backups: what is in them, what comes of them, and what is said where a database was put back without one."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sumus.errors import ExperimentError
from sumus.operations.backup import back_up, restore
from sumus.operations.policy import ServerPolicy
from sumus.operations.published import reconcile
from sumus.operations.service import Service, open_service
from sumus.operations.stores import Storage
from sumus.transport.inprocess import InProcess
from sumus.wire.messages import Assignment, Refused
from tests.server.devices import ScriptedDevice, tiny, train_round, update_of

PLAN = tiny().plan


@contextmanager
def served(data: Path) -> Iterator[tuple[Service, InProcess]]:
    service = open_service({"tiny": tiny()}, Storage(data), ServerPolicy(group=0.0))
    service.server.start()
    with InProcess(service.device_app) as transport:
        yield service, transport
    service.close()


def enrolled(service: Service, transport: InProcess) -> list[ScriptedDevice]:
    token = service.server.roll.new_token("default", service.server.clock(), uses=3)
    devices = [ScriptedDevice(transport, number) for number in range(3)]
    for device in devices:
        device.enrol(token)
    return devices


def settle(service: Service) -> None:
    """Wait until all is decided and written that was asked for."""
    service.server.ask_to_do(lambda now: [listen() for listen in service.server.listeners]).result()


def remembered(service: Service, devices: list[ScriptedDevice], transport: InProcess) -> list[ScriptedDevice]:
    """The same devices at another server."""
    return [ScriptedDevice(transport, number, serial=device.serial) for number, device in enumerate(devices)]


def put_back(data: Path, database: Path) -> None:
    for path in data.glob("sumus.db*"):
        path.unlink()
    (data / "sumus.db").write_bytes(database.read_bytes())


@pytest.fixture
def grown(tmp_path: Path) -> tuple[list[ScriptedDevice], Assignment]:
    """A server with two models, a backup of its first one, made while the second round was open, and whoever was out then."""
    with served(tmp_path / "data") as (service, transport):
        devices = enrolled(service, transport)
        train_round(devices, PLAN, [1.0, 2.0, 3.0])
        works = [device.work(PLAN, wait_s=5.0) for device in devices]
        assert works[0] is not None
        devices[0].report(works[0], update_of(PLAN, 0, 5.0))
        settle(service)
        copied = back_up(Storage(tmp_path / "data"), tmp_path / "backup")
        assert copied.tasks == {"tiny": 1}
        assert copied.shown()[1] == "tiny: version 1"
        out = works[2]
        assert out is not None
        for device, work in zip(devices[1:], works[1:], strict=True):
            assert work is not None
            device.report(work, update_of(PLAN, 0, 5.0))
        settle(service)
        assert service.server.tasks[0].training.version == 2
    return devices, out


def test_a_backup_holds_models_and_nothing_that_opens_a_sum(
    tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]
) -> None:
    folder = tmp_path / "backup"
    assert sorted(path.name for path in folder.iterdir()) == ["backup.json", "blobs", "sumus.db"]
    with closing(sqlite3.connect(folder / "sumus.db")) as database:
        assert database.execute("SELECT count(*) FROM note WHERE name IN ('key', 'seed')").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM shard").fetchone() == (0,)


def test_what_is_put_back_goes_on_from_its_model_in_a_greater_epoch(
    tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]
) -> None:
    devices, out = grown
    for path in (tmp_path / "data").glob("sumus.db*"):
        path.unlink()
    done = restore(tmp_path / "backup", Storage(tmp_path / "data"))
    assert done.epochs == {"tiny": 1}
    assert done.shown()[1] == "tiny: version 1, epoch 1"
    with served(tmp_path / "data") as (service, transport):
        training = service.server.tasks[0].training
        assert training.version == 1
        again = remembered(service, devices, transport)
        settled = again[2].check_in(PLAN, previous=out, wait_s=5.0).settled
        assert settled is not None
        assert settled.outcome == "discarded"
        train_round(again, PLAN, [1.0, 1.0, 1.0])
        settle(service)
        assert training.version == 2
        assert training.model(2).parent == 1
        with training.store.transaction() as rows:
            assert rows.run().epoch == 1


def test_it_is_put_on_another_machine_too(tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]) -> None:
    devices, _ = grown
    restore(tmp_path / "backup", Storage(tmp_path / "new" / "data"))
    with served(tmp_path / "new" / "data") as (service, transport):
        again = remembered(service, devices, transport)
        assert len(train_round(again, PLAN, [1.0, 1.0, 1.0])) == 3


def test_an_old_database_beside_a_newer_head_does_not_start_until_it_is_reconciled(
    tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]
) -> None:
    data = tmp_path / "data"
    put_back(data, tmp_path / "backup" / "sumus.db")
    with pytest.raises(
        ExperimentError, match="version 2 was already published.*`sumus reconcile`, which begins a new noise epoch"
    ):
        open_service({"tiny": tiny()}, Storage(data))
    assert reconcile(Storage(data)) == {"tiny": 1}
    with served(data) as (service, _):
        assert service.server.trouble == ""
        assert service.server.tasks[0].training.version == 1
    assert reconcile(Storage(data)) == {"tiny": 2}, "each time it is another epoch"


def test_a_restore_disturbs_nothing(tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]) -> None:
    backup, data = tmp_path / "backup", tmp_path / "data"
    with pytest.raises(ExperimentError, match="move sumus.db, .* keep keys/, head.json and departed.txt"):
        restore(backup, Storage(data))
    with served(data):
        with pytest.raises(ExperimentError, match="a server is using .*: stop it first"):
            restore(backup, Storage(data))
        with pytest.raises(ExperimentError, match="another server is using"):
            reconcile(Storage(data))
    with pytest.raises(ExperimentError, match="is not a complete backup"):
        restore(tmp_path, Storage(tmp_path / "other"))
    with pytest.raises(ExperimentError, match="give the backup a new folder"):
        back_up(Storage(data), backup)
    with pytest.raises(ExperimentError, match="no server's database"):
        back_up(Storage(tmp_path / "other"), tmp_path / "b")


def test_where_the_key_ring_is_lost_reconciling_gives_up_what_it_opened(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as (service, transport):
        devices = enrolled(service, transport)
        work = devices[0].work(PLAN)
        assert work is not None
        devices[0].report(work, update_of(PLAN, 0))
    for key in (data / "keys").iterdir():
        key.unlink()
    assert reconcile(Storage(data)) == {"tiny": 1}
    with served(data) as (service, transport):
        again = remembered(service, devices, transport)
        assert len(train_round(again, PLAN, [1.0, 1.0, 1.0])) == 3
        settle(service)
        assert service.server.tasks[0].training.version == 1


def test_a_round_whose_key_is_lost_ends_and_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as (service, transport):
        devices = enrolled(service, transport)
        works = [device.work(PLAN) for device in devices]
        assert works[0] is not None
        devices[0].report(works[0], update_of(PLAN, 0))
        devices[1].report(works[1], update_of(PLAN, 1))  # pyright: ignore[reportArgumentType]
    for key in (data / "keys").iterdir():
        key.unlink()
    with served(data) as (service, transport):
        again = remembered(service, devices, transport)
        assert works[2] is not None
        with pytest.raises(Refused, match="closed"):
            again[2].report(works[2], update_of(PLAN, 2))
        training = service.server.tasks[0].training
        assert "the key of round 0 cannot be decrypted" in training.trouble
        assert training.paused
        service.server.ask_to_do(lambda now: training.resume()).result()
        assert len(train_round(again, PLAN, [1.0, 1.0, 1.0])) == 3


# ── who is out stays out ─────────────────────────────────────────────────────────────────────────────────────────────


def states(service: Service) -> dict[str, tuple[str, bytes]]:
    return {row.id: (row.state, row.public_key) for row in service.server.roll.devices()}


def test_who_was_revoked_or_left_after_the_backup_does_not_come_back_with_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as (service, transport):
        revoked, left, stays = enrolled(service, transport)
        token = service.server.roll.new_token("default", service.server.clock(), uses=9)
        back_up(Storage(data), tmp_path / "backup")
        later = ScriptedDevice(transport, 3)
        later.enrol(token)
        for device in (revoked, later):
            service.server.roll.revoke(device.id)
            service.server.roll.revoke(device.id)
        left.withdraw()
    departed = data / "departed.txt"
    assert departed.stat().st_mode & 0o777 == 0o600
    assert sorted(departed.read_text().split()) == sorted(
        f"revoked {revoked.id} default revoked {later.id} default withdrawn {left.id} default".split()
    )
    with departed.open("a") as file:
        file.write(f"\nrevoked {stays.id[:9]}")  # a crash within a line
    for path in data.glob("sumus.db*"):
        path.unlink()
    restore(tmp_path / "backup", Storage(data))
    for _ in range(2):
        with served(data) as (service, transport):
            found = states(service)
            assert {id: state for id, (state, _) in found.items()} == {
                revoked.id: "revoked",
                left.id: "withdrawn",
                stays.id: "enrolled",
                later.id: "revoked",
            }
            assert found[left.id][1] == b""
            for number in (0, 3):
                with pytest.raises(Exception, match="revoked"):
                    ScriptedDevice(transport, number).enrol(token)


def test_a_database_put_back_by_other_means_lets_nobody_in_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as (service, transport):
        devices = enrolled(service, transport)
        back_up(Storage(data), tmp_path / "backup")
        service.server.roll.revoke(devices[0].id)
    put_back(data, tmp_path / "backup" / "sumus.db")
    with served(data) as (service, _):
        assert states(service)[devices[0].id][0] == "revoked"


def test_whoever_cannot_be_written_down_is_not_let_out(tmp_path: Path) -> None:
    with served(tmp_path / "data") as (service, transport):
        device = enrolled(service, transport)[0]
        (tmp_path / "data" / "departed.txt").mkdir()
        with pytest.raises(ExperimentError, match=r"departed.txt cannot be written"):
            service.server.roll.revoke(device.id)
        assert states(service)[device.id][0] == "enrolled"


# ── whose the files are ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_kept_is_its_owner_s_alone(tmp_path: Path) -> None:
    data, backup = tmp_path / "data", tmp_path / "backup"
    with served(data) as (service, transport):
        enrolled(service, transport)
        files = [path for path in data.iterdir() if path.name.startswith("sumus.db")]
        assert len(files) == 3
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        back_up(Storage(data), backup)
    assert {path.stat().st_mode & 0o777 for path in (data, backup)} == {0o700}
    assert (backup / "sumus.db").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_may_open_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "my data"
    with served(data):
        back_up(Storage(data), tmp_path / "backup")
    data.chmod(0o755)
    said = r"open to other users \(mode 755\).*`chmod 700 '.*my data'`"
    with pytest.raises(ExperimentError, match=said):
        open_service({"tiny": tiny()}, Storage(data))
    with pytest.raises(ExperimentError, match=said):
        reconcile(Storage(data))
    with pytest.raises(ExperimentError, match=said):
        restore(tmp_path / "backup", Storage(data))
    data.chmod(0o700)
    (data / "sumus.db").chmod(0o644)
    with served(data):
        assert (data / "sumus.db").stat().st_mode & 0o777 == 0o600
