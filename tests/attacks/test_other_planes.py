"""Cut, stopped and lying bodies on the planes besides the devices': a node's, a worker's and the admin's. They have one reader of
bodies, so what holds of one holds of all; nothing of such a body stays, counted by references alone."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sumus.node.intake import Intake
from sumus.node.plane import TENSORS, plane_app
from sumus.node.readings import Readings
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import open_service
from sumus.server.access import Access
from sumus.server.admin_plane import admin_app
from sumus.virtual.messages import BeginAnswer, BeginRequest, WorkerAnswer, read, write
from sumus.virtual.policy import Policy
from sumus.virtual.serving import ASK, BEGIN, worker_app
from tests.server.devices import tiny

MIB = 2**20
TOKEN = "a-token-that-nobody-guesses"
Cut = Callable[[list[bytes], int | None], bytes]


def ask(app: Any, path: str, headers: dict[str, str], pieces: list[bytes], length: int | None = None) -> bytes:
    """What an application says to a body that comes in pieces, and then ends: cut, if there is a length that is longer."""
    said = bytearray()
    come = list(pieces)
    given = {"content-length": str(sum(map(len, pieces)) if length is None else length), "host": "127.0.0.1", **headers}

    async def receive() -> dict[str, Any]:
        if come:
            piece = come.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(come) or length is not None}
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        said.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))
    return bytes(said)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Any, str, dict[str, str]]]:
    readings = Readings(tmp_path)
    app = plane_app(Intake(readings), lambda raws: None, lambda: {"models": {}}, TOKEN)  # pyright: ignore
    yield app, "/v1/readings", {"authorization": f"Bearer {TOKEN}", "content-type": TENSORS}
    readings.close()


@pytest.fixture
def worker() -> tuple[Any, str, dict[str, str]]:
    app = worker_app("dora", {"x": torch.ones(2)}, Policy(), TOKEN)
    headers = {"authorization": f"Bearer {TOKEN}"}
    begun = read(WorkerAnswer, ask(app, BEGIN, headers, [write(BeginRequest())]))[0].answer
    assert isinstance(begun, BeginAnswer)
    return app, ASK, {**headers, "sumus-caller": begun.caller}


@pytest.mark.parametrize("plane", ["node", "worker"])
@pytest.mark.parametrize("lie", [1, -1, 3 * MIB])
def test_bodies_that_are_not_as_long_as_they_said_leave_nothing(
    request: pytest.FixtureRequest, plane: str, lie: int
) -> None:
    app, path, headers = request.getfixturevalue(plane)
    ask(app, path, headers, [b"x" * MIB, b"x" * MIB], 2 * MIB + 1)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(8):
            assert b"malformed" in ask(app, path, headers, [b"x" * MIB, b"x" * MIB], 2 * MIB + lie)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert after - before < MIB


@pytest.mark.parametrize("plane", ["node", "worker"])
def test_bodies_that_stop_are_slow(request: pytest.FixtureRequest, plane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sumus.http.bodies.WINDOW_S", 0.05)
    app, path, headers = request.getfixturevalue(plane)

    async def stopping(scope: Any, receive: Any, send: Any) -> None:
        async def stops() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                await asyncio.Event().wait()
            return message

        await app(scope, stops, send)

    assert b"slow" in ask(stopping, path, headers, [b"x" * MIB], 2 * MIB)


def test_logins_that_are_cut_are_refused_and_the_next_one_is_heard(tmp_path: Path) -> None:
    service = open_service({"tiny": tiny(2)}, policy=ServerPolicy(group=0.0))
    app = admin_app(service, Access(tmp_path), str)
    for _ in range(100):
        assert b"malformed" in ask(app, "/v1/admin/login", {"content-type": "application/json"}, [b"x" * 60_000], 2**16)
    assert b"malformed" not in ask(app, "/v1/admin/login", {"content-type": "application/json"}, [b'{"code":"a"}'])
    service.close()


def test_a_body_in_chunks_is_read_up_to_the_most_that_is_read(node: tuple[Any, str, dict[str, str]]) -> None:
    app, path, headers = node
    chunked = {**headers, "content-type": "application/json", "transfer-encoding": "chunked"}
    reading = [b'{"inputs": ', b"[1, 2]}"]
    assert b'"kept":1' in ask_in_chunks(app, path, chunked, reading)
    assert b"too_large" in ask_in_chunks(app, path, chunked, [b" " * MIB] * 9)


def ask_in_chunks(app: Any, path: str, headers: dict[str, str], pieces: list[bytes]) -> bytes:
    """What an application says to a body whose length nobody said."""

    async def without_length(scope: Any, receive: Any, send: Any) -> None:
        named = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        await app({**scope, "headers": named}, receive, send)

    return ask(without_length, path, headers, pieces)
