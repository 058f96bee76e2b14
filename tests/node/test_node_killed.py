"""`sumus node` as a process: killed at any moment it has lost nothing that it acknowledged, and kept nothing twice."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sumus.cli import app
from sumus.errors import ExperimentError, UsageError
from sumus.node.commands import load_node
from sumus.node.readings_file import FILE

CLIENT = """
import sumus
from torch import nn

task = sumus.Task(
    model=lambda: nn.Linear(2, 1),
    loss=sumus.losses.mean_squared_error,
    data=sumus.Data((2,), "float32", (1,), "float32"),
)


def prepare(reading):
    return [reading["t"], reading["u"]], reading.get("power")
"""
NOWHERE = "http://127.0.0.1:9"
"""No server: a node needs none to take readings."""


class Process:
    """A node. url: where it answers."""

    def __init__(self, folder: Path, *words: object) -> None:
        (folder / "client.py").write_text(CLIENT)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "sumus", "node", NOWHERE, "--client", folder / "client.py",
             "--data", folder / "data", "--listen", "127.0.0.1:0", "--json", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SUMUS_TOKEN": "token"},
        )  # fmt: skip
        assert self._process.stdout is not None
        self.begun: dict[str, Any] = {}
        for line in self._process.stdout:
            self.begun = json.loads(line)
            if "url" in self.begun:
                break
        assert "url" in self.begun, self._process.communicate()[1]
        self.url: str = self.begun["url"]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end(self, by: signal.Signals) -> tuple[int, str, str]:
        self._process.send_signal(by)
        out, errors = self._process.communicate(timeout=60)
        return self._process.returncode, out, errors


@contextmanager
def process(folder: Path, *words: object) -> Iterator[Process]:
    mine = Process(folder, *words)
    try:
        yield mine
    finally:
        mine.kill()


def posted(url: str, body: Any, **headers: str) -> Any:
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), given), timeout=30) as answer:
        return json.loads(answer.read())


def asked(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return json.loads(answer.read())


def rows(folder: Path) -> list[tuple[str, list[float]]]:
    """Keys and inputs, as they lie on the disk."""
    with closing(sqlite3.connect(folder / "data" / FILE)) as database:
        found = database.execute("SELECT key, input FROM readings ORDER BY number").fetchall()
    return [(key, np.frombuffer(input, np.float32).tolist()) for key, input in found]


def reading(number: int) -> dict[str, Any]:
    return {"key": f"r{number}", "t": number, "u": -number, "power": [0.5]}


SENDERS, EACH = 3, 200


def test_killed_while_readings_come_it_has_them_all_once(tmp_path: Path) -> None:
    """Three send over HTTP, a fourth puts files into the folder; the process is killed three times."""
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    acknowledged: set[int] = set()
    counting, url = threading.Condition(), [""]

    def send(sender: int) -> None:
        for number in range(sender * EACH, (sender + 1) * EACH):
            while True:
                at = url[0]
                try:
                    answer = posted(f"{at}/v1/readings", reading(number))
                    assert answer["kept"] + answer["again"] == 1
                    break
                except (HTTPException, OSError):  # killed: send it again to the next one
                    with counting:
                        counting.wait_for(lambda at=at: url[0] != at, 300)
            with counting:
                acknowledged.add(number)
                counting.notify_all()

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(SENDERS)]
    for turn, enough in enumerate((60, 200, 350)):
        with process(tmp_path, "--watch", incoming) as node:
            lines = "".join(json.dumps(reading(10_000 + 100 * turn + row)) + "\n" for row in range(100))
            (incoming / f"{turn}.part").write_text(lines)
            (incoming / f"{turn}.part").rename(incoming / f"{turn}.jsonl")
            with counting:
                url[0] = node.url
                counting.notify_all()
            for sender in senders if not turn else ():
                sender.start()
            with counting:
                assert counting.wait_for(lambda enough=enough: len(acknowledged) >= enough, 300)
                node.kill()
                known = set(acknowledged)
        found = Counter(key for key, _ in rows(tmp_path))
        assert {f"r{number}" for number in known} <= set(found)
        assert set(found.values()) == {1}
    with process(tmp_path, "--watch", incoming) as node:
        with counting:
            url[0] = node.url
            counting.notify_all()
        for sender in senders:
            sender.join(300)
            assert not sender.is_alive()
        done = incoming / "done"
        left = threading.Event()
        while len(list(done.glob("*.jsonl"))) < 3:
            assert not left.wait(0.05)
        assert node.end(signal.SIGTERM)[0] == 0
    found = rows(tmp_path)
    wanted = [*range(SENDERS * EACH), *range(10_000, 10_300)]
    assert sorted(found) == sorted((f"r{n}", [n, -n]) for n in wanted), "each once, and none half"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_it_says_what_it_does_and_ends_when_told(by: signal.Signals, tmp_path: Path) -> None:
    token = tmp_path / "TOKEN"
    words = (
        "--access-file",
        token,
        "--keep-count",
        5,
        "--keep-days",
        1,
        "--least",
        100,
    )  # one device: none that trains
    with process(tmp_path, *words) as node:
        assert (node.begun["readings"], node.begun["models"]) == (0, {})
        with pytest.raises(urllib.error.HTTPError) as no:
            posted(f"{node.url}/v1/readings", reading(1))
        assert no.value.code == 401
        no.value.close()
        shown = {"Authorization": f"Bearer {token.read_text().strip()}"}
        assert posted(f"{node.url}/v1/readings", [reading(n) for n in range(9)], **shown)["kept"] == 9
        with pytest.raises(urllib.error.HTTPError) as no:
            posted(f"{node.url}/predict", reading(1), **shown)
        assert json.loads(no.value.read())["error"] == "no_model"
        deadline = time.monotonic() + 120
        while NOWHERE not in asked(f"{node.url}/status", **shown)["trouble"].get("training", ""):
            assert time.monotonic() < deadline, "the device did not ask for its server"
            time.sleep(0.01)  # a signal while Python opens a file or a connection leaves a warning
        status, out, errors = node.end(by)
    assert (status, errors) == (0, "")
    assert token.read_text().strip() not in out
    assert [key for key, _ in rows(tmp_path)] == ["r4", "r5", "r6", "r7", "r8"]


def test_a_file_of_a_node_needs_no_examples(tmp_path: Path) -> None:
    file = tmp_path / "client.py"
    file.write_text(CLIENT)
    own = load_node(str(file))
    assert own["prepare"]({"t": 1, "u": 2}) == ([1, 2], None)
    assert own["held_out"] is None
    with pytest.raises(ExperimentError, match="defines no 'other': write other"):
        load_node(f"{file}:other")
    file.write_text(CLIENT + "\nprepare = 7\n")
    with pytest.raises(ExperimentError, match="`prepare` in .* is a int: write a function that takes a reading"):
        load_node(str(file))
    file.write_text("prepare = len\n")
    with pytest.raises(ExperimentError, match="defines no `task"):
        load_node(str(file))


def test_words_that_do_not_go_together(tmp_path: Path) -> None:
    file = tmp_path / "client.py"
    file.write_text(CLIENT)
    words = ["node", NOWHERE, "--client", str(file), "--data", str(tmp_path / "data")]
    for more, why in (
        (["--mqtt-topic", "a"], "need a broker: give --mqtt"),
        (["--mqtt", "mqtts://broker.lan"], "no topic is given"),
        (["--listen", "0.0.0.0:0"], "without TLS the traffic can be read"),
    ):
        done = CliRunner().invoke(app, [*words, *more], env={"SUMUS_TOKEN": "token"})
        assert isinstance(done.exception, UsageError)
        assert why in str(done.exception)
