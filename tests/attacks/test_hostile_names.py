"""Attacks by names: whoever names a file, a member of an archive, a topic or a client, or answers as a server, writes into a
terminal or a log of somebody else's.

An escape sequence clears a screen or sets a window's title, a line feed in a log looks like another record, a bidirectional
override shows `gpj.exe` as `exe.jpg`, and `[red]` is rich's markup. A test for each source of text from outside looks at what is
shown. The control: names in any script are shown as they are.
"""

import ast
import io
import json
import logging
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import sumus
from sumus import cli
from sumus.cli import app
from sumus.device.commands import Lines
from sumus.device.device import Device
from sumus.device.news import DeviceNews
from sumus.device.options import DeviceProfile, ServerConnection
from sumus.errors import DataError, ExperimentError, ParticipantError, PlanError, UsageError
from sumus.metrics import Spread
from sumus.node.folder import WatchedFolder
from sumus.node.formats import read_file
from sumus.node.intake import Intake
from sumus.node.mqtt import Broker, Subscription
from sumus.node.reading import BadReading
from sumus.node.readings import Readings
from sumus.operations import serve
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.server import server
from sumus.server.access import Logins
from sumus.simulator.commands import OUT
from sumus.simulator.display import measurements
from sumus.transport.transport import Answer, Unreachable
from sumus.virtual.worker import WorkerRefused
from sumus.wire.bundle import Bundle
from sumus.wire.messages import Problem, Refused, write
from tests.device.served import FREE, Served, a_task, some_examples
from tests.node.test_node import a_node, until
from tests.server.devices import tiny

EVIL = "kitchen\x1b[2J\x1b]0;mine\x07\n2026-01-01 00:00:00,000 INFO sumus.admin: login\r\u202egpj\u2028\x9b31m\x7f\ud800[red]"
"""A name as an attacker chooses it."""
PLAIN = "Küche 厨房 مطبخ ☕ 100 % [red]_\\n.csv"
"""A name as somebody has it; nothing of it is changed."""


def shown_safely(text: str) -> bool:
    """Whether one line, or lines that a program wrote itself, hold nothing that a terminal obeys; the name is in them."""
    return text.isprintable() and "kitchen" in text


class Server(Served):
    """A server that refuses in words of its own choice, whatever it is asked."""

    def request(self, *asked: Any, **more: Any) -> Answer:
        return Answer(403, {}, write(Problem("revoked", EVIL.replace("\ud800", ""))))


# ── a node's readings ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def readings(tmp_path: Path) -> Iterator[Readings]:
    with Readings(tmp_path / "node") as readings:
        yield readings


@pytest.mark.parametrize(("name", "shown"), [(EVIL, None), (PLAIN, PLAIN)])
def test_a_file_in_a_watched_folder(tmp_path: Path, readings: Readings, name: str, shown: str | None) -> None:
    watched = WatchedFolder(tmp_path / "incoming", Intake(readings), clock=iter(range(0, 1000, 100)).__next__)
    file = tmp_path / "incoming" / f"{name.replace(chr(0xD800), '')}.jsonl"
    file.write_text('{"inputs": [1], "target": 0}\n{"in": 1}\n')
    seen = [*watched.look(), *watched.look()]
    assert [one.said.isprintable() for one in seen] == [True]
    assert seen[0].said.startswith(shown or "kitchen\\x1b[2J")


def test_what_a_node_says_and_where_it_stands(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "incoming").mkdir()
    with a_node(tmp_path / "node", Server(), watch=tmp_path / "incoming", say=said.append) as node:
        node.keep({"inputs": [1, 2, 3, 4], "target": [0]})
        (tmp_path / "incoming" / f"{EVIL.replace(chr(0xD800), '')}.npz").write_bytes(b"nothing")
        until(node, lambda status: "training" in status.trouble and any("kitchen" in line for line in said))
        trouble = node.status.trouble["training"]
    assert shown_safely(trouble)
    assert all(line.isprintable() for line in said)


def test_a_member_of_an_archive(tmp_path: Path, readings: Readings) -> None:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr(f"kitchen\x1b[2J\u202e{EVIL[10:40]}.npy", b"no array")
    with pytest.raises(BadReading) as error:
        read_file("a.npz", body.getvalue())
    assert shown_safely(str(error.value).replace("\n", ""))
    watched = WatchedFolder(tmp_path / "incoming", Intake(readings), clock=iter(range(0, 1000, 100)).__next__)
    (tmp_path / "incoming" / "a.npz").write_bytes(body.getvalue())
    (seen,) = [*watched.look(), *watched.look()]
    assert seen.said.isprintable()
    assert all(map(str.isprintable, (tmp_path / "incoming" / "refused" / "a.npz.reason").read_text().splitlines()))


def test_a_topic_of_a_broker(readings: Readings) -> None:
    said: list[str] = []
    subscription = Subscription(Broker("mqtt://127.0.0.1:1", ("#",)), Intake(readings), "node", said.append)
    message = SimpleNamespace(topic=EVIL, payload=b'{"kitchen\\u001b[2J": 1}', mid=1, qos=1, retain=False)
    client: Any = SimpleNamespace(ack=lambda *of: None)
    subscription._came(client, None, message)  # pyright: ignore[reportPrivateUsage]
    message.topic = PLAIN
    subscription._came(client, None, message)  # pyright: ignore[reportPrivateUsage]
    assert [shown_safely(line) for line in said] == [True, True]
    assert said[1].startswith(PLAIN)


# ── what another machine answers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_refuses_a_device(tmp_path: Path) -> None:
    news: list[Any] = []
    with Device(
        "https://example.org", a_task(), some_examples(), folder=tmp_path, token="token", consent=FREE, watch=news.append,
        connection=ServerConnection(transport=Server()), profile=DeviceProfile(executor="autograd"),
    ) as device:  # fmt: skip
        with pytest.raises(ExperimentError) as error:
            device.enrol()
        assert shown_safely(str(error.value).replace("\n", ""))
    assert all(one.said.isprintable() for one in news)


def test_a_line_of_a_device_s_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        lines = Lines(tmp_path, as_json)
        for what in ("trouble", "enrolled", "aborted", "counted"):
            lines(DeviceNews(what, EVIL, EVIL, "train", 1, 12, 1.0, {EVIL: 0.5}))  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 6, "a name begins no line"
    assert all(map(str.isprintable, (captured.out + captured.err).splitlines()))


@pytest.fixture
def hostile() -> Iterator[str]:
    """An address at which something answers that looks like an admin's plane."""
    text = EVIL.replace("\ud800", "")
    run = {
        "kind": text, "round": 0, "state": text, "counted": 0, "goal": 1, "out": 0, "dropped": 0, "since_s": 0.0, "left_s": None,
        "waiting": text, "trouble": text, "paused": False,
    }  # fmt: skip
    answers = {
        "/v1/admin/status": {
            "population": text, "devices": 1, "up_s": 1.0, "bytes_in": 0, "bytes_out": 0, "mode": text, "above": None,
            "replica": {"there": [text, text], "name": text, "leads": False, "leader": text}, "trouble": text, "events": {},
            "certificate_s": 1.0, "refusals": [{"task": text, "kind": text, "why": text, "devices": 1, "said": text}],
            "tasks": [
                {
                    "name": text, "runs": [run], "model": None, "released": 0, "evaluated": None, "edge_rounds": 1,
                    "noise_at": "", "influence": {"trusted": True, "said": text},
                }
            ],
        },
        "/v1/admin/devices?after=": {"devices": [{"id": text, "state": text, "enrolled": 1, "seen": 1}], "after": text},
    }  # fmt: skip

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            self.send_response(200 if found else 404)
            self.send_header("sumus-plane", "admin")
            self.end_headers()
            self.wfile.write(json.dumps(found or {"code": text, "detail": text}).encode())

        def log_message(self, *of: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["admin", "devices"], ["admin", "models", "x"]])
def test_a_server_that_an_admin_looks_at(
    hostile: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Logins(tmp_path / "sumus").keep(hostile, "A" * 43)
    command, *rest = words[:2] if words[0] == "admin" else words[:1]
    result = CliRunner().invoke(app, [command, *rest, hostile, *words[1 + len(rest) :]])
    shown = result.output + str(result.exception or "")
    assert "kitchen" in shown
    assert [line for line in shown.splitlines() if not line.isprintable() or line.startswith("2026")] == []


def test_a_worker_that_refuses() -> None:
    assert shown_safely(str(WorkerRefused("bob", "private", EVIL)).replace("\n", ""))


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def records(form: str) -> list[str]:
    """What a log holds once a name of an attacker's got into a record, its extras and an exception."""
    stream, root = io.StringIO(), logging.getLogger()
    others, root.handlers = (
        root.handlers,
        [],
    )  # pytest's own would hand a lone surrogate to another process, which fails
    handler = serve.log_to(stream, form)  # type: ignore[arg-type]
    try:
        logging.getLogger("another.library").warning("cannot read %s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            server.LOG.exception("a request for %s failed", EVIL, extra={"said": {"task": EVIL}})
    finally:
        root.removeHandler(handler)
        root.handlers = others
        logging.getLogger("sumus").setLevel(logging.NOTSET)
    return stream.getvalue().splitlines()


def test_a_record_is_a_line_and_a_traceback_is_indented() -> None:
    lines = records("text")
    assert all(map(str.isprintable, lines))
    assert len([line for line in lines if line[:2] == "20"]) == 2, "nobody wrote a third record"


def test_an_object_a_line_holds_no_control_characters_either() -> None:
    lines = records("json")
    assert len(lines) == 2
    for line in map(json.loads, lines):
        assert shown_safely(line["message"])
    assert all(map(str.isprintable, json.loads(lines[1])["traceback"].split("\n")))


def test_a_program_with_a_handler_of_its_own_is_safe_too() -> None:
    stream = io.StringIO()
    handler, log = logging.StreamHandler(stream), logging.getLogger("sumus.edge")
    import sumus.edge.uplink  # which makes that logger

    assert sumus.edge.uplink.LOG is log
    log.addHandler(handler)
    try:
        log.warning("the server above: %s", EVIL)
        log.warning("the server above: %s", PLAIN)
    finally:
        log.removeHandler(handler)
    evil, plain = stream.getvalue().splitlines()
    assert shown_safely(evil)
    assert plain.endswith(PLAIN)


# ── errors, tables, names that are refused ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error",
    [
        UsageError(EVIL), ExperimentError(EVIL), PlanError("rule", EVIL), DataError("client", EVIL), ParticipantError(EVIL, EVIL),
        ParticipantError(None, EVIL), BadReading(EVIL), Unreachable(EVIL), Refused("bad_report", EVIL), Refused(EVIL),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_s_text(error: Exception) -> None:
    assert shown_safely(str(error).replace("\n", ""))


def test_an_error_that_names_a_usual_name() -> None:
    assert str(UsageError(PLAIN)) == PLAIN
    assert str(Refused("bad_report", PLAIN)) == f"bad_report: {PLAIN}"
    assert str(UsageError("one line\nand another")) == "one line\nand another"


def test_a_traceback_of_a_defect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(cli, "app", lambda: None)
    monkeypatch.setattr(cli, "terminate_like_ctrl_c", lambda: None)
    cli.main()
    error = ValueError(EVIL)
    sys.excepthook(type(error), error, None)
    shown = capsys.readouterr().err
    assert "kitchen" in shown
    assert all(map(str.isprintable, shown.splitlines()))


def test_a_bundle_with_members_of_such_names() -> None:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr(EVIL.replace("\ud800", ""), b"")
    with pytest.raises(UsageError) as error:
        Bundle.from_bytes(body.getvalue())
    assert shown_safely(str(error.value).replace("\n", ""))


def test_a_task_or_a_population_cannot_be_called_so() -> None:
    for bundles, policy in (({EVIL: tiny()}, ServerPolicy()), ({"tiny": tiny()}, ServerPolicy(population=EVIL))):
        with pytest.raises(ExperimentError) as error:
            open_service(bundles, policy=policy)
        assert shown_safely(str(error.value))


@pytest.mark.parametrize(
    ("name", "shown"), [(EVIL, "kitchen\\x1b[2J"), ("[red]Anna[/red] :skull:", "[red]Anna[/red] :skull:")]
)
def test_a_client_of_a_population_in_a_table(name: str, shown: str) -> None:
    spread = Spread(1, 0.5, 0.5, 0.5, 0.0, 0.5, name)
    with OUT.capture() as captured:
        OUT.print(measurements({name: 0.5}, {name: spread}))
    assert shown in captured.get().replace("\n", "")
    assert all(map(str.isprintable, captured.get().splitlines()))


def test_every_place_that_shows_something_goes_through_the_one_that_escapes() -> None:
    """No file prints, makes a console or a logger by itself."""
    root, found = Path(sumus.__file__).parent, list[str]()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            own = {"terminal.py": ("print", "Console"), "logs.py": ("logging.getLogger",)}.get(name, ())
            root_logger = called == "logging.getLogger" and not getattr(node, "args", None)
            if (
                called in ("print", "Console", "typer.echo", "logging.getLogger")
                and called not in own
                and not root_logger
            ):
                found.append(f"{name}: {called}")
    assert found == []
