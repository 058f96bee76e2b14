"""Login to a server. There is no password: the operator opens a link that works once, and gets a session in return.

    access = Access(data / "admin")
    print(login_link("http://127.0.0.1:8001", access.new_code(now)))     to the terminal, never to a log
    session = access.exchange(code, address, now)                        once, within 15 minutes
    access.check(f"Bearer {session}", address, now)                      valid for 12 hours; else raises Refused

The folder holds one hash per file: deleting a file ends the session or code at once, in every process. A person who can read
the folder cannot log in. A person who can write to it can make a login link, so
only the owner of the server should have write access.

    logins = Logins(config_folder(os.environ))                           on the operator's machine: `sumus status URL`
    logins.keep(url, session)
    logins.session(url)
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sumus.errors import ExperimentError, UsageError
from sumus.http.limits import Buckets, Rate
from sumus.http.room import neighbourhood
from sumus.storage.files import make_private_folder, user_folder, write_whole
from sumus.text import shell_word
from sumus.wire.messages import Refused
from sumus.wire.signing import to_base64url

CODE_S = 15 * 60.0
SESSION_S = 12 * 3600.0
"""The time for which a code and a session are valid, in seconds."""
PLANE = "sumus-plane"
"""A header of every response of the admin plane. A client that sent its request to the device plane by mistake notices
that the header is missing.
"""
ATTEMPTS = Rate(1 / 60, 10)
_SECRET = re.compile("[A-Za-z0-9_-]{43}")


class Access:
    """Codes and sessions, kept as hashes in a folder of the server.

    Each `now` is a time of the machine's clock, which `sumus admin link` reads too. A code or session whose end is too far in
    the future is not valid. A code has 256 random bits, so guessing is hopeless; the limit on attempts only saves work. A right
    code or session is always accepted, even after many wrong ones, so that an attacker who guesses cannot lock the operator
    out.

    Args:
        folder: The folder.
        random: Returns random bytes that cannot be guessed.
        attempts: The rate at which each neighbourhood (network of addresses) may try wrong codes or sessions.
    """

    def __init__(
        self, folder: Path, random: Callable[[int], bytes] = secrets.token_bytes, attempts: Rate = ATTEMPTS
    ) -> None:
        self._codes, self._sessions = folder / "codes", folder / "sessions"
        self._random = random
        self._attempts = Buckets(attempts, most=10_000)
        for path in (folder, self._codes, self._sessions):
            _private_folder(path)

    def new_code(self, now: float, lasts: float = CODE_S) -> str:
        """Make a code of 43 characters for one login, and delete expired codes and sessions."""
        for path in (*self._codes.iterdir(), *self._sessions.iterdir()):
            if path.suffix != ".new" and _until(path) <= now:
                path.unlink(missing_ok=True)
        return self._new(self._codes, now + lasts)

    def exchange(self, code: str, address: str, now: float) -> str:
        """Exchange a code for a session. Each code works once.

        Args:
            code: The code of a login link.
            address: The address of the peer.
            now: The time.

        Raises:
            Refused: `bad_token` or `rate`.
        """
        if not _valid(self._codes, code, now) or not _taken_away(self._codes, code):
            self._fail(address, now)
            raise Refused("bad_token", "this login link was used before, or has expired: make a new one")
        return self._new(self._sessions, now + SESSION_S)

    def check(self, authorization: str, address: str, now: float) -> str:
        """Return the session of an `Authorization` header.

        A session is found by its hash, so the time that this takes does not reveal whether a guess was nearly right.

        Raises:
            Refused: `bad_token` or `rate`.
        """
        scheme, _, session = authorization.partition(" ")
        if scheme.lower() != "bearer" or not _valid(self._sessions, session, now):
            self._fail(address, now)
            raise Refused("bad_token", "this is not a session of this server, or it has ended: log in with a new link")
        return session

    def revoke(self, session: str) -> None:
        """End a session. If it has already ended, do nothing."""
        _taken_away(self._sessions, session)

    def revoke_all(self) -> int:
        """End all sessions and codes, and return how many were ended."""
        paths = [*self._codes.iterdir(), *self._sessions.iterdir()]
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _new(self, folder: Path, until: float) -> str:
        secret = to_base64url(self._random(32))
        write_whole(_place(folder, secret), repr(until).encode(), private=True)
        return secret

    def _fail(self, address: str, now: float) -> None:
        """Count a wrong code or session. Right ones are neither counted nor delayed."""
        if (window := self._attempts.take(neighbourhood(address), now)) is not None:
            raise Refused("rate", "too many wrong codes or sessions from this network: log in with a new link", window)


def login_link(url: str, code: str) -> str:
    """Make a link that logs in once. The code is in its fragment, which browsers do not send."""
    return f"{url.rstrip('/')}/#login={code}"


def code_of(link: str) -> tuple[str, str]:
    """Split a login link into URL and code; raise UsageError if it is not a login link."""
    url, mark, code = link.strip().partition("#login=")
    if not mark or not _SECRET.fullmatch(code):
        raise UsageError(
            "this is not a login link: give the complete link, from http to its end, as the server printed it"
        )
    return origin(url), code


class Logins:
    """A person's sessions, keyed by the server's URL, in a file that only this person can read.

    Args:
        folder: The folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "logins.json"

    def keep(self, url: str, session: str) -> None:
        """Store a session on a server, in place of the previous one."""
        self._write(self._read() | {origin(url): session})

    def session(self, url: str) -> str | None:
        """Return the session on a server; None if there is none."""
        return self._read().get(origin(url))

    def forget(self, url: str) -> None:
        """Forget the session on a server."""
        self._write({server: session for server, session in self._read().items() if server != origin(url)})

    def _read(self) -> dict[str, str]:
        try:
            _check_private(self._file, "600")
            held: Any = json.loads(self._file.read_bytes())
            return {str(server): str(session) for server, session in held.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            raise ExperimentError(f"{self._file} is damaged: delete it, and log in again") from None
        except OSError as error:
            raise _explained(self._file, error) from error

    def _write(self, held: dict[str, str]) -> None:
        try:
            make_private_folder(self._file.parent)
        except OSError as error:
            raise _explained(self._file.parent, error) from error
        write_whole(self._file, json.dumps(held, indent=1, sort_keys=True).encode(), private=True)


def config_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of a user's settings: $XDG_CONFIG_HOME/sumus, or ~/.config/sumus."""
    instead = "set XDG_CONFIG_HOME to your own folder for settings"
    return user_folder("XDG_CONFIG_HOME", ".config", instead, environ) / "sumus"


def origin(url: str) -> str:
    """Return scheme, host and port of a URL: a session is sent only to the server with this origin."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        host = parts.hostname or ""
    except (ValueError, KeyError):
        host, port, parts = "", 0, urlsplit("")
    if not host or parts.username is not None:
        raise UsageError(f"{url!r} is not the URL of a server: write http://HOST:PORT or https://HOST:PORT")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _place(folder: Path, secret: str) -> Path:
    """Return the file of a secret. Secrets have 256 random bits, so a plain hash of a secret cannot be inverted."""
    return folder / sha256(secret.encode()).hexdigest()


def _valid(folder: Path, secret: str, now: float) -> bool:
    """Return whether a secret is valid. If a secret would be valid for more than twice the time of a session, the clock was
    changed after it was made, and it is not valid.
    """
    return _SECRET.fullmatch(secret) is not None and now < _until(_place(folder, secret)) <= now + 2 * SESSION_S


def _until(path: Path) -> float:
    """Read the time at which a code or session ends; minus infinity if the file is missing or damaged."""
    try:
        return float(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return float("-inf")


def _taken_away(folder: Path, secret: str) -> bool:
    """Delete the file of a secret, and return whether it existed. If several calls come at the same time, only one returns
    True.
    """
    try:
        _place(folder, secret).unlink()
    except FileNotFoundError:
        return False
    return True


def _private_folder(path: Path) -> None:
    try:
        make_private_folder(path)
        _check_private(path, "700")
    except OSError as error:
        raise _explained(path, error) from error


def _check_private(path: Path, right: str) -> None:
    if (mode := path.stat().st_mode) & 0o077:
        raise ExperimentError(
            f"{path} is open to other users (mode {mode & 0o777:o}): run `chmod {right} {shell_word(path)}`, and log "
            "in again if another user may have opened it"
        )


def _explained(path: Path, error: OSError) -> ExperimentError:
    return ExperimentError(f"{path} cannot be used: {error.strerror or error}; check its owner and the disk")
