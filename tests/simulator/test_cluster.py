"""A Ray cluster trains the same model, bit for bit, and lets nobody in without a token.

Everything runs in processes of its own: Ray reads its settings once in a process.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import sumus
from sumus.simulator.options import check_workers

TESTS = Path(__file__).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
OPEN = {"RAY_AUTH_MODE": "disabled"}

needs_ray = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ray"], capture_output=True).returncode != 0,
    reason="needs Ray: pip install 'sumus[ray]'",
)
pytestmark = pytest.mark.xdist_group("ray")

CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""

RUNS = f"""
import json, os, sys
sys.path.insert(0, {str(TESTS)!r})
import dataclasses, signal
import numpy as np
import sumus
from conftest import EVERYWHERE, examples, told
from torch import nn

def experiment(name, load=lambda client: examples(client, 8 + 5 * client)):
    net = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    algorithm, fleet, pacing = EVERYWHERE[name]()
    plan = sumus.Plan(sumus.Task(net, sumus.losses.cross_entropy), algorithm, pacing)
    return sumus.Experiment(plan, sumus.Population(range(10), load), 3, sumus.Evaluation(seen=3), fleet=fleet)

def is_same(name, **options):
    return told(sumus.run(experiment(name), sumus.Compute(**options))) == told(sumus.run(experiment(name)))

def refused(**options):
    try:
        sumus.run(experiment("fedavg"), sumus.Compute(**options))
    except sumus.ExperimentError as error:
        return str(error)

here = os.getpid()

def wrong(client):
    inputs, targets = examples(client)
    return inputs * np.float32(np.nan if client and os.getpid() != here else 1), targets

def deadly(client):
    if client and os.getpid() != here:
        os._exit(7)
    return examples(client)
"""


@contextmanager
def cluster(environment: dict[str, str]) -> Generator[str, None, None]:
    """A cluster of two CPUs, by its address."""
    settings = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def said(code: str, **environment: str) -> dict[str, Any]:
    """What `found` is after this code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{RUNS}\nfound = {{}}\n{code}\nprint(json.dumps(found))"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_ray
def test_a_run_is_the_same_bit_for_bit_on_a_cluster_and_fails_in_the_same_words() -> None:
    with cluster(TOKEN) as address:
        found = said(
            f"""
for name in ("fedavg", "median", "buffered scaffold"):  # one sum; each update apart; buffers and what clients keep
    found[name] = is_same(name, workers={address!r})
for load in (wrong, deadly):
    try:
        sumus.run(experiment("fedavg", load), sumus.Compute(workers={address!r}))
    except sumus.SumusError as error:
        found[load.__name__] = f"{{type(error).__name__}}: {{error}}", len(error.history.rounds)
""",
            **TOKEN,
        )
    for name in ("fedavg", "median", "buffered scaffold"):
        assert found[name] is True, name
    message, rounds = found["wrong"]
    assert message.startswith("DataError: client ")
    assert "its inputs hold a NaN" in message
    assert rounds == 0
    assert found["deadly"][0].startswith("ExperimentError: the Ray cluster lost a worker (")


LISTENING = """
def listening():
    found = {}
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
            _, where, _, state, *rest = line.split()
            if state == "0A":
                found[rest[5]] = where.partition(":")[0]
    ours = sockets()
    return {inode: address for inode, address in found.items() if inode in ours}

def sockets():  # of processes with this test's own folder in their environment
    found = set()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.environ["TMPDIR"].encode() in open(f"/proc/{process}/environ", "rb").read():
                found.update(os.readlink(f"/proc/{process}/fd/{n}")[8:-1] for n in os.listdir(f"/proc/{process}/fd"))
        except OSError:
            pass
    return found

before = listening(), signal.getsignal(signal.SIGTERM), {n: v for n, v in os.environ.items() if n.startswith("RAY_AUTH")}
seen = set()

class Look:
    def watching(self, experiment, done):
        from contextlib import contextmanager
        @contextmanager
        def watch():
            yield lambda record: seen.update(listening().items() - before[0].items())
        return watch()

shown = sumus.run(experiment("scaffold"), sumus.Compute(workers="ray"), sumus.Output(progress=Look()))
found["same"] = told(shown) == told(sumus.run(experiment("scaffold")))
found["listens"] = sorted({address for _, address in seen})
found["handler"] = signal.getsignal(signal.SIGTERM) is before[1]
found["environment"] = {n: v for n, v in os.environ.items() if n.startswith("RAY_AUTH")} == before[2]
found["again"] = is_same("fedavg", workers="ray")
found["files"] = os.listdir(os.environ["TMPDIR"])
"""


@needs_ray
def test_a_cluster_of_ones_own_listens_to_this_machine_alone_and_is_gone_afterwards() -> None:
    with TemporaryDirectory() as folder:  # a short path: sockets lie in it
        found = said(LISTENING, TMPDIR=folder)
    listens = set(found.pop("listens"))
    assert listens
    assert listens <= {"0000000000000000FFFF00000100007F", "0100007F"}
    assert found == {"same": True, "handler": True, "environment": True, "again": True, "files": []}


@needs_ray
def test_a_cluster_that_lets_everyone_in_is_refused_unless_that_is_wanted() -> None:
    with cluster(OPEN) as address:
        code = f"""
found["refused"] = refused(workers={address!r})
found["same"] = is_same("fedavg", workers={address!r}, insecure=True)
"""
        found = said(code, **OPEN)
    assert found["refused"] == (
        f"the Ray cluster at {address} accepts anyone: start it with RAY_AUTH_MODE=token, or give insecure=True if its "
        "network is closed"
    )
    assert found["same"] is True


@needs_ray
def test_a_cluster_that_is_not_there_is_said_not_to_be() -> None:
    code = """
import sumus.simulator.processes.cluster
sumus.simulator.processes.cluster.REACHED_WITHIN = 3
found["refused"] = refused(workers="127.0.0.1:9")
"""
    found = said(code, **TOKEN)
    assert found["refused"].startswith("the Ray cluster at 127.0.0.1:9 cannot be reached: ")


@pytest.mark.parametrize("address", ["auto", "ray://somewhere:10001", "somewhere", ":1"])
def test_an_address_is_given_with_its_port(address: str) -> None:
    with pytest.raises(sumus.ExperimentError, match=r"^workers=.*: give .*'ray'.* HOST:PORT"):
        check_workers(address, "cpu")


def test_without_ray_it_is_said_what_to_install(
    anywhere: Callable[..., sumus.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sumus.ExperimentError, match=r"^workers='ray' needs ray: install sumus with its extra `ray`"):
        sumus.run(anywhere("fedavg"), compute=sumus.Compute(workers="ray"))
