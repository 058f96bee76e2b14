"""A server as a process of its own, one of several: `python -m tests.server.one_replica JOB`, until its standard input
ends.

    with replica(name="tiny", bundle=path, …) as said: said["url"]

It prints its URL once it is ready. JOB is JSON with `name` and `bundle` of the task, `data`, `database`, `shares`, and
`seed` of the public seeds, which are drawn as in the simulator; and `enrols`, to print a token for this number of
devices too.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.operations.stores import Storage
from sumus.rng import key
from sumus.transport.http import HttpTransport
from sumus.transport.transport import MOST, PATIENCE, Answer
from sumus.wire.bundle import Bundle
from tests.server.over_http import over_http

ROOT = Path(__file__).parents[2]


@contextmanager
def replica(before: Sequence[str] = (), **job: Any) -> Iterator[dict[str, Any]]:
    """Start a replica; yield what it printed when it was ready. before: words before its command."""
    command = [*before, sys.executable, "-m", "tests.server.one_replica", json.dumps(job, default=str)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "it did not start, and has said why"
        yield json.loads(line)
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Rotating:
    """A `Transport` whose requests go to several servers in turn.

    Attributes:
        met: The number of requests that each has answered.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._ways = [HttpTransport(url, connections=1) for url in urls]
        self.met = [0] * len(urls)
        self._next = 0

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Send a request once."""
        which = self._next % len(self._ways)
        self._next += 1
        answer = self._ways[which].request(method, path, body, headers, patience, most)
        self.met[which] += 1
        return answer

    def close(self) -> None:
        """Close the connections."""
        for way in self._ways:
            way.close()


def main(job: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    bundle, shares = Bundle.from_bytes(Path(job["bundle"]).read_bytes()), Path(job["shares"])
    where = Storage(Path(job["data"]), job["database"], shares / "keys", str(shares / "blobs"))
    service = open_service(
        {job["name"]: bundle},
        where,
        ServerPolicy("people", group=0.0),
        seeds=lambda task: lambda number: key(job["seed"], "round", number, "public"),
    )
    server = service.server
    try:
        server.start()
        token = server.roll.new_token("people", server.clock(), uses=job["enrols"]) if job["enrols"] else ""
        with over_http(service) as url:
            print(json.dumps({"url": url, "token": token}), flush=True)
            sys.stdin.read()
    finally:
        service.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
