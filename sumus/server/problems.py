"""Converts the exceptions of failed requests into answers, for both planes of a server.

Every such answer is an RFC 9457 problem with a code from the closed list `wire.messages.STATUS`.
"""

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response

from sumus.errors import ParticipantError
from sumus.logs import logger
from sumus.server.windows import AGAIN
from sumus.wire.messages import Problem, Refused, Window, write

LOG = logger("sumus.server")
AFTER_DEFECT: Window = (5.0, 30.0)
"""The retry window, in seconds, if a request failed because of a defect of the server."""


def problem(refused: Refused) -> Response:
    """Make the answer to a refused request."""
    said: Problem = refused.problem
    headers = {"retry-after": str(max(1, round(said.retry_after_s[0])))} if said.retry_after_s is not None else {}
    return Response(write(said), refused.status, headers, "application/problem+json")


def refusal_of(request: Request, error: Exception) -> Refused:
    """Return the refusal for an exception. Storage failures and defects are written to the log.

    Args:
        request: The request that failed.
        error: The exception that its endpoint raised.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, ParticipantError):
        return Refused(error.code if request.method == "PUT" else "malformed", str(error))
    if isinstance(error, SQLAlchemyError | OSError):
        LOG.error("storage fails: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return Refused("not_ready", "the server's storage does not answer", AGAIN)
    LOG.error("a request failed: %s", type(error).__name__, exc_info=error)
    return Refused(
        "failed", "the request failed because of a defect of the server; the server's log has the details", AFTER_DEFECT
    )
