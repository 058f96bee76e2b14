"""The listening side of a server: two HTTP planes on one event loop, each on its own socket.

    with opened_at(Listening(host="0.0.0.0", tls=["auto"], names=["fl.example"]), data / "tls") as at:
        async with at.planes(device_app, admin_app):
            …                                          both planes handle requests
        …                                              both have finished their requests, and are closed

uvicorn reads and writes; connections are bounded in `sumus.http.connections`.
"""

import asyncio
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn

from sumus.errors import ExperimentError, UsageError
from sumus.http.certificates import Certificate
from sumus.http.connections import MOST_CONNECTIONS, Connections, Listener, files_for
from sumus.http.proxies import Proxies, told_by_proxies
from sumus.http.room import trim
from sumus.http.tls import issue

KEEP_ALIVE_S = 15
"""The number of seconds for which an idle connection is kept."""
GRACE_S = 20
"""The number of seconds in which running requests must finish when a server stops."""
BACKLOG = 2048
"""The number of connections that may wait to be accepted."""
MOST = MOST_CONNECTIONS, 512
"""The largest number of connections to the first plane, and to the second plane."""
SWEPT = 3
"""The time between two searches for connections that are too slow, in tenths of a second."""
TRIMMED, CROWD = 30, 64
"""The time between two returns of freed memory to the system, in tenths of a second, and the number of connections that must
have ended in that time.
"""
LOOKED = 300
"""The time between two checks for a renewed certificate, in tenths of a second."""
ANY = ("0.0.0.0", "::", "")
"""The addresses that mean "all addresses of this machine"."""


@dataclass(frozen=True)
class Listening:
    """The addresses at which a server listens, and its names for devices.

    Attributes:
        host: The address for devices; 0.0.0.0 for all addresses of the machine.
        port: The port for devices, 0 for any.
        admin_host: The address for the operator and for /metrics.
        admin_port: The port for the operator, 0 for any.
        tls: "auto" for a certificate that the server makes itself; or the files of a certificate chain and its key, PEM; empty
            for plain HTTP.
        names: Host names and addresses that devices and the operator use. The first one is in the server's links.
        url: The server's URL for devices, if a proxy stands before it.
        proxies: Addresses and networks of proxies, separated by commas. On the devices' port, the client address that these
            proxies report is trusted.
        insecure: Whether other machines may reach the server without TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int = 8081
    tls: str | Path | Sequence[str | Path] = ()
    names: Sequence[str] = ()
    url: str | None = None
    proxies: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        for of in ("host", "admin_host"):
            object.__setattr__(self, of, _bare(getattr(self, of)))
        object.__setattr__(self, "names", tuple(map(_bare, self.names)))

    @property
    def certificate_files(self) -> list[str | Path]:
        """The value of `tls` as a list: empty, "auto", or two files."""
        return [self.tls] if isinstance(self.tls, str | Path) else list(self.tls)


def _bare(host: str) -> str:
    """Return a host without the brackets that a URL puts around an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


@dataclass(frozen=True)
class Addresses:
    """The open sockets of a server, with their addresses and certificates.

    Attributes:
        sockets: The sockets of the device plane and of the admin plane.
        certificates: The certificate of each socket.
        url: The URL for devices.
        admin_url: The URL for admins.
        authority: A certificate that devices pin, PEM, if the server made its own.
        pin: The SHA-256 of `authority`.
        notes: Messages about the certificate: that it has changed, or that it expires soon.
        proxies: The proxies whose reports of the client address are trusted.
        names: The host names of the admin plane.
    """

    sockets: tuple[socket.socket, socket.socket]
    certificates: tuple[Certificate | None, Certificate | None]
    url: str
    admin_url: str
    authority: bytes | None
    pin: str
    notes: tuple[str, ...]
    proxies: Proxies
    names: tuple[str, ...]

    def planes(self, device_app: Any, admin_app: Any) -> "Planes":
        """Return a context manager that serves both applications on their sockets. On the admin socket, no proxy is trusted."""
        apps = told_by_proxies(device_app, self.proxies), admin_app
        return Planes(list(zip(self.sockets, apps, self.certificates, strict=True)))

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of either socket; None if neither socket has one."""
        return self.certificates[0] or self.certificates[1]


@contextmanager
def opened_at(listen: Listening, folder: Path) -> Generator[Addresses, None, None]:
    """Open the sockets of both planes of a server, as a context manager.

    Args:
        listen: The options.
        folder: The folder for a certificate that the server makes itself.

    Raises:
        UsageError: Other machines could read the traffic, and this was not explicitly allowed.
        ExperimentError: The server cannot listen at the address.
    """
    proxies = Proxies(listen.proxies)
    with bound(listen.host, listen.port, "--port") as device:
        with bound(listen.admin_host, listen.admin_port, "--admin-port") as admin:
            local = _is_local(device), _is_local(admin)
            if not all(local) and not listen.certificate_files and not listen.insecure:
                which = listen.admin_host if local[0] else listen.host
                raise UsageError(
                    f"other machines can reach {which}, and without TLS the traffic can be read: give --tls auto "
                    "--name HOSTNAME, or your own certificate, --tls CERT KEY; or --insecure, if a proxy before it encrypts"
                )
            certificate, authority, pin, notes = _certificate(listen, folder)
            admins = None if local[1] else certificate
            name = listen.names[0] if listen.names else ""
            url = listen.url or url_at(certificate is not None, name or _called(listen.host), device)
            admin_url = url_at(
                admins is not None, listen.admin_host if local[1] else name or _called(listen.admin_host), admin
            )
            names = (*listen.names, *_hosts_of(url, admin_url))
            yield Addresses(
                (device, admin), (certificate, admins), url, admin_url, authority, pin, notes, proxies, names
            )


@dataclass(frozen=True)
class PlaneAddress:
    """The open socket of one plane, with its address and certificate.

    Attributes:
        socket: The socket.
        url: The plane's address.
        certificate: The plane's certificate; None if it uses no TLS.
        authority: The file of the authority's certificate, if the server made its own.
        local: Whether the plane is reachable from this machine only.
        names: The host names of the plane.
    """

    socket: socket.socket
    url: str
    certificate: Certificate | None
    authority: Path | None
    local: bool
    names: tuple[str, ...]

    def plane(self, app: Any) -> "Planes":
        """Return a context manager that serves an application on the socket."""
        return Planes([(self.socket, app, self.certificate)])


@contextmanager
def opened_plane(listen: Listening, folder: Path, option: str = "--listen") -> Generator[PlaneAddress, None, None]:
    """Open the socket of one plane, as a context manager.

    Args:
        listen: The options, of which `host` and `port` are used.
        folder: The folder for a certificate that the server makes itself.
        option: The command-line option that sets another address, for messages.

    Raises:
        UsageError: Other machines could read the traffic, and this was not explicitly allowed.
        ExperimentError: The server cannot listen at the address.
    """
    with bound(listen.host, listen.port, option) as listening:
        local = _is_local(listening)
        if not local and not listen.certificate_files and not listen.insecure:
            raise UsageError(
                f"other machines can reach {listen.host}, and without TLS the traffic can be read: give --tls auto "
                "--tls-name HOSTNAME, or your own certificate, --tls CERT KEY; or --insecure, if a proxy before it encrypts"
            )
        certificate, authority, _, _ = _certificate(listen, folder)
        name = listen.names[0] if listen.names else _called(listen.host)
        made = folder / "authority.pem" if authority is not None else None
        url = url_at(certificate is not None, name, listening)
        yield PlaneAddress(listening, url, certificate, made, local, (*listen.names, *_hosts_of(url)))


def bound(host: str, port: int, option: str) -> socket.socket:
    """Make a listening socket; port 0 means any port. `option` is the command-line option that sets another address, for
    messages.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _explained(host, port, option, error) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise _explained(host, port, option, error) from error
    return listening


def _explained(host: str, port: int, option: str, error: OSError) -> ExperimentError:
    return ExperimentError(
        f"cannot listen on {host}:{port}: {error.strerror or error}; give another port or address with {option}"
    )


def _is_local(listening: socket.socket) -> bool:
    """Return whether a socket is reachable from this machine only."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _certificate(listen: Listening, folder: Path) -> tuple[Certificate | None, bytes | None, str, tuple[str, ...]]:
    """Return the certificate; the authority and its hash, if the server made its own; and messages about changes."""
    match listen.certificate_files:
        case []:
            return None, None, "", ()
        case ["auto"]:
            names = list(listen.names) or ([] if listen.host in ANY else [listen.host])
            if not names:
                raise UsageError(
                    "--tls auto makes a certificate for host names: give --name HOSTNAME, the name that devices use"
                )
            before = folder.exists()
            made = issue(folder, names, datetime.now(UTC))
            news = (
                f"the server has a new certificate ({made.new}). Devices and edges that have the old pin cannot connect: start "
                f"each of them once with the new pin at the end of the address, `sumus join https://HOST:PORT/#pin={made.pin} "
                "--client FILE.py`; admins must give the new authority.pem as --authority",
            )
            notes = news if before and made.new else ()
            return Certificate(made.chain, made.key, own=True), made.authority.read_bytes(), made.pin, notes
        case [chain, key]:
            for file in (chain, key):
                if not Path(file).is_file():
                    raise UsageError(f"there is no file {file}: give a certificate's chain and its key, --tls CERT KEY")
            certificate = Certificate(Path(chain), Path(key))
            said = certificate.said(datetime.now(UTC))
            return certificate, None, "", (said,) if said else ()
        case _:
            raise UsageError("--tls takes `auto`, or a certificate's chain and its key: --tls CERT KEY")


def url_at(encrypted: bool, host: str, listening: socket.socket) -> str:
    """Return the URL of a socket under a host name."""
    port = listening.getsockname()[1]
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def _hosts_of(*urls: str) -> list[str]:
    """Return the hosts of these addresses, with their ports."""
    return [url.partition("://")[2].partition("/")[0] for url in urls]


def _called(host: str) -> str:
    return socket.gethostname() if host in ANY else host


def expect_no_loop(what: str, command: str) -> None:
    """Raise UsageError if an event loop already runs in this thread, as in a notebook: a thread can run only one loop."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError(
            f"an event loop already runs in this thread (a notebook?), but {what} needs an event loop of its own: run "
            f"{command}, or call it in another thread"
        )


def config(app: Any) -> uvicorn.Config:
    """Make the uvicorn configuration for an application."""
    how = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # see `sumus.http.proxies`
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    how.load()
    return how


@contextmanager
def told_to_stop(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> Generator[None, None, None]:
    """Call `end` on Ctrl-C and SIGTERM while the `with` block runs. Outside the main thread, signals are not handled."""
    mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for each in mine:
        loop.add_signal_handler(each, end)
    try:
        yield
    finally:
        for each in mine:
            loop.remove_signal_handler(each)


class Planes:
    """Applications that are served on sockets while an `async with` block runs.

    Args:
        planes: The socket, the application and the certificate of each plane.
    """

    def __init__(self, planes: Sequence[tuple[socket.socket, Any, Certificate | None]]) -> None:
        self._planes = [
            (listening, _Plane(config(app), most, certificate))
            for (listening, app, certificate), most in zip(planes, MOST, strict=False)
        ]
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Planes":
        self._running = [asyncio.create_task(plane.serve([listening])) for listening, plane in self._planes]
        for _, plane in self._planes:
            await plane.up.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, plane in self._planes:
            plane.should_exit = True
        await asyncio.gather(*self._running)

    def hurry(self) -> None:
        """Do not wait for running requests when the block ends."""
        for _, plane in self._planes:
            plane.force_exit = True


class _Plane(uvicorn.Server):
    """uvicorn's server without its handling of signals. `up` is set as soon as the server accepts requests."""

    def __init__(self, how: uvicorn.Config, most: int, certificate: Certificate | None) -> None:
        super().__init__(how)
        self._certificate = certificate
        if certificate is not None:
            how.ssl = certificate.context
        self.up = asyncio.Event()
        self._connections = Connections(files_for(most))

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers: Any = [
            Listener(each, self.config, self.server_state, self._connections) for each in sockets or []
        ]
        self.started = True
        self.up.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEPT == 0:
            self._connections.sweep(asyncio.get_running_loop().time())
        if counter % TRIMMED == 0 and self._connections.ended >= CROWD:
            self._connections.ended = 0
            asyncio.get_running_loop().run_in_executor(None, trim)
        if self._certificate is not None:
            if counter % LOOKED == 0:
                asyncio.get_running_loop().run_in_executor(None, self._certificate.look)
            self.config.ssl = self._certificate.context  # for connections that are accepted from now on
        return await super().on_tick(counter)
