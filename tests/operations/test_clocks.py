"""Clocks that are hours wrong, by libfaketime: rounds go on, and what cannot says that it is the clock."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills.__main__ import database
from sumus.storage.sql import SqlStore
from tests.server.devices import ScriptedDevice, tiny, train_round
from tests.server.one_replica import Rotating, replica
from tests.services import at_another_time

HOURS = 3600.0
CODE = """
import threading, time
time.sleep = lambda seconds: threading.Event().wait(seconds)  # libfaketime makes an error of Python's own
from sumus.cli import main
main()
"""


@contextmanager
def serving(folder: Path, before: list[str], rounds: int = 1) -> Iterator[tuple[list[str], "subprocess.Popen[str]"]]:
    """`sumus serve --tls auto`; its links, and its process."""
    (folder / "tiny.sumus").write_bytes(tiny(cohort=2, deadline=600.0).to_bytes())
    words = ["serve", folder / "tiny.sumus", "--data", folder / "data", "--tls", "auto", "--name", "127.0.0.1"]
    words += ["--port", 0, "--admin-port", 0, "--tokens", 2, "--rounds", rounds, "--json"]
    process = subprocess.Popen(
        [*before, sys.executable, "-c", CODE, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line)["enrolment"].splitlines(), process
    finally:
        process.kill()
        process.communicate()


def taking_part(link: str, folder: Path, number: int, before: list[str]) -> dict[str, Any]:
    command = [*before, sys.executable, "-m", "tests.server.one_device", link, str(folder / "tiny.sumus"), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("server", "devices"), [("", "-3h"), ("-3h", "+3h")])
def test_a_round_goes_on_where_clocks_are_hours_apart(server: str, devices: str, tmp_path: Path) -> None:
    with serving(tmp_path, at_another_time(server) if server else []) as (links, process):
        with ThreadPoolExecutor(2) as both:
            befores = at_another_time(devices), []
            running = list(both.map(taking_part, links, [tmp_path] * 2, range(2), befores))
        assert [each["said"] for each in running] == ["counted", "counted"]
        apart = running[0]["now"] - time.time()
        assert abs(apart - float(devices.removesuffix("h")) * HOURS) < 0.5 * HOURS  # its clock was wrong indeed
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err


def test_a_device_whose_clock_is_too_wrong_for_the_certificate_is_told_its_time(tmp_path: Path) -> None:
    with serving(tmp_path, []) as (links, _):
        for moment, said in (
            (
                "1970-01-05 00:00:00",
                "is not valid yet, and the time here is 1970-01-05 00:00 UTC: is this machine's clock slow?",
            ),
            ("-40h", "is not valid yet"),
            ("+800d", "has expired, and the time here is "),
        ):
            assert said in taking_part(links[0], tmp_path, 0, at_another_time(moment))["said"]


def test_replicas_go_by_the_database_s_clock(postgres: str, tmp_path: Path) -> None:
    bundle = tiny(cohort=4, deadline=600.0)
    (tmp_path / "tiny.sumus").write_bytes(bundle.to_bytes())
    (tmp_path / "shared").mkdir()
    with database(postgres) as url, ExitStack() as stack:
        assert url is not None
        job = {
            "name": "tiny",
            "bundle": tmp_path / "tiny.sumus",
            "database": url,
            "shares": tmp_path / "shared",
            "seed": 1,
        }
        opened = [
            stack.enter_context(replica(at_another_time(offset), data=tmp_path / offset, enrols=enrols, **job))
            for offset, enrols in (("-3h", 4), ("+3h", 0))
        ]
        transport = Rotating([each["url"] for each in opened])
        devices = [ScriptedDevice(transport, number, "people") for number in range(4)]
        for device in devices:
            device.enrol(opened[0]["token"])
        for value in (1.0, 2.0):
            assert len(train_round(devices, bundle.plan, [value] * 4)) == 4
        transport.close()
        store = SqlStore.open(url, "tiny.train")
        until = time.monotonic() + 30
        while True:
            with store.transaction() as rows:
                models = [(model.version, abs(model.at - time.time()) < 0.5 * HOURS) for model in rows.models()]
            if len(models) == 3:
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        store.close()
        assert models == [(0, True), (1, True), (2, True)]
