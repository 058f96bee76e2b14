"""The device plane over HTTP: every request in `wire.messages.ENDPOINTS` is read, checked and passed to the server.

    app = device_app(server, blobs, room)         an ASGI application

Each part of a request is checked before it is used. The length and the signature are checked before a long body is read, the
digest before the body is decoded, and the format before the report is counted. Every error answer has a code from the closed
list `STATUS`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from sumus.errors import ParticipantError
from sumus.http.answers import ExplainedEndpoint
from sumus.http.bodies import source
from sumus.http.limits import Limits
from sumus.http.room import Room
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.stages import ClearReport
from sumus.server.edge_plane import FOR_EDGES, EdgePlane, run_of
from sumus.server.objects import ObjectReader
from sumus.server.openapi import document
from sumus.server.problems import problem, refusal_of
from sumus.server.ranges import asked_range, keep_range, ranged
from sumus.server.senders import Senders, compare
from sumus.server.server import Server
from sumus.server.windows import AGAIN
from sumus.storage.blobs import Blobs
from sumus.wire.messages import (
    ENDPOINTS,
    PROTOCOL,
    Abort,
    CheckInRequest,
    EnrolmentRequest,
    Nothing,
    Refused,
    Relayed,
    read,
    write,
)
from sumus.wire.reports import most_bytes
from sumus.wire.signing import to_base64url

SMALL = 64 * 2**10
"""Bodies up to this size, in bytes, are checked on the event loop; larger bodies are checked in a thread."""
IMMUTABLE = "public, max-age=31536000, immutable"


class DevicePlane:
    """The endpoints for devices."""

    def __init__(
        self, server: Server, blobs: Blobs, room: Room, limits: Limits, authority: bytes | None = None
    ) -> None:
        """Answer the requests of devices for a server.

        Args:
            server: The server.
            blobs: The store of plans and models.
            room: Memory for bodies.
            limits: The rate limits of requests.
            authority: The certificate (PEM) that devices pin, if the server made its own.
        """
        self._server, self._limits = server, limits
        self._authority = authority
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="bodies")
        self._senders = Senders(server, room)
        self._objects = ObjectReader(blobs, room.bytes, self._in_thread)
        self._edges = EdgePlane(server, self._senders, limits, self._in_thread)

    # ── enrolment ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def challenge(self, request: Request) -> Any:
        """Return a nonce to sign."""
        await self._senders.message(request, Nothing)
        return self._server.roll.challenge(self._server.clock())

    async def enrol(self, request: Request) -> Any:
        """Enrol a device."""
        self._limits.enrolment(source(request), time.monotonic())
        asked = await self._senders.message(request, EnrolmentRequest)
        enrolment, new = await self._in_thread(self._server.roll.enrol, asked, self._server.clock())
        self._server.counts.events["enrolments", "new" if new else "again"] += 1
        self._server.crowd.note_change()
        return enrolment

    async def withdraw(self, request: Request) -> Any:
        """Withdraw a device's consent."""
        device, body = await self._senders.signed(request)
        self._limits.request(device, time.monotonic())
        read(Nothing, body)
        link = await self._in_thread(self._server.roll.link_of, device)  # read now, since `withdraw` erases it

        def forget(now: float) -> None:
            self._server.forget(device, link, now)

        await self._server.command(forget)  # before `withdraw`: if this fails, the device can send the request again
        await self._in_thread(self._server.roll.withdraw, device)
        await self._server.command(forget)  # again, for work that was given in the meantime
        self._server.crowd.note_change()
        return Nothing()

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def check_in(self, request: Request) -> Any:
        """Answer a device that asks for work."""
        device, body = await self._senders.signed(request)
        self._limits.check_in(self._server.population, device, time.monotonic())
        asked, key = read(CheckInRequest, body), self._server.roll.find(device, self._server.clock()).public_key
        signed = Relayed(device, to_base64url(key), body.decode(), request.headers.get("sumus-signature", ""))
        return await self._server.check_in(DeviceCheckIn(device, asked, signed=signed))

    async def abort(self, request: Request) -> Any:
        """Record that a device has given up its work."""
        device, body = await self._senders.signed(request)
        self._limits.request(device, time.monotonic())
        run, word = self._session(request.path_params)
        return await self._server.abort(run, f"{device}/{word}", read(Abort, body).reason)

    async def report(self, request: Request) -> Any:
        """Count a device's report. It is read into lent memory, and is checked completely before it is counted."""
        run, word = self._session(request.path_params)
        async with self._senders.upload(request, most_bytes(run.hop), self._limits.request) as (device, body, digest):
            session = f"{device}/{word}"
            asked = run, device, session, body, digest
            try:
                report = await self._in_thread(_checked, *asked) if len(body) > SMALL else _checked(*asked)
            except ParticipantError as error:  # the device sends no other report, so its place is freed
                await self._server.let_go(run, session, error.code)
                raise
            return await self._server.report(run, report)

    # ── objects, and requests without a sender ──────────────────────────────────────────────────────────────────────────

    async def object(self, request: Request) -> Response:
        """Send the plan or the model that has this hash."""
        sha256 = request.path_params["sha256"]
        if not await self._server.objects.has(sha256):
            raise Refused("not_found", "no plan and no model of this server has this hash, or it was deleted long ago")
        headers = {"etag": f'"{sha256}"', "cache-control": IMMUTABLE, "content-type": "application/octet-stream"}
        if f'"{sha256}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        found = await self._objects.open(sha256)
        if isinstance(found, Path):
            size = found.stat().st_size
            self._server.counts.bytes_out += size
            keep_range(request, asked_range(request, size))
            return FileResponse(found, headers=headers)
        self._server.counts.bytes_out += len(found.body)
        return ranged(found, asked_range(request, len(found.body)), headers)

    async def authority(self, request: Request) -> Response:
        """Send the certificate that devices pin."""
        if self._authority is None:
            raise Refused("not_found", "this server did not make its own certificate, so there is none to pin")
        return Response(self._authority, media_type="application/x-pem-file")

    async def openapi(self, request: Request) -> Response:
        """Return the OpenAPI document of this plane."""
        return Response(document(), media_type="application/json")

    async def alive(self, request: Request) -> Response:
        """Answer that the process is alive."""
        return Response(b"{}", media_type="application/json")

    async def ready(self, request: Request) -> Response:
        """Answer that the server can decide; refuse if it has not recovered yet, or its storage fails."""
        self._check_ready()
        return Response(b"{}", media_type="application/json")

    # ── common parts of endpoints ─────────────────────────────────────────────────────────────────────────────────────

    def routes(self) -> list[BaseRoute]:
        """Return all routes of the plane."""
        mine: list[BaseRoute] = [
            Route(each.path, self._answering(each.name), methods=[each.method]) for each in ENDPOINTS
        ]
        for path, what in (
            ("/v1/authority", self.authority),
            ("/v1/openapi.json", self.openapi),
            ("/healthz", self.alive),
            ("/readyz", self.ready),
        ):
            mine.append(Route(path, ExplainedEndpoint(what, self._answer_to), methods=["GET"]))
        return mine

    def _answering(self, name: str) -> ExplainedEndpoint:
        """Return the endpoint for a method that returns a message or a response."""
        plane = self._edges if name in FOR_EDGES else self
        endpoint = cast(Callable[[Request], Awaitable[Any]], getattr(plane, name))

        async def answer(request: Request) -> Response:
            if name != "object":
                if request.headers.get("sumus-protocol", "") != str(PROTOCOL):
                    raise Refused(
                        "old_protocol",
                        f"this server uses version {PROTOCOL} of the protocol, but the request another one: "
                        "upgrade the older side",
                    )
                self._check_ready()
            found = await endpoint(request)
            return found if isinstance(found, Response) else Response(write(found), media_type="application/json")

        return ExplainedEndpoint(answer, self._answer_to)

    def _answer_to(self, request: Request, error: Exception) -> Response:
        """Count a request that failed, and answer it."""
        refused = refusal_of(request, error)
        self._server.counts.events["refused", refused.problem.code] += 1
        return problem(refused)

    def _check_ready(self) -> None:
        """Refuse a request while the server cannot decide."""
        if self._server.trouble:
            raise Refused("not_ready", "the server is starting, or its storage fails", AGAIN)

    def _session(self, params: Mapping[str, Any]) -> tuple[Run, str]:
        """Return the run and the session in a path."""
        run = run_of(self._server, params)
        if not 0 < len(params["session"]) <= 64:
            raise Refused("unknown_session", "this session was not given to this device")
        return run, params["session"]

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _checked(run: Run, device: str, session: str, body: memoryview, digest: str) -> ClearReport:
    """Check that a body has the signed digest; then read and check its report."""
    compare(body, digest)
    return run.intake.read_report(body, device, session)


def device_app(server: Server, blobs: Blobs, room: Room, limits: Limits, authority: bytes | None = None) -> Starlette:
    """Make the ASGI application of the device plane; see `DevicePlane` for the arguments."""

    async def not_there(request: Request, error: Exception) -> Response:
        code = "method" if isinstance(error, HTTPException) and error.status_code == 405 else "not_found"
        return problem(Refused(code, "this server has no such path, or the path does not accept this method"))

    plane = DevicePlane(server, blobs, room, limits, authority)
    app = Starlette(routes=plane.routes(), exception_handlers={404: not_there, 405: not_there})
    app.router.redirect_slashes = False
    return app
