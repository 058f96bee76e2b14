"""Requests within a process: an ASGI application runs as on a server, but without sockets.

    with InProcess(app) as transport:
        transport.request("GET", "/healthz")

The application runs on an event loop in its own thread. It gets the same bytes as over HTTP, piece by piece. Several threads
may send requests at the same time.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import CancelledError
from typing import Any, TypeAlias

from sumus.errors import ExperimentError
from sumus.text import amount
from sumus.transport.transport import MOST, PATIENCE, Answer, Unreachable

Message: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[
    [Any, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

GRACE = 1.0
"""The number of seconds for which running requests may continue after `close`."""
_BLOCK = 2**16


class InProcess:
    """A `Transport` to an application. The constructor starts the application's lifespan, and `close` ends it.

    Attributes:
        failures: The exceptions that the application raised while it handled requests. As over HTTP, the caller of such a
            request gets status 500.
    """

    def __init__(self, app: App) -> None:
        self.failures: list[Exception] = []
        self._app = app
        self._running: set[asyncio.Future[None]] = set()
        self._asking: set[asyncio.Task[Any] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="sumus-in-process", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._lifespan = asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Send a request once, and keep at most `most` bytes of the response's body."""
        if self._closed:
            raise Unreachable("the application is closed")
        asked = asyncio.run_coroutine_threadsafe(self._ask(method, path, body, headers, patience, most), self._loop)
        try:
            return asked.result()
        except CancelledError as error:
            raise Unreachable("the application was closed before it answered") from error
        except BaseException:
            asked.cancel()  # also after an interrupt (Ctrl-C) of the calling thread
            raise

    async def _ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], patience: float, most: int
    ) -> Answer:
        call, asking = _Call(body, most), asyncio.current_task()
        self._asking.add(asking)
        running = asyncio.ensure_future(self._app(_scope(method, path, body, headers), call.receive, call.send))
        self._running.add(running)
        running.add_done_callback(self._ended)
        running.add_done_callback(call.ended)
        try:
            await asyncio.wait_for(call.whole.wait(), patience)
        except TimeoutError as error:
            raise Unreachable("the application did not answer in time") from error
        finally:
            self._asking.discard(asking)
            call.gone.set()  # tell the application that the client has disconnected, as a server does
        if call.answered:  # the application may still run, but the caller does not wait for it
            return Answer(call.status, call.headers, bytes(call.body))
        if len(call.body) > most:
            raise Unreachable(f"the application answers with more than {amount(most)}, which is not accepted here")
        if call.status:
            raise Unreachable("the answer of the application was cut off")
        return Answer(500, {}, b"Internal Server Error")

    def _ended(self, running: asyncio.Future[None]) -> None:
        """Note that a call of the application has ended."""
        self._running.discard(running)
        if not running.cancelled() and isinstance(error := running.exception(), Exception):
            self.failures.append(error)

    async def _begin(self) -> "_Lifespan":
        lifespan = _Lifespan(self._app)
        await lifespan.begin()
        return lifespan

    def close(self) -> None:
        """End the application's lifespan, then the event loop and its thread."""
        if self._closed:
            return
        self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        finally:
            self._stop()

    async def _end(self) -> None:
        for asking in self._asking:  # the application's own tasks are not cancelled: they may be closing a file
            if asking is not None:
                asking.cancel()
        if self._running:
            _, late = await asyncio.wait(set(self._running), timeout=GRACE)
            for running in late:
                running.cancel()
            if late:
                await asyncio.wait(late)
        await self._lifespan.end()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        """Run the event loop until it is stopped, and then close it in the same thread. The caller's thread cannot do this,
        since it may run a loop of its own (a notebook).
        """
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def _scope(method: str, path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    plain, _, query = path.partition("?")
    sent = {"host": "in-process", **({"content-length": str(len(body))} if body or method in ("PUT", "POST") else {})}
    sent |= {name.lower(): value for name, value in headers.items()}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": plain,
        "raw_path": plain.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("in-process", 80),
        "state": {},
    }


class _Call:
    """One request to the application, and its response.

    Attributes:
        status: The status of the response; 0 before the response begins.
        headers: The headers of the response, by name in lower case.
        body: The body of the response so far.
        answered: Whether the response is complete.
        whole: An event that is set when no more of the response will come.
        gone: An event that is set when the client no longer waits.
    """

    def __init__(self, body: bytes, most: int) -> None:
        self.status, self.answered = 0, False
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.gone, self.whole = asyncio.Event(), asyncio.Event()
        self._blocks = [body[start : start + _BLOCK] for start in range(0, len(body), _BLOCK)] or [b""]
        self._most = most

    async def receive(self) -> Message:
        if self._blocks:
            block = self._blocks.pop(0)
            return {"type": "http.request", "body": block, "more_body": bool(self._blocks)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]
            }
        elif message["type"] == "http.response.body" and not self.whole.is_set():
            self.body += message.get("body", b"")
            if len(self.body) > self._most:
                self.whole.set()
            elif not message.get("more_body", False):
                self.answered = True
                self.whole.set()

    def ended(self, task: asyncio.Future[None]) -> None:
        """Note that the application has returned or raised an exception."""
        self.whole.set()


class _Lifespan:
    """The start and the end of the application (ASGI lifespan). If the application does not support this, it is called without
    them.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._heard: asyncio.Queue[Message] = asyncio.Queue()
        self.task: asyncio.Future[None] | None = None

    async def begin(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
        self.task = asyncio.ensure_future(self._app(scope, self._said.get, self._heard.put))
        if (message := await self._phase("startup")) is not None and message["type"] == "lifespan.startup.failed":
            raise ExperimentError(f"the application did not start: {message.get('message', '')}")

    async def end(self) -> None:
        if self.task is not None and not self.task.done():
            await self._phase("shutdown")
            await asyncio.wait([self.task])

    async def _phase(self, name: str) -> Message | None:
        """Send a lifespan event, and return the application's answer; None if the application ends without an answer."""
        assert self.task is not None
        await self._said.put({"type": f"lifespan.{name}"})
        answer = asyncio.ensure_future(self._heard.get())
        await asyncio.wait([answer, self.task], return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        answer.cancel()
        self.task.exception()  # reading the exception stops asyncio from logging it: the application has no lifespan support
        return None
