"""Servers and edges as processes, over HTTP: the same model as without edges, also where an edge is killed in mid-round."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_adder import flat

from sumus.storage.blobs import DirectoryBlobs
from sumus.storage.sql import SqlStore
from sumus.transport.http import HttpTransport
from sumus.tree import sha256
from sumus.wire.tensors import decode_tree
from tests.server.devices import ScriptedDevice, tiny, together, update_of

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
                "--port",
                "0",
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
        errors = self._process.communicate(timeout=60)[1]
        assert self._process.returncode == 0, errors
        return self._process.returncode


@contextmanager
def process(*words: object) -> Iterator[Process]:
    mine = Process(*words)
    try:
        yield mine
    finally:
        mine.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_two_levels_of_edges_one_of_them_killed_in_mid_round(stack: ExitStack, tmp_path: Path) -> None:
    bundle, plan = tiny(cohort=PEOPLE, deadline=120.0), tiny(cohort=PEOPLE, deadline=120.0).plan
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
        works = together(*(partial(device.work, plan, wait_s=30.0) for device in people))
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
    store = SqlStore.open(f"sqlite:///{tmp_path}/top/sumus.db", "tiny.train")
    with store.transaction() as rows:
        models = rows.models()
    store.close()
    assert [model.contributors for model in models] == [0, PEOPLE, PEOPLE]
    assert sha256(decode_tree(DirectoryBlobs(tmp_path / "top" / "blobs").get(models[-1].model))) == flat(bundle, 2)
    assert upper.opened["mode"].startswith("clear mode")
