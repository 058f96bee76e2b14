"""An admin's requests to servers that are not there, or do not say what they should."""

import hashlib
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sumus.errors import ExperimentError
from sumus.operations.remote import Remote
from sumus.server.access import Logins
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Unreachable
from tests.transport.echoing import listening

BODY = b"a model's bytes" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


def sending(body: bytes, announced: int | None) -> Any:
    """An admin plane that answers everything with these bytes."""

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return
        headers = [(b"sumus-plane", b"admin")]
        headers += [] if announced is None else [(b"content-length", str(announced).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def remote_at(port: int, folder: Path) -> Remote:
    logins = Logins(folder / "config")
    remote = Remote(f"http://127.0.0.1:{port}", logins)
    logins.keep(remote.url, "A" * 43)
    return remote


@contextmanager
def plane(body: bytes, announced: int | None, folder: Path) -> Any:
    with listening(sending(body, announced)) as port:
        yield remote_at(port, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("body", "announced", "why"),
    [
        (BODY[:-1], len(BODY), "was cut off, or announced no length"),
        (BODY, None, "was cut off, or announced no length"),
        (BODY[:-1] + b"!", len(BODY), "does not have the SHA-256 that the server lists"),
        (b"", 0, "does not have the SHA-256 that the server lists"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_not_written(
    tmp_path: Path, body: bytes, announced: int | None, why: str
) -> None:
    with plane(body, announced, tmp_path) as remote, pytest.raises(ExperimentError, match=why):
        remote.fetch("/v1/admin/models/tiny/1", SHA256, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_a_file_system_without_links_gets_the_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("sumus.operations.remote.os.link", none)
    with plane(BODY, len(BODY), tmp_path) as remote:
        assert remote.fetch("/", SHA256, tmp_path / "model") == len(BODY)
        assert (tmp_path / "model").read_bytes() == BODY
        with pytest.raises(ExperimentError, match="exists already"):
            remote.fetch("/", SHA256, tmp_path / "model")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("asks", ["admin", "device"])
@pytest.mark.parametrize(
    ("host", "why"), [("127.0.0.1", "nothing listens there"), ("no-such-host.invalid", "no such host")]
)
def test_why_a_server_cannot_be_reached_is_said_in_words(tmp_path: Path, asks: str, host: str, why: str) -> None:
    url = f"http://{host}:{free_port()}"

    def ask() -> None:
        if asks == "device":
            HttpTransport(url).request("GET", "/")
        else:
            Remote(url, Logins(tmp_path)).log_in(f"{url}/#login={'A' * 43}")

    with pytest.raises((ExperimentError, Unreachable)) as caught:
        ask()
    assert f"{url} cannot be reached" in str(caught.value)
    assert why in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert "object at" not in str(caught.value)


def test_what_ends_a_connection_or_speaks_no_http_is_said_in_words() -> None:
    for greeting, why in ((b"", "it ended the connection"), (b"220 mail ready\r\n", "it does not answer in HTTP")):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

            def once(server: socket.socket = server, greeting: bytes = greeting) -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1024)
                    connection.sendall(greeting)

            thread = threading.Thread(target=once)
            thread.start()
            with pytest.raises(Unreachable, match=why):
                HttpTransport(f"http://127.0.0.1:{port}").request("GET", "/")
            thread.join()
