"""Blobs in an object store such as S3.

blobs = open_objects("s3://bucket/prefix")          where that is, and who asks, says the environment
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import S3Store

from sumus.errors import ExperimentError, UsageError
from sumus.storage.blobs import checked, named, place, places

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig


class ObjectBlobs:
    """An object a blob, `ab/abcd…`, in an object store such as S3; a store may have a prefix, below which they lie.

    Not all servers refuse to put an object in place of another, and here that does no harm: it is the same.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store

    def put(self, body: bytes | memoryview) -> str:
        name = named(body)
        with _reached("written"):
            try:
                self._store.put(place(name), body, mode="create")
            except AlreadyExistsError:
                if named(self._read(name)) != name:
                    self._store.put(place(name), body)
            except NotSupportedError:
                self._store.put(place(name), body)
        return name

    def get(self, sha256: str) -> bytes:
        with _reached("read"):
            try:
                body = self._read(sha256)
            except FileNotFoundError:
                body = None
        return checked(sha256, body)

    def size(self, sha256: str) -> int | None:
        with _reached("read"):
            try:
                return self._store.head(place(sha256))["size"]
            except FileNotFoundError:
                return None

    def delete(self, sha256: str) -> None:
        with _reached("written"), suppress(FileNotFoundError):
            self._store.delete(place(sha256))

    def path(self, sha256: str) -> Path | None:
        place(sha256)
        return None

    def __iter__(self) -> Iterator[str]:
        with _reached("read"):
            for some in cast(Any, self._store).list():
                yield from places(found["path"] for found in some)

    def _read(self, name: str) -> bytes:
        return self._store.get(place(name)).bytes().to_bytes()


def open_objects(url: str) -> ObjectBlobs:
    """Blobs at `s3://BUCKET/PREFIX`. UsageError for any other URL, and for one with a password in it.

    Where that is and who may use it says the environment, as AWS has it: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, …; AWS_ALLOW_HTTP where it has no certificate.
    """
    parts = urlsplit(url)
    if not url.startswith("s3://") or not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        shown = url.partition("?")[0] if "@" not in url else "an address with a password in it"
        raise UsageError(
            f"blobs cannot lie at {shown}: give a folder, or s3://BUCKET/PREFIX, and keys in the environment"
        )
    retries: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
    with _reached("opened"):
        return ObjectBlobs(S3Store.from_url(url, retry_config=retries, client_options={"timeout": "30s"}))


@contextmanager
def _reached(what: str) -> Generator[None, None, None]:
    """Says what went wrong on the way to an object store in one line."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ExperimentError(
            f"the object store cannot be {what} ({reason}): is it there, and do AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment say where and who?"
        ) from error
