"""The certificate of a server: it is read again when its files change, and a warning is logged before it expires.

    certificate = Certificate(chain, key)
    certificate.context                     for connections from now on
    certificate.look()                      reads changed files, if they are complete
    certificate.left_s(now)                 seconds until it expires

A renewal writes two files, one after the other: until the two match, the old certificate is used.
"""

import os
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from sumus.errors import UsageError
from sumus.http.tls import RENEWED
from sumus.logs import logger
from sumus.text import shell_word

LOG = logger("sumus.certificate")
SHARE = 4
"""A certificate is near its end in this last fraction of its validity, or in its last 30 days if that is shorter."""


class Certificate:
    """A certificate, with its files.

    Attributes:
        context: The TLS context for new connections. It is replaced when the files have changed.
        ends: The time at which it expires.

    Args:
        chain: The file of the certificate and its chain, PEM.
        key: The file of the key, PEM.
        own: Whether the server made the certificate. Then a server that starts near the certificate's end makes a new one.

    Raises:
        UsageError: The files cannot be read, or do not match.
    """

    def __init__(self, chain: Path, key: Path, own: bool = False) -> None:
        self.chain, self.key, self.own = chain, key, own
        self._lock = threading.Lock()
        self._seen, self._trouble = _marks(chain, key), ""
        self.context, self._begins, self.ends = _read(chain, key)

    def look(self) -> bool:
        """Read the files if they have changed; return whether the certificate was replaced. Any thread may call this."""
        with self._lock:
            marks = _marks(self.chain, self.key)
            if marks == self._seen:
                return False
            try:
                context, begins, ends = _read(self.chain, self.key)
            except UsageError as error:  # it is half written or missing: the next call tries again
                if str(error) != self._trouble:
                    LOG.warning(
                        "the certificate's files have changed but cannot be used, so the old certificate is still used: %s",
                        error,
                    )
                    self._trouble = str(error)
                return False
            self.context, self._begins, self.ends = context, begins, ends
            self._seen, self._trouble = marks, ""
            LOG.warning("a new certificate is used from now on; it expires on %s", ends.date())
            return True

    def left_s(self, now: datetime) -> float:
        """Return the seconds until it expires; negative afterwards."""
        return (self.ends - now).total_seconds()

    def is_near_its_end(self, now: datetime) -> bool:
        """Return whether the certificate should be renewed."""
        return self.ends - now <= (RENEWED if self.own else min(RENEWED, (self.ends - self._begins) / SHARE))

    def said(self, now: datetime) -> str:
        """Return a warning about the certificate's end; empty if the end is not near."""
        if not self.is_near_its_end(now):
            return ""
        days = int(self.left_s(now) // timedelta(days=1).total_seconds())
        when = "today" if days == 0 else f"in {days} {'day' if days == 1 else 'days'}"
        ends = f"ended on {self.ends:%Y-%m-%d}" if days < 0 else f"ends {when}, on {self.ends:%Y-%m-%d}"
        if self.own:
            return f"the certificate {ends}: restart the server to renew it; then give all devices the new pin"
        return (
            f"the certificate {self.chain} {ends}: put the new certificate and its key in place of the old ones; the server "
            "reads them within a minute"
        )

    def warn(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Log the warning about the certificate's end, if the end is near."""
        if said := self.said(now()):
            LOG.warning("%s", said)


def _marks(*files: Path) -> tuple[Any, ...]:
    """Return values that change when the files change. Links are followed, since certbot renews by replacing links."""
    found = list[Any]()
    for file in files:
        try:
            stat = os.stat(file)
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _read(chain: Path, key: Path) -> tuple[ssl.SSLContext, datetime, datetime]:
    """Read a certificate's chain and key.

    Returns:
        A context with both, and the first and last moment of the certificate's validity.

    Raises:
        UsageError: A server cannot use the files; the message names the wrong file.
    """
    held: dict[Path, bytes] = {}
    for file in (chain, key):
        try:
            held[file] = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    if b"ENCRYPTED" in held[key]:
        raise UsageError(
            f"the key {key} is encrypted, but nobody can type a passphrase when a server starts: write the key without a "
            f"passphrase, `openssl pkey -in {shell_word(key)} -out NEW.pem`, to a file that only its owner may read"
        )
    if b"-----BEGIN CERTIFICATE-----" not in held[chain]:
        raise UsageError(f"{chain} holds no certificate in PEM: give the chain first, then its key, --tls CERT KEY")
    if b"PRIVATE KEY-----" not in held[key]:
        raise UsageError(f"{key} holds no private key in PEM: give the chain first, then its key, --tls CERT KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(chain, key)
        leaf = x509.load_pem_x509_certificates(held[chain])[0]
    except (OSError, ValueError) as error:  # ValueError includes the errors of TLS
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the key {key} does not match {chain}: {reason or error}") from error
    return context, leaf.not_valid_before_utc, leaf.not_valid_after_utc
