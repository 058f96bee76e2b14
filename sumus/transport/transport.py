"""The interface of transports, which carry a request to a server and bring back its answer. All implementations pass
one suite of tests.

    answer = transport.request("GET", "/healthz")
    answer.status, answer.headers, answer.body

An answer arrives whole or not at all. If none arrives, the caller does not know whether the request was received, so it
must be safe to send the same request again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ssl import SSLCertVerificationError
from typing import Protocol

from sumus.errors import SumusError

PATIENCE = 30.0
"""Seconds to wait for an answer, if the caller gives no number."""
MOST = 2**20
"""The longest body of an answer in bytes, if the caller gives no number."""


class Unreachable(SumusError):
    """No whole answer arrived: the server is unreachable or slow, or its answer is cut off or too long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a server.

    Attributes:
        status: The HTTP status.
        headers: The headers, by name in lower case.
        body: The body as it was sent, not decoded.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""


_WORDS = (
    (("badstatusline", "unknownprotocol", "not http"), "it does not answer in HTTP"),
    (("refused",), "nothing listens there"),
    (
        ("name or service", "name resolution", "nodename nor servname", "getaddrinfo", "no address associated"),
        "no such host",
    ),
    (("timed out", "timeout"), "no answer in time"),
    (("reset by peer", "broken pipe", "remote end closed", "connection aborted"), "it ended the connection"),
    (("no route to host", "network is unreachable"), "no network leads there"),
)


def why_unreached(error: BaseException) -> str:
    """Say in words why a server cannot be reached. An error without such words gives its own first line, without
    Python's wrapping."""
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, BaseException) else error  # the reason of a TLS error is a word
    if isinstance(inner, SSLCertVerificationError):
        return f"its certificate is not trusted: {inner.verify_message or 'it cannot be checked'}"
    text = " ".join(str(inner).split())
    looked = f"{type(inner).__name__} {text}".lower()
    for signs, said in _WORDS:
        if any(sign in looked for sign in signs):
            return said
    plain = getattr(inner, "strerror", None) or text.rpartition("[Errno")[2].partition("] ")[2] or text
    return str(plain) or "it ended the connection"


def why_untrusted(error: BaseException, url: str, pinned: bool) -> str:
    """Say why a server's certificate is not accepted, and what the user can do.

    Args:
        error: An error of TLS, or an error around one.
        url: The server's address.
        pinned: Whether only one pinned authority is trusted.
    """
    said, now = " ".join(str(error).split()).lower(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if "expired" in said:
        return (
            f"the certificate of {url} is past its end, and here it is {now}: if this machine's clock is right, ask who runs the "
            "server to renew it"
        )
    if "not yet valid" in said:
        return f"the certificate of {url} is not valid yet, and here it is {now}: is this machine's clock late?"
    if "hostname mismatch" in said or "ip address mismatch" in said:
        return (
            f"the certificate of {url} is for other names: give the address that stands in the link, or that it is for"
        )
    if pinned:
        return (
            f"the certificate of {url} does not come from the authority that is known here: the server has made a new one, or it "
            f"is another server. Ask who runs it for the new pin, and give it once behind the address: {url}/#pin=HEX"
        )
    return (
        f"the certificate of {url} is from nobody that this machine trusts: if the server made its own (--tls auto), give its "
        f"link, or its pin behind the address: {url}/#pin=HEX; if it comes from an authority of your own, name that with "
        "--authority FILE (authority=); else, is this the server that you were invited to?"
    )


class Transport(Protocol):
    """A connection to one server. Several threads may use it at once."""

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Send a request once. A redirection is an answer like any other.

        Args:
            method: The HTTP method.
            path: The path with its query, as it is sent.
            body: The body.
            headers: Further headers.
            patience: Seconds until the whole answer must have come.
            most: The most bytes of the answer's body.

        Raises:
            Unreachable: No whole answer arrived, or its body is too long.
        """
        ...

    def close(self) -> None:
        """Release all resources. The transport must not be used again."""
        ...
