"""A node's part in rounds: a device that trains on the readings while it has enough of them.

Without enough new readings, the device only evaluates models; without enough readings, it only fetches them. A new device is
made if the kinds of work that it accepts change, or if the form of readings changes.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sumus.device.device import Device, DeviceStatus
from sumus.device.link import read_link
from sumus.device.news import DeviceNews
from sumus.errors import DataError, ExperimentError
from sumus.node.models import ModelPair
from sumus.node.options import NodeTraining
from sumus.node.readings import ReadingCounts, Readings
from sumus.node.status import NodeTroubles
from sumus.task import Task
from sumus.text import many

if TYPE_CHECKING:
    from sumus.device.training import Training

PART = "training"
"""The name of this part of a node in its status."""
LOOK_S = 1.0
"""The seconds between two checks of the readings."""
AGAIN_S = 5.0
"""The seconds before the readings are tried again as a sample of the model's inputs."""
LATER_S = 3600.0
"""The seconds before a device is tried again after a problem that only a person can fix, such as a full disk."""


class Participant:
    """Takes part in rounds for a node.

    Args:
        server: The server's address or its link; None for the server at which the node is enrolled.
        task: The task.
        readings: The readings on which the device trains.
        models: The programs with which it trains.
        folder: The device's folder.
        how: The options for taking part.
        troubles: The record of current problems.
        say: Called with a line when the node begins to wait for something else.
    """

    def __init__(
        self,
        server: str | None,
        task: Task,
        readings: Readings,
        models: ModelPair,
        folder: Path,
        how: NodeTraining,
        troubles: NodeTroubles,
        say: Callable[[str], None],
    ) -> None:
        self._server, self._task, self._readings, self._models, self._folder = server, task, readings, models, folder
        self._how, self._troubles, self._say = how, troubles, say
        self._said_waits = ""
        self._device: Device | None = None

    @property
    def device(self) -> DeviceStatus | None:
        """The device's status; None if there is no device yet."""
        return None if self._device is None else self._device.status

    def check_enrolled(self) -> None:
        """Check that the node is enrolled at a server, or can enrol itself.

        Raises:
            ExperimentError: The node is not enrolled, and has no token.
        """
        with self._new_device(self._task, trains=True, evaluates=True) as device:
            link = None if self._server is None else read_link(self._server, self._how.connection.insecure)
            if not device.status.device and not (self._how.token or (link and link.token)):
                raise ExperimentError(
                    "this node is not enrolled: give it a link or a token, from the server's operator"
                )

    def waits(self, kept: ReadingCounts) -> str:
        """Return the condition that the node waits for before it takes part; empty if it takes part."""
        if kept.labelled < self._how.least:
            return f"for {many(self._how.least, 'reading')} with a target; there {_are(kept.labelled)}"
        if kept.new < self._how.new:
            return (
                f"for {many(self._how.new, 'new reading')} with a target since the last round; there {_are(kept.new)}"
            )
        return ""

    def run(self, over: threading.Event) -> None:
        """Take part until the event is set. Ctrl-C in the calling thread gives up a round that is being trained."""
        works: tuple[bool, bool] | None = None
        try:
            while not over.is_set():
                kept = self._readings.kept
                enough = (not (waits := self.waits(kept)), kept.labelled >= self._how.least)
                if waits != self._said_waits:
                    self._say_waits(waits)
                try:
                    if self._device is None or works != enough or self._models.is_outdated():
                        self._change_device(*enough)
                        works = enough
                    if self._device is None:
                        over.wait(LOOK_S)
                        continue
                    seconds = self._device.wake()
                except DataError as error:  # the model cannot be tried on the readings
                    self._troubles.note(PART, str(error))
                    over.wait(AGAIN_S)
                    continue
                except ExperimentError as error:
                    self._troubles.tell(PART, str(error))
                    works = None
                    over.wait(LATER_S)
                    continue
                self._troubles.clear(PART)
                over.wait(min(seconds, LOOK_S))
        except KeyboardInterrupt:
            if self._device is not None:
                self._device.give_up()
            raise
        finally:
            if self._device is not None:
                self._device.close()

    def stop(self) -> None:
        """Let the device end. Any thread may call this."""
        if self._device is not None:
            self._device.stop()

    def _say_waits(self, waits: str) -> None:
        """Report what the node waits for, but not again with each reading that arrives."""
        before, self._said_waits = self._said_waits, waits
        if waits and waits.partition(";")[0] != before.partition(";")[0]:
            self._say(f"{PART}: waits {waits}")

    def _change_device(self, trains: bool, evaluates: bool) -> None:
        """Make a device that accepts this work, or only models; make none while the form of readings is unknown."""
        training, _ = self._models.get() or (None, None)
        if training is None:
            self._troubles.note(
                PART,
                "it waits for a reading with a target, which shows the form of the readings, since data= of the task "
                "does not declare it",
            )
            return
        if self._device is not None:
            self._device.close()
        self._device = self._new_device(training, trains=trains, evaluates=evaluates)

    def _new_device(self, task: "Task | Training", trains: bool, evaluates: bool) -> Device:
        """Make a device. Its check-ins wait at the server only if it accepts work."""
        how = self._how
        consent = how.consent
        return Device(
            self._server,
            task,
            self._readings.examples,
            folder=self._folder,
            token=how.token,
            held_out=how.held_out,
            consent=replace(consent, trains=trains and consent.trains, evaluates=evaluates and consent.evaluates),
            connection=how.connection if evaluates else replace(how.connection, wait_s=0.0),
            profile=how.profile,
            watch=self._heard,
        )

    def _heard(self, news: DeviceNews) -> None:
        """Record which readings were trained on, and pass on the device's news."""
        if news.kind == "train" and news.what == "trained":
            self._readings.note_trained()
        elif news.kind == "train" and news.what == "counted":
            self._readings.note_counted()
        if self._how.news is not None:
            self._how.news(news)


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count:,}"
