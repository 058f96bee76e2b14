"""An admin's requests to a server that runs elsewhere.

    remote = Remote("http://127.0.0.1:8081", Logins(config_folder(os.environ)))
    remote.log_in(link)                                        once; the session is remembered for its twelve hours
    remote.ask("GET", "/v1/admin/status")                      the answer's JSON

Everything that goes wrong is said in a sentence: nobody is there, it is the devices' address, the session is over.
"""

import http.client
import json
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sumus.errors import ExperimentError, UsageError
from sumus.operations.access import PLANE, Logins, code_of, origin
from sumus.text import printable_values

PATIENCE = 30.0
MOST = 64 * 2**20


class Remote:
    """One server's admin plane. authority: a certificate's file that its own must come from; None for those of the system."""

    def __init__(self, url: str, logins: Logins, authority: Path | None = None) -> None:
        if "#" in url:
            raise UsageError(
                "a login link is a secret, and what stands in a command is read by others: give the URL alone, and the link "
                "when you are asked, in a file (--link-file), or in SUMUS_LOGIN; this one should be used or replaced now"
            )
        self.url = origin(url)
        self._logins, self._authority = logins, authority

    @property
    def logged_in(self) -> bool:
        """Whether there is a session; it may be over."""
        return self._logins.session(self.url) is not None

    def log_in(self, link: str) -> None:
        """Use up a link, and remember the session."""
        url, code = code_of(link)
        if url != self.url:
            raise UsageError(
                f"this link is of {url}, and you asked for {self.url}: give the URL that the link begins with"
            )
        self._logins.keep(self.url, self.ask("POST", "/v1/admin/login", {"code": code}, known=False)["session"])

    def log_out(self) -> None:
        """End the session, here and there."""
        if self.logged_in:
            self.ask("POST", "/v1/admin/logout")
            self._logins.forget(self.url)

    def ask(self, method: str, path: str, body: Any = None, known: bool = True) -> Any:
        """An answer's JSON. known: whether the session is shown. ExperimentError for every error."""
        headers = {"Content-Type": "application/json"}
        if known:
            session = self._logins.session(self.url)
            if session is None:
                self._check(self._request("GET", "/healthz", {}, b"")[1])
                raise ExperimentError(f"you are not logged in at {self.url}: run `sumus admin login {self.url}`")
            headers["Authorization"] = f"Bearer {session}"
        status, plane, said = self._request(
            method, path, headers, b"" if method == "GET" else json.dumps(body or {}).encode()
        )
        self._check(plane)
        if status == 200:
            return said
        if known and said.get("code") == "bad_token":
            self._logins.forget(self.url)
            raise ExperimentError(
                f"your session at {self.url} is over: run `sumus admin login {self.url}`; whoever owns the server's folder "
                "makes a new link with `sumus admin link`"
            )
        raise ExperimentError(f"{self.url} says no: {said.get('detail') or said.get('code') or status}")

    def _check(self, plane: str) -> None:
        if plane != "admin":
            raise ExperimentError(
                f"{self.url} is not the admin's address of a sumus server: give the one that `sumus serve` prints after `admin`"
            )

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, str, Any]:
        parts = urlsplit(self.url)
        connection = self._connection(parts.scheme, parts.hostname or "", parts.port or 80)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            read = response.read(MOST)
        except ssl.SSLCertVerificationError as error:
            raise ExperimentError(
                f"the certificate of {self.url} is not to be trusted ({error.verify_message}): give its authority with "
                "--authority DATA/tls/authority.pem, if it is the server's own"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ExperimentError(
                f"{self.url} cannot be reached ({error or type(error).__name__}): does the server run, and is that its admin's "
                "address?"
            ) from error
        finally:
            connection.close()
        said: Any = {}
        with suppress(ValueError, RecursionError):
            said = printable_values(json.loads(read))
        return response.status, response.headers.get(PLANE, ""), said

    def _connection(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=PATIENCE)
        try:
            context = ssl.create_default_context(cafile=None if self._authority is None else str(self._authority))
        except OSError as error:
            raise UsageError(f"{self._authority} is no certificate: {error.strerror or error}") from error
        return http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
