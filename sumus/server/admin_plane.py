"""The admin plane: the HTTP interface with which an operator sees and changes a server, on a port of its own.

    app = admin_app(service, access, invite, names)       an ASGI application

    POST /v1/admin/login               {"code"} → {"session"}, once             access.py
    GET  /v1/admin/status              status.ServerStatus
    GET  /v1/admin/models/TASK         the model's lineage
    GET  /v1/admin/models/TASK/VERSION the version's file (safetensors)
    POST /v1/admin/models/TASK/VERB    promote, rollback {"version"}; pause, resume, cancel {"kind"}
    POST /v1/admin/tokens              {"uses", "lasts_s", "speaks_for"} → {"link"}
    GET  /v1/admin/devices?after=ID    the enrolled devices, a hundred at a time
    POST /v1/admin/devices/ID/revoke
    GET  /metrics, /healthz, /readyz   for monitoring programs, without a session: only sums and states
    GET  /                             a page that shows the status to an operator who opens a login link

All requests but login and the last two rows need `Authorization: Bearer SESSION`. There are no cookies, so a page of another
site cannot use a session. The plane answers only under its own names, and refuses requests from pages of other sites
(http/guard.py). A request that changes something must declare a JSON body. /metrics is computed at most once a second. Every
change writes a line to the log of `sumus.admin`.

Each group of requests is a class: `StatusRequests`, `ModelRequests` and `DeviceRequests`. They share `AdminGate`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sumus.errors import UsageError
from sumus.http.answers import ExplainedEndpoint, PiecewiseResponse
from sumus.http.bodies import Strangers, announced, source
from sumus.http.certificates import Certificate
from sumus.http.guard import guard, is_json
from sumus.http.room import Room
from sumus.http.snapshot import Snapshot
from sumus.json_names import repeated
from sumus.logs import logger
from sumus.rounds.run import Run, cancel_newest
from sumus.server.access import PLANE, Access
from sumus.server.admin_messages import (
    ChangeMade,
    DevicePage,
    EnrolledDevice,
    EnrolmentLink,
    Lineage,
    LoggedIn,
    Login,
    NewToken,
    RunRef,
    VersionRef,
)
from sumus.server.membership import DAY
from sumus.server.metrics import CONTENT_TYPE, exposition
from sumus.server.problems import problem, refusal_of
from sumus.server.server import Server
from sumus.server.status import AboveStatus, ServerStatus, lineage, look
from sumus.server.training import TrainingRun
from sumus.storage.blobs import Blobs
from sumus.text import whole_number
from sumus.wire.messages import MAX_CONTROL, Nothing, Problem, Refused, read, write

AUDIT = logger("sumus.admin")
MOST_DEVICES = 100
"""The largest number of devices in one answer."""
HEADERS = {
    PLANE: "admin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_PAGE = (
    ("/", "index.html", "text/html"),
    ("/page.js", "page.js", "text/javascript"),
    ("/page.css", "page.css", "text/css"),
)
_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_BODIES = Strangers(2 * 2**20)
M = TypeVar("M")


class AdministeredServer(Protocol):
    """The interface that the plane uses: a server with its models, its memory for bodies and its certificate."""

    @property
    def server(self) -> Server: ...
    @property
    def blobs(self) -> Blobs: ...
    @property
    def room(self) -> Room: ...
    @property
    def certificate(self) -> Certificate | None: ...
    def above(self) -> AboveStatus | None: ...


@dataclass(frozen=True)
class AdminRoute:
    """One request of the plane.

    Attributes:
        method: GET or POST.
        path: The request's path, with the names of its parameters in braces.
        answer: The function for the request. It returns a message, which is sent as JSON, or a complete response.
        open_to_all: Whether the request is allowed without a session.
    """

    method: str
    path: str
    answer: Callable[[Request], Awaitable[Any]]
    open_to_all: bool = False


class AdminGate:
    """The common part of all requests: the session, the audit log, and changes, which the server's deciding thread makes.

    Args:
        server: The server that is shown and changed.
        access: The sessions.
    """

    def __init__(self, server: Server, access: Access) -> None:
        self._server, self._access = server, access

    def session(self, request: Request) -> str:
        """Return the session in a request's `Authorization` header.

        Raises:
            Refused: The request has no session, or its session has ended.
        """
        return self._access.check(request.headers.get("authorization", ""), source(request), time.time())

    def audit(self, what: str, request: Request, **said: Any) -> None:
        """Write a change to the log.

        Args:
            what: The name of the change.
            request: The request that made the change.
            said: Details of the change, by name.
        """
        AUDIT.info("%s", what, extra={"said": {"from": source(request), **said}})

    async def change(self, do: Callable[[float], Any]) -> Any:
        """Make a change on the deciding thread.

        Args:
            do: Makes the change; its argument is the time of the storage's clock.

        Raises:
            Refused: The change is not possible, or another replica leads: only the leader can make changes.
        """

        def done(now: float) -> Any:
            if not self._server.leads:
                raise UsageError(f"replica {self._server.replica.leader} leads: send the request to that replica")
            return do(now)

        try:
            return await self._server.command(done)
        except UsageError as error:
            raise Refused("not_found", str(error)) from error

    def route(self, admin_route: AdminRoute) -> BaseRoute:
        """Make the route for a request. A request that changes something must declare a JSON body."""

        async def answer(request: Request) -> Response:
            if admin_route.method != "GET" and not is_json(request):  # a form on a web page cannot send this type
                raise Refused("encoding", "the header Content-Type: application/json is required")
            if not admin_route.open_to_all:
                self.session(request)
            found = await admin_route.answer(request)
            return found if isinstance(found, Response) else Response(write(found), media_type="application/json")

        return Route(admin_route.path, ExplainedEndpoint(answer, _answer_to), methods=[admin_route.method])


class StatusRequests:
    """Login and logout, the server's status, and the endpoints for monitoring programs.

    Args:
        service: The server.
        access: The sessions.
        gate: The common part of all requests.
    """

    def __init__(self, service: AdministeredServer, access: Access, gate: AdminGate) -> None:
        self._service, self._access, self._gate = service, access, gate
        self._metrics = Snapshot(self._exposed)

    def routes(self) -> list[AdminRoute]:
        """List the requests of this group."""
        return [
            AdminRoute("GET", "/healthz", self.alive, open_to_all=True),
            AdminRoute("GET", "/readyz", self.ready, open_to_all=True),
            AdminRoute("GET", "/metrics", self.metrics, open_to_all=True),
            AdminRoute("POST", "/v1/admin/login", self.login, open_to_all=True),
            AdminRoute("POST", "/v1/admin/logout", self.logout),
            AdminRoute("GET", "/v1/admin/status", self.status),
        ]

    async def login(self, request: Request) -> LoggedIn:
        """Exchange a code for a session."""
        asked = await _message(request, Login)
        session = self._access.exchange(asked.code, source(request), time.time())
        self._gate.audit("login", request)
        return LoggedIn(session)

    async def logout(self, request: Request) -> Nothing:
        """End the session of the request."""
        self._access.revoke(self._gate.session(request))
        return Nothing()

    async def status(self, request: Request) -> ServerStatus:
        """Return the server's status."""
        return await self._look()

    async def metrics(self, request: Request) -> Response:
        """Return the server's status in Prometheus's text format."""
        return Response(await self._metrics.look(), media_type=CONTENT_TYPE)

    async def alive(self, request: Request) -> Nothing:
        """Answer that the process is alive."""
        return Nothing()

    async def ready(self, request: Request) -> Nothing:
        """Answer that the server can decide; refuse if it cannot."""
        if self._service.server.trouble:
            raise Refused("not_ready", self._service.server.trouble, (1.0, 3.0))
        return Nothing()

    async def _exposed(self) -> bytes:
        return exposition(await self._look())

    async def _look(self) -> ServerStatus:
        certificate = self._service.certificate
        left = None if certificate is None else certificate.left_s(datetime.now(UTC))
        return await look(self._service.server, self._service.room.lent, self._service.above(), left)


class ModelRequests:
    """A task's models and rounds.

    Args:
        server: The server.
        blobs: The store of the models' files.
        gate: The common part of all requests.
    """

    def __init__(self, server: Server, blobs: Blobs, gate: AdminGate) -> None:
        self._server, self._blobs, self._gate = server, blobs, gate
        self._reading = asyncio.Lock()

    def routes(self) -> list[AdminRoute]:
        """List the requests of this group."""
        task = "/v1/admin/models/{task}"
        verbs = (self.promote, self.rollback, self.pause, self.resume, self.cancel)
        return [
            AdminRoute("GET", task, self.models),
            AdminRoute("GET", f"{task}/{{version}}", self.model),
            *(AdminRoute("POST", f"{task}/{verb.__name__}", verb) for verb in verbs),
        ]

    async def models(self, request: Request) -> Lineage:
        """List a task's versions."""
        run = self._training(request)

        def found(now: float) -> Lineage:
            return Lineage(run.task, run.version, run.shown, lineage(run, now))

        return await self._server.command(found)

    async def model(self, request: Request) -> Response:
        """Send a version's file piece by piece. If the blobs are not stored as files, one model at a time is read into memory."""
        run, version = self._training(request), whole_number(request.path_params["version"])
        if version is None:
            raise Refused("not_found", f"{request.path_params['version']!r:.80} is not a version: give a number")

        def found(now: float) -> str:
            return run.model(version).model

        try:
            sha256 = await self._server.command(found)
            headers = {"etag": f'"{sha256}"', "content-type": "application/octet-stream"}
            path = await asyncio.to_thread(self._blobs.path, sha256)
            if path is not None and await asyncio.to_thread(path.is_file):
                return FileResponse(path, headers=headers)
            async with self._reading:
                return PiecewiseResponse(await asyncio.to_thread(self._blobs.get, sha256), headers=headers)
        except UsageError as error:
            raise Refused("not_found", str(error)) from error

    async def promote(self, request: Request) -> ChangeMade:
        """Release a version: devices use it for predictions from now on."""
        run, version = self._training(request), (await _message(request, VersionRef)).version
        await self._gate.change(lambda now: run.promote(version))
        self._gate.audit("promote", request, task=run.task, version=version)
        return ChangeMade(version=version)

    async def rollback(self, request: Request) -> ChangeMade:
        """Continue training from an earlier version."""
        run, version = self._training(request), (await _message(request, VersionRef)).version
        made = await self._gate.change(lambda now: run.roll_back(version, now).version)
        self._gate.audit("rollback", request, task=run.task, to=version, version=made)
        return ChangeMade(version=made)

    async def pause(self, request: Request) -> ChangeMade:
        """Pause a run: no round begins, and no work is assigned."""
        run = await self._run(request)
        await self._gate.change(lambda now: run.pause())
        self._gate.audit("pause", request, task=run.task, kind=run.kind)
        return ChangeMade()

    async def resume(self, request: Request) -> ChangeMade:
        """Resume a run: rounds begin and work is assigned again."""
        run = await self._run(request)
        await self._gate.change(lambda now: run.resume())
        self._gate.audit("resume", request, task=run.task, kind=run.kind)
        return ChangeMade()

    async def cancel(self, request: Request) -> ChangeMade:
        """End the open round without a model."""
        run = await self._run(request)
        number = await self._gate.change(lambda now: cancel_newest(run, now))
        if number is None:
            raise Refused("not_found", f"{run.task} has no open round to cancel")
        self._gate.audit("cancel", request, task=run.task, kind=run.kind, round=number)
        return ChangeMade(round=number)

    def _training(self, request: Request) -> TrainingRun:
        run = self._server.run(request.path_params["task"], "train")
        if run is None:
            raise self._no_task(request)
        if not isinstance(run, TrainingRun):
            raise Refused("not_found", "an edge makes and keeps no models: send the request to its upstream server")
        return run

    async def _run(self, request: Request) -> Run:
        kind = (await _message(request, RunRef)).kind
        run = self._server.run(request.path_params["task"], kind)
        if run is None and self._server.run(request.path_params["task"], "train") is not None:
            raise Refused("not_found", "this task has no evaluation: serve it with --evaluate")
        if run is None:
            raise self._no_task(request)
        return run

    def _no_task(self, request: Request) -> Refused:
        names = ", ".join(task.name for task in self._server.tasks)
        there = f"the tasks are {names}" if names else "this server has no task yet"
        return Refused("not_found", f"there is no task {request.path_params['task']!r:.80} on this server; {there}")


class DeviceRequests:
    """Enrolled devices, and links for new devices.

    Args:
        server: The server.
        gate: The common part of all requests.
        invite: Makes the link of an enrolment token.
    """

    def __init__(self, server: Server, gate: AdminGate, invite: Callable[[str], str]) -> None:
        self._server, self._gate, self._invite = server, gate, invite

    def routes(self) -> list[AdminRoute]:
        """List the requests of this group."""
        return [
            AdminRoute("POST", "/v1/admin/tokens", self.tokens),
            AdminRoute("GET", "/v1/admin/devices", self.devices),
            AdminRoute("POST", "/v1/admin/devices/{device}/revoke", self.revoke),
        ]

    async def tokens(self, request: Request) -> EnrolmentLink:
        """Make a link for new devices."""
        asked, roll = await _message(request, NewToken), self._server.roll
        token = await asyncio.to_thread(
            roll.new_token,
            self._server.population,
            self._server.clock(),
            asked.uses,
            asked.lasts_s,
            asked.speaks_for,
        )
        self._gate.audit("token", request, uses=asked.uses, lasts_s=asked.lasts_s, speaks_for=asked.speaks_for)
        return EnrolmentLink(self._invite(token))

    async def devices(self, request: Request) -> DevicePage:
        """List the devices that are, or were, enrolled."""
        found = await asyncio.to_thread(self._server.roll.devices, request.query_params.get("after", ""), MOST_DEVICES)
        rows = tuple(EnrolledDevice(row.id, row.state, int(row.enrolled // DAY), int(row.seen // DAY)) for row in found)
        return DevicePage(rows, rows[-1].id if len(rows) == MOST_DEVICES else None)

    async def revoke(self, request: Request) -> Nothing:
        """Revoke a device's enrolment."""
        device = request.path_params["device"]
        await asyncio.to_thread(self._server.roll.revoke, device)
        link = await asyncio.to_thread(self._server.roll.link_of, device)
        await self._server.command(lambda now: self._server.forget(device, link, now, "revoked"))
        self._gate.audit("revoke", request)
        return Nothing()


def admin_routes(service: AdministeredServer, access: Access, invite: Callable[[str], str]) -> list[BaseRoute]:
    """List all routes of the plane.

    Args:
        service: The server.
        access: The sessions.
        invite: Makes the link of an enrolment token.
    """
    gate = AdminGate(service.server, access)
    groups = (
        StatusRequests(service, access, gate),
        ModelRequests(service.server, service.blobs, gate),
        DeviceRequests(service.server, gate, invite),
    )
    pages = [AdminRoute("GET", path, _page(name, kind), open_to_all=True) for path, name, kind in _PAGE]
    return [gate.route(each) for each in (*pages, *(route for group in groups for route in group.routes()))]


def admin_app(
    service: AdministeredServer, access: Access, invite: Callable[[str], str], names: Sequence[str] = ()
) -> ASGIApp:
    """Make the admin plane, an ASGI application.

    Args:
        service: The server.
        access: The sessions.
        invite: Makes the link of an enrolment token.
        names: Host names that the operator uses for the plane.
    """

    async def not_there(request: Request, error: Exception) -> Response:
        code = "method" if isinstance(error, HTTPException) and error.status_code == 405 else "not_found"
        return problem(Refused(code, "the admin plane has no such path, or the path does not accept this method"))

    app = Starlette(
        routes=admin_routes(service, access, invite),
        exception_handlers={404: not_there, 405: not_there},
        middleware=[guard(names, _turned_away, "--name")],
    )
    app.router.redirect_slashes = False

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await app(scope, receive, send_marked)

    return marked


def _answer_to(request: Request, error: Exception) -> Response:
    return problem(refusal_of(request, error))


def _turned_away(status: int, code: str, detail: str) -> Response:
    return Response(write(Problem(code, detail)), status, media_type="application/problem+json")


def _page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint that sends a file of the package. The file contains no secret."""
    body = resources.files("sumus.server").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(body, media_type=kind)

    return answer


async def _message(request: Request, form: type[M]) -> M:
    """Read the body of a request as a message."""
    body = await _BODIES.read(request, announced(request, MAX_CONTROL))
    if (twice := repeated(body)) is not None:
        raise Refused(
            "malformed", f"the name {twice[0]!r:.80} appears twice in one object, the second time in line {twice[1]}"
        )
    return read(form, body)
