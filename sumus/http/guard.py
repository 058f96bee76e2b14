"""Guards a plane (one HTTP interface of a server) that a browser can reach: the plane answers only under its own host names,
and refuses requests from web pages of other sites.

    app = Starlette(routes=routes, middleware=[guard(names, refusal, "--name")])

A web page can make a name of its own resolve to 127.0.0.1 (DNS rebinding). Its requests then come from a browser on this
machine, and the page may read the responses. The `Host` of these requests is the page's name. So a plane accepts only the
loopback names, the address on which the connection arrived, and the names that its operator has given. A page can also send
requests to an address whose responses it may not read (CSRF): a browser reveals this in `Origin` and in `Sec-Fetch-Site`.
Endpoints that change something also require `is_json`, since a form on a page cannot send JSON.
"""

import hmac
from collections.abc import Callable, Iterable
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sumus.text import printable
from sumus.transport.hosts import host_of, ip_of, is_loopback

WRONG_HOST, OTHER_SITE = "wrong_host", "other_site"
STATUS = {WRONG_HOST: 421, OTHER_SITE: 403}
Refusal: TypeAlias = Callable[[int, str, str], Response]
"""A function that makes a response, in the plane's own format, from a status, a code and a detail."""


def guard(names: Iterable[str], refusal: Refusal, option: str) -> Middleware:
    """Make the middleware that checks the host name and the origin of each request before the application sees the request.

    Args:
        names: The host names or addresses that the operator uses for this plane.
        refusal: Makes the response to a request that fails a check.
        option: The command-line option with which an operator adds a name.
    """
    known = frozenset(filter(None, map(host_of, names)))
    return Middleware(_guarded, known, refusal, option)


def _guarded(app: ASGIApp, known: frozenset[str], refusal: Refusal, option: str) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
        elif not _is_called(scope, known):
            said = printable(Headers(scope=scope).get("host", "nothing"))
            detail = (
                f"this server does not accept the host name {said:.100}: use the address that the server printed, or start the "
                f"server with {option} HOST"
            )
            await refusal(STATUS[WRONG_HOST], WRONG_HOST, detail)(scope, receive, send)
        elif _is_of_other_site(scope):
            detail = "a web page of another site sent this request, which is not allowed: use this server's own pages"
            await refusal(STATUS[OTHER_SITE], OTHER_SITE, detail)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return answer


def shows(request: Request, token: bytes) -> bool:
    """Return whether a request shows a token (`Authorization: Bearer TOKEN`), in a time that does not depend on the token."""
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), token) and scheme.lower() == "bearer"


def is_json(request: Request) -> bool:
    """Return whether a request declares its body to be JSON."""
    return media_type(request) == "application/json"


def media_type(request: Request) -> str:
    """Return the media type of a body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_called(scope: Scope, known: frozenset[str]) -> bool:
    given = Headers(scope=scope).getlist("host")
    host = host_of(given[0]) if len(given) == 1 else None
    if host is None:
        return False
    here = scope.get("server") or ("", 0)
    return is_loopback(host) or host in known or host in (ip_of(here[0]), here[0])


def _is_of_other_site(scope: Scope) -> bool:
    """Return whether the browser's headers show that a page of another site sent a request. The answer is no if a person
    follows a link.
    """
    headers = Headers(scope=scope)
    if scope["method"] in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
        return False
    origins = headers.getlist("origin")
    own = [origin.partition("://")[2].lower() == headers["host"].lower() for origin in origins]
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or not all(own)
