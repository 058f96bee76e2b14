"""The endpoints of the device plane for edges: the runs of the server, relayed check-ins, and sums."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request

from sumus.errors import ParticipantError
from sumus.http.limits import Limits
from sumus.rounds.run import DeviceCheckIn, Run
from sumus.rounds.stages import EdgeSum
from sumus.server.identity import signed_by_device
from sumus.server.senders import Senders, compare
from sumus.server.server import Server
from sumus.wire.messages import (
    ENDPOINTS,
    CheckInAnswer,
    CheckInRequest,
    Refused,
    RelayAnswer,
    Relayed,
    RelayedAnswer,
    RelayRequest,
    Tasks,
    read,
)
from sumus.wire.reports import most_sum_bytes

FOR_EDGES = frozenset({"tasks", "relay", "report_sum"})
"""The names of the endpoints for edges."""
MOST = {endpoint.name: endpoint.most for endpoint in ENDPOINTS}


class EdgePlane:
    """The endpoints for edges."""

    def __init__(
        self, server: Server, senders: Senders, limits: Limits, in_thread: Callable[..., Awaitable[Any]]
    ) -> None:
        """Answer the requests of edges for a server.

        Args:
            server: The server.
            senders: Reads requests.
            limits: The rate limits of requests.
            in_thread: Calls a function with its arguments in a thread.
        """
        self._server, self._senders, self._limits, self._in_thread = server, senders, limits, in_thread

    async def tasks(self, request: Request) -> Any:
        """Return the runs in which an edge may take part."""
        edge, _ = await self._edge(request)
        may = self._server.roll.find(edge, self._server.clock()).speaks_for
        return await self._server.command(lambda now: Tasks(tuple(self._server.tasks.for_edges(may))))

    async def relay(self, request: Request) -> Any:
        """Answer check-ins that an edge relays for its devices."""
        edge, body = await self._edge(request)
        asked = read(RelayRequest, body)
        server = self._server
        if await self._in_thread(server.roll.note_members, edge, asked.members, server.clock()):
            server.crowd.note_change()
        for each in asked.ended:
            run = server.run(each.task, each.kind)
            if run is not None:
                await server.abort(run, f"{each.device}/{each.session}", each.reason, edge)
        signed = await self._in_thread(lambda: [signed_by_device(each, server.population) for each in asked.asked])
        may = server.roll.find(edge, server.clock()).speaks_for
        answers = (self._relayed(edge, may, each, by_it) for each, by_it in zip(asked.asked, signed, strict=True))
        return RelayAnswer(tuple(await asyncio.gather(*answers)))

    async def report_sum(self, request: Request) -> Any:
        """Count an edge's sum. It is handled like a report, but contains the reports of many devices."""
        run = run_of(self._server, request.path_params)
        most, least = most_sum_bytes(run.hop, run.most_together), run.least if run.edges.rounds > 1 else None
        async with self._senders.upload(request, most, self._limits.edge_request) as (edge, body, digest):

            def checked() -> EdgeSum:
                compare(body, digest)
                if not (may := self._server.roll.find(edge, self._server.clock()).speaks_for):
                    raise Refused(
                        "not_edge",
                        "this sender was enrolled as a device: enrol the edge with a link of `sumus admin token --edge`",
                    )
                report = run.intake.read_sum(body, edge, run.most_together, least)
                if len(report.sessions) > may:
                    raise Refused(
                        "not_edge",
                        f"the sum has {len(report.sessions)} reports, but the edge's token allows at most {may} devices",
                    )
                return report

            return await self._server.report(run, await self._in_thread(checked))

    async def _relayed(self, edge: str, may: int, asked: Relayed, signed: bool) -> RelayedAnswer:
        """Answer a relayed check-in of one device.

        Args:
            edge: The edge's id.
            may: The largest number of devices of the edge.
            asked: The relayed check-in of the device.
            signed: Whether the device itself has signed the check-in.
        """
        try:
            if not signed:
                raise Refused(
                    "bad_signature", "the signature was not made by this device, or was made for another check-in"
                )
            self._limits.relayed(self._server.population, edge, may, asked.device, time.monotonic())
            answer = await self._server.check_in(DeviceCheckIn(asked.device, _passed_on(asked), edge, asked))
        except Refused as refused:
            problem = refused.problem
            if problem.code == "rate":
                later = CheckInAnswer(retry_after_s=problem.retry_after_s, reason="rate")
                return RelayedAnswer(asked.device, later)
            return RelayedAnswer(asked.device, code=problem.code, serial=problem.serial)
        return RelayedAnswer(asked.device, replace(answer, released={}))

    async def _edge(self, request: Request) -> tuple[str, bytes]:
        """Return the id of the edge that sent a request, and the request's body."""
        endpoint = "relay" if request.method == "POST" else "tasks"
        edge, body = await self._senders.signed(request, MOST[endpoint])
        self._limits.edge_request(edge, time.monotonic())
        if not self._server.roll.find(edge, self._server.clock()).speaks_for:
            raise Refused(
                "not_edge",
                "this sender was enrolled as a device: enrol the edge with a link of `sumus admin token --edge`",
            )
        return edge, body


def run_of(server: Server, params: Mapping[str, Any]) -> Run:
    """Return the run that the path of a request names."""
    kind = params["kind"]
    run = server.run(params["task"], kind) if kind in ("train", "evaluate") else None
    if run is None:
        raise Refused("unknown_session", "this session was not given to this device")
    return run


def _passed_on(relayed: Relayed) -> CheckInRequest:
    """Read a relayed check-in, without the question about an earlier session, which the edge itself answers, and without the
    time to wait, since a relayed check-in is not held open.
    """
    try:
        request = read(CheckInRequest, relayed.check_in.encode())
    except ParticipantError as error:
        raise Refused("malformed", str(error)) from error
    return replace(request, previous=None, wait_s=0.0)
