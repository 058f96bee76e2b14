"""The interface of transports, which send a request to a server and return its response. All implementations pass the same test
suite.

    answer = transport.request("GET", "/healthz")
    answer.status, answer.headers, answer.body

`request` returns a complete response or raises Unreachable. In the second case the caller does not know whether the server
received the request, so requests must be safe to repeat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ssl import SSLCertVerificationError
from typing import Protocol

from sumus.errors import SumusError

PATIENCE = 30.0
"""The number of seconds to wait for a response if the caller gives none."""
MOST = 2**20
"""The longest body of a response, in bytes, if the caller gives no other number."""


class Unreachable(SumusError):
    """No complete response arrived: the server is unreachable or slow, or its response is cut off or too long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of a server.

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
    """Return the reason, as text for a person, why a server cannot be reached. For an unknown error, return the first line of
    its message.
    """
    reason = getattr(error, "reason", None)
    inner = (
        reason if isinstance(reason, BaseException) else error
    )  # the attribute `reason` of a TLS error is only a word
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
    """Return a message that explains why a server's certificate is not accepted, and what the user can do.

    Args:
        error: A TLS error, or an error that was caused by one.
        url: The server's address.
        pinned: Whether only one pinned authority is trusted.
    """
    said, now = " ".join(str(error).split()).lower(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if "expired" in said:
        return (
            f"the certificate of {url} has expired, and the time here is {now}: if this machine's clock is right, ask the "
            "server's operator to renew it"
        )
    if "not yet valid" in said:
        return f"the certificate of {url} is not valid yet, and the time here is {now}: is this machine's clock slow?"
    if "hostname mismatch" in said or "ip address mismatch" in said:
        return f"the certificate of {url} is for other names: use the address in the link, or a name in the certificate"
    if pinned:
        return (
            f"the certificate of {url} is not from the authority that is known here: the server has made a new one, or this is "
            f"another server. Ask its operator for the new pin, and give the pin once at the end of the address: {url}/#pin=HEX"
        )
    return (
        f"the certificate of {url} is not from an authority that this machine trusts: if the server made its own (--tls auto), "
        f"give its link, or its pin at the end of the address: {url}/#pin=HEX; if the certificate is from your own authority, "
        "give --authority FILE (authority=); otherwise check that this is the server to which you were invited"
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
        """Send a request once. A redirection is returned like any other response, and is not followed.

        Args:
            method: The HTTP method.
            path: The path with its query, encoded as it is sent.
            body: The body.
            headers: Further headers.
            patience: The number of seconds within which the complete response must arrive.
            most: The largest number of bytes in the response's body.

        Raises:
            Unreachable: No complete response arrived, or its body is too long.
        """
        ...

    def close(self) -> None:
        """Release all resources. The transport must not be used again."""
        ...
