"""An ASGI application that returns what it was asked, and misbehaves on request; and a real server for it on loopback."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


class Echo:
    """An application that echoes.

    Attributes:
        began: How often its lifespan has begun.
        ended: How often its lifespan has ended.
        hung: Set while a client waits at /never.
        left: Set once that client has gone.
    """

    def __init__(self) -> None:
        self.began, self.ended = 0, 0
        self.bodies: list[bytes] = []
        self.hung, self.left = threading.Event(), threading.Event()
        self.meeting = threading.Barrier(4)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        match scope["path"]:
            case "/never":
                self.hung.set()
                await receive()
                self.left.set()
            case "/cut":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
                await send({"type": "http.response.body", "body": b"0123456789", "more_body": True})
                raise RuntimeError("cut off")
            case "/fails":
                raise RuntimeError("a defect")
            case "/moved":
                await answer(send, 302, b"elsewhere", [(b"location", b"/echo")])
            case "/meet":
                await asyncio.to_thread(self.meeting.wait, 20)
                await answer(send, 200, b"met")
            case "/long":
                count = int(scope["query_string"])
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for start in range(0, count, 1000):
                    block = b"x" * min(1000, count - start)
                    await send({"type": "http.response.body", "body": block, "more_body": start + 1000 < count})
            case _:
                said = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
                said |= {"mine": headers.get("x-mine"), "length": headers.get("content-length"), "bytes": len(body)}
                await answer(send, 207, json.dumps(said).encode(), [(b"X-Yours", b"yes")])

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        self.began += 1
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.ended += 1
        await send({"type": "lifespan.shutdown.complete"})


async def answer(send: Any, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), length]})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        await super().startup(*args, **kwargs)
        self.ready.set()


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    """Serve an application on a real port of this machine, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1, **options)
    server = _Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert server.ready.wait(20)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
