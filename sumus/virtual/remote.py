"""A worker in another process or on another machine. It has the same interface as a worker in this process.

    bob = sumus.virtual.connect("http://127.0.0.1:8090", token=Path("TOKEN"))
    x = sumus.virtual.send(torch.ones(3), bob)

If a request gets no response, the same bytes are sent again. The worker performs the request only once.
"""

from pathlib import Path

from sumus.device.link import read_link
from sumus.errors import ExperimentError, ParticipantError, unread
from sumus.transport.http import HttpTransport
from sumus.transport.transport import Transport, Unreachable
from sumus.virtual.messages import OVERHEAD, BeginAnswer, BeginRequest, RefusalAnswer, WorkerAnswer, read, write
from sumus.virtual.worker import Worker, WorkerRefused

ATTEMPTS = 3
PATIENCE = 60.0
"""The seconds to wait for a response."""


def connect(
    url: str,
    token: str | Path,
    *,
    authority: str | None = None,
    insecure: bool = False,
    patience: float = PATIENCE,
    transport: Transport | None = None,
) -> "RemoteWorker":
    """Connect to a worker. Tensors that are sent to it stay there until the connection is closed.

    Args:
        url: The worker's address, as `sumus worker` prints it.
        token: The token that the worker's owner gave, or the file that holds it.
        authority: The certificates, in PEM, of the authorities that may have issued the worker's certificate; None for the
            authorities that the system trusts.
        insecure: Whether http:// to another machine is allowed.
        patience: The seconds that an operation may take.
        transport: A transport for the requests instead of HTTP.
    """
    server = read_link(url, insecure).server
    if not server:
        raise ExperimentError(
            f"{url!r:.80} is not a worker's address: give http://HOST:PORT, as `sumus worker` prints it"
        )
    secret = read_token(token) if isinstance(token, Path) else token
    return RemoteWorker(server, secret, transport or HttpTransport(server, authority), patience)


def read_token(file: Path) -> str:
    """Read a token from a file that only its owner may read."""
    try:
        if file.stat().st_mode & 0o077:
            raise ExperimentError(f"{file} holds a secret, and other users may read it: run chmod 600 {file}")
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"the token's file {file} cannot be read: {unread(error)}") from error


class RemoteWorker(Worker):
    """A worker in another process. `connect` makes it."""

    def __init__(self, url: str, token: str, transport: Transport, patience: float) -> None:
        self._url, self._token, self._transport, self._patience = url, token, transport, patience
        self._caller = ""
        super().__init__(url, ())
        said = self._said(self._post("/v1/begin", write(BeginRequest()), 2**20)).answer
        if isinstance(said, RefusalAnswer):
            raise WorkerRefused(url, said.code, said.detail)
        if not isinstance(said, BeginAnswer):
            raise self._strange(ParticipantError(None, "it did not admit this caller"))
        self._caller, self.name, self.names = said.caller, said.worker, said.names

    def __repr__(self) -> str:
        return f"<worker {self.name!r} at {self._url}>"

    def _exchange(self, body: bytes, most: int) -> bytes:
        return self._post("/v1/ask", body, most)

    def close(self) -> None:
        """End the connection. The worker deletes everything that it holds for this caller."""
        try:
            self._post("/v1/end", b"", OVERHEAD)
        except Unreachable:
            pass  # the worker forgets callers that send no requests
        finally:
            self._transport.close()

    def _post(self, path: str, body: bytes, most: int) -> bytes:
        headers = {"Authorization": f"Bearer {self._token}"} | ({"Sumus-Caller": self._caller} if self._caller else {})
        for attempt in range(ATTEMPTS):
            try:
                return self._transport.request("POST", path, body, headers, self._patience, most).body
            except Unreachable as error:
                if attempt == ATTEMPTS - 1:
                    raise Unreachable(
                        f"worker {self.name!r} does not answer ({error}): the last operation may or may not have been done, and "
                        "the tensors there may be lost; connect again, and send them again"
                    ) from error
        raise AssertionError

    def _said(self, body: bytes) -> WorkerAnswer:
        try:
            return read(WorkerAnswer, body)[0]
        except ParticipantError as error:
            raise self._strange(error) from error
