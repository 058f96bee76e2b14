"""A network with faults that a seed decides: a TCP proxy on loopback that understands enough of HTTP to cause realistic
faults.

with Proxy(port, 0.1, seed) as proxy:
    HttpTransport(proxy.url)
    proxy.harm = 0.0                    from now on there are no faults
"""

import random
import socket
import threading
from collections import Counter
from contextlib import suppress

HARMS = ("cut request", "cut answer", "lost answer", "twice", "late", "delayed")


class Proxy:
    """A proxy with faults. A request or an answer that is cut ends somewhere in its bytes.

    "twice" means that a request arrives twice, and the second answer comes back. "late" means that the connection
    breaks, and the request arrives after later ones. "delayed" means that another request overtakes this one, which is
    then answered.

    Attributes:
        harm: The probability of each fault in HARMS for a request.
        met: The number of each fault so far.
    """

    def __init__(self, port: int, harm: float, seed: int) -> None:
        self.harm, self.met = harm, Counter[str]()
        self._port, self._rng = port, random.Random(seed)
        self._lock, self._held, self._passed = threading.Condition(), list[bytes](), 0
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._open = set[socket.socket]()
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        """Serve the requests of a connection, until a fault breaks it."""
        with connection, suppress(OSError):
            with connection.makefile("rb") as reading:
                while (request := message(reading)) is not None and self._pass_on(connection, request):
                    pass
        with self._lock:
            self._open.discard(connection)

    def _pass_on(self, connection: socket.socket, request: bytes) -> bool:
        """Ask the server, and answer; return whether the connection is still whole."""
        with self._lock:
            harms = [harm for harm in HARMS if self._rng.random() < self.harm]
            harm, share = (self._rng.choice(harms) if harms else ""), self._rng.random()
            late = self._held.pop(0) if self._held and (self._rng.random() < 0.3 or self.harm == 0.0) else None
            self.met[harm] += 1
            passed = self._passed
        if late is not None:
            self._ask(late)
        if harm == "late":
            with self._lock:
                self._held.append(request)
            return False
        if harm == "cut request":
            with self._to_server() as server:
                server.sendall(request[: int(share * len(request))])
            return False
        if harm == "delayed":
            with self._lock:
                self._lock.wait_for(lambda: self._passed > passed, 0.2)
        if harm == "twice":
            self._ask(request)
        answer = self._ask(request)
        with self._lock:
            self._passed += 1
            self._lock.notify_all()
        if harm == "lost answer" or answer is None:
            return False
        connection.sendall(answer[: int(share * len(answer))] if harm == "cut answer" else answer)
        return harm != "cut answer"

    def _ask(self, request: bytes) -> bytes | None:
        with self._to_server() as server:
            server.sendall(request)
            with server.makefile("rb") as reading:
                return message(reading)

    def _to_server(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=30)


def message(reading: "socket.SocketIO | object") -> bytes | None:
    """Return the bytes of a request or answer of HTTP/1.1 with a Content-Length; None if they end too early."""
    head, length = b"", 0
    while not head.endswith(b"\r\n\r\n"):
        line: bytes = reading.readline()  # type: ignore[union-attr]
        if not line:
            return None
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        head += line
    body: bytes = reading.read(length)  # type: ignore[union-attr]
    return head + body if len(body) == length else None
