"""Finds the client of a request that came through proxies, from the `X-Forwarded-For` header of proxies that the operator
named.

    proxies = Proxies("127.0.0.1, 10.0.0.0/8")
    proxies.client("10.0.0.7", "203.0.113.9, 198.51.100.4")          "198.51.100.4"
    app = told_by_proxies(app, proxies)                              an ASGI application that wraps another one

Each proxy appends the address of its own peer to the header. The peer, which may be anybody, wrote the text before that
address. So the header is read from its end, and reading stops at the first address that is not a named proxy.
"""

import ipaddress
from typing import TypeAlias

from starlette.types import ASGIApp, Receive, Scope, Send

from sumus.errors import UsageError
from sumus.logs import logger
from sumus.transport.hosts import host_of, ip_of

LOG = logger("sumus.serve")
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Proxies:
    """The peers whose reports of the client address are trusted.

    Args:
        named: Addresses and networks, separated by commas, or empty. `*` means every peer: then only the last address in the
            header is used, since the connected peer wrote it.
    """

    def __init__(self, named: str = "") -> None:
        words = [word for word in (part.strip() for part in named.split(",")) if word]
        self._everyone = words == ["*"]
        self._networks = [] if self._everyone else [_network(word) for word in words]

    def client(self, peer: str, forwarded: str) -> str:
        """Return the address from which a request comes.

        Args:
            peer: The address of the connected peer.
            forwarded: The value of the header; the values of several headers are joined in order with commas.
        """
        here = ip_of(peer) or peer
        for said in reversed(forwarded.split(",")):
            address = ip_of(host_of(said) or "")
            if address is None or not self.holds(here):
                break
            here = address
            if self._everyone:
                break
        return here

    def holds(self, address: str) -> bool:
        """Return whether a peer at this address is trusted."""
        if self._everyone:
            return True
        known = ip_of(address)
        return known is not None and any(ipaddress.ip_address(known) in network for network in self._networks)


def told_by_proxies(app: ASGIApp, proxies: Proxies) -> ASGIApp:
    """Wrap an application so that it sees the client address that these proxies report. Other peers are not trusted; the first
    such peer is logged.
    """
    heard = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal heard
        forwarded = [value for name, value in scope.get("headers", ()) if name == b"x-forwarded-for"]
        if scope["type"] == "http" and forwarded and scope.get("client"):
            peer = scope["client"][0]
            if proxies.holds(peer):
                scope["client"] = (proxies.client(peer, b",".join(forwarded).decode("latin-1")), 0)
            elif not heard:
                heard = True
                LOG.warning(
                    f"a request from {ip_of(peer) or 'a peer without an address'} has the header X-Forwarded-For, which is "
                    "ignored, since --proxies does not name the sender: if the sender is your own proxy, add its address to "
                    "--proxies; otherwise all clients of the proxy share the limits of one network"
                )
        await app(scope, receive, send)

    return answer


def _network(word: str) -> Network:
    try:
        return ipaddress.ip_network(word, strict=False)
    except ValueError:
        raise UsageError(
            f"--proxies: {word!r:.80} is not an address or a network: give addresses and networks, separated by commas, such "
            "as 127.0.0.1,10.0.0.0/8; or *, if only your proxies can reach the port"
        ) from None
