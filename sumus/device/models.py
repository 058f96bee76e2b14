"""The released models, which a device stores in order to predict."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from sumus.device.access import ServerAccess
from sumus.device.compute import DeviceCompute
from sumus.device.memory import DeviceMemory
from sumus.device.news import DeviceNews, NewsFeed
from sumus.device.record_step import MOST_TASKS
from sumus.device.store import KeptModel
from sumus.errors import ParticipantError
from sumus.transport.transport import Unreachable
from sumus.wire.messages import Refused, Released


class ReleasedModels:
    """Fetches newly released models.

    Args:
        memory: Keeps the models.
        access: Fetches them.
        news: Informs the owner.
        compute: Returns the device's compute, which checks the models.
        longest: The owner's limit for a model, in bytes.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        access: ServerAccess,
        news: NewsFeed,
        compute: Callable[[], DeviceCompute[Any]],
        longest: int,
    ) -> None:
        self._memory, self._access, self._news = memory, access, news
        self._compute, self._longest = compute, longest

    def take(self, released: Mapping[str, Released]) -> None:
        """Fetch the model of each task, unless it is stored already or too large. At most `MOST_TASKS` are considered."""
        for task, one in islice(released.items(), MOST_TASKS):
            self._take(task, one)

    def _take(self, task: str, released: Released) -> None:
        kept, model = self._memory.record.models.get(task), released.model
        if kept == KeptModel(released.version, model.sha256) or model.bytes > self._longest:
            return
        try:
            if kept is None or kept.object != model.sha256:
                body = self._access.object(model)
                self._compute().model(body)  # refuses a model with which this device's task cannot predict
                self._memory.store.put(body)
        except (Unreachable, Refused, ParticipantError) as error:
            self._news.tell_trouble(f"model {released.version} could not be fetched: {error}")
            return
        self._memory.keep_model(task, KeptModel(released.version, model.sha256))
        self._news.tell(DeviceNews("model", "to predict with", task, "train", released.version))
