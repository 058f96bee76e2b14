"""Models in S3: blobs on a real S3 server, which is killed while blobs are put; and what must hold.

    python -m benchmarks.s3                       20 kills
    python -m benchmarks.s3 --kills 200           the long form

The server is OpenStack Swift with its S3 interface, in an environment of its own, on free ports of this machine. A kill
is a SIGKILL of its proxy or of its object server during puts. The process is then started again, and a client whose put
was not confirmed repeats it. At the end every blob whose put was confirmed must be there, with the bytes that were put.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from obstore import sign
from obstore.store import S3Store

from benchmarks.peers.environments import KEPT, Environment, prepare, versions
from sumus.errors import ExperimentError
from sumus.storage.blobs import Blobs, open_blobs

SWIFT = Environment("swift", ("swift==2.38.3",), False, ("swift",))
BUCKET = "models"
SIZES = (0, 1, 4096, 2**20, 6 * 2**20)
"""Bytes. S3 clients may send more than 5 MiB in parts."""
_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/srv
mount_check = false
fallocate_reserve = 0
"""
_STORAGE = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats cache s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:cache]
use = egg:swift#memcache
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:slo]
use = egg:swift#slo
"""
_HASHES = """
[swift-hash]
swift_hash_path_suffix = sumus
swift_hash_path_prefix = sumus
[storage-policy:0]
name = one
default = yes
"""


class Swift:
    """One node of Swift in a folder: four processes."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder, self._programs = folder, programs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = {kind: _free_port() for kind in ("account", "container", "object", "proxy")}
        (folder / "srv" / "d1").mkdir(parents=True)
        (folder / "swift.conf").write_text(_HASHES)
        for kind, port in self._ports.items():
            common = _COMMON.format(port=port, user=_user(), folder=folder)
            (folder / f"{kind}.conf").write_text(common + (_PROXY if kind == "proxy" else _STORAGE.format(kind=kind)))
            if kind != "proxy":
                self._ring(kind, "create", "4", "1", "0")
                self._ring(kind, "add", f"r1z1-127.0.0.1:{port}/d1", "1")
                self._ring(kind, "rebalance")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['proxy']}"

    def start(self) -> None:
        """Start the processes that do not run; return when they listen."""
        for kind, port in self._ports.items():
            if kind not in self._running:
                with open(self._folder / f"{kind}.log", "ab") as log:
                    command = [str(self._programs / f"swift-{kind}-server"), str(self._folder / f"{kind}.conf")]
                    self._running[kind] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                _listens(port, self._running[kind])

    def kill(self, kind: str) -> None:
        """Kill a process and its children with SIGKILL."""
        process = self._running.pop(kind)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Stop all processes."""
        for kind in list(self._running):
            self.kill(kind)

    def _ring(self, kind: str, *arguments: str) -> None:
        program = [str(self._programs / "swift-ring-builder"), str(self._folder / f"{kind}.builder"), *arguments]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        if done.returncode > 1:  # status 1 is a warning
            raise RuntimeError(f"swift-ring-builder: {done.stdout}{done.stderr}")


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"{' '.join(map(str, process.args))} does not listen: see its log")


def make_bucket(swift: Swift) -> None:
    """Make the bucket over S3, with a signed address; clients of object stores cannot make one."""
    store = S3Store(BUCKET, endpoint=swift.url, client_options={"allow_http": True})
    request = urllib.request.Request(sign(store, "PUT", "", timedelta(minutes=1)), method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200, "the bucket is made"


def contract(rng: random.Random) -> None:
    """Check on a real server what the test suite checks of blobs."""
    blobs, other = open_blobs(f"s3://{BUCKET}/contract"), open_blobs(f"s3://{BUCKET}/other/place/")
    names = {blobs.put(body): body for body in map(rng.randbytes, SIZES)}
    assert {blobs.put(memoryview(body)) for body in names.values()} == set(names), "putting again gives the same names"
    assert {name: blobs.get(name) for name in names} == names, "what was put is got"
    assert {name: blobs.size(name) for name in names} == {name: len(body) for name, body in names.items()}, "sizes"
    assert set(blobs) == set(names), "listed are those"
    assert list(other) == [], "prefixes do not see each other"
    first, *others = names
    blobs.delete(first)
    blobs.delete(first)
    assert blobs.size(first) is None, "gone"
    assert set(blobs) == set(others), "and only it"
    assert not _is_there(blobs, first), "and is not got"


def _is_there(blobs: Blobs, name: str) -> bool:
    """Return whether a blob can be read, whole.

    Raises:
        ExperimentError: The blob is damaged, or the server does not answer.
    """
    try:
        blobs.get(name)
    except ExperimentError as error:
        if "is missing" in str(error):
            return False
        raise
    return True


@dataclass
class Puts:
    """What a few threads have put.

    Attributes:
        told: The names of blobs whose put was confirmed.
        failed: The bodies of puts that were not confirmed.
    """

    told: set[str] = field(default_factory=set)
    failed: list[bytes] = field(default_factory=list)


@contextlib.contextmanager
def putting(blobs: Blobs, seed: int, threads: int) -> Iterator[Puts]:
    """Let threads put one blob after the other, until the block ends."""
    puts, over = Puts(), threading.Event()

    def put(thread: int) -> None:
        rng = random.Random(f"{seed}/{thread}")
        while not over.is_set():
            body = rng.randbytes(rng.choice(SIZES[2:]) + rng.randrange(1000))
            try:
                puts.told.add(blobs.put(body))
            except ExperimentError:
                puts.failed.append(body)
                over.wait(0.2)

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(put, thread) for thread in range(threads)]
        try:
            yield puts
        finally:
            over.set()
        for each in running:
            each.result()


def kills(swift: Swift, count: int, seed: int) -> tuple[Puts, int, int]:
    """Kill servers during puts; return what was put, and how many confirmed blobs are lost and how many are damaged."""
    rng, blobs = random.Random(seed), open_blobs(f"s3://{BUCKET}/kills")
    with putting(blobs, seed, threads=3) as puts:
        for number in range(count):
            until = len(puts.told) + rng.randrange(1, 6)
            while len(puts.told) < until:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.2))
            swift.kill(("object", "proxy")[number % 2])
            swift.start()
    lost = damaged = 0
    for name in puts.told | {blobs.put(body) for body in puts.failed}:
        try:
            lost += not _is_there(blobs, name)
        except ExperimentError as error:
            if "is damaged" not in str(error):
                raise
            damaged += 1
    return puts, lost, damaged


def speed(rng: random.Random) -> tuple[float, float]:
    """Return megabytes a second for blobs of 4 MiB: put, and read."""
    blobs, bodies = open_blobs(f"s3://{BUCKET}/speed"), [rng.randbytes(4 * 2**20) for _ in range(10)]
    began = time.perf_counter()
    names = [blobs.put(body) for body in bodies]
    between = time.perf_counter()
    for name in names:
        blobs.get(name)
    size = sum(map(len, bodies)) / 1e6
    return size / (between - began), size / (time.perf_counter() - between)


def main() -> int:
    """Start the server, check it, kill it, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of server processes (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="when and what (default 0)")
    args = parser.parse_args()
    python = prepare(SWIFT, KEPT, lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory(prefix="sumus-s3-") as folder:
        swift = Swift(Path(folder), python.parent)
        os.environ |= {
            "AWS_ENDPOINT_URL": swift.url,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test:tester",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_ALLOW_HTTP": "true",
        }
        try:
            swift.start()
            make_bucket(swift)
            contract(random.Random(args.seed))
            put, got = speed(random.Random(args.seed))
            print(
                f"{' '.join(versions(SWIFT, python))}: blobs of 4 MiB, {put:.0f} MB/s put, {got:.0f} MB/s got",
                flush=True,
            )
            puts, lost, damaged = kills(swift, args.kills, args.seed)
        finally:
            swift.stop()
    print(
        f"{args.kills} kills: {len(puts.told)} blobs told to be there, {len(puts.failed)} puts that failed and were repeated, "
        f"{lost} lost, {damaged} damaged"
    )
    return 1 if lost or damaged else 0


if __name__ == "__main__":
    sys.exit(main())
