"""An MQTT broker for one test: MQTT 3.1.1 over TCP, sessions that survive connections, QoS 1, and nothing else.

It records what it was asked. It delivers a message again, marked as a duplicate, until the message is acknowledged by
its packet identifier, as the standard requires (MQTT-4.4.0-1). Real clients connect to it.
"""

import contextlib
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14


class Broker:
    """A broker for one client at a time.

    Attributes:
        password: The user and password that the client must show.
        denied: The topics that it refuses.
        acknowledged: Packet identifiers, in the order in which they came.
        delivered: For each message that was sent: (packet identifier, whether it was sent again).
    """

    def __init__(self, password: tuple[str, str] | None = None, context: ssl.SSLContext | None = None) -> None:
        self.password, self.context = password, context
        self.clients: list[tuple[str, bool]] = []
        self.topics: list[tuple[str, int]] = []
        self.denied = set[str]()
        self.acknowledged: list[int] = []
        self.delivered: list[tuple[int, bool]] = []
        self._waiting: dict[int, tuple[str, bytes]] = {}
        self._sent: set[int] = set()
        self._here: set[int] = set()
        self._next = 1
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def publish(self, topic: str, payload: bytes) -> int:
        """Keep a message for the session, and deliver it if the client is connected."""
        with self._changed:
            number, self._next = self._next, self._next + 1
            self._waiting[number] = (topic, payload)
            if self._socket is not None and self.topics:
                with contextlib.suppress(OSError):  # the client has just gone: the message waits
                    self._deliver(number, self._socket)
        return number

    def drop(self) -> None:
        """Cut the connection."""
        with self._changed:
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the connection has just ended by itself
                    self._socket.shutdown(socket.SHUT_RDWR)

    def until(self, met: Callable[["Broker"], Any], seconds: float = 30.0) -> None:
        """Wait until a condition of the broker is met."""
        with self._changed:
            assert self._changed.wait_for(lambda: met(self), seconds)

    def close(self) -> None:
        self.drop()
        with contextlib.suppress(OSError):  # closed already
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10.0)

    def _deliver(self, number: int, to: socket.socket) -> None:
        topic, payload = self._waiting[number]
        again = number in self._sent
        self._sent.add(number)
        self._here.add(number)
        name = topic.encode()
        body = struct.pack(">H", len(name)) + name + struct.pack(">H", number) + payload
        to.sendall(_packet(PUBLISH, 0b0010 | (0b1000 if again else 0), body))
        self.delivered.append((number, again))

    def _deliver_all(self, to: socket.socket | None) -> None:
        for number in [number for number in self._waiting if number not in self._here] if to is not None else ():
            self._deliver(number, to)

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                return
            try:
                with self.context.wrap_socket(accepted, server_side=True) if self.context else accepted as client:
                    self._talk(client)
            except (OSError, EOFError):
                pass
            finally:
                with self._changed:
                    self._socket = None
                    self._changed.notify_all()

    def _talk(self, client: socket.socket) -> None:
        while True:
            kind, body = _read(client)
            with self._changed:
                if (
                    kind == CONNECT and body[6] != 4
                ):  # of MQTT 3.1.1: another version is answered as the standard has it
                    client.sendall(_packet(CONNACK, 0, bytes([0, 1])))
                    return
                if kind == CONNECT:
                    words: deque[bytes] = deque()
                    flags, rest = body[7], body[10:]
                    while rest:
                        size = struct.unpack(">H", rest[:2])[0]
                        words.append(rest[2 : 2 + size])
                        rest = rest[2 + size :]
                    self.clients.append((words.popleft().decode(), bool(flags & 0b10)))
                    right = self.password is None or tuple(word.decode() for word in words) == self.password
                    client.sendall(_packet(CONNACK, 0, bytes([0, 0 if right else 5])))
                    if not right:
                        return
                    self._socket, self._here = client, set()
                    self._deliver_all(client if self.topics else None)
                elif kind == SUBSCRIBE:
                    asked, at = list[tuple[str, int]](), 2
                    while at < len(body):
                        size = struct.unpack(">H", body[at : at + 2])[0]
                        asked.append((body[at + 2 : at + 2 + size].decode(), body[at + 2 + size]))
                        at += 3 + size
                    self.topics += [each for each in asked if each[0] not in self.denied]
                    client.sendall(
                        _packet(
                            SUBACK, 0, body[:2] + bytes(128 if topic in self.denied else qos for topic, qos in asked)
                        )
                    )
                    self._deliver_all(client)
                elif kind == PUBACK:
                    number = struct.unpack(">H", body)[0]
                    self.acknowledged.append(number)
                    self._waiting.pop(number, None)
                elif kind == PINGREQ:
                    client.sendall(_packet(PINGRESP, 0, b""))
                elif kind == DISCONNECT:
                    return
                self._changed.notify_all()


def _packet(kind: int, flags: int, body: bytes) -> bytes:
    length, size = b"", len(body)
    while True:
        size, low = divmod(size, 128)
        length += bytes([low | (128 if size else 0)])
        if not size:
            return bytes([kind << 4 | flags]) + length + body


def _read(client: socket.socket) -> tuple[int, bytes]:
    kind, length, shift = _exactly(client, 1)[0] >> 4, 0, 0
    while True:
        byte = _exactly(client, 1)[0]
        length |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return kind, _exactly(client, length)


def _exactly(client: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        if not (more := client.recv(count - len(found))):
            raise EOFError
        found += more
    return found
