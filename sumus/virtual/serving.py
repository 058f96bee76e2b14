"""A worker that other machines can reach: its owner's tensors, under its owner's policy, over HTTP.

    sumus.virtual.serve({"inputs": inputs, "targets": targets}, Policy(fetch="parameters"), token=secret)     until Ctrl-C

There are three requests, each with the token: begin, ask and end. A program that sends "begin" becomes a caller, with tensors
and limits of its own. The token and the body's length are checked before the body is read.
"""

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from torch import Tensor

from sumus.errors import ParticipantError, UsageError
from sumus.http.answers import ExplainedEndpoint
from sumus.http.bodies import announced, whole
from sumus.http.certificates import Certificate
from sumus.http.guard import guard, shows
from sumus.http.listening import Planes, bound, expect_no_loop, told_to_stop, url_at
from sumus.terminal import echo
from sumus.transport.hosts import is_loopback
from sumus.virtual.messages import (
    OVERHEAD,
    STATUS,
    BeginAnswer,
    BeginRequest,
    Code,
    EmptyAnswer,
    RefusalAnswer,
    WorkerAnswer,
    read,
    write,
)
from sumus.virtual.policy import Policy
from sumus.virtual.refusal import RequestRefused
from sumus.virtual.workbench import LOG, Workbench
from sumus.virtual.worker import offered
from sumus.wire.messages import Refused as NotRead

LEAST_TOKEN = 16
"""The smallest number of characters of a token."""
BEGIN, ASK, END = "/v1/begin", "/v1/ask", "/v1/end"
CALLER = "sumus-caller"
"""The header with the secret that `begin` returned."""


def serve(
    tensors: Mapping[str, Tensor],
    policy: Policy | None = None,
    *,
    token: str,
    name: str = "worker",
    host: str = "127.0.0.1",
    port: int = 0,
    tls: tuple[str | Path, str | Path] | None = None,
    names: Sequence[str] = (),
    insecure: bool = False,
    ready: Callable[[str], None] = lambda url: echo(url),
) -> None:
    """Serve a worker until the process is asked to stop.

    Args:
        tensors: The tensors that are offered, by name.
        policy: The policy for callers; None for the default policy.
        token: The token that callers must send, with at least 16 characters. Do not pass it on a command line.
        name: The worker's name.
        host: The address to listen on. An address that other machines can reach requires `tls` or `insecure`.
        port: The port to listen on; 0 for any free port.
        tls: The files of the certificate chain and of its key, in PEM.
        names: Further host names that callers use for this machine.
        insecure: Whether other machines may reach the worker without TLS.
        ready: Function that is called with the URL as soon as the worker accepts requests.
    """
    app = worker_app(name, tensors, policy or Policy(), token, names=(host, *names))
    if not is_loopback(host) and tls is None and not insecure:
        raise UsageError(
            f"other machines can reach {host}, and without TLS they can read the traffic: give --tls CERT KEY; or --insecure, "
            "behind a proxy that encrypts"
        )
    certificate = None if tls is None else Certificate(Path(tls[0]), Path(tls[1]))
    with closing(bound(host, port, "--listen")) as listening:
        url = url_at(tls is not None, host, listening)
        expect_no_loop("a worker", "`sumus worker`")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_told(Planes([(listening, app, certificate)]), app.state.callers, lambda: ready(url)))


async def _until_told(planes: Planes, callers: "Callers", ready: Callable[[], None]) -> None:
    over = asyncio.Event()
    with told_to_stop(asyncio.get_running_loop(), over.set):
        async with planes:
            sweeping = asyncio.create_task(_sweep(callers))
            ready()
            await over.wait()
            sweeping.cancel()


async def _sweep(callers: "Callers") -> None:
    while True:
        await asyncio.sleep(callers.policy.idle_s / 4)
        callers.sweep()


# ── callers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Caller:
    bench: Workbench
    last: float


class Callers:
    """The admitted callers, by the hash of their secret.

    Args:
        tensors: The tensors that are offered, by name.
        policy: The policy for callers.
        clock: Returns the time in seconds, which never goes back.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], policy: Policy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy
        self._tensors, self._clock = offered(tensors, policy.public), clock
        self._callers: dict[str, _Caller] = {}
        self._lock = threading.Lock()

    def begin(self) -> str:
        """Admit a new caller, and return its secret. Raise RequestRefused (`busy`) if there are too many callers."""
        self.sweep()
        secret = secrets.token_urlsafe(32)
        with self._lock:
            if len(self._callers) >= self.policy.callers:
                raise RequestRefused(
                    "busy",
                    f"this worker has {self.policy.callers} callers, the maximum: close one, or try later",
                )
            self._callers[_hash(secret)] = _Caller(Workbench(self._tensors, self.policy), self._clock())
        return secret

    def bench(self, secret: str) -> Workbench:
        """Return a caller's workbench. Raise RequestRefused (`unknown_caller`) for an unknown secret."""
        self.sweep()
        with self._lock:
            caller = self._callers.get(_hash(secret))
            if caller is None:
                raise RequestRefused(
                    "unknown_caller",
                    f"the worker does not know this caller, or forgot it after {self.policy.idle_s:g} s without a request; "
                    "connect again, and send the tensors again",
                )
            caller.last = self._clock()
            return caller.bench

    def end(self, secret: str) -> None:
        """Forget a caller, with its tensors."""
        with self._lock:
            self._callers.pop(_hash(secret), None)

    def sweep(self) -> None:
        """Forget the callers that have sent no request for too long."""
        before = self._clock() - self.policy.idle_s
        with self._lock:
            for at in [at for at, caller in self._callers.items() if caller.last < before]:
                del self._callers[at]

    def __len__(self) -> int:
        return len(self._callers)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def worker_app(
    name: str,
    tensors: Mapping[str, Tensor],
    policy: Policy,
    token: str,
    clock: Callable[[], float] = time.monotonic,
    names: Sequence[str] = (),
) -> Starlette:
    """Make a worker as an ASGI application. Its `state.callers` holds the admitted callers.

    Args:
        name: The worker's name.
        tensors: The tensors that are offered, by name.
        policy: The policy for callers.
        token: The token that callers must send.
        clock: Returns the time in seconds, which never goes back.
        names: The host names that callers use for it.
    """
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"a token must have at least {LEAST_TOKEN} ASCII characters, without blanks: make another one")
    callers = Callers(tensors, policy, clock)
    plane = _Plane(name, tuple(tensors), callers, token)
    routes = [
        Route(path, _answering(answer), methods=["POST"])
        for path, answer in {BEGIN: plane.begin, ASK: plane.ask, END: plane.end}.items()
    ]

    async def not_there(request: Request, error: Exception) -> Response:
        return _refusal(
            RequestRefused("not_found", "there is no such path: this is a sumus worker, for sumus.virtual.connect(url)")
        )

    app = Starlette(
        routes=routes,
        exception_handlers={404: not_there, 405: not_there},
        middleware=[guard(names, _turned_away, "--host-name")],
    )
    app.router.redirect_slashes = False
    app.state.callers = callers
    return app


class _Plane:
    """Responds to the three kinds of requests."""

    def __init__(self, name: str, names: tuple[str, ...], callers: Callers, token: str) -> None:
        self._name, self._names, self._callers = name, names, callers
        self._token = token.encode()
        most = 2 * callers.policy.callers  # a caller sends one request at a time, and may repeat it meanwhile
        self._room = most
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="benches")

    async def begin(self, request: Request) -> bytes:
        """Admit a new caller."""
        read(BeginRequest, await self._body(request, 2**10))
        return write(WorkerAnswer(BeginAnswer(self._callers.begin(), self._name, self._names)))

    async def ask(self, request: Request) -> bytes:
        """Respond to a caller's request."""
        self._authorize(request)
        bench = self._callers.bench(request.headers.get(CALLER, ""))
        body = await self._body(request, self._callers.policy.largest + OVERHEAD)
        return await asyncio.get_running_loop().run_in_executor(self._pool, bench.answer, body)

    async def end(self, request: Request) -> bytes:
        """Forget a caller at the caller's request."""
        await self._body(request, 2**10)
        self._callers.end(request.headers.get(CALLER, ""))
        return write(WorkerAnswer(EmptyAnswer()))

    def _authorize(self, request: Request) -> None:
        if not shows(request, self._token):
            raise RequestRefused("bad_token", "this is not the worker's token: ask the worker's owner for the token")

    async def _body(self, request: Request, most: int) -> bytes:
        self._authorize(request)
        length = announced(request, most)
        if not self._room:
            raise RequestRefused("busy", "the worker is receiving the maximum number of requests: try again")
        self._room -= 1
        try:
            return await whole(request, length)
        finally:
            self._room += 1


def _answering(answer: Callable[[Request], Awaitable[bytes]]) -> ExplainedEndpoint:
    """Return an endpoint for a function that returns the bytes of a response.

    If a request fails, the response is a refusal with a code of `STATUS`.
    """

    async def respond(request: Request) -> Response:
        return Response(await answer(request), media_type="application/octet-stream")

    return ExplainedEndpoint(respond, lambda request, error: _refusal(_of(error)))


def _turned_away(status: int, code: str, detail: str) -> Response:
    """Return a response for browsers. Callers of a worker never receive it."""
    return PlainTextResponse(detail, status)


def _of(error: Exception) -> RequestRefused:
    match error:
        case RequestRefused():
            return error
        case NotRead():
            code = error.problem.code if error.problem.code in STATUS else "malformed"
            return RequestRefused(cast(Code, code), error.problem.detail)
        case ParticipantError():
            return RequestRefused("malformed", str(error))
        case _:
            LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
            return RequestRefused("failed", "the worker has a defect: ask its owner for the traceback in its log")


def _refusal(no: RequestRefused) -> Response:
    return Response(
        write(WorkerAnswer(RefusalAnswer(no.code, no.detail))), STATUS[no.code], media_type="application/octet-stream"
    )
