"""A server needs no torch: it serves a bundle from an environment with the `server` extra alone, and real devices train."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sumus.cli import app
from sumus.device.conditions import AllConditionsMet
from sumus.device.device import Device
from sumus.device.options import DeviceProfile
from sumus.protocol.session import Floor
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.userfile import load_client
from sumus.wire.tensors import decode_tree

ROOT = Path(__file__).parents[2]
ROUNDS = 2
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
    name="line",
)
plan = sumus.Plan(task, sumus.fedavg(sumus.sgd(0.1)), sumus.Pacing(cohort=2), min_contributors=2, trusts_devices=True)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's programs. The tree is copied, since whoever builds a package leaves files in it."""
    place = tmp_path_factory.mktemp("environment")
    tree, venv = place / "tree", place / "venv"
    shutil.copytree(ROOT / "sumus", tree / "sumus", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=300)
    install = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-c", str(ROOT / "constraints.txt"), f"{tree}[server]"]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        why = f"pip cannot install sumus[server]: {(done.stderr.splitlines() or ['no reason given'])[-1]}"
        if os.environ.get("SUMUS_REQUIRE_SERVICES"):
            pytest.fail(f"{why}, and SUMUS_REQUIRE_SERVICES is set")
        pytest.skip(why)
    return venv / "bin"


def test_a_bundle_is_served_without_torch(environment: Path, tmp_path: Path) -> None:
    python = str(environment / "python")
    there = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in there.stderr
    file, bundle, data = tmp_path / "line.py", tmp_path / "line.sumus", tmp_path / "data"
    file.write_text(FILE)
    packed = CliRunner().invoke(app, ["pack", str(file), "-o", str(bundle)])
    assert packed.exit_code == 0, packed.output
    command = [str(environment / "sumus"), "serve", str(bundle), "--data", str(data), "--json", "--port", "0"]
    command += ["--admin-port", "0", "--tokens", "2", "--rounds", str(ROUNDS)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = server.stdout.readline()
            assert said, server.communicate()[1]
            take_part(json.loads(said)["enrolment"], file)
            _, log = server.communicate(timeout=300)
        finally:
            server.kill()
    assert server.returncode == 0, log
    assert "Traceback" not in log
    with SqlStore.open(f"sqlite:///{data}/sumus.db", "line.train").transaction() as rows:
        models = list(rows.models())
    assert [model.contributors for model in models] == [0, 2, 2]
    blobs = DirectoryBlobs(data / "blobs")
    first, *_, last = (decode_tree(blobs.get(model.model)) for model in models)
    assert first.keys() == last.keys() == {"weight", "bias"}
    assert not np.array_equal(first["weight"], last["weight"])


def take_part(link: str, file: Path) -> None:
    """Two devices that train what they are told to, until each was counted in every round."""
    client = load_client(str(file))
    failures: list[BaseException] = []
    floor = Floor(contributors=2)

    def run(number: int) -> None:
        device = Device(
            link,
            client.task,
            client.examples,
            consent=floor,
            profile=DeviceProfile(number, sensors=AllConditionsMet(), executor="autograd"),
        )
        try:
            device.run(rounds=ROUNDS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(300)
        assert not each.is_alive()
    assert failures == []
