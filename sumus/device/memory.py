"""A running device's view of its record and objects: the record is read once, and every change is written before it is
used."""

from dataclasses import dataclass, replace

from sumus.device.record_step import with_task
from sumus.device.store import DeviceStore, KeptModel, Record
from sumus.errors import ExperimentError
from sumus.tree import nested
from sumus.wire.tensors import decode_tree
from sumus.work import ClientState


@dataclass(frozen=True)
class ModelAtHand:
    """A model that the device has stored.

    Attributes:
        task: The model's task.
        version: The model's version.
        body: The model's leaves, encoded.
        state: The client's state from the task's rounds, such as personal leaves.
    """

    task: str
    version: int
    body: bytes
    state: ClientState


class DeviceMemory:
    """The newest record, and the store that holds it."""

    def __init__(self, store: DeviceStore) -> None:
        self.store = store
        self._record = store.read()

    @property
    def record(self) -> Record:
        """The record that was read or written last."""
        return self._record

    def write(self, record: Record) -> None:
        """Replace the record; the new one is durable when this returns."""
        self.store.write(record)
        self._record = record

    def read_again(self) -> Record:
        """Read the record from the store again, since it may have been erased, or written before an error."""
        self._record = self.store.read()
        return self._record

    def keep_model(self, task: str, model: KeptModel) -> None:
        """Record the current model of a task, and that this task was updated last."""
        models = with_task(self._record.models, task, model)
        self.write(replace(self._record, models=models, latest=task))

    def state(self, task: str, fingerprint: str) -> ClientState:
        """Return the client's state for a task; empty if it was kept for another model or other data."""
        return self._state_in(self._record, task, fingerprint)

    def last_model(self, task: str | None, fingerprint: str) -> ModelAtHand:
        """Return the newest stored model of a task, even while another process is writing.

        Args:
            task: The task; None for the one whose model was updated last.
            fingerprint: The hash of the task's leaves and data, for the client's state.

        Raises:
            ExperimentError: No model is stored, or it is damaged.
        """
        try:
            return self._model_in(self.store.read(), task, fingerprint)
        except ExperimentError:  # the other process may just have replaced the objects of the record that was read
            return self._model_in(self.store.read(), task, fingerprint)

    def _model_in(self, record: Record, task: str | None, fingerprint: str) -> ModelAtHand:
        name = task or record.latest
        if (kept := record.models.get(name)) is None:
            raise ExperimentError(
                "this device has no model to predict with yet: join its server once (`sumus join --once`), so that it gets one"
            )
        state = self._state_in(record, name, fingerprint)
        return ModelAtHand(name, kept.version, self.store.get(kept.object), state)

    def _state_in(self, record: Record, task: str, fingerprint: str) -> ClientState:
        kept = record.states.get(task)
        if kept is None or kept.fingerprint != fingerprint:
            return {}
        return nested(decode_tree(self.store.get(kept.object)))
