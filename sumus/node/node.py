"""A node: takes readings, keeps them, trains on them, and predicts.

    with Node("https://fl.example.org:8443/#enrol=TOKEN&pin=HEX", task, "DATA", sources="incoming") as node:
        node.keep({"inputs": [1.0, 2.0], "target": 0})
        node.predict({"inputs": [1.0, 2.0]}).outputs
        node.url                                     the same over HTTP, on the local network
    node.run()                                       runs until the process is told to stop

DATA/readings.db    the readings           DATA/device    the device's key, record and models
DATA/tls            a certificate, if the node made one         DATA/mqtt    the node's name at the broker

Training, the folder, the broker and HTTP each have a thread. A failure in one does not end the others: the status reports it,
and the rest continues. Predictions use their own copy of the model, and do not wait for training.

    Node
      Readings        stores readings           Participant    trains, as a device of the server
      Intake          accepts readings          Predictor      predicts
      WatchedFolder   reads files               LocalPlane     answers over HTTP
      Subscription    listens to a broker       Housekeeper    scans the folder, and deletes old readings
"""

import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from time import time as wall_clock
from typing import Any

from sumus.device.device import Prediction
from sumus.errors import ExperimentError, SumusError, UsageError
from sumus.http.certificates import Certificate
from sumus.http.listening import PlaneAddress, opened_plane
from sumus.logs import logger
from sumus.node.access import VARIABLE, checked
from sumus.node.batch import Raw
from sumus.node.folder import WatchedFolder
from sumus.node.housekeeper import Housekeeper
from sumus.node.intake import Intake, IntakeResult
from sumus.node.local_plane import LocalPlane
from sumus.node.models import ModelPair, Predictor
from sumus.node.mqtt import Subscription
from sumus.node.options import NodeListening, NodeTraining, ReadingSchema, ReadingSources
from sumus.node.participant import PART, Participant
from sumus.node.plane import plane_app
from sumus.node.readings import USUAL, Readings, Retention
from sumus.node.status import NodeStatus, NodeTroubles, ReadingStatus
from sumus.storage.files import expanded, make_private_folder, write_whole
from sumus.task import Task
from sumus.text import printable

LOG = logger("sumus.node")
AS_IT_COMES, BY_HTTP, HERE, AS_A_DEVICE = ReadingSchema(), ReadingSources(), NodeListening(), NodeTraining()


def _quiet(said: Any) -> None:
    """Ignore a line."""


class Node:
    """One node of one server, with one task.

    Args:
        server: The server's address or its link; None for the server at which the node is enrolled.
        task: The task that the node trains.
        data: The node's folder, which is made if it does not exist.
        schema: The user's functions that turn a reading into an example, and an output into an answer.
        sources: The sources of readings, in addition to HTTP and `keep`; a folder alone is short for `ReadingSources(watch=)`.
        retention: The limits on stored readings; the oldest ones are deleted first.
        listen: The address for HTTP; "HOST:PORT" is short for `NodeListening(address=)`, None for no HTTP.
        training: The options for taking part in rounds.
        say: Called with lines about new readings and problems.
        clock: Returns the seconds since 1970.

    Raises:
        ExperimentError: The folder or the server cannot be used, and a person must act; the message says how.
        UsageError: Options contradict each other, or one is missing.
    """

    def __init__(
        self,
        server: str | None,
        task: Task,
        data: str | Path,
        *,
        schema: ReadingSchema = AS_IT_COMES,
        sources: ReadingSources | str | Path = BY_HTTP,
        retention: Retention = USUAL,
        listen: NodeListening | str | None = HERE,
        training: NodeTraining = AS_A_DEVICE,
        say: Callable[[str], None] = _quiet,
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        self._folder, self._clock = expanded(data), clock
        self._say: Callable[[str], None] = lambda line: say(printable(line))
        self._troubles = NodeTroubles(self._say)
        listen = NodeListening(listen) if isinstance(listen, str) else listen
        listening = None if listen is None else listen.listening()
        access = None if listen is None or listen.access is None else checked(listen.access)
        sources = sources if isinstance(sources, ReadingSources) else ReadingSources(watch=sources)
        device = self._folder / "device"
        with ExitStack() as stack:
            _own_folder(self._folder)
            declared = (
                task.data if task.prepare is None else None
            )  # otherwise `data` describes the output of the task's `prepare`
            self.readings = Readings(self._folder, declared, retention, clock)
            stack.callback(self.readings.close)
            self._intake = Intake(self.readings, schema.prepare, schema.time, schema.label)
            self._watched = _watched(sources, self._intake, retention, clock)
            if self._watched is not None:
                stack.callback(self._watched.close)
            self._mqtt: Subscription | None = None
            if sources.mqtt is not None:
                asked, name = self._folder / "mqtt-topics", _name_at_broker(self._folder / "mqtt")
                self._mqtt = Subscription(sources.mqtt, self._intake, name, self._tell_mqtt, asked)
            models = ModelPair(task, self.readings, training.profile.executor)
            self._predictor = Predictor(models, self._intake, device, schema.answer)
            self._at: PlaneAddress | None = None
            if listening is not None:
                self._at = stack.enter_context(opened_plane(listening, self._folder / "tls"))
                if not self._at.local and access is None:
                    raise UsageError(
                        f"other machines can reach {listening.host}: give --access-file FILE (made if it does not exist), or "
                        f"set {VARIABLE} (access=), so that only clients with the token can add readings and get predictions"
                    )
            self._participant = Participant(
                server, task, self.readings, models, device, training, self._troubles, self._say
            )
            self._participant.check_enrolled()
            self._closing = stack.pop_all()
        self._house = Housekeeper(self.readings, self._watched, self._certificate, self._troubles, self._say)
        self._plane = None if self._at is None else LocalPlane(self._at.plane(self._app(self._at, access)))
        self._over, self._up = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # ── public methods ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        """The address at which the node answers; empty if it does not listen."""
        return "" if self._at is None else self._at.url

    @property
    def authority(self) -> Path | None:
        """The file of the certificate by which clients verify the node, if the node made its own certificate."""
        return None if self._at is None else self._at.authority

    def start(self) -> "Node":
        """Begin to take readings, to take part in rounds and to answer requests; the node answers when this returns."""
        return self._start((PART, lambda: self._participant.run(self._over)))

    def _start(self, *parts_too: tuple[str, Callable[[], None]]) -> "Node":
        parts = [("folder", lambda: self._house.run(self._over)), *parts_too]
        if self._mqtt is not None:
            subscription = self._mqtt
            parts.append(("mqtt", lambda: subscription.run(self._over)))
        if self._plane is not None:
            plane = self._plane
            parts.append(("http", lambda: plane.run(self._over, self._up.set)))
        else:
            self._up.set()
        self._threads = [
            threading.Thread(target=self._part, args=part, name=f"node-{part[0]}", daemon=True) for part in parts
        ]
        for thread in self._threads:
            thread.start()
        self._up.wait()
        return self

    def run(self, ready: Callable[["Node"], None] = _quiet) -> None:
        """Run the node until the process is told to stop.

        It trains in the calling thread. Call it in the main thread, so that Ctrl-C interrupts training at once.

        Args:
            ready: Called once the node answers.
        """
        try:
            self._start()
            ready(self)
            self._part(PART, lambda: self._participant.run(self._over))
            self._over.wait()
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def stop(self) -> None:
        """Let `run` end. Any thread may call this."""
        self._over.set()

    def close(self) -> None:
        """End all threads, and release the folder. This waits for training or a check-in in progress, unless `run` was
        interrupted during it."""
        self._over.set()
        self._participant.stop()
        if self._mqtt is not None:
            self._mqtt.stop()
        if self._plane is not None:
            self._plane.stop()
        for thread in self._threads:
            thread.join()
        self._closing.close()

    def __enter__(self) -> "Node":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def keep(self, *raws: Raw, key: str | None = None) -> IntakeResult:
        """Keep readings, given in the form in which they arrive; they are on the disk when this returns.

        Args:
            raws: The readings.
            key: A key for all of them together, so that readings that are given again are kept only once.
        """
        return self._intake.take(raws, key)

    def label(self, key: str, target: Any) -> None:
        """Give a reading its target.

        Raises:
            BadReading: No reading has this key.
        """
        self._intake.label({"key": key, "target": target})

    def predict(self, *raws: Raw) -> Prediction:
        """Predict from readings with the newest model: one row for each, and the `answers` if the node has a
        function for them. Works offline.

        Raises:
            ExperimentError: The node has no model yet.
        """
        return self._predictor.predict(raws)

    @property
    def status(self) -> NodeStatus:
        """The node's status."""
        kept, trouble = self.readings.kept, self._troubles.by_part()
        if self._mqtt is not None and self._mqtt.trouble:
            trouble["mqtt"] = printable(self._mqtt.trouble)
        device, certificate = self._participant.device, self._certificate()
        if device is not None and device.trouble:
            trouble.setdefault(PART, device.trouble)
        oldest = None if kept.oldest is None else max(0.0, self._clock() - kept.oldest)
        return NodeStatus(
            readings=ReadingStatus(kept.count, kept.labelled, kept.new, kept.bytes, oldest),
            models={} if device is None else device.models,
            rounds=0 if device is None else device.counts.get("in sums", 0),
            waits=self._participant.waits(kept),
            server="" if device is None else device.server,
            phase="" if device is None else device.phase,
            trouble=trouble,
            certificate_s=None if certificate is None else certificate.left_s(datetime.now(UTC)),
            folder={} if self._watched is None else self._watched.state.as_json(),
            mqtt={} if self._mqtt is None else self._mqtt.state,
        )

    # ── its parts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _part(self, name: str, work: Callable[[], None]) -> None:
        """Run one thread's work. If it fails, report the problem, and let the other parts continue."""
        try:
            work()
        except Exception as error:  # nothing else would report it: the thread ends
            if self._over.is_set():
                return
            if not isinstance(error, SumusError):
                LOG.error("%s ended because of a defect", name, exc_info=error)
            defect = f"it ended because of a defect; the log has the details ({type(error).__name__})"
            self._troubles.tell(name, str(error) if isinstance(error, SumusError) else defect)
        finally:
            self._up.set()

    def _app(self, at: PlaneAddress, access: str | None) -> Any:
        return plane_app(self._intake, self._predictor.predict, lambda: self.status.as_json(), access, names=at.names)

    def _certificate(self) -> Certificate | None:
        return None if self._at is None else self._at.certificate

    def _tell_mqtt(self, line: str) -> None:
        self._say(f"mqtt: {line}")


def _watched(
    sources: ReadingSources, intake: Intake, retention: Retention, clock: Callable[[], float]
) -> WatchedFolder | None:
    if sources.watch is not None:
        return WatchedFolder(expanded(sources.watch), intake, retention, now=clock, follow=sources.follow)
    if sources.follow:
        raise UsageError("follow needs a folder: give watch= (--watch FOLDER) too")
    return None


def _own_folder(folder: Path) -> None:
    """Make a node's folder, accessible only to its owner.

    Raises:
        ExperimentError: The folder has other contents, or cannot be used.
    """
    try:
        make_private_folder(folder)
        others = {path.name for path in folder.iterdir()} - {"device", "tls", "mqtt", "mqtt.new", "mqtt-topics"}
        if others and not (folder / "readings.db").is_file():
            raise ExperimentError(f"{folder} is not a node's folder, and is not empty: give a new or an empty folder")
        folder.chmod(0o700)
    except OSError as error:
        raise ExperimentError(
            f"a node cannot keep anything in {folder}: {error.strerror or error}; give a folder in which you can write"
        ) from error


def _name_at_broker(file: Path) -> str:
    """Return the name by which the broker knows the node's session. It is the same after a restart."""
    if not file.exists():
        write_whole(file, f"sumus-{secrets.token_hex(8)}".encode(), private=True)
    return file.read_text()
