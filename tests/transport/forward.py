"""A forward proxy on loopback. It resolves every host's name to this machine, and records the requests."""

import base64
import socket
import threading
from contextlib import suppress


class Forward:
    """A forward proxy.

    Args:
        password: The USER:PASSWORD that it asks for; "" for none.

    Attributes:
        heads: The first request of each connection.
    """

    def __init__(self, password: str = "") -> None:
        self.heads = list[str]()
        self._password = password
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open = set[socket.socket]()
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Forward":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for one in self._open:
            one.close()

    def _start(self, what: object, *arguments: object) -> None:
        thread = threading.Thread(target=what, args=arguments)  # pyright: ignore[reportArgumentType]
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        while True:
            try:
                one, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(one)
            self._start(self._serve, one)

    def _serve(self, one: socket.socket) -> None:
        with suppress(OSError):  # the client may leave at any moment
            self._answer(one)

    def _answer(self, one: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = one.recv(4096)
            if not piece:
                return
            head += piece
        self.heads.append(head.decode("latin-1"))
        method, target, *_ = self.heads[-1].split()
        secret = base64.b64encode(self._password.encode()).decode()
        if self._password and f"proxy-authorization: basic {secret}".lower() not in self.heads[-1].lower():
            one.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            one.shutdown(socket.SHUT_WR)
            return
        there = target if method == "CONNECT" else target.removeprefix("http://").partition("/")[0]
        other = socket.create_connection(("127.0.0.1", int(there.rpartition(":")[2])))
        self._open.add(other)
        if method == "CONNECT":
            one.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            other.sendall(head.replace(f"http://{there}".encode(), b"", 1))
        self._start(_pass, one, other)
        _pass(other, one)


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
