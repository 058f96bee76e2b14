"""Encryption of sums, and a key ring that is kept outside the database and whose old keys are destroyed.

    ring = KeyRing("/srv/keys")                               # creates the folder and a first key
    data_key = new_key()                                      # one for each round
    wrapped = ring.wrap(data_key, "round 7")                  # encrypted, to be kept in the database
    sealed = seal(data_key, sums, "sum 7 shard ab 3")         # may be kept anywhere
    sums = unseal(ring.unwrap(wrapped, "round 7"), sealed, "sum 7 shard ab 3")

    ring.destroy_before(ring.rotate())                        # from now on, data that older keys wrapped cannot be read

Why sums are sealed: two consecutive partial sums differ by one batch of updates, and a batch may hold a single person's
update. A deleted row, with the data key in it, survives in logs and backups of the database. If the key that wrapped
the data key is destroyed, every copy of that row is worthless.
"""

import os
import re
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from sumus.errors import ExperimentError, SumusError, UsageError
from sumus.storage.files import sync
from sumus.text import shell_word
from sumus.types import Array

_KEY, _NONCE, _TAG, _ID = 32, 12, 16, 4
"""Lengths in bytes: of a key, of a nonce, of a tag, and of a key's id before a wrapped key."""
_MOST = 2**31 - 1
"""The largest number of bytes of one body."""


class SealError(SumusError):
    """A sealed body cannot be opened: it was changed, it was sealed with another `about`, or its key is wrong or
    destroyed."""


def new_key() -> bytes:
    """Return 32 random bytes from the operating system."""
    return secrets.token_bytes(_KEY)


def seal(key: bytes, body: bytes | memoryview | Array, about: str) -> bytes:
    """Encrypt a body with AES-256-GCM.

    Random nonces are safe for 2³² bodies under one key (NIST SP 800-38D, 8.3).

    Args:
        key: 32 bytes.
        body: A contiguous body of any dtype and shape, smaller than 2 GiB.
        about: A text that says what the body is. It is authenticated but not kept: `unseal` needs the same text.

    Returns:
        A random nonce (12 bytes), the ciphertext (as long as the body), and a tag (16 bytes).

    Raises:
        UsageError: The key has another length, or the body has 2 GiB or more.
    """
    return bytes(seal_pieces(key, (body,), about))


def seal_pieces(key: bytes, pieces: Sequence[bytes | memoryview | Array], about: str) -> memoryview:
    """Encrypt a body that is given in consecutive pieces, as `seal` does. Only the result needs memory."""
    nonce, plain = secrets.token_bytes(_NONCE), [np.frombuffer(piece, np.uint8).data for piece in pieces]
    cipher = Cipher(AES(_whole(key)), GCM(nonce)).encryptor()
    if (length := sum(map(len, plain))) > _MOST:
        raise UsageError(f"{about} has {length} bytes, too many for one seal: seal parts below 2 GiB")
    sealed = memoryview(bytearray(_NONCE + length + _TAG))
    cipher.authenticate_additional_data(about.encode())
    sealed[:_NONCE], at = nonce, _NONCE
    for piece in plain:
        at += cipher.update_into(piece, sealed[at:])
    cipher.finalize()
    sealed[at:] = cipher.tag
    return sealed


def unseal(key: bytes, sealed: bytes | memoryview, about: str) -> bytes:
    """Decrypt a sealed body.

    Raises:
        SealError: The key, the sealed body or `about` differs, even by one bit.
    """
    cipher, view = AESGCM(_whole(key)), memoryview(sealed)
    try:
        if len(view) < _NONCE + _TAG:
            raise InvalidTag
        return cipher.decrypt(view[:_NONCE], view[_NONCE:], about.encode())
    except InvalidTag:
        raise SealError(
            f"{about} cannot be decrypted: its bytes were changed, belong to something else, or were encrypted with another "
            "key; restore the bytes from a backup, or cancel the round"
        ) from None


class KeyRing:
    """Keys in a folder, as files `1.key`, `2.key`, …. The newest key wraps (encrypts) data keys; the older keys only unwrap.

    Any number of processes may use one folder. Every call reads the folder again, and no key stays in this object. The
    folder must be on another volume than the database, and must not be in any backup of the database. A crash may leave a
    `.new` file in it. Such a file is harmless: either its key never wrapped anything, or the file is a second name (hard
    link) of a key's file and is overwritten together with that file.

    The constructor creates the folder if its parent exists, and a first key if there is none.

    Args:
        folder: The folder.

    Raises:
        ExperimentError: A key cannot be read, or users other than the owner have any right to a key or to the folder.
    """

    _NAME = re.compile(r"([1-9][0-9]{0,8})\.key")

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        self._lasting = 0
        with _explained(
            f"keys cannot be kept in {self._folder}", "give a folder that belongs to the server and whose parent exists"
        ):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(self._folder, self._folder.stat().st_mode, "700")
            if not self._ids():
                with suppress(PermissionError):  # a user who may not read the parent did not make the folder
                    sync(self._folder.parent)
                self._add(1)
        for key_id in self._ids():
            self._read(key_id)

    @property
    def current(self) -> int:
        """The id of the newest key."""
        if not (ids := self._ids()):
            raise ExperimentError(
                f"there are no keys in {self._folder} any more: restore them; or start the server again with new keys, but "
                "then everything that the old keys encrypted is lost"
            )
        return ids[-1]

    def wrap(self, data_key: bytes, about: str) -> bytes:
        """Encrypt a data key with the newest key.

        Returns:
            The newest key's id (4 bytes, big-endian), then the data key as `seal` encrypts it.
        """
        key_id, key = self._newest()
        return key_id.to_bytes(_ID, "big") + seal(_present(key, key_id, about), data_key, about)

    def unwrap(self, wrapped: bytes, about: str) -> bytes:
        """Decrypt a data key.

        Raises:
            SealError: The wrapped key cannot be decrypted, or the key that wrapped it is destroyed.
        """
        key_id = self.id_of(wrapped)
        return unseal(_present(self._read(key_id), key_id, about), wrapped[_ID:], about)

    @staticmethod
    def id_of(wrapped: bytes) -> int:
        """Return the id of the key that wrapped a data key."""
        return int.from_bytes(wrapped[:_ID], "big")

    def rotate(self) -> int:
        """Add a new key, which is on the disk when this method returns, and return its id.

        Several calls at the same time may add only one key, and return the same id.
        """
        self._add(self.current + 1)
        return self._last()

    def destroy_before(self, key_id: int) -> list[int]:
        """Destroy all keys older than `key_id`, so that the data that they wrapped can no longer be read.

        Each file is overwritten with zeros and then deleted. Both changes are on the disk when this method returns. On
        SSDs and copy-on-write file systems the medium may still keep the old bytes: encrypt the medium. The operator
        must take care of backups and snapshots of the folder. Data keys that a process has already unwrapped stay in
        the memory of that process.

        Returns:
            The ids of the destroyed keys.

        Raises:
            UsageError: The newest key would be destroyed.
            ExperimentError: A key cannot be destroyed. Some keys may remain; call this method again.
        """
        newest = self._last()
        if key_id > newest:
            raise UsageError(
                f"destroying all keys before {key_id} would destroy the newest key, {newest}: call rotate() first, or pass at "
                f"most {newest}"
            )
        older = [old for old in self._ids() if old < key_id]
        with _explained(f"keys in {self._folder} cannot be destroyed", "run sumus as their owner, and try again"):
            for path in map(self._path, older):
                with suppress(FileNotFoundError):  # another process was faster
                    _write(path, "r+b", bytes(_KEY))
                    path.unlink()
            sync(self._folder)
        return older

    def _newest(self) -> tuple[int, bytes | None]:
        """Return the newest key's id and the key.

        If another process adds a newer key meanwhile, the key that was read may be partly overwritten. The method then reads
        the newest key again.
        """
        key_id, key = 0, None
        while key_id != (newest := self._last()):
            key_id, key = newest, self._read(newest)
        return key_id, key

    def _last(self) -> int:
        """Return the newest key's id. If another process has only just added this key, first make sure that its file would
        survive a loss of power."""
        newest = self.current
        if newest > self._lasting:
            with _explained(f"keys in {self._folder} cannot be kept", "check the disk, and try again"):
                sync(self._folder)
            self._lasting = newest
        return newest

    def _ids(self) -> list[int]:
        with _explained(f"{self._folder} cannot be read", "restore the folder"):
            names = [self._NAME.fullmatch(name) for name in os.listdir(self._folder)]
        return sorted(int(name[1]) for name in names if name)

    def _path(self, key_id: int) -> Path:
        return self._folder / f"{key_id}.key"

    def _read(self, key_id: int) -> bytes | None:
        """Return a key; None if it is destroyed. A destroyed key has no file, or a file of zeros that a crash left behind."""
        path = self._path(key_id)
        with _explained(f"{path} cannot be read", "run sumus as its owner"):
            try:
                with path.open("rb") as file:
                    _check_private(path, os.fstat(file.fileno()).st_mode, "600")
                    key = file.read()
            except FileNotFoundError:
                return None
        if len(key) != _KEY:
            raise ExperimentError(
                f"{path} has {len(key)} bytes, but a key has {_KEY}: restore the file; or delete it, but then everything that "
                "the key encrypted is lost"
            )
        return key if any(key) else None

    def _add(self, key_id: int) -> None:
        """Add a key with this id, unless another process has already added one. The key's file is never incomplete."""
        new = self._folder / f"{key_id}.{secrets.token_hex(8)}.new"
        with _explained(
            f"no key can be added to {self._folder}", "check the disk and the folder's owner, and try again"
        ):
            try:
                _write(new, "xb", new_key())
                with suppress(FileExistsError):
                    os.link(new, self._path(key_id))
            finally:
                new.unlink(missing_ok=True)


def _whole(key: bytes) -> bytes:
    if len(key) != _KEY:
        raise UsageError(f"the key has {len(key)} bytes, but it must have {_KEY}: make a key with new_key()")
    return key


def _present(key: bytes | None, key_id: int, about: str) -> bytes:
    if key is None:
        raise SealError(
            f"{about} cannot be used: key {key_id} is destroyed, or belongs to another key ring; use the key ring that "
            "has this key, or cancel the round"
        )
    return key


def _write(path: Path, mode: Literal["xb", "r+b"], body: bytes) -> None:
    """Write the beginning of a file, and wait until it is on the disk. Only its owner can read a new file ("xb")."""
    with open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _check_private(path: Path, mode: int, right: str) -> None:
    if mode & 0o077:
        raise ExperimentError(
            f"{path} is open to other users (mode {mode & 0o777:o}): run `chmod {right} {shell_word(path)}`, and "
            "rotate the keys if another user may have read one"
        )


@contextmanager
def _explained(what: str, remedy: str) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise ExperimentError(f"{what}: {error.strerror or error}; {remedy}") from error
