"""A server over HTTP in a thread of the test, on loopback and any port."""

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from sumus.operations.service import Service


@contextmanager
def over_http(service: Service) -> Generator[str, None, None]:
    """Serve the device plane; yield its URL."""
    config = uvicorn.Config(service.device_app, "127.0.0.1", 0, log_level="error", access_log=False, lifespan="off")
    answering = threading.Event()

    class Told(uvicorn.Server):
        async def startup(self, sockets: list[object] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            await super().startup(sockets)  # pyright: ignore[reportArgumentType]
            answering.set()

    server = Told(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert answering.wait(30.0)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
