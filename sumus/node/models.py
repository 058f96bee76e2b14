"""A node's two programs for one task, so that predictions do not wait for training. A program is the task's module on this
machine, with all operations on it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sumus.device.device import Device, Prediction
from sumus.device.store import FolderDeviceStore
from sumus.errors import ExperimentError
from sumus.node.batch import Raw
from sumus.node.intake import Intake, answered
from sumus.node.reading import BadReading
from sumus.node.readings import Readings
from sumus.task import Task

if TYPE_CHECKING:
    from sumus.device.training import Training

SAMPLE = 256
"""The number of readings with which a new model is tried."""
Pair: TypeAlias = "tuple[Training, ...]"
"""One program for training and one for predictions; empty until the form (shape and dtype) of readings is known."""


class ModelPair:
    """Two programs of the same task, made together before either computes.

    Args:
        task: The task.
        readings: The readings, which show the form of inputs and targets if the task does not declare it.
        executor: The programs' executor.
    """

    def __init__(self, task: Task, readings: Readings, executor: str) -> None:
        self._task, self._readings, self._executor = task, readings, executor
        self._making = threading.Lock()
        self._pair: Pair = ()
        self._form: Any = None

    def get(self) -> Pair:
        """Return the programs: the same ones until the form of inputs is widened; none while the form of readings is unknown."""
        with self._making:
            if self.is_outdated():  # a first input of whole numbers was followed by fractions
                self._pair = ()
            if not self._pair and (sample := self.sample()) is not None:
                from sumus.device.training import Training

                self._form = self._readings.forms.get("input")
                self._pair = tuple(Training(self._task, sample, self._executor) for _ in range(2))
            return self._pair

    def is_outdated(self) -> bool:
        """Return whether the form of inputs has changed since the programs were made."""
        return bool(self._pair) and self._form != self._readings.forms.get("input")

    def sample(self) -> tuple[Any, Any] | None:
        """Return readings with a target, or zeros in their form if there are none; None if the form is not known yet."""
        if self._readings.kept.labelled:
            inputs, targets = self._readings.examples()
            return inputs[:SAMPLE], targets[:SAMPLE]
        forms = self._readings.forms
        if not {"input", "target"} <= set(forms):
            return None
        inputs, targets = (np.zeros((1, *forms[what].shape), forms[what].dtype) for what in ("input", "target"))
        return inputs, targets


class Predictor:
    """Predicts with the newest model of the node's device, without a network.

    Args:
        models: The two programs.
        intake: Makes inputs from readings.
        folder: The folder of the node's device.
        answer: The user's function that turns an output into an answer; None if there is none.
    """

    def __init__(
        self, models: ModelPair, intake: Intake, folder: Path, answer: Callable[[Any, Any], Any] | None
    ) -> None:
        self._models, self._intake, self._folder, self._answer = models, intake, folder, answer
        self._made_of: Pair = ()
        self._device: Device | None = None

    def predict(self, raws: Sequence[Raw | BadReading]) -> Prediction:
        """Predict from readings.

        Args:
            raws: The readings as they arrived.

        Raises:
            BadReading: One of the readings is invalid.
            ExperimentError: The device has no model yet.
        """
        inputs = self._intake.inputs(raws)
        pair = self._models.get()
        if self._device is None or self._made_of is not pair:
            sample = self._models.sample()
            if not pair or not (self._folder / "record.json").is_file():
                raise ExperimentError("there is no model yet: the server sends one with its first answer")
            self._device = Device(None, pair[1], sample, folder=FolderDeviceStore(self._folder, look=True))
            self._made_of = pair
        found = self._device.prediction(inputs)
        if self._answer is None:
            return found
        said = [answered(self._answer, each, row) for each, row in zip(inputs, found.outputs, strict=True)]
        return replace(found, answers=tuple(said))
