"""Servers and edges as processes: the same model as without edges, or as with simulated sites, also where one is killed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from test_adder import flat

import sumus
from sumus.device.device import Device
from sumus.experiment import Experiment
from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.transport.http import HttpTransport
from sumus.tree import sha256
from sumus.wire.tensors import decode_tree
from tests.server.clients import clients, served, train
from tests.server.devices import ScriptedDevice, tiny, together, update_of
from tests.simulator.test_wire import PEOPLE as CLIENTS

PEOPLE = 8


class Process:
    """A command of sumus. opened: what it said when it answered."""

    def __init__(self, *words: object) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "sumus",
                *map(str, words),
                *(() if "--port" in words else ("--port", "0")),
                "--admin-port",
                "0",
                "--json",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        self.opened: dict[str, Any] = json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def wait(self) -> int:
        errors = self._process.communicate(timeout=300)[1]
        assert self._process.returncode == 0, errors
        return self._process.returncode


@contextmanager
def process(*words: object) -> Iterator[Process]:
    mine = Process(*words)
    try:
        yield mine
    finally:
        mine.kill()


def test_two_levels_of_edges_one_of_them_killed_in_mid_round(stack: ExitStack, tmp_path: Path) -> None:
    bundle, plan = tiny(cohort=PEOPLE, deadline=600.0), tiny(cohort=PEOPLE, deadline=600.0).plan
    (tmp_path / "tiny.sumus").write_bytes(bundle.to_bytes())
    link, near, far = tmp_path / "edges", tmp_path / "near", tmp_path / "far"
    server = stack.enter_context(
        process(
            "serve",
            tmp_path / "tiny.sumus",
            "--data",
            tmp_path / "top",
            "--rounds",
            2,
            "--edges",
            2,
            "--edge-file",
            link,
        )
    )

    def edge(data: Path, token: Path, many: int, *more: object) -> Process:
        words = (
            "edge",
            "--data",
            data,
            "--link-file",
            token,
            "--linger",
            0.5,
            "--tokens",
            1,
            "--uses",
            many,
            "--token-file",
            data.with_suffix(".link"),
        )
        return stack.enter_context(process(*words, *more))

    upper = edge(near, link, 3, "--edges", 1, "--edge-file", tmp_path / "below")
    other = edge(far, tmp_path / "below", 5)
    assert server.opened["tasks"] == {"tiny": plan.id}
    people: list[ScriptedDevice] = []
    for data, numbers in ((near, range(3)), (far, range(3, PEOPLE))):
        url, _, token = data.with_suffix(".link").read_text().strip().partition("/#enrol=")
        for number in numbers:
            people.append(ScriptedDevice(stack.enter_context(closing(HttpTransport(url))), number))
            people[-1].enrol(token)

    for killed in (True, False):
        works = together(*(partial(device.work, plan, wait_s=60.0) for device in people))
        reports = [
            partial(device.report, work, update_of(plan, n, 0.1 * (n + 1), 5 + n))
            for n, (device, work) in enumerate(zip(people, works, strict=True))
        ]
        if killed:  # with three of its five reports
            assert [not counted.duplicate for counted in together(*reports[3:6])] == [True] * 3
            other.kill()
            other = edge(far, tmp_path / "below", 5)
            for device in people[3:]:
                device.transport = stack.enter_context(closing(HttpTransport(other.opened["url"])))
            assert [counted.duplicate for counted in together(*reports[3:6])] == [True] * 3, "they are kept"
            together(*reports[:3], *reports[6:])
        else:
            together(*reports)
    server.wait()
    contributors, model = last_model(tmp_path / "top", "tiny")
    assert contributors == [0, PEOPLE, PEOPLE]
    assert model == flat(bundle, 2)
    assert upper.opened["mode"].startswith("clear mode")


def last_model(data: Path, task: str) -> tuple[list[int], str]:
    """How many people are in each of a server's models, and a hash of the last."""
    with closing(SqlStore.open(f"sqlite:///{data}/sumus.db", f"{task}.train")) as store, store.transaction() as rows:
        models = rows.models()
    last = DirectoryBlobs(data / "blobs").get(models[-1].model)
    return [model.contributors for model in models], sha256(decode_tree(last))


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def test_sites_one_of_them_killed_between_its_rounds_do_what_simulated_ones_do(
    stack: ExitStack, tmp_path: Path
) -> None:
    """Nothing is drawn on devices here: each step is over all examples."""
    task = sumus.Task(net, sumus.losses.cross_entropy, name="sites")
    algorithm, pacing = sumus.fedadam(sumus.sgd(lr=0.3, epochs=2), 0.1), sumus.Pacing(6, deadline=900.0)
    wanted = Experiment(
        sumus.Plan(task, algorithm, pacing, 2, edges=sumus.Edges(3), trusts_devices=True), CLIENTS, 2, edge_groups=2
    )
    bundle, training = served(wanted)
    (tmp_path / "sites.sumus").write_bytes(bundle.to_bytes())
    words = ("--rounds", 2, "--edges", 2, "--edge-file", tmp_path / "link")
    server = stack.enter_context(process("serve", tmp_path / "sites.sumus", "--data", tmp_path / "top", *words))

    def site(data: Path, *more: object) -> Process:
        words = ("edge", "--data", data, "--link-file", tmp_path / "link", "--linger", 120)
        return stack.enter_context(
            process(*words, "--tokens", 1, "--uses", 3, "--token-file", data.with_suffix(".link"), *more)
        )

    def begun(data: Path, numbers: range) -> list[Device]:
        url, _, token = data.with_suffix(".link").read_text().strip().partition("/#enrol=")
        return clients(url, token, training, numbers, wanted.seed)

    near, far = tmp_path / "near", tmp_path / "far"
    first = site(near)
    site(far)
    port = first.opened["url"].rpartition(":")[2]
    people = begun(near, range(3)) + begun(far, range(3, 6))

    def between(number: int) -> None:
        nonlocal first
        if number == 2:
            first.kill()
            first = site(near, "--port", port)

    train(people, 6, between)
    server.wait()
    contributors, model = last_model(tmp_path / "top", "sites")
    assert contributors == [0, 6, 6]
    assert model == sumus.run(wanted, compute=sumus.Compute(executor="sequential", workers=1)).model_sha256
