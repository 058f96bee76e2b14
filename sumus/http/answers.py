"""HTTP responses that every plane needs: for failed requests, and for bodies too long to be copied. A plane is one HTTP
interface of a server, for devices or for admins, with a socket of its own.

Route(path, ExplainedEndpoint(endpoint, answer_to), methods=["GET"])     `answer_to` answers if the endpoint raises
return PiecewiseResponse(body)                                           sent piece by piece, as fast as the client reads
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sumus.http.bodies import let_go

Answering: TypeAlias = Callable[[Request], Awaitable[Response]]
"""An endpoint: it takes a request and returns the response."""

PIECE = 64 * 2**10
"""The largest number of bytes that are passed to a connection at once."""


class PiecewiseResponse(Response):
    """A response whose body is in memory. It passes one piece at a time to the connection, so a slow client does not cause a
    copy of the remaining bytes.

    Args:
        body: The body, which many responses may share.
        keeps: An object that must stay in memory until the response is sent.
    """

    def __init__(
        self,
        body: bytes | memoryview,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        keeps: object = None,
    ) -> None:
        super().__init__(None, status_code, {**(headers or {}), "content-length": str(len(body))})
        self._body, self._keeps = memoryview(body), keeps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as ASGI defines it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for begin in range(0, max(len(self._body), 1), PIECE):
            end = begin + PIECE
            more = end < len(self._body)
            await send({"type": "http.response.body", "body": self._body[begin:end], "more_body": more})


class ExplainedEndpoint:
    """An endpoint that turns every exception into a response. It is a raw ASGI application, since Starlette wraps functions but
    not objects.

    Args:
        endpoint: Handles a request: returns the response, or raises an exception.
        answer_to: Makes the response to a request whose endpoint raised an exception.
    """

    def __init__(self, endpoint: Answering, answer_to: Callable[[Request, Exception], Response]) -> None:
        self._endpoint, self._answer_to = endpoint, answer_to

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI defines it."""
        request = Request(scope, receive, send)
        try:
            response = await self._endpoint(request)
        except Exception as error:  # the request ends here: any exception becomes its response
            response = self._answer_to(request, error)
            let_go(error)
        await response(scope, receive, send)
