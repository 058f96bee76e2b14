"""What carries a request to a server and brings back its answer; its implementations pass one contract suite.

    answer = transport.request("GET", "/healthz")
    answer.status, answer.headers, answer.body

An answer comes whole or not at all. Where none comes, nobody knows whether the request arrived: whoever asks must be able to
ask the same again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ssl import SSLCertVerificationError
from typing import Protocol

from sumus.errors import SumusError

PATIENCE = 30.0
"""Seconds to wait for an answer, where nobody says how many."""
MOST = 2**20
"""The longest body of an answer, in bytes, where nobody says."""


class Unreachable(SumusError):
    """No whole answer came: the server is not there, or is slow, or what it said is cut off or too long."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answers. headers: by name in lower case.  body: as it was sent, not decoded."""

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
    """Why a server cannot be reached, in words; for what has none, its own first line without Python's wrapping."""
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, BaseException) else error  # an error of TLS has a word there
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
    """Why a server's certificate is not taken, and what to do.

    Args:
        error: of TLS, or around such an error.
        url: the server's address.
        pinned: whether one authority alone is trusted, which was pinned once.
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
    """A way to one server; several threads may use it at once."""

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        patience: float = PATIENCE,
        most: int = MOST,
    ) -> Answer:
        """Ask once; redirections are answers like others. path: with its query, as it goes over the wire.

        patience: seconds to the whole answer.  most: bytes of its body, more are not read. Raises Unreachable.
        """
        ...

    def close(self) -> None:
        """End what was begun for it; it is not used again."""
        ...
