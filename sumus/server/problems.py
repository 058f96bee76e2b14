"""Answers that are errors: each has a code of the closed list, on every plane of a server."""

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sumus.errors import ParticipantError
from sumus.http.bodies import let_go
from sumus.logs import logger
from sumus.server.windows import AGAIN
from sumus.wire.messages import Problem, Refused, Window, write

LOG = logger("sumus.server")
_MUCH_LATER: Window = (5.0, 30.0)
"""The window to come back in after a defect of the server."""

Answering = Callable[[Request], Awaitable[Response]]


def problem(refused: Refused) -> Response:
    """Make the answer of a refused request."""
    said: Problem = refused.problem
    headers = {"retry-after": str(max(1, round(said.retry_after_s[0])))} if said.retry_after_s is not None else {}
    return Response(write(said), refused.status, headers, "application/problem+json")


def explained(endpoint: Answering, refused: Callable[[str], None]) -> Any:
    """Turn whatever an endpoint raises into an answer in the words of the closed list.

    Args:
        endpoint: The endpoint.
        refused: Is called with the code of each refusal.
    """

    async def explain(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except Exception as error:
            response = said(request, error)
            let_go(error)
        await response(scope, receive, send)

    def said(request: Request, error: Exception) -> Response:
        refusal = _refusal(request, error)
        refused(refusal.problem.code)
        return problem(refusal)

    return _Asgi(explain)


def _refusal(request: Request, error: Exception) -> Refused:
    """Choose the refusal for an error; a defect of ours leaves its traceback in the log."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ParticipantError):
        return Refused(error.code if request.method == "PUT" else "malformed", str(error))
    if isinstance(error, SQLAlchemyError | OSError):
        LOG.error("storage fails: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return Refused("not_ready", "the server's storage does not answer", AGAIN)
    LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
    return Refused("failed", "a defect of the server, which is in its log", _MUCH_LATER)


class _Asgi:
    """An endpoint in raw ASGI: Starlette wraps functions, and leaves objects as they are."""

    def __init__(self, call: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)
