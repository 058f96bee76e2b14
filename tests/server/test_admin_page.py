"""The admin's page in a real browser, at the width of a phone: the reason is there, in words."""

import html
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.server.status import AboveStatus, in_short
from sumus.text import amount
from sumus.transport.inprocess import InProcess
from tests.server.devices import ScriptedDevice, tiny
from tests.services import missing
from tests.transport.echoing import listening

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AWAY = "http://198.51.100.7:8080 cannot be reached: no network leads there; the sums are kept, and sent later"


def seen(url: str, home: Path) -> str:
    """A page's elements once its script has run, as one line of HTML."""
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", "--window-size=390,844"]
    command = [str(CHROMIUM), *words, "--virtual-time-budget=4000", "--dump-dom", url]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return html.unescape(" ".join(found.stdout.split()))


def test_what_it_waits_for_who_took_no_part_and_a_lost_server_above_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if CHROMIUM is None:
        missing("Chromium (Debian: apt-get install chromium)")
    service = open_service({"tiny": tiny()}, Storage(tmp_path / "data"), ServerPolicy(group=0.0))
    service.server.start()
    access = Access(tmp_path / "data" / "admin")
    above: list[AboveStatus | None] = [None]
    monkeypatch.setattr(service, "above", lambda: above[0])
    app: Any = admin_app(service, access, lambda token: f"http://devices/#enrol={token}")

    def page() -> str:
        with listening(app) as port:
            return seen(f"http://127.0.0.1:{port}/#login={access.new_code(time.time())}", tmp_path / "browser")

    with InProcess(service.device_app) as devices:
        token = service.server.roll.new_token("default", service.server.clock(), uses=2)
        both = [ScriptedDevice(devices, number) for number in range(2)]
        for device in both:
            device.enrol(token)
        for device in both:
            work = device.work(tiny().plan)
            assert work is not None
            device.abort(work, "floor-rounds")
        service.server.counts.bytes_in = 1_400_000
        said = page()
    assert "2 devices enrolled, 1.4 MB in" in said
    assert "0 of 3 reports; 2 devices took no part recently" in said
    assert "<li>tiny train: 2 devices: already took part in as many rounds today as the owner consents to (24" in said
    assert re.search(r'<p id="above" hidden', said)
    above[0] = AboveStatus("http://198.51.100.7:8080", AWAY, 0, 0, 1, in_short(AWAY, "http://198.51.100.7:8080"))
    said = page()
    (line,) = re.findall(r'<p id="above"[^>]*class="trouble"[^>]*>([^<]*)</p>', said)
    assert line == "The server above does not hear this edge: no network leads there, 1 sum on the way"
    service.close()


def test_what_is_wrong_is_said_in_short() -> None:
    assert in_short(AWAY, "http://198.51.100.7:8080") == "no network leads there"
    assert in_short("unknown_device: it has left", "http://x") == "unknown_device: it has left"
    assert in_short("why " * 100, "http://x").endswith("…")
    assert len(in_short("why " * 100, "http://x")) == 80


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (1_400_000, "1.4 MB"), (2.5e9, "2.5 GB"), (7e12, "7.0 TB")],
)  # fmt: skip
def test_bytes_are_written_as_people_write_them(count: float, said: str) -> None:
    assert amount(count) == said
