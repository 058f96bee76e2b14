"""Converts the names of hosts in addresses and headers to one spelling.

host_of("LOCALHOST.:8081")                   "localhost"
host_of("[::ffff:127.0.0.1]:8081")           "127.0.0.1"
listen_address("127.0.0.1:0")                ("127.0.0.1", 0)
"""

import ipaddress
import re

from sumus.errors import UsageError
from sumus.text import whole_number

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)(?:%[a-z0-9._~%-]+)?\]|([a-z0-9_.-]+))(?::[0-9]{0,5})?")


def host_of(authority: str) -> str | None:
    """Return the host in `NAME`, `NAME:PORT`, `[ADDRESS]:PORT` or an address without port; None for any other text."""
    text = authority.strip().lower()
    if (address := ip_of(text)) is not None:
        return address
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name = found[1] or found[2].removesuffix(".")
    return ip_of(name) or (name if found[2] else None) or None


def ip_of(text: str) -> str | None:
    """Return an IP address in its usual spelling, without a zone; None for any other text. An IPv4 address that is written as
    IPv6 is converted to IPv4.
    """
    try:
        ip = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine."""
    address = ip_of(host)
    return host == "localhost" if address is None else ipaddress.ip_address(address).is_loopback


def listen_address(listen: str) -> tuple[str, int]:
    """Return the host and the port of a command's argument `HOST:PORT`.

    Raises:
        UsageError: The text is not of the form HOST:PORT.
    """
    host, colon, digits = listen.rpartition(":")
    port = whole_number(digits, 5)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or "[" in host or "]" in host or port is None or port > 65535:
        raise UsageError(f"--listen {listen!r:.80}: write HOST:PORT, such as 127.0.0.1:0")
    return host, port
