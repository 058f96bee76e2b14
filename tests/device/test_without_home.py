"""A user without a home folder, and without an entry among the machine's users, as containers have it."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sumus.device.commands import folder_of
from sumus.device.device import Device
from sumus.device.link import read_authority
from sumus.errors import UsageError
from sumus.executors.recall import recall_of_this_user
from sumus.node.node import Node
from sumus.server.access import config_folder
from tests.device.served import a_task, some_examples
from tests.server.devices import tiny

NOBODY = 54321


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder of that user's; pytest's are root's."""
    with tempfile.TemporaryDirectory(prefix="sumus-home-") as folder:
        shutil.chown(folder, NOBODY, NOBODY)
        yield Path(folder)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: object) -> object:
        raise KeyError(user)

    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_what_needs_a_home_says_what_to_give_instead(tmp_path: Path) -> None:
    for variable, instead, folder in (
        ("XDG_DATA_HOME", "--folder DIR", lambda environment: folder_of("client.py", environment)),
        ("XDG_CONFIG_HOME", "set XDG_CONFIG_HOME", config_folder),
    ):
        for environment in ({}, {variable: ""}, {variable: "relative"}):
            with pytest.raises(UsageError, match=f"this user has no home folder, and {variable}.*{instead}"):
                folder(environment)
        assert folder({variable: str(tmp_path)}).is_relative_to(tmp_path / "sumus")


@pytest.mark.usefixtures("homeless")
def test_a_path_in_a_home_that_is_none_is_refused(tmp_path: Path) -> None:
    for use in (
        lambda: Device(None, a_task(), some_examples(), folder="~/device"),
        lambda: Node(None, a_task(), "~/node"),
        lambda: Node(None, a_task(), tmp_path / "node", sources="~/incoming"),
        lambda: read_authority("~/ca.pem"),
    ):
        with pytest.raises(UsageError, match=r"~/\S+ begins with `~`, but the home folder is not known"):
            use()


@pytest.mark.usefixtures("homeless")
def test_what_a_simulation_would_remember_there_it_does_without() -> None:
    recall = recall_of_this_user()
    recall.put("here", {"choice": "autograd", "reason": "", "seconds": 1.0})
    assert recall.get("here") is None


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may be somebody else")
def test_a_server_runs_and_a_command_explains_itself(own: Path) -> None:
    (own / "tiny.sumus").write_bytes(tiny(deadline=60.0).to_bytes())
    capability = "+dac_read_search"  # the interpreter may lie where only root may look
    mine = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    mine += ["--inh-caps", capability, "--ambient-caps", capability]
    mine += ["env", "-u", "HOME", "-u", "XDG_CONFIG_HOME", sys.executable, "-m", "sumus"]
    words = [
        "serve",
        str(own / "tiny.sumus"),
        "--data",
        str(own / "data"),
        "--port",
        "0",
        "--admin-port",
        "0",
    ]
    with subprocess.Popen([*mine, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "sumus serves 1 task" in line, server.communicate()[1]
        server.terminate()
        assert "Traceback" not in server.communicate(timeout=60)[1]
    done = subprocess.run(
        [*mine, "status", "http://127.0.0.1:1"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sumus: this user has no home folder")
