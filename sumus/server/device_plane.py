"""The device plane over HTTP: `wire.messages.ENDPOINTS`, each read, checked and handed to the server.

    app = device_app(server, blobs, room)         an ASGI application

Nothing is believed before it is checked: the length and the signature before a long body is read, its digest before it is
decoded, the form before it is counted. Every answer that is an error has a code of the closed list.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from sumus.aggregate import Aggregate
from sumus.errors import ParticipantError
from sumus.evaluation import check_measured, check_sum_measured
from sumus.http.answers import ExplainedEndpoint, PiecewiseResponse
from sumus.http.bodies import STRANGERS, Strangers, Uploads, announced, source
from sumus.http.limits import Limits
from sumus.http.room import Room, near
from sumus.rounds.run import Run
from sumus.server.doubt import Doubt
from sumus.server.identity import signed_by_device
from sumus.server.objects import HeldObject, ObjectReader
from sumus.server.openapi import document
from sumus.server.problems import problem, refusal_of
from sumus.server.server import AGAIN, Server
from sumus.storage.blobs import Blobs
from sumus.text import whole_number
from sumus.wire.messages import (
    ENDPOINTS,
    MAX_CONTROL,
    MAX_UNDIGESTED,
    PROTOCOL,
    Abort,
    CheckInAnswer,
    CheckInRequest,
    EnrolmentRequest,
    Nothing,
    Refused,
    RelayAnswer,
    Relayed,
    RelayedAnswer,
    RelayRequest,
    Tasks,
    digest_of,
    read,
    text_over,
    write,
)
from sumus.wire.reports import decode_report, decode_sum, most_bytes, most_sum_bytes
from sumus.wire.signing import to_base64url

SMALL = 64 * 2**10
"""Bodies up to so many bytes are checked where they are read, without a thread."""
MOST_LOOKUPS = 1000
"""Devices that are looked up at a time, at most."""
_DIGEST = re.compile("[0-9a-f]{64}")
MOST = {endpoint.name: endpoint.most for endpoint in ENDPOINTS}
IMMUTABLE = "public, max-age=31536000, immutable"


class DevicePlane:
    """The endpoints. blobs: where plans and models lie.  room: memory for bodies.  limits: requests a second.
    authority: the certificate that devices pin, PEM, if the server made its own."""

    def __init__(
        self, server: Server, blobs: Blobs, room: Room, limits: Limits, authority: bytes | None = None
    ) -> None:
        self._server, self._limits = server, limits
        self._authority = authority
        self._strangers, self._uploads, self._doubt = Strangers(STRANGERS), Uploads(room), Doubt()
        self._objects = ObjectReader(blobs, room.bytes, self._in_thread)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="bodies")
        self._finding, self._lookups = ThreadPoolExecutor(1, thread_name_prefix="devices"), 0

    # ── enrolment ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def challenge(self, request: Request) -> Any:
        """A nonce to sign."""
        await self._message(request, Nothing)
        return self._server.roll.challenge(self._server.clock())

    async def enrol(self, request: Request) -> Any:
        """A device makes itself known."""
        self._limits.enrolment(source(request), time.monotonic())
        asked = await self._message(request, EnrolmentRequest)
        enrolment, new = await self._in_thread(self._server.roll.enrol, asked, self._server.clock())
        self._server.counts.events["enrolments", "new" if new else "again"] += 1
        self._server.people_changed = True
        return enrolment

    async def withdraw(self, request: Request) -> Any:
        """A device takes its consent back."""
        device, body = await self._signed(request)
        self._limits.request(device, time.monotonic())
        read(Nothing, body)
        link = await self._in_thread(self._server.roll.link_of, device)  # it is erased below
        await self._server.command(
            lambda now: self._server.forget(device, link, now)
        )  # first: then it can be asked again
        await self._in_thread(self._server.roll.withdraw, device)
        await self._server.command(lambda now: self._server.forget(device, link, now))  # and what was given in between
        self._server.people_changed = True
        return Nothing()

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def check_in(self, request: Request) -> Any:
        """A device asks for work."""
        device, body = await self._signed(request)
        self._limits.check_in(self._server.population, device, time.monotonic())
        asked, key = read(CheckInRequest, body), self._server.roll.find(device, self._server.clock()).public_key
        signed = Relayed(device, to_base64url(key), body.decode(), request.headers.get("sumus-signature", ""))
        return await self._server.check_in(device, asked, signed)

    async def abort(self, request: Request) -> Any:
        """A device gave up."""
        device, body = await self._signed(request)
        self._limits.request(device, time.monotonic())
        run, session = self._run(request.path_params)
        return await self._server.abort(device, run, session, read(Abort, body).reason)

    async def report(self, request: Request) -> Any:
        """An update arrives: into memory that was lent for it, checked whole, then counted."""
        run, session = self._run(request.path_params)
        async with self._upload(request, most_bytes(run.hop), self._limits.request) as (device, body, digest):
            check = self._checked, device, run, body, digest
            try:
                update = await self._in_thread(*check) if len(body) > SMALL else check[0](*check[1:])
            except ParticipantError as error:  # nobody waits for another: its place is another device's
                await self._server.let_go(device, run, session, error.code)
                raise
            return await self._server.report(device, run, session, update)

    # ── edges ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def tasks(self, request: Request) -> Any:
        """What there is to do, for an edge."""
        edge, _ = await self._edge(request)
        may = self._server.roll.find(edge, self._server.clock()).speaks_for
        return await self._server.command(lambda now: Tasks(tuple(self._server.served(may))))

    async def relay(self, request: Request) -> Any:
        """An edge speaks for its devices."""
        edge, body = await self._edge(request)
        asked = read(RelayRequest, body)
        server = self._server
        if await self._in_thread(server.roll.note_members, edge, asked.members, server.clock()):
            server.people_changed = True
        for each in asked.ended:
            run = server.run(each.task, each.kind)
            if run is not None:
                await server.end(edge, run, f"{each.device}/{each.session}", each.reason)
        signed = await self._in_thread(lambda: [signed_by_device(each, server.population) for each in asked.asked])
        may = server.roll.find(edge, server.clock()).speaks_for
        answers = (self._relayed(edge, may, each, by_it) for each, by_it in zip(asked.asked, signed, strict=True))
        return RelayAnswer(tuple(await asyncio.gather(*answers)))

    async def _relayed(self, edge: str, may: int, asked: Relayed, signed: bool) -> RelayedAnswer:
        """Answer one of an edge's devices.

        Args:
            edge: The edge's id.
            may: Devices that it may speak for.
            asked: The device's check-in.
            signed: Whether the device itself has signed the check-in.
        """
        try:
            if not signed:
                raise Refused("bad_signature", "not signed by this device, or not over this check-in")
            self._limits.relayed(self._server.population, edge, may, asked.device, time.monotonic())
            request = _passed_on(asked)
            answer = await self._server.relay(edge, request, asked)
        except Refused as refused:
            problem = refused.problem
            if problem.code == "rate":
                later = CheckInAnswer(retry_after_s=problem.retry_after_s, reason="rate")
                return RelayedAnswer(asked.device, later)
            return RelayedAnswer(asked.device, code=problem.code, serial=problem.serial)
        return RelayedAnswer(asked.device, replace(answer, released={}))

    async def report_sum(self, request: Request) -> Any:
        """What an edge has added: as a report, but of many."""
        run = self._run_of(request.path_params)
        most, least = most_sum_bytes(run.hop, run.most_together), run.least if run.edges.rounds > 1 else None
        async with self._upload(request, most, self._limits.edge_request) as (edge, body, digest):

            def checked() -> tuple[tuple[str, ...], Aggregate]:
                _compare(body, digest)
                if not (may := self._server.roll.find(edge, self._server.clock()).speaks_for):
                    raise Refused("not_edge", "it was enrolled as a device: give an edge a token of its own")
                sessions, total = decode_sum(body, edge, run.hop, run.most_together, least)
                if len(sessions) > may:
                    raise Refused(
                        "not_edge", f"its sum is of {len(sessions)} reports, and its token is for {may} devices"
                    )
                weigh = len(sessions) if least is None else min(len(sessions), least)
                check_sum_measured(total, run.hop, edge, weigh if run.kind == "train" else 0)
                return sessions, total

            sessions, total = await self._in_thread(checked)
            return await self._server.report_sum(edge, run, sessions, total)

    async def _edge(self, request: Request) -> tuple[str, bytes]:
        """Which edge sent a request, and its body."""
        endpoint = "relay" if request.method == "POST" else "tasks"
        edge, body = await self._signed(request, MOST[endpoint])
        self._limits.edge_request(edge, time.monotonic())
        if not self._server.roll.find(edge, self._server.clock()).speaks_for:
            raise Refused("not_edge", "it was enrolled as a device: give an edge a token of its own")
        return edge, body

    # ── objects, and what everybody may ask ──────────────────────────────────────────────────────────────────────────

    async def object(self, request: Request) -> Response:
        """A plan or a model, under its hash."""
        sha256 = request.path_params["sha256"]
        if not await self._server.has(sha256):
            raise Refused("not_found", "no plan and no model of this server has this hash, or it is long past")
        headers = {"etag": f'"{sha256}"', "cache-control": IMMUTABLE, "content-type": "application/octet-stream"}
        if f'"{sha256}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        found = await self._objects.open(sha256)
        if isinstance(found, Path):
            size = found.stat().st_size
            self._server.counts.bytes_out += size
            _keep_range(request, _asked_range(request, size))
            return FileResponse(found, headers=headers)
        self._server.counts.bytes_out += len(found.body)
        return _ranged(found, _asked_range(request, len(found.body)), headers)

    async def authority(self, request: Request) -> Response:
        """The certificate that devices pin."""
        if self._authority is None:
            raise Refused("not_found", "this server's certificate is not its own")
        return Response(self._authority, media_type="application/x-pem-file")

    async def openapi(self, request: Request) -> Response:
        """What this plane is, for machines."""
        return Response(document(), media_type="application/json")

    async def alive(self, request: Request) -> Response:
        """The process answers."""
        return Response(b"{}", media_type="application/json")

    async def ready(self, request: Request) -> Response:
        """It can decide: recovered, and its storage works."""
        if self._server.trouble:
            raise Refused("not_ready", "starting, or its storage fails", (1.0, 3.0))
        return Response(b"{}", media_type="application/json")

    # ── what the endpoints share ─────────────────────────────────────────────────────────────────────────────────────

    def routes(self) -> list[BaseRoute]:
        """All of the plane."""
        mine: list[BaseRoute] = [
            Route(each.path, self._answering(each.name, each.signed), methods=[each.method]) for each in ENDPOINTS
        ]
        for path, what in (
            ("/v1/authority", self.authority),
            ("/v1/openapi.json", self.openapi),
            ("/healthz", self.alive),
        ):
            mine.append(Route(path, ExplainedEndpoint(what, self._answer_to), methods=["GET"]))
        return [*mine, Route("/readyz", ExplainedEndpoint(self.ready, self._answer_to), methods=["GET"])]

    def _answering(self, name: str, signed: bool) -> ExplainedEndpoint:
        """An endpoint whose answer is a message, or a response."""
        endpoint = cast(Callable[[Request], Awaitable[Any]], getattr(self, name))

        async def answer(request: Request) -> Response:
            if name != "object":
                if request.headers.get("sumus-protocol", "") != str(PROTOCOL):
                    raise Refused("old_protocol", f"this server speaks version {PROTOCOL}: upgrade the older side")
                if self._server.trouble:
                    raise Refused("not_ready", "starting, or its storage fails", (1.0, 3.0))
            found = await endpoint(request)
            return found if isinstance(found, Response) else Response(write(found), media_type="application/json")

        return ExplainedEndpoint(answer, self._answer_to)

    def _answer_to(self, request: Request, error: Exception) -> Response:
        """Count a request that failed, and answer it."""
        refused = refusal_of(request, error)
        self._server.counts.events["refused", refused.problem.code] += 1
        return problem(refused)

    async def _message(self, request: Request, form: type[Any]) -> Any:
        return read(form, await self._strangers.read(request, announced(request, MAX_CONTROL)))

    async def _signed(self, request: Request, most: int = MAX_CONTROL) -> tuple[str, bytes]:
        """Who sent a small request, and its body."""
        if request.method == "GET":
            await self._turn(request)
            device = await self._sender(request, digest_of(b""))
            return device, b""
        length = announced(request, most)
        digest = _claimed(request, length)
        await self._turn(request)
        if digest is None:
            body = await self._strangers.read(request, length)
            return await self._sender(request, digest_of(body)), body
        device = await self._sender(request, digest)
        async with self._uploads.body(request, length, f"{device} {request.url.path}") as lent:
            _compare(lent, digest)
            return device, bytes(lent)

    @asynccontextmanager
    async def _upload(
        self, request: Request, most: int, limit: Callable[[str, float], None]
    ) -> AsyncGenerator[tuple[str, memoryview, str], None]:
        """Who sends a long body, the body, and the digest that was signed. limit: of the sender, before the body is read."""
        length = announced(request, most)
        digest = _claimed(request, length)
        await self._turn(request)
        if digest is None:
            read_before = memoryview(await self._strangers.read(request, length))
            digest = digest_of(read_before)
            device = await self._sender(request, digest)
            limit(device, time.monotonic())
            self._server.counts.bytes_in += length
            yield device, read_before, digest
            return
        device = await self._sender(request, digest)
        limit(device, time.monotonic())
        async with self._uploads.body(request, length, device) as body:
            self._server.counts.bytes_in += length
            yield device, body, digest

    async def _turn(self, request: Request) -> None:
        """Wait, before a body is read, if the sender is in doubt."""
        await self._doubt.turn(request.headers.get("sumus-device", ""), near(source(request)))

    async def _sender(self, request: Request, digest: str) -> str:
        """The device that signed a request whose body has this digest."""
        device = request.headers.get("sumus-device", "")
        await self._find(device)
        text = text_over(request.method, _path(request), self._server.population, device, digest)
        signature = request.headers.get("sumus-signature", "")
        try:
            self._server.roll.authenticate(device, signature, text, self._server.clock())
        except Refused as refused:
            if refused.problem.code == "bad_signature":
                self._doubt.note(device, near(source(request)))
            raise
        return device

    async def _find(self, device: str) -> None:
        """Refuse who is not enrolled. A device that is not in memory is looked up in a thread, since a database may keep one
        waiting; and not more than so many at a time, since anybody can name devices."""
        if self._server.roll.remembers(device, self._server.clock()):
            return
        if self._lookups >= MOST_LOOKUPS:
            raise Refused("busy", "too many devices that are not in memory ask at once", AGAIN)
        self._lookups += 1
        try:
            find = self._server.roll.find
            await asyncio.get_running_loop().run_in_executor(self._finding, find, device, self._server.clock())
        finally:
            self._lookups -= 1

    def _checked(self, device: str, run: Run, body: memoryview, digest: str) -> Any:
        """The update of a report's body, of this device and this plan; what it says can be counted."""
        _compare(body, digest)
        update = decode_report(body, device, run.hop)
        run.hop.check(update)
        check_measured(update, run.kind == "train")
        return update

    def _run(self, params: Mapping[str, Any]) -> tuple[Run, str]:
        """The run and the session of a path."""
        run = self._run_of(params)
        if not 0 < len(params["session"]) <= 64:
            raise Refused("unknown_session", "no such session was given to this device")
        return run, params["session"]

    def _run_of(self, params: Mapping[str, Any]) -> Run:
        kind = params["kind"]
        run = self._server.run(params["task"], kind) if kind in ("train", "evaluate") else None
        if run is None:
            raise Refused("unknown_session", "no such session was given to this device")
        return run

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def device_app(server: Server, blobs: Blobs, room: Room, limits: Limits, authority: bytes | None = None) -> Starlette:
    """The device plane as an ASGI application."""

    async def not_there(request: Request, error: Exception) -> Response:
        code = "method" if isinstance(error, HTTPException) and error.status_code == 405 else "not_found"
        return problem(Refused(code, "this server has no such path, or not with this method"))

    plane = DevicePlane(server, blobs, room, limits, authority)
    app = Starlette(routes=plane.routes(), exception_handlers={404: not_there, 405: not_there})
    app.router.redirect_slashes = False
    return app


def _passed_on(relayed: Relayed) -> CheckInRequest:
    """Read a check-in that an edge passes on: the edge answers what became of earlier work, and holds nothing open."""
    try:
        request = read(CheckInRequest, relayed.check_in.encode())
    except ParticipantError as error:
        raise Refused("malformed", str(error)) from error
    return replace(request, previous=None, wait_s=0.0)


def _path(request: Request) -> str:
    """The path as the device wrote it, query and all."""
    raw = cast(bytes | None, request.scope.get("raw_path")) or request.url.path.encode()
    query = cast(bytes, request.scope.get("query_string", b""))
    return (raw + b"?" + query if query else raw).decode("latin-1")


def _claimed(request: Request, length: int) -> str | None:
    """The digest that a body is said to have; None if that is not said of a short one."""
    digest = request.headers.get("sumus-digest")
    if digest is None and length > MAX_UNDIGESTED:
        raise Refused("digest_required", f"say Sumus-Digest of a body of more than {MAX_UNDIGESTED} bytes")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise Refused("malformed", "Sumus-Digest is the SHA-256 of the body: 64 hexadecimal digits, small letters")
    return digest


def _compare(body: memoryview, digest: str) -> None:
    """Refuse a body that is not the one whose digest was signed."""
    if digest_of(body) != digest:
        raise Refused("bad_digest", "the body is not the one that was signed: it was changed on its way")


def _asked_range(request: Request, size: int) -> tuple[int, int] | None:
    """Where the one range begins and ends that a request asks for, empty if there are no such bytes. None for the whole object:
    also for several ranges, and for what is no range, which HTTP lets a server ignore."""
    unit, _, asked = request.headers.get("range", "").partition("=")
    first, dash, last = asked.partition("-")
    begin, end = whole_number(first), whole_number(last)
    if unit != "bytes" or not dash or (begin is None and (first or end is None)) or (end is None and last):
        return None
    if begin is None:
        return max(0, size - (end or 0)), size
    if end is not None and end < begin:
        return None
    return begin, size if end is None else min(size, end + 1)


def _keep_range(request: Request, asked: tuple[int, int] | None) -> None:
    """Leave this range in a request's headers, and none of what its sender wrote, for whoever reads them next."""
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
    if asked is not None:
        headers.append((b"range", f"bytes={asked[0]}-{max(asked[1] - 1, 0)}".encode()))
    request.scope["headers"] = headers


def _ranged(found: HeldObject, asked: tuple[int, int] | None, headers: Mapping[str, str]) -> Response:
    """An object, or the one range of it that was asked for."""
    body = found.body
    whole = {**headers, "accept-ranges": "bytes"}
    if asked is None:
        return PiecewiseResponse(body, headers=whole, keeps=found)
    begin, end = asked
    if begin >= end:
        return Response(status_code=416, headers={**whole, "content-range": f"bytes */{len(body)}"})
    part = {**whole, "content-range": f"bytes {begin}-{end - 1}/{len(body)}"}
    return PiecewiseResponse(memoryview(body)[begin:end], 206, part, found)
