"""A node's HTTP plane on its local network: it accepts readings, and returns predictions.

    app = plane_app(intake, predict, status, token, names=names)          an ASGI application

    POST /v1/readings     {"inputs": [1, 2], "target": 0}, a list of these, or safetensors with one row for each reading
    POST /v1/labels       {"key": "kitchen/17", "target": 1}, or a list of these
    POST /predict         readings, without targets
    GET  /status, /metrics, /healthz, /readyz

Readings are on the disk when their request is answered. The host name and the origin (http/guard.py), the token, the rate and
the length are checked before a body is read. A body may be sent in chunks, and may be compressed by gzip. Bodies count against
a limit of memory until their request is answered. If no memory is free for a body, it waits up to `ROOM_S` before it is read.
Requests for status and readiness never wait.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sumus.errors import DataError, ExperimentError, TaskError
from sumus.http.answers import ExplainedEndpoint
from sumus.http.bodies import SOON, announced, source, up_to, whole
from sumus.http.guard import guard, media_type, shows
from sumus.http.limits import Buckets, Rate, neighbourhood
from sumus.http.room import Shares, near
from sumus.http.snapshot import Snapshot
from sumus.logs import logger
from sumus.node.batch import MOST_TEXT, Raw
from sumus.node.formats import read_json, read_safetensors
from sumus.node.intake import BadAnswer, Intake, IntakeResult
from sumus.node.metrics import CONTENT_TYPE, exposition
from sumus.node.packed import unpacked_gzip
from sumus.node.reading import BadReading
from sumus.node.readings import LONGEST_KEY
from sumus.wire.messages import Refused

LOG = logger("sumus.node")
MOST_TENSORS = 32 * 2**20
"""The maximum number of bytes of a safetensors body; for JSON the limit is `MOST_TEXT`."""
ROOM = 256 * 2**20
"""The maximum number of bytes of memory for bodies. A body holds its memory from before it is read until its request is
answered."""
ROOM_S = 10.0
"""The longest time, in seconds, that a body waits for memory."""
JSON_COSTS = 16
"""The approximate bytes of memory for one byte of JSON. Lists and objects take more; their number is bounded
(`MOST_CONTAINERS`), and each thread reads one body at a time."""
REQUESTS = Rate(200.0, 1000)
"""The maximum rate of requests from each address."""
GUESSES = Rate(1 / 10, 10)
"""The maximum rate of wrong tokens from each network, which is a range of addresses."""
MOST_LABELS = 1000
"""The maximum number of labels in one body: each is written to the disk separately."""
WAITING = 16
"""The maximum number of predictions that may wait for their turn."""
JSON, TENSORS = "application/json", "application/octet-stream"


class Predicted(Protocol):
    """A prediction: outputs, one row for each example; the task and version of the model; and the results of the `answer`
    function of the node's file, if it has one."""

    @property
    def outputs(self) -> Any: ...
    @property
    def task(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def answers(self) -> tuple[Any, ...]: ...


class ErrorAnswer(Exception):
    """An answer that reports an error.

    Args:
        status: The HTTP status.
        code: The error code, a word for programs.
        detail: The reason, a sentence for a person.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


def plane_app(
    intake: Intake,
    predict: Callable[[list[Raw | BadReading]], Predicted],
    status: Callable[[], Mapping[str, Any]],
    token: str | None,
    clock: Callable[[], float] = time.monotonic,
    names: Sequence[str] = (),
) -> Starlette:
    """Make the node's application.

    Args:
        intake: Accepts readings.
        predict: Predicts. It raises BadReading, DataError or TaskError for an invalid input, ExperimentError if no model exists.
        status: Returns the node's status, as values that JSON can hold.
        token: The token that every request must carry, except /healthz and /readyz; None accepts every request.
        clock: Returns seconds that never go backwards.
        names: Additional host names of the node, from its owner.
    """
    plane = _Plane(intake, predict, status, token, clock)
    routes = [
        Route(path, ExplainedEndpoint(answer, _answer_to), methods=[method])
        for method, path, answer in (
            ("POST", "/v1/readings", plane.readings),
            ("POST", "/v1/labels", plane.labels),
            ("POST", "/predict", plane.predict),
            ("GET", "/status", plane.status),
            ("GET", "/metrics", plane.metrics),
            ("GET", "/healthz", plane.healthz),
            ("GET", "/readyz", plane.readyz),
        )
    ]

    async def not_there(request: Request, error: Exception) -> Response:
        return _refusal(
            ErrorAnswer(404, "not_found", "this sumus node has no such path, or the path does not accept this method")
        )

    app = Starlette(
        routes=routes,
        exception_handlers={404: not_there, 405: not_there},
        middleware=[guard(names, _turned_away, "--tls-name")],
    )
    app.router.redirect_slashes = False
    return app


class _Plane:
    """The handlers of requests."""

    def __init__(
        self,
        intake: Intake,
        predict: Callable[[list[Raw | BadReading]], Predicted],
        status: Callable[[], Mapping[str, Any]],
        token: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._intake, self._predict, self._status, self._clock = intake, predict, status, clock
        self._token = None if token is None else token.encode()
        self._requests, self._guesses = Buckets(REQUESTS, most=10_000), Buckets(GUESSES, most=10_000)
        self._ready = Snapshot(self._is_ready, clock=clock)
        self._room, self._waiting = Shares(ROOM), 0
        self._keeping = ThreadPoolExecutor(2, thread_name_prefix="readings")
        self._predicting = ThreadPoolExecutor(1, thread_name_prefix="predictions")
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._freed = asyncio.Event()

    async def readings(self, request: Request) -> Response:
        """Accept readings."""
        self._admit(request)
        key = request.headers.get("idempotency-key")
        if key is not None and not (key.isprintable() and 0 < len(key) <= LONGEST_KEY - 10):
            raise ErrorAnswer(
                400, "malformed", f"Idempotency-Key must have 1 to {LONGEST_KEY - 10} printable characters"
            )
        async with self._body(request, (JSON, TENSORS)) as (body, kind):
            taken = await self._in(self._keeping, lambda: self._intake.take(_read(body, kind), key))
        return _answer(_said(taken), 422 if taken.refused else 200)

    async def labels(self, request: Request) -> Response:
        """Accept labels for readings that arrived without one."""
        self._admit(request)

        def label(body: bytes) -> tuple[int, dict[int, str]]:
            refused, given = dict[int, str](), 0
            found = read_json(body)
            if len(found) > MOST_LABELS:
                raise BadReading(
                    f"there are {len(found)} labels, but one request may have at most {MOST_LABELS}: send fewer at once"
                )
            for number, each in enumerate(found):
                try:
                    self._intake.label(each)
                    given += 1
                except BadReading as bad:
                    refused[number] = str(bad)
            return given, refused

        async with self._body(request, (JSON,)) as (body, _):
            given, refused = await self._in(self._keeping, lambda: label(body))
        return _answer({"labelled": given, "refused": _listed(refused)}, 422 if refused else 200)

    async def predict(self, request: Request) -> Response:
        """Predict with the newest model."""
        self._admit(request)
        if self._waiting >= WAITING:
            raise ErrorAnswer(503, "busy", "too many predictions are waiting: try again later")
        self._waiting += 1
        try:
            async with self._body(request, (JSON, TENSORS)) as (body, kind):
                found = await self._in(self._predicting, lambda: self._predict(_read(body, kind)))
        except ExperimentError as error:
            raise ErrorAnswer(503, "no_model", str(error)) from error
        finally:
            self._waiting -= 1
        said = {"task": found.task, "version": found.version, "outputs": found.outputs.tolist()}
        return _answer(said | ({"answers": found.answers} if found.answers else {}))

    async def status(self, request: Request) -> Response:
        """Return the node's status."""
        self._admit(request)
        return _answer(await self._in(self._looking, self._status))

    async def metrics(self, request: Request) -> Response:
        """Return the node's status in Prometheus's format."""
        self._admit(request)
        return Response(exposition(await self._in(self._looking, self._status)), media_type=CONTENT_TYPE)

    async def healthz(self, request: Request) -> Response:
        """Report that the node answers."""
        return _answer({"ok": True})

    async def readyz(self, request: Request) -> Response:
        """Report whether the node has a model."""
        ready = await self._ready.look()
        return _answer({"ready": ready, **({} if ready else {"why": "there is no model yet"})}, 200 if ready else 503)

    async def _is_ready(self) -> bool:
        return bool((await self._in(self._looking, self._status))["models"])

    # ── checks before a request is processed ─────────────────────────────────────────────────────────────────────────

    def _admit(self, request: Request) -> None:
        """Refuse a request that is not allowed. Requests with wrong tokens never delay those with the correct one."""
        address, now = (request.client.host if request.client else ""), self._clock()
        if self._token is not None and not shows(request, self._token):
            if self._guesses.take(neighbourhood(address), now) is not None:
                raise ErrorAnswer(
                    429, "rate", "too many requests with a wrong token from this network: send this node's token"
                )
            raise ErrorAnswer(401, "bad_token", "send this node's token: Authorization: Bearer TOKEN")
        if self._requests.take(address, now) is not None:
            raise ErrorAnswer(429, "rate", "too many requests from this address: send many readings in one request")

    @asynccontextmanager
    async def _body(self, request: Request, kinds: tuple[str, ...]) -> AsyncGenerator[tuple[bytes, str], None]:
        """Read a body and its media type, and count the body against the memory limit while the `with` block runs.

        Since a request must declare its media type, a web page in a browser cannot send a request without a preflight request.
        """
        kind = media_type(request)
        if kind not in kinds:
            raise ErrorAnswer(415, "encoding", f"send Content-Type: {' or '.join(kinds)}")
        packed = request.headers.get("content-encoding", "identity").strip().lower()
        if packed not in ("identity", "gzip"):
            raise ErrorAnswer(
                415, "encoding", "this Content-Encoding is not accepted: send the body uncompressed or gzip"
            )
        most, who = (MOST_TEXT if kind == JSON else MOST_TENSORS), near(source(request))
        each = JSON_COSTS if kind == JSON else 4
        taken = 0

        def take(more: int) -> None:
            nonlocal taken
            if not self._room.take(who, more):
                raise ErrorAnswer(
                    503, "busy", f"no memory is free for the body now: try again in {SOON[0]:g} to {SOON[1]:g} s"
                )
            taken += more

        try:
            if _chunked(request):
                body = await up_to(request, most, lambda size: take(size * each))
            else:
                length = announced(request, most, packed="gzip")
                await self._wait_for_room(who, length * each)
                take(length * each)
                body = await whole(request, length)
            if packed == "gzip":
                take(most)
                body = await self._in(self._keeping, lambda body=body: unpacked_gzip(body, most))
                take(len(body) * each)
            yield body, kind
        finally:
            self._room.give(who, taken)
            self._freed.set()

    async def _wait_for_room(self, who: str, cost: int) -> None:
        try:
            async with asyncio.timeout(ROOM_S):
                while not self._room.may(who, cost):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            pass  # the caller then refuses the body

    async def _in(self, pool: ThreadPoolExecutor, what: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, what)


def _chunked(request: Request) -> bool:
    return "content-length" not in request.headers and "chunked" in request.headers.get("transfer-encoding", "").lower()


def _read(body: bytes, kind: str) -> list[Raw | BadReading]:
    return read_json(body) if kind == JSON else read_safetensors(body)


def _said(taken: IntakeResult) -> dict[str, Any]:
    return {
        "kept": taken.kept,
        "labelled": taken.labelled,
        "again": taken.again,
        "refused": _listed(taken.refused),
    }


def _listed(refused: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"reading": number, "why": why} for number, why in refused.items()]


def _answer_to(request: Request, error: Exception) -> Response:
    """Answer a failed request, with a reason."""
    return _refusal(_of(error))


def _turned_away(status: int, code: str, detail: str) -> Response:
    return _refusal(ErrorAnswer(status, code, detail))


def _of(error: Exception) -> ErrorAnswer:
    match error:
        case ErrorAnswer():
            return error
        case Refused():
            return ErrorAnswer(error.status, error.problem.code, error.problem.detail)
        case BadReading() | DataError() | TaskError():
            return ErrorAnswer(422, "bad_reading", str(error))
        case BadAnswer():
            LOG.error("%s", error)
            return ErrorAnswer(500, "answer", str(error))
        case ExperimentError():
            return ErrorAnswer(503, "not_kept", str(error))
        case _:
            LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
            return ErrorAnswer(
                500, "failed", "the request failed because of a defect in the node; its log has the details"
            )


def _refusal(no: ErrorAnswer) -> Response:
    return _answer({"error": no.code, "detail": no.detail}, no.status)


def _answer(said: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(said), status, media_type=JSON)
