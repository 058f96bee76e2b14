"""A node's background tasks: scan the folder, delete old readings, watch the certificate, report new readings."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic

from sumus.errors import ExperimentError
from sumus.http.certificates import Certificate
from sumus.node.folder import LOOK_S, WatchedFolder
from sumus.node.readings import Readings
from sumus.node.status import NodeTroubles
from sumus.text import amount

PRUNE_S = 60.0
"""The seconds between two checks for readings that are too old."""
SUMMARY_S = 10.0
"""The minimum number of seconds between two lines about new readings."""


class Housekeeper:
    """Keeps a node's folder and readings in order.

    Args:
        readings: The readings.
        watched: The watched folder; None if there is none.
        certificate: Returns the node's certificate; None if it has none.
        troubles: The record of current problems.
        say: Called with lines about new readings.
    """

    def __init__(
        self,
        readings: Readings,
        watched: WatchedFolder | None,
        certificate: Callable[[], Certificate | None],
        troubles: NodeTroubles,
        say: Callable[[str], None],
    ) -> None:
        self._readings, self._watched, self._certificate = readings, watched, certificate
        self._troubles, self._say = troubles, say

    def run(self, over: threading.Event) -> None:
        """Run until the event is set."""
        said, next_prune, next_summary = self._readings.kept.count, 0.0, 0.0
        while not over.wait(LOOK_S):
            now = monotonic()
            try:
                for seen in self._watched.look() if self._watched is not None else ():
                    self._say(f"folder: {seen.said}")
                if now >= next_prune:
                    self._readings.let_go()
                    next_prune = now + PRUNE_S
                    self._look_at_certificate()
                if (kept := self._readings.kept).count != said and now >= next_summary:
                    said, next_summary = kept.count, now + SUMMARY_S
                    self._say(f"readings: {kept.count:,} kept, {kept.labelled:,} with a target, {amount(kept.bytes)}")
                self._troubles.clear("folder")
            except (ExperimentError, OSError) as error:
                self._troubles.tell("folder", str(error))

    def _look_at_certificate(self) -> None:
        certificate = self._certificate()
        if certificate is None or not (said := certificate.said(datetime.now(UTC))):
            self._troubles.clear("certificate")
        else:
            self._troubles.tell("certificate", said)
