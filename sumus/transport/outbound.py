"""Finds the proxy for requests to other networks, from the environment variables HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and
NO_PROXY.

    proxy = proxy_to("https", "fl.example.org", 443)          None if the server is reached directly

As with curl, the names are also read in lower case. HTTP_PROXY is read in lower case only: a web server may set a
variable with this name in capitals from a header of a request. Requests to this machine itself never use a proxy.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from urllib3.exceptions import LocationParseError
from urllib3.util import make_headers, parse_url

from sumus.errors import UsageError
from sumus.transport.hosts import ip_of, is_loopback


@dataclass(frozen=True)
class Outbound:
    """A proxy.

    Attributes:
        url: scheme://HOST:PORT, without user and password.
        host: The proxy's name or address.
        port: The proxy's port.
        headers: The headers with the user and the password, if the proxy needs them.
        variable: The environment variable that gives the proxy.
    """

    url: str
    host: str
    port: int
    headers: Mapping[str, str]
    variable: str


def proxy_to(scheme: str, host: str, port: int, environment: Mapping[str, str] = os.environ) -> Outbound | None:
    """Return the proxy for requests to a server; None if no proxy is used.

    Raises:
        UsageError: The environment names a proxy that is not an HTTP proxy.
    """
    host = host.strip("[]").lower()
    names = [f"{scheme}_proxy", *([] if scheme == "http" else [f"{scheme}_proxy".upper()]), "all_proxy", "ALL_PROXY"]
    variable = next((name for name in names if environment.get(name)), None)
    excepted = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if variable is None or is_loopback(host) or _is_excepted(host, port, excepted):
        return None
    said = environment[variable].strip()
    try:
        parsed = parse_url(said if "://" in said else f"http://{said}")
    except LocationParseError:
        parsed = parse_url("")
    if not parsed.host or parsed.scheme not in ("http", "https"):
        shown = (
            f"a {parsed.scheme}:// proxy"
            if parsed.host and parsed.scheme
            else "something that is not a proxy's address"
        )
        raise UsageError(
            f"{variable} in the environment names {shown}: sumus can only use http://HOST:PORT; or set NO_PROXY={host}"
        )
    at = parsed.port or (443 if parsed.scheme == "https" else 80)
    headers = make_headers(proxy_basic_auth=unquote(parsed.auth)) if parsed.auth else {}
    return Outbound(f"{parsed.scheme}://{parsed.host}:{at}", parsed.host.strip("[]"), at, headers, variable)


def _is_excepted(host: str, port: int, excepted: str) -> bool:
    """Return whether NO_PROXY lists a host.

    An entry matches the host itself, a parent domain of the host, or a network that contains its address; `*` matches all
    hosts. An entry may end with a port.
    """
    address = ip_of(host)
    for word in (part.strip().lower() for part in excepted.split(",")):
        name, ports = word, None
        if ip_of(word) is None and word.rpartition(":")[2].isdecimal():
            name, _, ports = word.rpartition(":")
        name = name.strip("[]").lstrip("*") if name != "*" else name
        if not name or (ports is not None and int(ports) != port):
            continue
        if name == "*" or host == name.lstrip(".") or host.endswith(f".{name.lstrip('.')}"):
            return True
        if address is not None and _holds(name, address):
            return True
    return False


def _holds(network: str, address: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
