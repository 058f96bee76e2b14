"""An operator's requests to a server that runs elsewhere.

    remote = Remote("http://127.0.0.1:8081", Logins(config_folder(os.environ)))
    remote.log_in(link)                                        once; the session is saved for its twelve hours
    remote.ask("GET", "/v1/admin/status")                      the answer's JSON
    remote.fetch("/v1/admin/models/health/7", sha256, path)    a file, complete or not written

Every failure is explained in a sentence: no server answers, the address is the one for devices, or the session has ended.
"""

import hashlib
import http.client
import json
import os
import secrets
import ssl
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sumus.errors import ExperimentError, UsageError
from sumus.server.access import PLANE, Logins, code_of, origin
from sumus.storage.files import sync
from sumus.text import printable_values, whole_number
from sumus.transport.transport import why_unreached

PATIENCE = 30.0
MOST = 64 * 2**20
"""The maximum number of bytes of an answer in JSON."""
_PIECE = 2**20


class Remote:
    """A client for one server's admin plane.

    Args:
        url: The plane's address.
        logins: The operator's sessions.
        authority: The file of the CA certificate that must have issued the server's certificate; None for the system's CAs.
    """

    def __init__(self, url: str, logins: Logins, authority: Path | None = None) -> None:
        if "#" in url:
            raise UsageError(
                "a login link is a secret, but others on this machine can read commands: give only the URL here, and give the "
                "link when you are asked, in a file (--link-file), or in SUMUS_LOGIN. Use this link soon, before others do"
            )
        self.url = origin(url)
        self._logins, self._authority = logins, authority

    @property
    def logged_in(self) -> bool:
        """Whether a session is saved; it may have expired."""
        return self._logins.session(self.url) is not None

    def log_in(self, link: str) -> None:
        """Log in with a link, which works only once, and save the session."""
        url, code = code_of(link)
        if url != self.url:
            raise UsageError(f"this link is for {url}, not {self.url}: give the URL that the link begins with")
        self._logins.keep(self.url, self.ask("POST", "/v1/admin/login", {"code": code}, known=False)["session"])

    def log_out(self) -> None:
        """End the session, both here and on the server."""
        if self.logged_in:
            self.ask("POST", "/v1/admin/logout")
            self._logins.forget(self.url)

    def ask(self, method: str, path: str, body: Any = None, known: bool = True) -> Any:
        """Request an answer in JSON.

        Args:
            method: GET or POST.
            path: The path.
            body: The body, which is encoded as JSON; None for no body.
            known: Whether to send the session's credentials.

        Raises:
            ExperimentError: The answer is an error, or no answer comes.
        """
        with self._asked(method, path, body, known) as response, self._reached():
            return _json(response.read(MOST))

    def fetch(self, path: str, sha256: str, output: Path) -> int:
        """Write the body of an answer to a new file, in pieces. The file appears only when it is complete and has the right hash.

        Returns:
            The number of bytes.

        Raises:
            ExperimentError: The answer is an error, its hash is wrong, or the file cannot be written or exists already.
        """
        part = output.with_name(f".{output.name}.{secrets.token_hex(4)}.part")
        try:
            if output.exists() or output.is_symlink():
                raise FileExistsError
            with self._asked("GET", path, None, True) as response:
                nbytes = _written(response, sha256, part, self.url)
            _named(part, output)
            sync(output.parent)
        except FileExistsError:
            raise ExperimentError(f"{output} exists already, and is not overwritten: give another -o FILE") from None
        except OSError as error:
            raise ExperimentError(
                f"{output} cannot be written: {error.strerror or error}; give another -o FILE"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return nbytes

    @contextmanager
    def _asked(self, method: str, path: str, body: Any, known: bool) -> Generator[http.client.HTTPResponse, None, None]:
        """Send a request, and yield a successful answer for reading. ExperimentError is raised for every other answer."""
        headers = {"Content-Type": "application/json"}
        if known:
            session = self._logins.session(self.url)
            if session is None:
                with self._requested("GET", "/healthz", {}, b"") as response:
                    self._check(response)
                raise ExperimentError(f"you are not logged in at {self.url}: run `sumus admin login {self.url}`")
            headers["Authorization"] = f"Bearer {session}"
        sent = b"" if method == "GET" else json.dumps(body or {}).encode()
        with self._requested(method, path, headers, sent) as response:
            self._check(response)
            if response.status == 200:
                yield response
                return
            with self._reached():
                said = _json(response.read(MOST))
            if known and said.get("code") == "bad_token":
                self._logins.forget(self.url)
                raise ExperimentError(
                    f"your session at {self.url} is over: run `sumus admin login {self.url}`; the owner of the server's folder "
                    "can make a new link with `sumus admin link`"
                )
            raise ExperimentError(
                f"{self.url} refused the request: {said.get('detail') or said.get('code') or response.status}"
            )

    def _check(self, response: http.client.HTTPResponse) -> None:
        if response.headers.get(PLANE, "") != "admin":
            raise ExperimentError(
                f"{self.url} is not the admin address of a sumus server: give the address that `sumus serve` prints after `admin`"
            )

    @contextmanager
    def _requested(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> Generator[http.client.HTTPResponse, None, None]:
        parts = urlsplit(self.url)
        connection = self._connection(parts.scheme, parts.hostname or "", parts.port or 80)
        try:
            with self._reached():
                connection.request(method, path, body or None, headers)
                response = connection.getresponse()
            with response:
                yield response
        finally:
            connection.close()

    @contextmanager
    def _reached(self) -> Generator[None, None, None]:
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise ExperimentError(
                f"the certificate of {self.url} is not trusted ({error.verify_message}): if the server made it itself, give its "
                "authority: --authority DATA/tls/authority.pem. A renewed certificate has a new authority: copy the file again"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ExperimentError(
                f"{self.url} cannot be reached ({why_unreached(error)}): check that the server runs, "
                "and that this is its admin address"
            ) from error

    def _connection(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=PATIENCE)
        try:
            context = ssl.create_default_context(cafile=None if self._authority is None else str(self._authority))
        except OSError as error:
            raise UsageError(f"{self._authority} is not a certificate: {error.strerror or error}") from error
        return http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)


def _json(body: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return printable_values(json.loads(body))
    return {}


def _named(part: Path, output: Path) -> None:
    """Give a complete file its name. Raise FileExistsError if the name is taken; a plain rename would replace that file."""
    try:
        os.link(part, output)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        output.open("xb").close()
        part.replace(output)


def _written(response: http.client.HTTPResponse, sha256: str, part: Path, url: str) -> int:
    """Write a body to a new file, up to its announced length; return the number of bytes."""
    announced, got, hashed = whole_number(response.headers.get("content-length", "")), 0, hashlib.sha256()
    cut = ExperimentError(f"the answer from {url} was cut off, or announced no length: run the same command again")
    if announced is None:
        raise cut
    with part.open("xb") as file:
        while got < announced:
            try:
                piece = response.read(min(_PIECE, announced - got))
            except (OSError, http.client.HTTPException) as error:
                raise cut from error
            if not piece:
                raise cut
            got += len(piece)
            hashed.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if hashed.hexdigest() != sha256:
        raise ExperimentError(
            f"the model from {url} does not have the SHA-256 that the server lists: look for a proxy that changes answers, or a "
            "damaged disk on the server"
        )
    return got
