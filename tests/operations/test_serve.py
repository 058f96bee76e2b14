"""`sumus serve` as a process: it begins, answers, and ends by itself or when it is told to, without torch."""

import asyncio
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sumus
from sumus.device.link import read_link
from sumus.errors import ExperimentError, UsageError
from sumus.http.listening import Listening, Planes, opened_at
from sumus.operations import serve as serving_module
from sumus.operations.commands import is_file_of_code
from sumus.operations.options import priorities_of, without_secret
from sumus.operations.policy import ServerPolicy
from sumus.operations.progress import ServerOpened
from sumus.operations.remote import Remote
from sumus.operations.serve import Startup, bundles_of, run
from sumus.operations.serve import _read as read_bundle  # pyright: ignore[reportPrivateUsage]
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.operations.upkeep import EXIT_STUCK, keep_house, keys_turned, watch
from sumus.server.access import Logins
from sumus.transport.http import HttpTransport
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle
from tests.server.devices import ScriptedDevice, tiny, train_round, update_of

CODE = """
import sys
from sumus.cli import main
try:
    main()
finally:
    commands = {"sumus.simulator", "sumus.simulator.commands", "sumus.simulator.display"}  # the command line itself
    heavy = {name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("sumus.simulator")}
    print("loaded", sorted(heavy - commands))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.sumus"
    path.write_bytes(tiny(deadline=60.0).to_bytes())
    return path


@dataclass
class Process:
    """A server. opened: what it said when it was ready."""

    process: "subprocess.Popen[str]"
    opened: dict[str, Any]

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def serving(*words: object) -> Iterator[Process]:
    command = [sys.executable, "-W", "error", "-c", CODE, "serve", *map(str, words), "--port", "0", "--admin-port", "0"]
    process = subprocess.Popen(
        [*command, "--json", "--log", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield Process(process, json.loads(line))
    finally:
        process.kill()
        process.communicate()


def test_a_bundle_is_served_without_torch_until_it_has_its_models(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    with serving(bundle, "--data", tmp_path / "data", "--tokens", 3, "--token-file", link, "--rounds", 2) as served:
        assert served.opened["tasks"] == {"tiny": tiny(deadline=60.0).plan.id}
        assert served.opened["enrolment"] is None
        assert link.stat().st_mode & 0o777 == 0o600
        links = [line.partition("/#enrol=") for line in link.read_text().splitlines()]
        assert [url for url, _, _ in links] == [served.opened["url"]] * 3
        transport = HttpTransport(served.opened["url"])
        devices = [ScriptedDevice(transport, number) for number in range(3)]
        for device, (_, _, token) in zip(devices, links, strict=True):
            device.enrol(token)
        plan = tiny(deadline=60.0).plan
        for value in (1.0, 2.0):
            assert len(train_round(devices, plan, [value] * 3)) == 3
        code, out, err = served.ended()
        transport.close()
        assert (code, out.strip()) == (0, "loaded []"), err
    written = [json.loads(line) for line in err.splitlines()]
    assert {line["logger"] for line in written} <= {"sumus.server", "sumus.serve"}
    assert not any(device.id in err for device in devices)
    assert not any(token in err for _, _, token in links)


def test_when_it_is_told_to_stop_it_answers_who_waits_and_keeps_what_was_counted(bundle: Path, tmp_path: Path) -> None:
    plan = tiny(deadline=60.0).plan
    with serving(bundle, "--data", tmp_path / "data", "--tokens", 4) as served:
        links = [read_link(line) for line in served.opened["enrolment"].splitlines()]
        transport = HttpTransport(links[0].server)
        devices = [ScriptedDevice(transport, number) for number in range(4)]
        for device, link in zip(devices, links, strict=True):
            device.enrol(str(link.token))
        works = [device.work(plan, wait_s=5.0) for device in devices[:3]]
        assert works[0] is not None
        devices[0].report(works[0], update_of(plan, 0))
        waiting: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=lambda: waiting.put(devices[3].check_in(plan, wait_s=55.0))).start()
        remote = logged_in(served.opened, tmp_path)
        while not remote.ask("GET", "/v1/admin/status")["held"]:
            pass
        served.process.send_signal(signal.SIGTERM)
        answer = waiting.get(timeout=30)
        assert answer.assignment is None
        assert answer.retry_after_s is not None
        code, _, err = served.ended()
        transport.close()
        assert code == 0, err
    again = open_service({"tiny": Bundle.from_bytes(bundle.read_bytes())}, Storage(tmp_path / "data"))
    again.server.start()
    assert again.server.tasks[0].training.coordinator.current.counted == 1
    again.close()


def logged_in(opened: dict[str, Any], folder: Path) -> Remote:
    remote = Remote(opened["admin_url"], Logins(folder / "config"))
    remote.log_in(opened["login"])
    return remote


class Running:
    """A server in a thread of this process, which ends after one model."""

    def __init__(self, tmp_path: Path, listen: Listening) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        opened: queue.Queue[ServerOpened] = queue.Queue()
        tell = Startup(tokens=1, uses=3, rounds=1, say=self.said.put, ready=opened.put)
        arguments = {"tiny": tiny()}, Storage(tmp_path / "data"), ServerPolicy(), listen, tell
        self.thread = threading.Thread(target=run, args=arguments)
        self.thread.start()
        self.opened = opened.get(timeout=30)

    def finish(self, transport: HttpTransport) -> list[str]:
        """Let three devices make a model; what was said."""
        token = (self.opened.enrolment or "").partition("#enrol=")[2].partition("&")[0]
        devices = [ScriptedDevice(transport, number) for number in range(3)]
        for device in devices:
            device.enrol(token)
        train_round(devices, tiny().plan, [1.0] * 3)
        transport.close()
        self.thread.join(60)
        assert not self.thread.is_alive()
        return [self.said.get_nowait() for _ in range(self.said.qsize())]


def test_each_model_is_a_line(tmp_path: Path) -> None:
    running = Running(tmp_path, Listening(port=0, admin_port=0))
    first, last = running.finish(HttpTransport(running.opened.url))
    assert first.startswith("tiny  version 1  3 devices  loss 0.5000")
    assert last.startswith("stopping")
    shown = "\n".join(running.opened.shown())
    assert "clear mode" in shown
    assert running.opened.login in shown
    assert "gives rounds no deadline" in shown


def test_it_makes_its_own_certificate_and_the_link_says_which(tmp_path: Path) -> None:
    listen = Listening(port=0, admin_port=0, tls=["auto"], names=["localhost", "127.0.0.1"])
    running = Running(tmp_path, listen)
    assert running.opened.url.startswith("https://localhost:")
    assert f"&pin={running.opened.pin}" in (running.opened.enrolment or "")
    assert running.opened.admin_url.startswith("http://127.0.0.1:")
    assert not any("certificate" in note for note in running.opened.notes), "nobody knows another"
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    authority = (tmp_path / "data" / "tls" / "authority.pem").read_text()
    assert HttpTransport(running.opened.url, authority).request("GET", "/v1/authority").body.decode() == authority
    running.finish(HttpTransport(running.opened.url, authority))


def test_a_public_address_wants_tls_or_to_be_asked_for_without(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="other machines can reach 0.0.0.0.*--tls auto"):
        with opened_at(Listening(host="0.0.0.0", port=0, admin_port=0), tmp_path):
            pass
    with pytest.raises(UsageError, match="other machines can reach ::"):
        with opened_at(Listening(port=0, admin_host="::", admin_port=0), tmp_path):
            pass
    with pytest.raises(UsageError, match="give --name HOSTNAME"):
        with opened_at(Listening(host="0.0.0.0", port=0, admin_port=0, tls=["auto"]), tmp_path):
            pass
    with opened_at(
        Listening(host="0.0.0.0", port=0, admin_port=0, insecure=True, url="https://fl.example"), tmp_path
    ) as at:
        assert at.url == "https://fl.example"


def test_what_cannot_be_listened_on_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ExperimentError, match="Address already in use; give another port or address with --port"):
            with opened_at(Listening(port=taken.getsockname()[1], admin_port=0), tmp_path):
                pass
    with pytest.raises(ExperimentError, match="give another port or address with --admin-port"):
        with opened_at(Listening(port=0, admin_host="192.0.2.1", admin_port=0), tmp_path):
            pass
    (tmp_path / "no.pem").write_text("no certificate")
    listen = Listening(port=0, admin_port=0, tls=[tmp_path / "no.pem", tmp_path / "no.pem"])
    with pytest.raises(UsageError, match="no.pem holds no certificate"):
        with opened_at(listen, tmp_path):
            pass
    with pytest.raises(UsageError, match="there is no file .*missing.pem"):
        with opened_at(Listening(port=0, admin_port=0, tls=["missing.pem", "missing.key"]), tmp_path):
            pass


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nA: " + b"a" * 200_000, b"GET / HT", b""])
def test_a_head_that_is_too_long_or_too_slow_ends_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("sumus.http.connections.HEAD_S", 30.0 if len(sent) > 100 else 0.2)

    def talk(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            try:
                client.sendall(sent)
                return client.recv(100)
            except ConnectionError:
                return b""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async def both() -> bytes:
        with opened_at(Listening(port=0, admin_port=0), tmp_path) as at:
            async with at.planes(application, application) as planes:
                assert isinstance(planes, Planes)
                return await asyncio.to_thread(talk, at.sockets[0].getsockname()[1])

    assert asyncio.run(both()) == b""


# ── keys, and a watch ────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_turned_and_those_of_open_rounds_stay(tmp_path: Path) -> None:
    service = open_service({"tiny": tiny()}, Storage(tmp_path / "data"), ServerPolicy(group=0.0))
    server, ring = service.server, service.ring
    server.start()
    runs = [server.tasks[0].training]

    def turned() -> list[int]:
        return server.ask_to_do(lambda now: keys_turned(ring, runs)).result()

    with InProcess(service.device_app) as transport:
        token = server.roll.new_token("default", server.clock(), uses=3)
        devices = [ScriptedDevice(transport, number) for number in range(3)]
        for device in devices:
            device.enrol(token)
        assert turned() == [1]
        plan = tiny().plan
        works = [device.work(plan) for device in devices]
        assert works[0] is not None
        assert works[1] is not None
        assert works[2] is not None
        devices[0].report(works[0], update_of(plan, 0))
        assert turned() == [], "round 0 is open, and its key is wrapped under key 2"
        assert turned() == []
        devices[1].report(works[1], update_of(plan, 0))
        devices[2].report(works[2], update_of(plan, 0))
        server.ask_to_do(lambda now: None).result()
        assert turned() == [2, 3, 4]
    service.close()


def test_a_process_that_is_stuck_ends(caplog: pytest.LogCaptureFixture) -> None:
    codes: list[int] = []
    watch(SimpleNamespace(stuck_s=0.02), threading.Event(), 0.01, codes.append)  # pyright: ignore[reportArgumentType]
    assert codes == [EXIT_STUCK]
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)
    over = threading.Event()
    over.set()
    watch(SimpleNamespace(stuck_s=99.0), over, 0.01, codes.append)  # pyright: ignore[reportArgumentType]
    assert codes == [EXIT_STUCK]


def test_keeping_house_warns_of_a_certificate_s_end() -> None:
    service = open_service({"tiny": tiny()}, policy=ServerPolicy(group=0.0))
    service.server.start()

    async def kept() -> None:
        said = asyncio.Event()
        service.certificate = SimpleNamespace(warn=said.set)  # type: ignore[assignment]
        house = asyncio.create_task(keep_house(service))
        await said.wait()
        house.cancel()

    asyncio.run(asyncio.wait_for(kept(), 30))
    service.close()


def test_a_plan_whose_reports_could_never_be_taken_is_not_served() -> None:
    with pytest.raises(
        ExperimentError, match=r"a report of tiny may have 2 MiB, but .* together only 1 MiB: .*--memory \d"
    ):
        open_service({"tiny": tiny()}, policy=ServerPolicy(memory=2**20))
    open_service({"tiny": tiny()}, policy=ServerPolicy(memory=3 * 2**20)).close()


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_served_has_a_name_of_its_own(tmp_path: Path, bundle: Path) -> None:
    assert list(bundles_of([tiny(), tiny(name="other")])) == ["tiny", "other"]
    assert list(bundles_of([bundle])) == ["tiny"]
    with pytest.raises(UsageError, match="two tasks are called 'tiny'"):
        bundles_of([tiny(), bundle])
    with pytest.raises(UsageError, match="nothing to serve"):
        bundles_of([])
    with pytest.raises(UsageError, match="has no first model: serve the bundle"):
        bundles_of([tiny().plan])
    with pytest.raises(UsageError, match="missing.sumus cannot be read"):
        bundles_of([tmp_path / "missing.sumus"])


def test_words_of_the_command_line(bundle: Path) -> None:
    assert is_file_of_code("health.py")
    assert is_file_of_code("health.py:smaller")
    assert not is_file_of_code(str(bundle))
    assert priorities_of(["a=2", "b=-1"]) == {"a": 2, "b": -1}
    with pytest.raises(UsageError, match="write TASK=N"):
        priorities_of(["a=much"])


def test_a_database_s_password_stands_in_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    open_url, secret = "postgresql+psycopg://fl@db/fl", "postgresql+psycopg://fl:word@db/fl"
    assert without_secret(open_url) == open_url
    assert without_secret(None) is None
    with pytest.raises(UsageError, match="PGPASSWORD"):
        without_secret(secret)
    monkeypatch.setenv("SUMUS_DATABASE", secret)
    assert without_secret(secret) == secret


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tls", "a.pem", "b.pem"], "there is no file a.pem"),
        (["--priority", "other=1"], "there is no such task"),
    ],
)
def test_a_mistake_is_one_line(bundle: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sumus", "serve", str(bundle), "--data", str(tmp_path / "data"), "--port", "0", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sumus: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# ── from elsewhere ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_whoever_asks_the_wrong_place_is_told_which_it_is(tmp_path: Path) -> None:
    running = Running(tmp_path, Listening(port=0, admin_port=0))
    logins = Logins(tmp_path / "config")
    with pytest.raises(ExperimentError, match="not logged in .*sumus admin login"):
        Remote(running.opened.admin_url, logins).ask("GET", "/v1/admin/status")
    with pytest.raises(ExperimentError, match="not the admin address"):
        Remote(running.opened.url, logins).ask("GET", "/v1/admin/status")
    with pytest.raises(UsageError, match="a login link is a secret"):
        Remote(running.opened.login, logins)
    with pytest.raises(UsageError, match="give the URL that the link begins with"):
        Remote("http://127.0.0.1:1", logins).log_in(running.opened.login)
    remote = Remote(running.opened.admin_url, logins)
    remote.log_in(running.opened.login)
    assert remote.ask("GET", "/v1/admin/status")["population"] == "default"
    with pytest.raises(ExperimentError, match="refused the request: tiny has no version 9 yet: its newest is 0"):
        remote.ask("POST", "/v1/admin/models/tiny/promote", {"version": 9})
    with pytest.raises(ExperimentError, match="used before, or has expired"):
        remote.log_in(running.opened.login)
    remote.log_out()
    assert not remote.logged_in
    logins.keep(running.opened.admin_url, "A" * 43)
    with pytest.raises(ExperimentError, match="session .* is over"):
        remote.ask("GET", "/v1/admin/status")
    running.finish(HttpTransport(running.opened.url))
    with pytest.raises(ExperimentError, match="cannot be reached"):
        remote.log_in(running.opened.login)


def test_a_plan_that_was_not_made_for_devices_is_not_served() -> None:
    """Its metrics would count any number of predictions."""
    bundle = tiny()
    undecided = replace(bundle, plan=replace(bundle.plan, trusts_devices=None))
    with pytest.raises(ExperimentError, match=r"was not made for devices: .*Pack its file again with `sumus pack`"):
        open_service({"tiny": undecided})
    open_service({"tiny": bundle}).close()


@pytest.mark.parametrize(
    ("held", "words"), [(b"", "not a bundle"), (b"PK\x03\x04", "not a bundle"), (b"plan = 1", "not a bundle")]
)
def test_a_file_that_is_no_bundle_is_named(held: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.sumus").write_bytes(held)
    with pytest.raises(UsageError, match=f"mine.sumus: this is {words}"):
        read_bundle(tmp_path / "mine.sumus")


def test_a_folder_and_an_address_alone_are_short_for_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Any] = []
    monkeypatch.setattr(serving_module, "run", lambda *given: found.append(given))
    sumus.serve(tiny(), storage=str(tmp_path), listen="0.0.0.0:8443", quiet=True)
    sumus.serve(tiny(), listen=Listening(port=0), startup=Startup(tokens=2, token_file="LINKS"))  # type: ignore[arg-type]  # pyright: ignore
    (_, storage, _, listen, startup), (_, memory, policy, _, loud) = found
    assert storage == Storage(tmp_path)
    assert (listen.host, listen.port, listen.admin_port) == ("0.0.0.0", 8443, 8081)
    assert startup.say is None
    assert startup.ready is not None, "it says where it answers"
    assert (memory, policy) == (Storage(), ServerPolicy())
    assert (loud.tokens, loud.token_file) == (2, Path("LINKS"))
    assert loud.say is not None


@pytest.mark.parametrize(("tls", "files"), [((), []), ("auto", ["auto"]), (["c", "k"], ["c", "k"])])
def test_a_certificate_is_named_by_a_word_or_two_files(tls: Any, files: list[str]) -> None:
    assert Listening(tls=tls).certificate_files == files
