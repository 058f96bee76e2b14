"""Sends parts of objects (HTTP ranges): a device whose download was interrupted requests the rest."""

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from sumus.http.answers import PiecewiseResponse
from sumus.server.objects import HeldObject
from sumus.text import whole_number


def asked_range(request: Request, size: int) -> tuple[int, int] | None:
    """Read the start and the end of the single range in a request.

    Returns:
        The range, which is empty if the object has no such bytes. None means the complete object. Several ranges and invalid
        ranges also give None, since HTTP lets a server ignore them.
    """
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


def keep_range(request: Request, asked: tuple[int, int] | None) -> None:
    """Replace the range in a request's headers with this one, for the response class that reads the headers next."""
    headers = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
    if asked is not None:
        headers.append((b"range", f"bytes={asked[0]}-{max(asked[1] - 1, 0)}".encode()))
    request.scope["headers"] = headers


def ranged(found: HeldObject, asked: tuple[int, int] | None, headers: Mapping[str, str]) -> Response:
    """Return the response with an object, or with the requested range of the object."""
    body = found.body
    whole = {**headers, "accept-ranges": "bytes"}
    if asked is None:
        return PiecewiseResponse(body, headers=whole, keeps=found)
    begin, end = asked
    if begin >= end:
        return Response(status_code=416, headers={**whole, "content-range": f"bytes */{len(body)}"})
    part = {**whole, "content-range": f"bytes {begin}-{end - 1}/{len(body)}"}
    return PiecewiseResponse(memoryview(body)[begin:end], 206, part, found)
