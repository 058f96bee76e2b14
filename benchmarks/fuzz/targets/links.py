"""Enrolment links and addresses of servers, and the certificate that a link's pin is compared with."""

from collections.abc import Callable, Mapping

from urllib3.util import parse_url

from benchmarks.fuzz.target import Target
from sumus.device.link import Link, given, is_loopback, link_of_command, pin_of, read_link
from sumus.errors import ExperimentError

PIN, SECRET = "0123456789abcdef" * 4, "a-secret-token"
PEM = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"


def check(data: bytes) -> None:
    """Check that a link that is read can be written and is read again unchanged, and that HTTP can reach its server."""
    text = data.decode("utf-8", "replace")
    for insecure in (False, True):
        link, why = _read(lambda insecure=insecure: read_link(text, insecure))
        if link is None:
            assert SECRET not in why or SECRET in text.partition("#")[0]
            continue
        assert link.server or link.token
        assert read_link(written(link), insecure) == link
        if link.server:
            address = parse_url(link.server)
            assert address.scheme in ("http", "https")
            assert address.host
            assert address.auth is None
            assert address.url == link.server
            assert insecure or address.scheme == "https" or is_loopback(address.host.strip("[]"))
    first, _, second = text.partition("\n")
    for command, secret in ((first, second), (first, None), (None, text)):
        environment = {} if secret is None else {"SUMUS_TOKEN": secret}
        _read(lambda command=command, environment=environment: given(command, None, environment))
    _read(lambda: link_of_command(text))
    pin = pin_of(text)
    assert pin is None or len(pin) == 64


def _read(how: Callable[[], Link]) -> tuple[Link | None, str]:
    """Return a link, or the reason why there is none."""
    try:
        return how(), ""
    except ExperimentError as error:
        return None, str(error)


def written(link: Link) -> str:
    """Return a link as text, with one line for each token."""
    lines = list[str]()
    for token in (None,) if link.token is None else link.token.split(" "):
        said = {"enrol": token, "pin": link.pin}
        fragment = "&".join(f"{name}={value}" for name, value in said.items() if value is not None)
        lines.append(f"{link.server}/#{fragment}" if link.server else str(token))
    return "\n".join(lines)


def seeds() -> Mapping[str, bytes]:
    """Return links of every kind, and texts that are no links."""
    texts = {
        "link": f"https://sumus.example.org:8443/#enrol={SECRET}&pin={PIN}",
        "token": SECRET,
        "address": "https://sumus.example.org",
        "address-and-token": f"https://sumus.example.org\n{SECRET}",
        "address-and-link": f"https://sumus.example.org\nhttps://sumus.example.org/#enrol={SECRET}",
        "address-and-another": f"https://sumus.example.org\nhttps://other.example.org/#enrol={SECRET}",
        "ipv4": "http://127.0.0.1:8080",
        "ipv6": f"https://[::1]:8443/#pin={PIN}",
        "ipv6-zone": "https://[fe80::1%25eth0]:8443",
        "localhost": "http://localhost:1",
        "not-encrypted": "http://sumus.example.org",
        "pin-not-encrypted": f"http://127.0.0.1/#pin={PIN}",
        "path": "https://sumus.example.org/a",
        "query": "https://sumus.example.org/?a=b",
        "user": f"https://{SECRET}@sumus.example.org",
        "password": f"https://:{SECRET}@sumus.example.org",
        "port-too-large": "https://sumus.example.org:99999",
        "port-no-number": "https://sumus.example.org:x",
        "half-bracket": "https://[::1",
        "no-address-in-brackets": "https://[x]",
        "letters-that-become-others": "https://sumus.example.org℀",
        "blank-in-host": "https://a b",
        "control-character": "https://a\x01b",
        "long-label": f"https://{'a' * 80}.org",
        "other-scheme": "ftp://sumus.example.org",
        "token-cut": f"https://sumus.example.org/#enrol={SECRET[:4]}%20",
        "pin-cut": f"https://sumus.example.org/#pin={PIN[:-1]}",
        "certificate": PEM,
        "certificate-cut": PEM[:40],
        "empty": "",
    }
    return {name: text.encode() for name, text in texts.items()}


TARGET = Target(
    "links",
    check,
    seeds,
    {"sumus.device.link": ("read_link", "link_of_command", "is_loopback", "pin_of")},
    (b"https://", b"http://", b"/#enrol=", b"&pin=", b"[::1]", b":8443", b"@", b"%", b"localhost"),
)
