"""The admin plane: what whoever runs a server may see and change, on a port of its own.

    app = admin_app(service, access, invite, names)       an ASGI application

    POST /v1/admin/login               {"code"} → {"session"}, once             access.py
    GET  /v1/admin/status              status.ServerStatus
    GET  /v1/admin/models/TASK         its lineage
    GET  /v1/admin/models/TASK/VERSION that version's file, safetensors
    POST /v1/admin/models/TASK/VERB    promote, rollback {"version"}; pause, resume, cancel {"kind"}
    POST /v1/admin/tokens              {"uses", "lasts_s", "speaks_for"} → {"link"}
    GET  /v1/admin/devices?after=ID    who is enrolled, a hundred at a time
    POST /v1/admin/devices/ID/revoke
    GET  /metrics, /healthz, /readyz   for machines, without a session: sums and states only
    GET  /                             a page that shows the status, to whoever opens a login link

All but the last two rows, and login, want `Authorization: Bearer SESSION`; there are no cookies, so no page of somebody else's
can use a session. The plane answers only under its own names and to no page of another site, and a request that changes
something says that its body is JSON (guard.py). /metrics is made once a second at most. Every change is a line in the log of
`sumus.admin`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sumus.errors import UsageError
from sumus.http.answers import PiecewiseResponse
from sumus.http.bodies import Strangers, announced, source
from sumus.json_names import repeated
from sumus.logs import logger
from sumus.operations.access import PLANE, Access
from sumus.operations.guard import guard, is_json
from sumus.operations.metrics import CONTENT_TYPE, exposition
from sumus.operations.service import Service
from sumus.operations.snapshot import Snapshot
from sumus.operations.status import ModelStatus, ServerStatus, lineage, look
from sumus.rounds.run import Run, cancel_newest
from sumus.server.identity import TOKEN_S
from sumus.server.membership import DAY
from sumus.server.problems import explained, problem
from sumus.server.training import TrainingRun
from sumus.text import whole_number
from sumus.wire.messages import MAX_CONTROL, Count, Kind, Nothing, Problem, Refused, read, write

AUDIT = logger("sumus.admin")
MOST_DEVICES = 100
"""Devices in one answer."""
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


class Login(msgspec.Struct, frozen=True):
    """The code of a link."""

    code: str


class LoggedIn(msgspec.Struct, frozen=True):
    """What the next requests show."""

    session: str


class VersionRef(msgspec.Struct, frozen=True):
    """A version of a task's model."""

    version: Count


class RunRef(msgspec.Struct, frozen=True):
    """Of a task's runs, this one."""

    kind: Kind = "train"


class NewToken(msgspec.Struct, frozen=True):
    """A link. uses: how many keys may enrol with it.  speaks_for: how many devices an edge that enrols with it may speak for; 0
    for a device's link.  lasts_s: seconds."""

    uses: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 1
    speaks_for: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    lasts_s: Annotated[float, msgspec.Meta(gt=0, le=3650 * DAY)] = TOKEN_S


class EnrolmentLink(msgspec.Struct, frozen=True):
    """Who has it may enrol."""

    link: str


class Lineage(msgspec.Struct, frozen=True):
    """A task's versions, the oldest first. version: the newest.  released: that devices answer with."""

    task: str
    version: int
    released: int
    models: tuple[ModelStatus, ...]


class ChangeMade(msgspec.Struct, frozen=True):
    """What was changed. version: that is now the newest, or released.  round: that was ended."""

    version: int | None = None
    round: int | None = None


class EnrolledDevice(msgspec.Struct, frozen=True):
    """A device. enrolled, seen: in days since 1970."""

    id: str
    state: str
    enrolled: int
    seen: int


class DevicePage(msgspec.Struct, frozen=True):
    """Some devices by their id. after: where the next ones begin, if there are any."""

    devices: tuple[EnrolledDevice, ...]
    after: str | None = None


class AdminPlane:
    """The endpoints. invite: the link of an enrolment token."""

    def __init__(self, service: Service, access: Access, invite: Callable[[str], str]) -> None:
        self._service, self._server, self._access, self._invite = service, service.server, access, invite
        self._metrics = Snapshot(self._exposed)
        self._reading = asyncio.Lock()

    async def _look(self) -> ServerStatus:
        certificate = self._service.certificate
        left = None if certificate is None else certificate.left_s(datetime.now(UTC))
        return await look(self._server, self._service.room.lent, self._service.above(), left)

    async def login(self, request: Request) -> LoggedIn:
        """A session for a code."""
        asked = await _message(request, Login)
        session = self._access.exchange(asked.code, source(request), time.time())
        self._audit("login", request)
        return LoggedIn(session)

    async def logout(self, request: Request) -> Nothing:
        """End this session."""
        self._access.revoke(self._session(request))
        return Nothing()

    async def status(self, request: Request) -> Any:
        """What the server does."""
        return await self._look()

    async def models(self, request: Request) -> Lineage:
        """A task's versions."""
        run = self._training(request)

        def found(now: float) -> Lineage:
            return Lineage(run.task, run.version, run.shown, lineage(run, now))

        return await self._server.command(found)

    async def model(self, request: Request) -> Response:
        """A version's file, piece by piece. One is read into memory at a time, if its blobs are no files."""
        run, version = self._training(request), whole_number(request.path_params["version"])
        if version is None:
            raise Refused("not_found", f"{request.path_params['version']!r:.80} is no version: give a number")

        def found(now: float) -> str:
            return run.model(version).model

        blobs = self._service.blobs
        try:
            sha256 = await self._server.command(found)
            headers = {"etag": f'"{sha256}"', "content-type": "application/octet-stream"}
            path = await asyncio.to_thread(blobs.path, sha256)
            if path is not None and await asyncio.to_thread(path.is_file):
                return FileResponse(path, headers=headers)
            async with self._reading:
                return PiecewiseResponse(await asyncio.to_thread(blobs.get, sha256), headers=headers)
        except UsageError as error:
            raise Refused("not_found", str(error)) from error

    async def promote(self, request: Request) -> ChangeMade:
        """Let devices answer with a version."""
        run, version = self._training(request), (await _message(request, VersionRef)).version
        await self._command(lambda now: run.promote(version))
        self._audit("promote", request, task=run.task, version=version)
        return ChangeMade(version=version)

    async def rollback(self, request: Request) -> ChangeMade:
        """Train on from an earlier version."""
        run, version = self._training(request), (await _message(request, VersionRef)).version
        made = await self._command(lambda now: run.roll_back(version, now).version)
        self._audit("rollback", request, task=run.task, to=version, version=made)
        return ChangeMade(version=made)

    async def pause(self, request: Request) -> ChangeMade:
        """Begin no round, and give no work."""
        run = await self._run(request)
        await self._command(lambda now: run.pause())
        self._audit("pause", request, task=run.task, kind=run.kind)
        return ChangeMade()

    async def resume(self, request: Request) -> ChangeMade:
        """Go on."""
        run = await self._run(request)
        await self._command(lambda now: run.resume())
        self._audit("resume", request, task=run.task, kind=run.kind)
        return ChangeMade()

    async def cancel(self, request: Request) -> ChangeMade:
        """End the open round without a model."""
        run = await self._run(request)
        number = await self._command(lambda now: cancel_newest(run, now))
        if number is None:
            raise Refused("not_found", f"no round of {run.task} is on its way")
        self._audit("cancel", request, task=run.task, kind=run.kind, round=number)
        return ChangeMade(round=number)

    async def tokens(self, request: Request) -> EnrolmentLink:
        """A link for new devices."""
        asked, roll = await _message(request, NewToken), self._server.roll
        token = await asyncio.to_thread(
            roll.new_token,
            self._server.population,
            self._server.clock(),
            asked.uses,
            asked.lasts_s,
            asked.speaks_for,
        )
        self._audit("token", request, uses=asked.uses, lasts_s=asked.lasts_s, speaks_for=asked.speaks_for)
        return EnrolmentLink(self._invite(token))

    async def devices(self, request: Request) -> DevicePage:
        """Who is enrolled, or was."""
        found = await asyncio.to_thread(self._server.roll.devices, request.query_params.get("after", ""), MOST_DEVICES)
        rows = tuple(EnrolledDevice(row.id, row.state, int(row.enrolled // DAY), int(row.seen // DAY)) for row in found)
        return DevicePage(rows, rows[-1].id if len(rows) == MOST_DEVICES else None)

    async def revoke(self, request: Request) -> Nothing:
        """Shut a device out."""
        device = request.path_params["device"]
        await asyncio.to_thread(self._server.roll.revoke, device)
        link = await asyncio.to_thread(self._server.roll.link_of, device)
        await self._server.command(lambda now: self._server.forget(device, link, now, "revoked"))
        self._audit("revoke", request)
        return Nothing()

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(await self._metrics.look(), media_type=CONTENT_TYPE)

    async def alive(self, request: Request) -> Nothing:
        """The process answers."""
        return Nothing()

    async def ready(self, request: Request) -> Nothing:
        """It can decide."""
        if self._server.trouble:
            raise Refused("not_ready", self._server.trouble, (1.0, 3.0))
        return Nothing()

    # ── what the endpoints share ─────────────────────────────────────────────────────────────────────────────────────

    def routes(self) -> list[BaseRoute]:
        """All of the plane."""
        task = "/v1/admin/models/{task}"
        open_to_all = [
            ("GET", "/healthz", self.alive),
            ("GET", "/readyz", self.ready),
            ("GET", "/metrics", self.metrics),
            ("POST", "/v1/admin/login", self.login),
            *(("GET", path, _page(name, kind)) for path, name, kind in _PAGE),
        ]
        verbs = (self.promote, self.rollback, self.pause, self.resume, self.cancel)
        of_admins = [
            ("POST", "/v1/admin/logout", self.logout),
            ("GET", "/v1/admin/status", self.status),
            ("GET", task, self.models),
            ("GET", f"{task}/{{version}}", self.model),
            *(("POST", f"{task}/{verb.__name__}", verb) for verb in verbs),
            ("POST", "/v1/admin/tokens", self.tokens),
            ("GET", "/v1/admin/devices", self.devices),
            ("POST", "/v1/admin/devices/{device}/revoke", self.revoke),
        ]
        all_of_them = [*open_to_all, *((method, path, self._for_admins(what)) for method, path, what in of_admins)]
        return [
            Route(path, _answering(what if method == "GET" else _in_json(what)), methods=[method])
            for method, path, what in all_of_them
        ]

    async def _exposed(self) -> bytes:
        return exposition(await self._look())

    def _for_admins(self, endpoint: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
        async def answer(request: Request) -> Any:
            self._session(request)
            return await endpoint(request)

        return answer

    def _session(self, request: Request) -> str:
        return self._access.check(request.headers.get("authorization", ""), source(request), time.time())

    def _training(self, request: Request) -> TrainingRun:
        run = self._server.run(request.path_params["task"], "train")
        if run is None:
            raise self._no_task(request)
        if not isinstance(run, TrainingRun):
            raise Refused("not_found", "an edge makes no models, and keeps none: ask the server above it")
        return run

    async def _run(self, request: Request) -> Run:
        kind = (await _message(request, RunRef)).kind
        run = self._server.run(request.path_params["task"], kind)
        if run is None and self._server.run(request.path_params["task"], "train") is not None:
            raise Refused("not_found", "nobody measures this task's models: serve it with --evaluate")
        if run is None:
            raise self._no_task(request)
        return run

    def _no_task(self, request: Request) -> Refused:
        names = ", ".join(task.name for task in self._server.tasks)
        there = f"its tasks are {names}" if names else "it serves no task yet"
        return Refused("not_found", f"there is no task {request.path_params['task']!r:.80} here; {there}")

    async def _command(self, do: Callable[[float], Any]) -> Any:
        """Let the deciding thread change something. Refused where that cannot be, or is another replica's to do."""

        def done(now: float) -> Any:
            if not self._server.leads:
                raise UsageError(f"replica {self._server.replica.leader} leads: say it to that one")
            return do(now)

        try:
            return await self._server.command(done)
        except UsageError as error:
            raise Refused("not_found", str(error)) from error

    def _audit(self, what: str, request: Request, **said: Any) -> None:
        AUDIT.info("%s", what, extra={"said": {"from": source(request), **said}})


def admin_app(service: Service, access: Access, invite: Callable[[str], str], names: Sequence[str] = ()) -> ASGIApp:
    """The admin plane as an ASGI application. names: hosts that the operator calls it by."""

    async def not_there(request: Request, error: Exception) -> Response:
        code = "method" if isinstance(error, HTTPException) and error.status_code == 405 else "not_found"
        return problem(Refused(code, "the admin plane has no such path, or not with this method"))

    plane = AdminPlane(service, access, invite)
    app = Starlette(
        routes=plane.routes(),
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


def _answering(endpoint: Callable[[Request], Awaitable[Any]]) -> Any:
    async def answer(request: Request) -> Response:
        found = await endpoint(request)
        return found if isinstance(found, Response) else Response(write(found), media_type="application/json")

    return explained(answer, lambda code: None)


def _in_json(endpoint: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    """An endpoint that changes something: no form of a page can ask for it."""

    async def answer(request: Request) -> Any:
        if not is_json(request):
            raise Refused("encoding", "say Content-Type: application/json")
        return await endpoint(request)

    return answer


def _turned_away(status: int, code: str, detail: str) -> Response:
    return Response(write(Problem(code, detail)), status, media_type="application/problem+json")


def _page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """A file that lies in the package; it holds no secret."""
    body = resources.files("sumus.operations").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(body, media_type=kind)

    return answer


async def _message(request: Request, form: type[M]) -> M:
    body = await _BODIES.read(request, announced(request, MAX_CONTROL))
    if (twice := repeated(body)) is not None:
        raise Refused(
            "malformed", f"the name {twice[0]!r:.80} stands twice in one object, the second time in line {twice[1]}"
        )
    return read(form, body)
