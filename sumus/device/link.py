"""Enrolment links: the address of a server, a token that admits a device, and a pin by which the device recognizes the server.

    https://sumus.example.org:8443/#enrol=TOKEN&pin=HEX

The part after # is never sent over the network. Anybody with the token can enrol, so the token is read from a file, from
standard input or from the environment, and never from a command line, which everyone on the machine can read. `pin` is the
SHA-256 of the server's authority, a certificate in DER. With a pin, only a certificate from that authority is accepted.
"""

import hashlib
import re
import ssl
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from sumus.errors import ExperimentError, UsageError, unread
from sumus.storage.files import expanded
from sumus.transport.hosts import is_loopback
from sumus.transport.http import unverified

VARIABLE = "SUMUS_TOKEN"
"""The name of the environment variable that may hold a token or a whole link."""
_NO_ADDRESS = "this is neither a server's address nor a link: give https://HOST:PORT, or a whole link"
_QUOTES = "\"'`<>\u2018\u2019\u201c\u201d\ufeff "
"""Characters to strip around a link that was copied from a shell, a mail or a file."""
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,512}")


@dataclass(frozen=True)
class Link:
    """A server's address, with the token with which a device enrols.

    Args:
        server: scheme://host:port; empty if only a token is known.
        token: The token. For several links: their tokens, separated by blanks; the first unused one is used.
        pin: SHA-256 of the server's authority, hexadecimal.
        authority: CA certificates (PEM), one of which must have issued the server's certificate; empty if the user gave none.
    """

    server: str
    token: str | None = field(default=None, repr=False)
    pin: str | None = None
    authority: str = field(default="", repr=False)

    def vouched_for_by(self, file: str | Path | None) -> "Link":
        """Return the same link with the CA certificates of a file, which verify the server. None changes nothing."""
        if file is None:
            return self
        if self.pin is not None:
            raise UsageError("this link pins the server's authority (#pin=): leave --authority (authority=) out")
        return replace(self, authority=read_authority(file))


def read_link(text: str, insecure: bool = False) -> Link:
    """Read a link, a server's address, or a token alone.

    Args:
        text: The link, address or token; or several links of the same server, one per line, each for one device.
        insecure: Whether http:// to other machines is allowed.

    Raises:
        ExperimentError: The text is not a link, an address or a token. The error never repeats the token.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return _one_of([read_link(line, insecure) for line in lines])
    text = text.strip().strip(_QUOTES)
    if _TOKEN.fullmatch(text):
        return Link("", text)
    try:
        address = parse_url(text)  # urllib3 also connects to it: two parsers could see two hosts
    except LocationParseError:
        raise ExperimentError(_NO_ADDRESS) from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ExperimentError(_NO_ADDRESS)
    server = f"{address.scheme}://{address.host}"
    if address.path not in (None, "", "/") or address.query or address.auth is not None:
        raise ExperimentError(f"{server}: a server's address has no path, no query and no user: give https://HOST:PORT")
    if address.scheme == "http" and not (insecure or is_loopback(address.host.strip("[]"))):
        raise ExperimentError(
            f"{server} is not encrypted: use https://, or --insecure (insecure=True) if the network itself is encrypted"
        )
    said = dict(parse_qsl(address.fragment or ""))
    token, pin = said.get("enrol"), said.get("pin")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ExperimentError("the token of this link is incomplete: copy the whole link again")
    if pin is not None and not re.fullmatch(r"[0-9a-f]{64}", pin):
        raise ExperimentError("the pin of this link is incomplete: copy the whole link again")
    if pin is not None and address.scheme == "http":
        raise ExperimentError("a pin needs an https:// address: copy the link again")
    return Link(server + (f":{address.port}" if address.port else ""), token, pin)


def _one_of(links: Sequence[Link]) -> Link:
    """Combine several links of the same server into one; a device may use any of their tokens."""
    first = links[0]
    if any((link.server, link.pin) != (first.server, first.pin) or link.token is None for link in links):
        raise ExperimentError(
            "these links are not all for one server, or one has no token: give links of one server, one per line"
        )
    return replace(first, token=" ".join(link.token for link in links if link.token is not None))


def link_of_command(text: str, insecure: bool = False, option: str = "--token-file") -> Link:
    """Read a server's address from a command line, which must not contain a token; the error recommends `option`."""
    if "://" not in text:
        raise ExperimentError(f"{text!r} is not a server's address: give https://HOST:PORT")
    link = read_link(text, insecure)
    if link.token is not None:
        raise ExperimentError(
            "everyone on this machine can read a command line, so it must not contain a token: put the link into a file and "
            f"give {option} FILE, or - for standard input, or set {VARIABLE}; then ask for another token, since others may have "
            "read this one"
        )
    return link


def read_authority(file: str | Path) -> str:
    """Read the certificates (PEM) of a file. Raise UsageError if the file contains none, or cannot be read."""
    try:
        text = expanded(file).read_text(encoding="utf-8")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:  # also errors of TLS
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error
        raise UsageError(
            f"the authority {file} cannot be read ({reason}): give a file of CA certificates (PEM)"
        ) from error
    return text


def given(
    text: str | None,
    file: str | None,
    environment: Mapping[str, str],
    insecure: bool = False,
    authority: Path | None = None,
    option: str = "--token-file",
) -> Link:
    """Make the link from a command's options.

    Args:
        text: The address on the command line.
        file: A file with a token or a whole link; "-" for standard input; None for the environment.
        environment: The environment, which may hold a token or a whole link.
        insecure: Whether http:// to other machines is allowed.
        authority: A file of CA certificates (PEM), one of which must have issued the server's certificate.
        option: The command's option for `file`, for messages.
    """
    return _given(text, file, environment, insecure, option).vouched_for_by(authority)


def _given(text: str | None, file: str | None, environment: Mapping[str, str], insecure: bool, option: str) -> Link:
    link = Link("") if text is None else link_of_command(text, insecure, option)
    if file is None:
        secret = environment.get(VARIABLE)
    elif file == "-":
        secret = sys.stdin.readline()
    else:
        try:
            secret = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{option} {file} cannot be read: {unread(error)}") from error
    if not secret or not secret.strip():
        return link
    more = read_link(secret, insecure)
    if link.server and more.server and more.server != link.server:
        raise ExperimentError(f"the link is for {more.server}, but the address is {link.server}: leave the address out")
    return replace(link, server=link.server or more.server, token=more.token, pin=more.pin or link.pin)


def fetch_authority(link: Link, patience: float = 30.0) -> str:
    """Fetch the certificate (PEM) whose hash is the pin. Only the hash is trusted, whichever server answers."""
    text = unverified(link.server, "/v1/authority", patience).decode("ascii", "replace").strip()
    if pin_of(text) != link.pin:
        raise ExperimentError(
            f"{link.server} is not the server of this link: its authority does not have the link's pin; ask for a new link"
        )
    return text


def pin_of(authority: str) -> str | None:
    """Return the SHA-256 of a certificate in PEM, hexadecimal; None if the text is not a certificate."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(authority.strip())).hexdigest()
    except ValueError:
        return None
