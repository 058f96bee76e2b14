"""Devices with a real server: in this process, and over HTTPS with the command line."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import sumus
from sumus.device.commands import floor_of, folder_of, forget, join, predict
from sumus.device.device import Device
from sumus.device.store import FolderDeviceStore
from sumus.device.training import Training
from sumus.errors import ExperimentError, UsageError
from sumus.http.tls import enrolment_link, issue
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.plan import Plan
from sumus.protocol.session import Floor
from sumus.rng import generator
from sumus.server.evaluation import Evaluating
from sumus.server.identity import count_enrolled
from sumus.transport.faulty import Faults, FaultyTransport
from sumus.transport.inprocess import InProcess
from sumus.transport.transport import Unreachable
from sumus.wire.bundle import Bundle
from tests.device.served import FEDAVG, FREE, SCAFFOLD, a_device, a_task, some_examples
from tests.transport.echoing import listening

PEOPLE = 4

FILE = """
import numpy as np
from torch import nn
import sumus

def examples():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(12, 4)).astype(np.float32)
    return inputs, (inputs.sum(1, keepdims=True) > 0).astype(np.float32)

task = sumus.Task(
    model=lambda: nn.Linear(4, 1),
    loss=sumus.losses.mean_squared_error,
    metrics={"error": sumus.metrics.mean_absolute_error},
)
"""


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(a_task(), some_examples(), "autograd")


@contextmanager
def serving(
    training: Training,
    algorithm: sumus.Algorithm = FEDAVG,
    cohort: int = PEOPLE,
    authority: bytes | None = None,
    **policy: Any,
) -> Iterator[Service]:
    plan = Plan(training.description, algorithm, sumus.Pacing(cohort=cohort), min_contributors=2, trusts_devices=True)
    service = open_service(
        {"a": Bundle(plan, training.program.initial)},
        policy=ServerPolicy(**{"group": 0.0, **policy}),
        authority=authority,
    )
    service.server.start()
    try:
        yield service
    finally:
        service.close()


def a_token(service: Service, uses: int = 100) -> str:
    return service.server.roll.new_token("default", service.server.clock(), uses)


def in_turn(devices: list[Device], done: Any) -> None:
    """Wake one after the other, whenever each is due."""
    for _ in range(2000):
        for device in devices:
            device._sleep(device.wake())
        if done():
            return
    raise AssertionError("it comes to no end")


@pytest.mark.parametrize("algorithm", [FEDAVG, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_rounds_are_trained_measured_and_published(training: Training, algorithm: sumus.Algorithm) -> None:
    with serving(training, algorithm, evaluate=Evaluating(3)) as service, InProcess(service.device_app) as transport:
        token, run = a_token(service), service.server.tasks[0].training
        devices = [
            a_device(
                transport,
                task=training,
                examples=some_examples(n),
                name=n,
                token=token,
                wait_s=0.0,
                trains=n < PEOPLE,
                evaluates=n >= PEOPLE,
            )
            for n in range(PEOPLE + 3)
        ]
        for device in devices:
            device.enrol()
        service.server.ask_to_do(lambda now: service.server.crowd.count()).result()
        in_turn(devices, lambda: run.version >= 8)
        assert transport.failures == []
        assert sum(device.status.counts.get("in sums", 0) for device in devices) >= PEOPLE * 8
        assert all(device.status.counts["evaluated"] for device in devices[PEOPLE:])
        in_turn(devices, lambda: all(device.status.models["a"] >= 8 for device in devices))
        inputs, targets = some_examples(99, 50)
        first = training.predict(training.program.initial_shared, {}, some_examples(), inputs)
        assert np.mean((devices[0].predict(inputs) - targets) ** 2) < np.mean((first - targets) ** 2) / 2
        measured = [json.loads(run.model(version).metrics).get("evaluate") for version in range(run.version)]
        assert any(one and one["devices"] == 3 for one in measured)


def test_over_a_bad_network_what_devices_were_told_is_what_the_server_counted(training: Training) -> None:
    faults = Faults(lost=0.1, unanswered=0.1, twice=0.1, cut=0.05, answer_cut=0.05)
    with serving(training, SCAFFOLD) as service, InProcess(service.device_app) as transport:
        token, run = a_token(service), service.server.tasks[0].training
        devices = [
            a_device(
                FaultyTransport(transport, faults, generator(n, "network")),
                task=training, examples=some_examples(n), name=n, token=token, wait_s=0.0,
            )
            for n in range(PEOPLE)
        ]  # fmt: skip
        in_turn(devices, lambda: run.version >= 5)
        in_turn(devices, lambda: not any(device._memory.store.read().row.unsettled for device in devices))
        assert transport.failures == []
        counted = {device.status.device: device.status.counts["counted"] for device in devices}
        with run.store.transaction() as rows:
            told = {row.id: row.times_counted for row in map(rows.device, counted) if row is not None}
        assert counted == told


def devices_known(service: Service) -> int:
    """How many devices a server knows."""
    return count_enrolled(service.server.roll._identities, "default")  # pyright: ignore[reportPrivateUsage]


def test_a_device_that_left_is_not_known_any_more(training: Training) -> None:
    with serving(training) as service, InProcess(service.device_app) as transport:
        device = a_device(transport, task=training, token=a_token(service), wait_s=0.0)
        device.enrol()
        assert devices_known(service) == 1
        device.forget()
        assert devices_known(service) == 0


def test_devices_of_another_task_are_told(training: Training) -> None:
    with serving(training) as service, InProcess(service.device_app) as transport:
        device = a_device(
            transport,
            task=a_task(model=lambda: __import__("torch").nn.Linear(4, 1, bias=False)),
            token=a_token(service),
            wait_s=0.0,
        )
        with pytest.raises(ExperimentError, match="the server has no task with this model and these data"):
            device.run()


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


app = typer.Typer(pretty_exceptions_enable=False)
for command in (join, predict, forget):
    app.command()(command)


def said(*words: str, **environment: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(words), env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_join_predict_and_forget_over_https_with_a_pinned_authority(training: Training, tmp_path: Path) -> None:
    certificates = issue(tmp_path / "tls", ["127.0.0.1"], datetime.now(UTC))
    file, folder = tmp_path / "mine.py", tmp_path / "device"
    file.write_text(FILE)
    with ExitStack() as stack:
        service = stack.enter_context(serving(training, cohort=2, authority=certificates.authority.read_bytes()))
        port = stack.enter_context(
            listening(service.device_app, ssl_certfile=str(certificates.chain), ssl_keyfile=str(certificates.key))
        )
        link = enrolment_link(f"https://127.0.0.1:{port}", a_token(service), certificates.pin)
        other = Device(link, training, some_examples(1), consent=FREE, connection=sumus.ServerConnection(wait_s=2.0))
        beside = threading.Thread(target=other.run)
        beside.start()
        try:
            out, _ = said(
                "join", "--client", str(file), "--folder", str(folder), "--rounds", "3", "--floor", "contributors=2",
                "--always", SUMUS_TOKEN=link,
            )  # fmt: skip
            lines = out.splitlines()
            assert lines[0].startswith("enrolled in default as ")
            assert [line.endswith(": counted") and ": trained on 12 examples in " in line for line in lines[1:]] == [
                True
            ] * 3
            out, _ = said(
                "join", "--client", str(file), "--folder", str(folder), "--once", "--json", "--floor", "contributors=2"
            )
            assert "enrolled" not in {json.loads(line)["what"] for line in out.splitlines()}
        finally:
            other.stop()
            beside.join()
            other.close()
        assert (folder / "key").stat().st_mode & 0o777 == 0o600
        answers = json.loads(said("predict", "--client", str(file), "--folder", str(folder), "--json")[0])["outputs"]
        assert len(answers) == 12
        out, _ = said("forget", "--folder", str(folder))
        assert out.splitlines()[0] == "erased   here: its key, its state from rounds, its models and its counts"
    assert not (folder / "key").exists()


def test_predict_reads_inputs_and_writes_outputs(training: Training, tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.py", tmp_path / "device"
    file.write_text(FILE)
    with serving(training) as service, InProcess(service.device_app) as transport:
        with a_device(transport, task=training, token=a_token(service), folder=folder, wait_s=0.0) as device:
            device.wake()
            inputs = some_examples(3, 5)[0]
            expected = device.predict(inputs)
    np.save(tmp_path / "inputs.npy", inputs)
    where = ("--client", str(file), "--folder", str(folder), "--inputs", str(tmp_path / "inputs.npy"))
    assert said("predict", *where, "--output", str(tmp_path / "outputs.npy"))[0].endswith(
        "outputs.npy: outputs of shape [5, 1] from version 0 of a\n"
    )
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=1e-6)
    assert [float(line) for line in said("predict", *where)[0].split()] == pytest.approx(
        expected.ravel().tolist(), 1e-4
    )
    (tmp_path / "inputs.npy").write_text("1 2 3")
    with pytest.raises(ExperimentError, match="is not an .npy file of numbers, or contains Python objects.*numpy.save"):
        said("predict", *where)


def test_mistakes_are_said_before_anything_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    for words, message in (
        (("join", "https://fl.example/#enrol=SECRET", "--client", str(file)), "must not contain a token"),
        (("join", "--client", str(file), "--folder", str(tmp_path / "new")), "has no server"),
        (("join", "https://fl.example", "--client", str(tmp_path / "none.py")), "there is no file"),
        (
            ("join", "https://fl.example", "--client", str(file), "--floor", "people=3"),
            "write NAME=NUMBER, where NAME is one of steps",
        ),
        (("predict", "--client", str(file), "--folder", str(tmp_path / "nothing")), "is not a device's folder"),
        (("forget", "--folder", str(tmp_path / "nothing")), "is not a device's folder"),
    ):
        with pytest.raises(ExperimentError, match=message):
            said(*words)


def test_a_floor_is_given_in_words() -> None:
    assert floor_of(["rounds=100", " seconds = 2.5"]) == Floor(rounds=100, seconds=2.5)
    for word in ("rounds", "rounds=many", "rounds=2.5", "people=3"):
        with pytest.raises(ExperimentError, match=f"--floor '{word}': write NAME=NUMBER"):
            floor_of([word])


def test_without_a_folder_it_is_one_of_this_users(tmp_path: Path) -> None:
    folder = folder_of("some/mine.py", {"XDG_DATA_HOME": str(tmp_path)})
    assert folder.parent == tmp_path / "sumus"
    assert re.fullmatch("mine-[0-9a-f]{8}", folder.name)
    assert folder_of("mine.py", {}).parent == Path.home() / ".local/share/sumus"


def test_files_of_one_name_in_two_projects_are_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one" / "client.py", tmp_path / "other" / "client.py"
    one.parent.mkdir()
    one.write_text(FILE)
    assert folder_of(str(one)) != folder_of(str(other))
    monkeypatch.chdir(one.parent)
    assert folder_of("client.py") == folder_of(str(one))
    names = [folder_of(str(one)), folder_of(f"{one}:mine"), folder_of(f"{one}:yours")]
    assert len(set(names)) == 3, "each name is a device of its own"
    assert folder_of("client.py:mine") == names[1]


def test_one_check_in_that_nobody_answers_is_an_error(training: Training, tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.py", tmp_path / "device"
    file.write_text(FILE)
    words = ("join", "--client", str(file), "--folder", str(folder), "--once")
    with serving(training) as service:
        with listening(service.device_app) as port:
            at = f"http://127.0.0.1:{port}"
            link = enrolment_link(at, a_token(service))
            out, _ = said(*words, SUMUS_TOKEN=link)
            device = FolderDeviceStore(folder, look=True).read().membership.device  # type: ignore[union-attr]
            assert out == f"enrolled in default as {device[:12]}…; kept in {folder}\n"
    before = FolderDeviceStore(folder, look=True).read().row.serial
    with pytest.raises(Unreachable, match="the check-in failed: .*; run the same command again later"):
        said(*words)
    assert FolderDeviceStore(folder, look=True).read().row.serial == before + 1
    new = (*words[:-2], str(tmp_path / "new"), "--once")
    with pytest.raises(Unreachable, match="the check-in failed: "):
        said(*new, SUMUS_TOKEN=link)


def test_a_device_is_forgotten_by_its_file(training: Training, tmp_path: Path) -> None:
    file, data = tmp_path / "mine.py", {"XDG_DATA_HOME": str(tmp_path / "data")}
    file.write_text(FILE)
    with serving(training) as service, listening(service.device_app) as port:
        link = enrolment_link(f"http://127.0.0.1:{port}", a_token(service))
        out, _ = said("join", "--client", str(file), "--once", "--json", SUMUS_TOKEN=link, **data)
        (enrolled,) = (json.loads(line) for line in out.splitlines() if '"enrolled"' in line)
        folder = folder_of(str(file), data)
        assert enrolled["folder"] == str(folder)
        assert said("forget", "--client", str(file), **data)[0].startswith("erased ")
        assert not (folder / "key").exists()
        assert devices_known(service) == 0
    with pytest.raises(UsageError, match="no device is named"):
        said("forget")


def test_forgetting_a_folder_of_something_else_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "mine").write_text("mine")
    mode = tmp_path.stat().st_mode
    with pytest.raises(ExperimentError, match="is not a device's folder"):
        said("forget", "--folder", str(tmp_path))
    assert (tmp_path / "objects" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["objects"]
    assert tmp_path.stat().st_mode == mode
