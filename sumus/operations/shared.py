"""The data that servers with one database share in addition to rows: a secret, and blobs."""

import hashlib
from collections.abc import Sequence

from sumus.errors import ExperimentError
from sumus.server.replica import Replica
from sumus.storage.blobs import Blobs
from sumus.storage.keyring import KeyRing, SealError, new_key
from sumus.storage.leases import PresentReplica
from sumus.storage.store import OF_THE_RUN, Rows, Store, TakenOver


class Shared:
    """The data, in addition to rows, that servers with one database share: a secret, wrapped by the key ring, and blobs.

    The secret shows whether they have the same ring and the same blobs.

    Args:
        store: The rows that hold the wrapped secret.
        ring: The key ring.
        blobs: The blobs.
    """

    _NOTE = "/shared"
    """The note's name, which no task can have."""

    def __init__(self, store: Store, ring: KeyRing, blobs: Blobs) -> None:
        self._store, self._ring, self._blobs = store, ring, blobs

    def join(self, replica: Replica) -> bytes:
        """Join the servers that work on the database.

        Returns:
            The secret.

        Raises:
            ExperimentError: Other servers have a different ring, different blobs or different tasks.
        """
        with self._store.transaction() as rows:  # servers join one after the other, so that each sees the earlier ones
            others = replica.others(rows)
            for other in others:
                if other.serves != replica.serves:
                    raise ExperimentError(
                        f"replica {other.name} serves other tasks, plans or options from this database: start all "
                        "replicas with the same ones, or stop the other replicas first"
                    )
            secret = self._secret(rows, others)
            if replica.shared:
                mark = b"replicas share these blobs " + hashlib.sha256(secret).digest()
                if others and self._blobs.size(hashlib.sha256(mark).hexdigest()) is None:
                    raise ExperimentError(
                        f"replica {others[0].name} keeps models and sums elsewhere: give all replicas the same --blobs, a "
                        "folder or a bucket that all of them can reach"
                    )
                self._blobs.put(mark)
            replica.beat(rows)
        return secret

    def wrap_again(self, fence: int | None) -> None:
        """Wrap the secret with the newest key. Raise TakenOver if another server leads."""
        with self._store.transaction() as rows:
            if rows.run().fence != fence:
                raise TakenOver
            self._write(rows, self._secret(rows, ()))

    def _secret(self, rows: Rows, others: Sequence[PresentReplica]) -> bytes:
        """Unwrap the secret. If the ring no longer has its key and no other server uses the secret, make a new secret."""
        wrapped = rows.note(OF_THE_RUN, self._NOTE)
        try:
            if wrapped is not None:
                return self._ring.unwrap(wrapped, self._NOTE)
        except SealError as error:
            if others:
                raise ExperimentError(
                    f"replica {others[0].name} has another key ring: give all replicas the same --keys, "
                    "a folder that all of them can reach"
                ) from error
        return self._write(rows, new_key())

    def _write(self, rows: Rows, secret: bytes) -> bytes:
        rows.put_note(OF_THE_RUN, self._NOTE, self._ring.wrap(secret, self._NOTE))
        return secret
