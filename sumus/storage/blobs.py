"""Blobs: models, plans and broadcasts as bytes under their SHA-256. A blob never changes.

blobs = open_blobs("/srv/blobs")                    a folder; or "s3://bucket/prefix"
name = blobs.put(body)                              durable when it returns; a second put of the same bytes is harmless
body = blobs.get(name)                              the same bytes, or an error
"""

import hashlib
import os
import re
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import S3Store

from sumus.errors import ExperimentError, UsageError
from sumus.storage.files import sync

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_NAME = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """Keeps bytes by name. A name is the SHA-256 of the bytes in hexadecimal, so no body replaces a different one."""

    def put(self, body: bytes | memoryview) -> str:
        """Keep a body, and return its name. The body is durable when this method returns.

        Raises:
            ExperimentError: The body cannot be kept.
        """
        ...

    def get(self, sha256: str) -> bytes:
        """Return the body with this name.

        Raises:
            ExperimentError: The body is missing, or its bytes have another hash.
        """
        ...

    def size(self, sha256: str) -> int | None:
        """Return the number of bytes of a blob; None if the blob is not here."""
        ...

    def delete(self, sha256: str) -> None:
        """Delete a blob, if it is here."""
        ...

    def path(self, sha256: str) -> Path | None:
        """Return a local file that holds a blob, or None if there is no such file.

        A caller that reads the file must check the hash of its bytes.
        """
        ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over all names, in no particular order."""
        ...


class MemoryBlobs:
    """Blobs in memory. They are gone when the process ends."""

    def __init__(self) -> None:
        self._bodies: dict[str, bytes] = {}

    def put(self, body: bytes | memoryview) -> str:
        name = _named(body)
        self._bodies[_key(name)] = bytes(body)
        return name

    def get(self, sha256: str) -> bytes:
        return _checked(sha256, self._bodies.get(_key(sha256)))

    def size(self, sha256: str) -> int | None:
        body = self._bodies.get(_key(sha256))
        return None if body is None else len(body)

    def delete(self, sha256: str) -> None:
        self._bodies.pop(_key(sha256), None)

    def path(self, sha256: str) -> Path | None:
        _key(sha256)
        return None

    def __iter__(self) -> Iterator[str]:
        return _names(list(self._bodies))


class DirectoryBlobs:
    """Blobs in a folder: one file `ab/abcd…` for each blob.

    The folder is created if its parent exists. A crash may leave a `.new` file, but never an incomplete blob.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ExperimentError(
                f"blobs cannot be kept in {folder}: {error.strerror}; give a folder whose parent exists"
            ) from error

    def put(self, body: bytes | memoryview) -> str:
        name = _named(body)
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            if not self._holds(path, name):
                new = path.with_name(f"{name}.{uuid.uuid4().hex}.new")
                try:
                    with open(new, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                        file.write(body)
                    sync(new)
                    new.replace(path)
                finally:
                    with suppress(OSError):
                        new.unlink(missing_ok=True)
            for folder in (path.parent, self._folder):  # the first writer of the file may have crashed before this step
                sync(folder)
        except OSError as error:
            raise ExperimentError(
                f"{path} cannot be written: {error.strerror or error}; its old content is unchanged"
            ) from error
        return name

    def get(self, sha256: str) -> bytes:
        path = self._path(sha256)
        try:
            return _checked(sha256, path.read_bytes())
        except FileNotFoundError:
            return _checked(sha256, None)
        except OSError as error:
            raise ExperimentError(f"{path} cannot be read: {error.strerror or error}; check the disk") from error

    def size(self, sha256: str) -> int | None:
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path | None:
        path = self._path(sha256)
        return path if path.is_file() else None

    def __iter__(self) -> Iterator[str]:
        return _names(path.relative_to(self._folder).as_posix() for path in self._folder.glob("??/*"))

    def _path(self, name: str) -> Path:
        return self._folder / _key(name)

    def _holds(self, path: Path, name: str) -> bool:
        """Return whether the file exists and has the right hash. If not, the caller writes it again."""
        try:
            whole = _named(path.read_bytes()) == name
        except FileNotFoundError:
            return False
        if whole:
            sync(path)
        return whole


class ObjectBlobs:
    """Blobs in an object store such as S3: one object `ab/abcd…` for each blob, below the store's prefix if it has one.

    Some servers cannot refuse to overwrite an object. Overwriting does no harm here: the bytes are the same.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store

    def put(self, body: bytes | memoryview) -> str:
        name = _named(body)
        with _reached("written"):
            try:
                self._store.put(_key(name), body, mode="create")
            except AlreadyExistsError:
                if _named(self._read(name)) != name:
                    self._store.put(_key(name), body)
            except NotSupportedError:
                self._store.put(_key(name), body)
        return name

    def get(self, sha256: str) -> bytes:
        with _reached("read"):
            try:
                body = self._read(sha256)
            except FileNotFoundError:
                body = None
        return _checked(sha256, body)

    def size(self, sha256: str) -> int | None:
        with _reached("read"):
            try:
                return self._store.head(_key(sha256))["size"]
            except FileNotFoundError:
                return None

    def delete(self, sha256: str) -> None:
        with _reached("written"), suppress(FileNotFoundError):
            self._store.delete(_key(sha256))

    def path(self, sha256: str) -> Path | None:
        _key(sha256)
        return None

    def __iter__(self) -> Iterator[str]:
        with _reached("read"):
            for some in cast(Any, self._store).list():
                yield from _names(found["path"] for found in some)

    def _read(self, name: str) -> bytes:
        return self._store.get(_key(name)).bytes().to_bytes()


def open_blobs(where: str | Path) -> Blobs:
    """Open blobs in a folder, or at `s3://BUCKET/PREFIX`.

    The address and the keys of an S3 server come from the usual environment variables: AWS_ENDPOINT_URL,
    AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …. A server without a certificate also needs
    AWS_ALLOW_HTTP=true.

    Raises:
        UsageError: `where` is another URL, or has a password, a query or a fragment in it.
        ExperimentError: The folder cannot be made, or the object store cannot be opened.
    """
    if isinstance(where, Path) or "://" not in where:
        return DirectoryBlobs(where)
    try:
        parts = urlsplit(where)
    except ValueError:
        parts = urlsplit("")
    if not where.startswith("s3://") or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        shown = where.partition("?")[0] if "@" not in where else "an address with a password in it"
        raise UsageError(
            f"blobs cannot be kept at {shown}: give a folder, or s3://BUCKET/PREFIX with the keys in environment variables"
        )
    retries: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
    client: ClientConfig = {"timeout": "30s", "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"}
    with _reached("opened"):
        return ObjectBlobs(S3Store.from_url(where, retry_config=retries, client_options=client))


@contextmanager
def _reached(what: str) -> Generator[None, None, None]:
    """Turn an error of an object store into an ExperimentError of one line. `what` is "opened", "read" or "written"."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ExperimentError(
            f"the object store cannot be {what} ({reason}): check that it is running, and that AWS_ENDPOINT_URL, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment are right"
        ) from error


def _named(body: bytes | memoryview) -> str:
    """Return the name of a body: its SHA-256 in hexadecimal."""
    return hashlib.sha256(body).hexdigest()


def _key(name: str) -> str:
    """Return the path of a blob within its folder or prefix.

    Raises:
        UsageError: The name is not a SHA-256 in hexadecimal. A name may come from a request.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r:.80} is not the name of a blob: a name is a SHA-256 in hexadecimal, 64 digits in lower case"
        )
    return f"{name[:2]}/{name}"


def _names(keys: Iterable[str]) -> Iterator[str]:
    """Yield the names of the blobs among these paths; other files are skipped."""
    return (key[3:] for key in keys if _NAME.fullmatch(key[3:]) and _key(key[3:]) == key)


def _checked(name: str, body: bytes | None) -> bytes:
    """Check the hash of a body that was read, and return the body.

    Raises:
        ExperimentError: The body is missing, or has another hash.
    """
    if body is None:
        raise ExperimentError(f"blob {name} is missing: restore it from a backup")
    if _named(body) != name:
        raise ExperimentError(f"blob {name} is damaged: its bytes have another hash; restore it from a backup")
    return body
