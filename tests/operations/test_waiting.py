"""What is not there yet when a machine starts is waited for, and said; what a person must mend is not."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kills.__main__ import database
from sumus.errors import ExperimentError
from sumus.operations.waiting import LONGEST, once_there
from sumus.storage.sql import SqlStore
from sumus.storage.store import StorageAway
from sumus.transport.transport import Unreachable
from tests.server.devices import tiny
from tests.services import pgbouncer


class Opening:
    """Something that raises these errors, one after the other, before it opens. waits: seconds between its attempts."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.waits, self.now = list(errors), list[float](), 0.0

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "open"

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def wait(self) -> str:
        return once_there(self, self.sleep, lambda: self.now)


def test_it_is_tried_later_and_later_and_each_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    opening = Opening(*[StorageAway("no database")] * 7, *[Unreachable("no server above")] * 2)
    assert opening.wait() == "open"
    assert opening.waits == [1, 2, 4, 8, 16, LONGEST, LONGEST, LONGEST, LONGEST]
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "no database",
        "no server above",
        "what was missing is available now: the start continues",
    ]


def test_what_lasts_is_said_again_and_a_mistake_at_once(caplog: pytest.LogCaptureFixture) -> None:
    opening = Opening(*[StorageAway("no database")] * 30, ExperimentError("no such password"))
    with pytest.raises(ExperimentError, match="no such password"):
        opening.wait()
    assert len(caplog.records) == 3


@contextmanager
def begun(*words: object) -> Iterator["subprocess.Popen[str]"]:
    """A command of sumus that may not answer yet."""
    command = [sys.executable, "-m", "sumus", *map(str, words), "--admin-port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def opened(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return json.loads(line)


def said(process: "subprocess.Popen[str]", words: str) -> str:
    """The first line of its log with these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"it never said {words!r}")


def test_a_server_waits_for_its_database(postgres: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.sumus").write_bytes(tiny(deadline=60.0).to_bytes())
    with database(postgres) as url:
        assert url is not None
        address, _, folder = url.partition("host=")
        late = f"{address}host={tmp_path}/late"
        with begun(
            "serve", tmp_path / "tiny.sumus", "--data", tmp_path / "data", "--database", late, "--port", 0
        ) as server:
            assert "the database cannot be opened" in said(server, "the start waits, and tries again")
            (tmp_path / "late").symlink_to(folder)
            assert list(opened(server)["tasks"]) == ["tiny"]


def test_who_waits_is_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "tiny.sumus").write_bytes(tiny(deadline=60.0).to_bytes())
    nowhere = f"postgresql+psycopg://sumus@/sumus?host={tmp_path}"
    with begun("serve", tmp_path / "tiny.sumus", "--data", tmp_path / "data", "--database", nowhere) as server:
        said(server, "the start waits, and tries again")
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out) == (130, "")
        assert "Traceback" not in err


def test_an_edge_waits_for_the_server_above(tmp_path: Path) -> None:
    (tmp_path / "tiny.sumus").write_bytes(tiny(deadline=60.0).to_bytes())
    link = tmp_path / "edges"
    words = ("serve", tmp_path / "tiny.sumus", "--data", tmp_path / "data")
    with begun(*words, "--port", 0, "--edges", 1, "--edge-file", link) as server:
        port = opened(server)["url"].rpartition(":")[2]
    with begun("edge", "--data", tmp_path / "edge", "--link-file", link, "--port", 0) as edge:
        assert "cannot be reached" in said(edge, "the start waits, and tries again")
        with begun(*words, "--port", port) as server:
            opened(server)
            assert opened(edge)["url"]


def refused(url: str) -> ExperimentError:
    with pytest.raises(ExperimentError) as caught:
        SqlStore.open(url)
    return caught.value


@pytest.mark.parametrize(
    ("change", "away"),
    [
        (lambda url, folder: f"{url}/nowhere", True),
        (lambda url, folder: "postgresql://sumus@127.0.0.1:1/sumus", True),
        (lambda url, folder: "postgresql://sumus@[::1]:1/sumus", True),
        (lambda url, folder: "postgresql://sumus@no.such.host.invalid/sumus", True),
        (lambda url, folder: url.replace("/postgres?", "/nosuch?"), False),
        (lambda url, folder: url.replace("sumus@", "nobody@"), False),
        (lambda url, folder: f"{url}&colour=blue", False),
        (lambda url, folder: f"sqlite:///{folder}/nowhere/run.db", False),
    ],
    ids=["socket", "port", "ipv6", "name", "database", "user", "option", "sqlite"],
)
def test_what_may_come_is_told_from_what_will_not(
    change: Callable[[str, Path], str], away: bool, postgres: str, tmp_path: Path
) -> None:
    assert isinstance(refused(change(postgres, tmp_path)), StorageAway) == away


def test_a_pooler_whose_database_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    with pgbouncer(f"postgresql+psycopg://sumus@/postgres?host={tmp_path}") as pooled:
        assert isinstance(refused(f"{pooled}&connect_timeout=2"), StorageAway)
