"""Backups: what is in them, what comes of them, and what is said where a database was put back without one."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sumus.errors import ExperimentError
from sumus.operations.backup import back_up, restore
from sumus.operations.service import Conduct, Service, Where, open_service, reconcile
from sumus.transport.inprocess import InProcess
from sumus.wire.messages import Assignment
from tests.server.devices import ScriptedDevice, tiny, train_round, update_of

PLAN = tiny().plan


@contextmanager
def served(data: Path) -> Iterator[tuple[Service, InProcess]]:
    service = open_service({"tiny": tiny()}, Where(data), Conduct(group=0.0))
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
        copied = back_up(Where(tmp_path / "data"), tmp_path / "backup")
        assert copied.tasks == {"tiny": 1}
        assert "tiny: version 1" in copied.shown()
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
    done = restore(tmp_path / "backup", Where(tmp_path / "data"))
    assert done.epochs == {"tiny": 1}
    assert "tiny: version 1, epoch 1" in done.shown()
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
    restore(tmp_path / "backup", Where(tmp_path / "new" / "data"))
    with served(tmp_path / "new" / "data") as (service, transport):
        again = remembered(service, devices, transport)
        assert len(train_round(again, PLAN, [1.0, 1.0, 1.0])) == 3


def test_an_old_database_beside_a_newer_head_does_not_start_until_it_is_reconciled(
    tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]
) -> None:
    data = tmp_path / "data"
    put_back(data, tmp_path / "backup" / "sumus.db")
    with pytest.raises(ExperimentError, match="version 2 was published.*`sumus reconcile` begins a new epoch"):
        open_service({"tiny": tiny()}, Where(data))
    assert reconcile(Where(data)) == {"tiny": 1}
    with served(data) as (service, _):
        assert service.server.trouble == ""
        assert service.server.tasks[0].training.version == 1
    assert reconcile(Where(data)) == {"tiny": 2}, "each time it is another epoch"


def test_a_restore_disturbs_nothing(tmp_path: Path, grown: tuple[list[ScriptedDevice], Assignment]) -> None:
    backup, data = tmp_path / "backup", tmp_path / "data"
    with pytest.raises(ExperimentError, match="move sumus.db, .* away"):
        restore(backup, Where(data))
    with served(data):
        with pytest.raises(ExperimentError, match="a server runs on .*: stop it first"):
            restore(backup, Where(data))
        with pytest.raises(ExperimentError, match="another server runs"):
            reconcile(Where(data))
    with pytest.raises(ExperimentError, match="is no whole backup"):
        restore(tmp_path, Where(tmp_path / "other"))
    with pytest.raises(ExperimentError, match="give the backup a new folder"):
        back_up(Where(data), backup)
    with pytest.raises(ExperimentError, match="no server's database"):
        back_up(Where(tmp_path / "other"), tmp_path / "b")


def test_where_the_key_ring_is_lost_reconciling_gives_up_what_it_opened(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as (service, transport):
        devices = enrolled(service, transport)
        work = devices[0].work(PLAN)
        assert work is not None
        devices[0].report(work, update_of(PLAN, 0))
    for key in (data / "keys").iterdir():
        key.unlink()
    assert reconcile(Where(data)) == {"tiny": 1}
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
        again[2].abort(works[2])
        settle(service)
        training = service.server.tasks[0].training
        assert "the key of round 0 does not open" in training.trouble
        assert training.coordinator.paused
        service.server.ask_to_do(lambda now: training.resume()).result()
        assert len(train_round(again, PLAN, [1.0, 1.0, 1.0])) == 3
