"""What an operator types, and what is printed."""

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from sumus.cli import app
from sumus.errors import ExperimentError
from sumus.http.listening import Listening
from sumus.operations import commands
from sumus.operations.policy import ServerPolicy
from sumus.operations.progress import ServerOpened
from sumus.operations.serve import Startup, run
from sumus.operations.stores import Storage
from sumus.text import amount
from sumus.transport.http import HttpTransport
from tests.server.devices import ScriptedDevice, tiny, train_round

PLAN = tiny().plan


class Operator:
    """A server that ends after two models, and who types at a terminal beside it."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        opened: queue.Queue[ServerOpened] = queue.Queue()
        tell = Startup(tokens=1, uses=3, rounds=2, ready=opened.put)
        arguments = {"tiny": tiny()}, Storage(self.data), ServerPolicy(), Listening(port=0, admin_port=0), tell
        self.thread = threading.Thread(target=run, args=arguments)
        self.thread.start()
        self.opened = opened.get(timeout=30)
        self.url = self.opened.admin_url
        self.transport = HttpTransport(self.opened.url)
        token = (self.opened.enrolment or "").partition("#enrol=")[2]
        self.devices = [ScriptedDevice(self.transport, number) for number in range(3)]
        for device in self.devices:
            device.enrol(token)

    def round(self) -> None:
        train_round(self.devices, PLAN, [1.0] * 3)

    def types(self, *words: str, stdin: str = "", code: int = 0) -> str:
        result = CliRunner().invoke(app, words, input=stdin)
        if result.exit_code != code and result.exception is not None:
            raise result.exception
        return result.output


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    operator = Operator(tmp_path)
    yield operator
    for _ in range(2):
        if operator.thread.is_alive():
            operator.types(
                "admin", "login", operator.url, stdin=operator.types("admin", "link", "--data", str(operator.data))
            )
            operator.types("admin", "resume", operator.url, "tiny")
            operator.round()
    operator.thread.join(60)
    operator.transport.close()
    assert not operator.thread.is_alive()


def test_logging_in_looking_and_changing(operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types, url = operator.types, operator.url
    assert "logged in" in types("admin", "login", url, stdin=operator.opened.login)
    assert "3 devices enrolled" in types("status", url)
    assert json.loads(types("status", url, "--json"))["tasks"][0]["name"] == "tiny"
    assert types("admin", "pause", url, "tiny") == "tiny is paused\n"
    assert "paused by an admin" in types("status", url)
    assert types("admin", "resume", url, "tiny") == "tiny continues\n"
    operator.round()
    versions: list[Any] = []
    while len(versions) < 2:
        versions = json.loads(types("admin", "models", url, "tiny", "--json"))["models"]
    assert "released" in types("admin", "models", url, "tiny")
    assert types("admin", "promote", url, "tiny", "0") == "devices now predict with version 0 of tiny\n"
    assert "devices predict with version 0" in types("status", url)
    link = tmp_path / "link"
    types("admin", "token", url, "--uses", "2", "-o", str(link))
    assert link.read_text().startswith(f"{operator.opened.url}/#enrol=")
    assert link.stat().st_mode & 0o777 == 0o600
    assert types("admin", "devices", url).count("enrolled") == 6
    assert "round 1 of tiny has ended" in types("admin", "cancel", url, "tiny")
    types("admin", "logout", url)
    with monkeypatch.context() as patch:
        patch.setenv("SUMUS_LOGIN", types("admin", "link", "--data", str(operator.data)).splitlines()[0])
        assert "3 devices enrolled" in types("status", url)
    types("admin", "revoke", url, operator.devices[2].id)
    assert types("admin", "rollback", url, "tiny", "0") == "tiny continues from version 0, which is now version 2\n"
    operator.thread.join(60)


def test_a_model_comes_out_bit_for_bit_by_the_plan_s_names(operator: Operator, tmp_path: Path) -> None:
    types, url = operator.types, operator.url
    types("admin", "login", url, stdin=operator.opened.login)
    operator.round()
    while (found := json.loads(types("admin", "models", url, "tiny", "--json")))["version"] < 1:
        pass
    first, newest, old = tmp_path / "first.safetensors", tmp_path / "newest.safetensors", tmp_path / "old"
    said = types("admin", "export", url, "tiny", "-o", str(newest))
    sha256 = found["models"][1]["sha256"]
    assert said == f"{newest}: version 1 of tiny, {amount(newest.stat().st_size)}, sha256 {sha256}\n"
    assert hashlib.sha256(newest.read_bytes()).hexdigest() == sha256
    assert types("admin", "export", url, "tiny", "0", "-o", str(first)).startswith(f"{first}: version 0 of tiny, ")
    loaded = load_file(newest)
    assert set(loaded) == {"w"} == {leaf.name for leaf in PLAN.description.leaves}
    assert loaded["w"].tobytes() == np.full(4, -1.0, np.float32).tobytes()
    assert not load_file(first)["w"].any()

    old.write_text("mine")
    for there in (old, tmp_path / "dangling"):
        if there is not old:
            there.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ExperimentError, match="exists already, and is not overwritten"):
            types("admin", "export", url, "tiny", "-o", str(there), code=2)
    assert old.read_text() == "mine"
    missing = tmp_path / "missing" / "model"
    with pytest.raises(ExperimentError, match="missing/model cannot be written: No such file or directory"):
        types("admin", "export", url, "tiny", "-o", str(missing), code=2)
    for words, why in (
        (("tiny", "7"), "tiny has no version 7 yet: its newest is 1"),
        (("tinny",), "there is no task 'tinny' on this server; the tasks are tiny"),
    ):
        with pytest.raises(ExperimentError, match=why):
            types("admin", "export", url, *words, "-o", str(tmp_path / "other"), code=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [first.name, newest.name, "old"]
    operator.round()
    operator.thread.join(60)


def test_a_backup_is_made_while_it_runs_and_put_back(operator: Operator, tmp_path: Path) -> None:
    operator.round()
    backup = tmp_path / "backup"
    assert "plans and models" in operator.types("backup", "--data", str(operator.data), "-o", str(backup))
    operator.round()
    operator.thread.join(60)
    said = operator.types("restore", str(backup), "--data", str(tmp_path / "new"))
    assert "epoch 1" in said
    assert operator.types("reconcile", "--data", str(tmp_path / "new")) == "tiny: epoch 2\n"


def test_whatever_a_word_holds_it_is_one_part_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Asked:
        def ask(self, method: str, path: str, body: Any = None) -> Any:
            asked.append(path)
            return {"models": [], "devices": [], "after": "", "released": 0, "version": 1, "round": 1}

    monkeypatch.setattr(commands, "_remote", lambda *_: Asked())
    for words in (
        ("models", "url", "my task"),
        ("pause", "url", "a/b?c#d"),
        ("devices", "url", "--after", "a&b"),
        ("revoke", "url", "../x"),
    ):
        result = CliRunner().invoke(commands.admin, words, catch_exceptions=False)
        assert result.exit_code == 0
    assert asked == [
        "/v1/admin/models/my%20task",
        "/v1/admin/models/a%2Fb%3Fc%23d/pause",
        "/v1/admin/devices?after=a%26b",
        "/v1/admin/devices/..%2Fx/revoke",
    ]
