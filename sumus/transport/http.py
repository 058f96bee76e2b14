"""Requests over HTTP and HTTPS. Connections to one server are kept open. Its certificate may be checked against a single
authority.

transport = HttpTransport("https://sumus.example.org:8443", authority=pem)
"""

import http.client
import ssl
import time
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError, ProtocolError, ProxyError, SSLError
from urllib3.util import parse_url

from sumus.errors import ExperimentError
from sumus.text import amount
from sumus.transport.outbound import Outbound, proxy_to
from sumus.transport.transport import MOST, PATIENCE, Answer, Unreachable, why_unreached, why_untrusted

CONNECTING = 10.0
"""The longest time for opening a connection, in seconds."""
_BLOCK = 2**16


class HttpTransport:
    """A `Transport` to a server at scheme://host:port, through the environment's proxy if there is one
    (`sumus.transport.outbound`). Redirections are not followed.

    Args:
        url: scheme://host:port of the server.
        authority: Certificates in PEM. The server's certificate must be one of them, or signed by one of them. They replace the
            system's certificates. None uses the system's certificates.
        connections: The number of connections that are kept open for later requests. If more threads than this send requests at
            once, they open further connections.
    """

    def __init__(self, url: str, authority: str | None = None, connections: int = 4) -> None:
        self.url, self._pinned = url, authority is not None
        try:
            parsed = parse_url(url)
        except LocationParseError as error:
            raise ExperimentError(f"{url!r} is not the address of a server: write https://HOST:PORT") from error
        scheme, host = parsed.scheme or "http", parsed.host or ""
        port = parsed.port or (443 if scheme == "https" else 80)
        more: dict[str, Any] = {"ssl_context": _context(authority)} if scheme == "https" else {}
        self._proxy = proxy_to(scheme, host, port)
        self._before = ""
        if self._proxy is not None:
            headers = dict(self._proxy.headers)
            self._manager = urllib3.ProxyManager(self._proxy.url, maxsize=connections, proxy_headers=headers, **more)
            self._pool: urllib3.HTTPConnectionPool = self._manager.connection_from_host(host, port, scheme)
            if scheme == "http":
                self._before = f"http://{host}:{port}"
        elif scheme == "https":
            self._pool = urllib3.HTTPSConnectionPool(host, port, maxsize=connections, **more)
        else:
            self._pool = urllib3.HTTPConnectionPool(host, port, maxsize=connections)

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Send a request once, and read at most `most` bytes of the response's body."""
        until = time.monotonic() + patience
        try:
            response = self._pool.urlopen(
                method,
                self._before + path,
                body=body or (None if method in ("GET", "HEAD") else b""),
                headers={"Accept-Encoding": "identity", **headers},
                timeout=urllib3.Timeout(connect=min(CONNECTING, patience), read=patience),
                redirect=False,
                assert_same_host=False,  # a proxy gets the whole address
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except SSLError as error:
            if _speaks_no_tls(error):
                raise Unreachable(no_tls(self.url)) from error
            raise Unreachable(why_untrusted(error, self.url, self._pinned)) from error
        except ProxyError as error:
            raise Unreachable(_of_proxy(self.url, self._proxy, error.original_error)) from error
        except HTTPError as error:
            hint = "; does it answer to https://?" if self.url.startswith("http://") and _hung_up(error) else ""
            raise Unreachable(f"{self.url} cannot be reached: {why_unreached(error)}{hint}") from error
        whole = False
        try:
            read = self._read(response, until, most)
            whole = True
        except HTTPError as error:
            raise Unreachable(f"the response from {self.url} was cut off: {why_unreached(error)}") from error
        finally:
            if not whole:
                response.close()  # its unread rest must not be mistaken for the next response
            response.release_conn()
        return Answer(response.status, {name.lower(): value for name, value in response.headers.items()}, read)

    def _read(self, response: urllib3.BaseHTTPResponse, until: float, most: int) -> bytes:
        body = bytearray()
        while block := response.read1(_BLOCK):
            body += block
            if len(body) > most:
                raise Unreachable(f"the response from {self.url} is longer than the limit of {amount(most)}")
            if time.monotonic() > until:
                raise Unreachable(f"the response from {self.url} took too long")
        return bytes(body)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


def unverified(url: str, path: str, patience: float = PATIENCE, most: int = 2**16) -> bytes:
    """Send a GET request to an HTTPS server without checking its certificate, and return the body. The caller must compare the
    body with a hash that it already knows.
    """
    parsed = parse_url(url)
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    host, port = (parsed.host or "").strip("[]"), parsed.port or 443
    proxy = proxy_to("https", host, port)
    connection = http.client.HTTPSConnection(
        host if proxy is None else proxy.host, port if proxy is None else proxy.port, timeout=patience, context=anyone
    )
    if proxy is not None:
        connection.set_tunnel(host, port, dict(proxy.headers))
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read(most)
    except (OSError, http.client.HTTPException) as error:
        if _speaks_no_tls(error):
            raise Unreachable(no_tls(url)) from error
        if proxy is not None:
            raise Unreachable(_of_proxy(url, proxy, error)) from error
        raise Unreachable(f"{url} cannot be reached: {why_unreached(error)}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise Unreachable(f"{url}{path} answers {response.status}: is this a sumus server?")
    return body


def _of_proxy(url: str, proxy: Outbound | None, error: Exception) -> str:
    """Return the message for a server that cannot be reached through its proxy."""
    named = "the proxy" if proxy is None else f"the proxy {proxy.url} ({proxy.variable} of the environment)"
    return f"{url} cannot be reached through {named}: {why_unreached(error)}; NO_PROXY lists hosts that are reached without it"


def no_tls(url: str) -> str:
    """Return the message for a port that does not answer in TLS."""
    return f"{url} does not speak TLS: is it http://, or another port? (behind a proxy that encrypts, give the proxy's address)"


def _speaks_no_tls(error: BaseException) -> bool:
    """Return whether the server answered the start of a TLS handshake with something else."""
    said = str(error).upper().replace(" ", "_")
    return any(
        word in said for word in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
    )


def _hung_up(error: BaseException) -> bool:
    """Return whether the server closed the connection, or did not answer in HTTP. A port for TLS does this if it gets a request
    without TLS.
    """
    inner = str(getattr(error, "reason", None) or error)
    return isinstance(error, ProtocolError) or "BadStatusLine" in inner or "reset" in inner.lower()


def _context(authority: str | None) -> ssl.SSLContext:
    if authority is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the trusted certificate may be the server's own
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as error:
        raise ExperimentError(f"the authority is not a certificate in PEM: {error}") from error
    return context
