"""Answers that are long: sent piece by piece, as the other side reads them."""

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE = 64 * 2**10
"""Bytes that are handed to a connection at once."""


class PiecewiseResponse(Response):
    """A body in memory of which one piece at a time is given to the connection: a reader who is slow makes no copy of the rest.

    Args:
        body: may be shared by many answers.
        keeps: whatever must stay in memory until the answer is sent.
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
        """As ASGI has it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for begin in range(0, max(len(self._body), 1), PIECE):
            end = begin + PIECE
            more = end < len(self._body)
            await send({"type": "http.response.body", "body": self._body[begin:end], "more_body": more})
