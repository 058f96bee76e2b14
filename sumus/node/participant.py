"""A node's part in rounds: a device that trains on the readings while there are enough of them.

Without enough readings the device measures models, or only asks for them. It is made anew if the work that it takes changes, or
if the form of readings does.
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
"""What this part of a node is called in its status."""
LOOK_S = 1.0
"""Seconds between two looks at the readings."""
AGAIN_S = 5.0
"""Seconds until the readings are tried again as a sample of the model's inputs."""
LATER_S = 3600.0
"""Seconds until a device is tried again that met what only a person can mend: its disk, its server's operator."""


class Participant:
    """Takes part in rounds.

    Args:
        server: The server's address or its link; None for the one that the node is enrolled at.
        task: The task.
        readings: What the device trains on.
        models: The programs that it trains with.
        folder: The device's folder.
        how: How the node takes part.
        troubles: Where it is noted what goes wrong.
        say: Is told a line when the node begins to wait for something else.
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
        """Where the device stands; None if there is none yet."""
        return None if self._device is None else self._device.status

    def check_enrolled(self) -> None:
        """Refuse to begin if a person has to mend something about the server.

        Raises:
            ExperimentError: The node is not enrolled, and has no token.
        """
        with self._new_device(self._task, trains=True, evaluates=True) as device:
            link = None if self._server is None else read_link(self._server, self._how.connection.insecure)
            if not device.status.device and not (self._how.token or (link and link.token)):
                raise ExperimentError(
                    "this node is not enrolled: give it a link or a token, from whoever runs the server"
                )

    def waits(self, kept: ReadingCounts) -> str:
        """Tell what the node waits for before it takes part; empty if it takes part."""
        if kept.labelled < self._how.least:
            return f"for {many(self._how.least, 'reading')} with a target; there {_are(kept.labelled)}"
        if kept.new < self._how.new:
            return (
                f"for {many(self._how.new, 'new reading')} with a target since the last round; there {_are(kept.new)}"
            )
        return ""

    def run(self, over: threading.Event) -> None:
        """Take part until the event is set. Ctrl-C in the thread that calls this gives up a round that is being trained."""
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
        """Let the device come to its end; from any thread."""
        if self._device is not None:
            self._device.stop()

    def _say_waits(self, waits: str) -> None:
        """Say what the node waits for, and not again with each reading that comes."""
        before, self._said_waits = self._said_waits, waits
        if waits and waits.partition(";")[0] != before.partition(";")[0]:
            self._say(f"{PART}: waits {waits}")

    def _change_device(self, trains: bool, evaluates: bool) -> None:
        """Make a device that takes such work, or only models; none while nothing says what readings look like."""
        training, _ = self._models.get() or (None, None)
        if training is None:
            self._troubles.note(
                PART,
                "it waits for a reading with a target: until then nothing says what readings look like, where data= of the "
                "task does not",
            )
            return
        if self._device is not None:
            self._device.close()
        self._device = self._new_device(training, trains=trains, evaluates=evaluates)

    def _new_device(self, task: "Task | Training", trains: bool, evaluates: bool) -> Device:
        """Make a device. A check-in waits at the server only if the device takes work."""
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
        """Note which readings were trained on, and pass on what the device tells."""
        if news.kind == "train" and news.what == "trained":
            self._readings.note_trained()
        elif news.kind == "train" and news.what == "counted":
            self._readings.note_counted()
        if self._how.news is not None:
            self._how.news(news)


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count:,}"
