"""A node: what takes readings, keeps them, trains on them, and answers, put together.

    with Node("https://fl.example.org:8443/#enrol=TOKEN&pin=HEX", task, "DATA", watch="incoming") as node:
        node.keep({"inputs": [1.0, 2.0], "target": 0})
        node.predict({"inputs": [1.0, 2.0]}).outputs
        node.url                                     the same over HTTP, on the local network
    node.run()                                       until the process is told to stop

DATA/readings.db    what was kept          DATA/device    the device's key, record and models
DATA/tls            a certificate, where it is made here         DATA/mqtt    its name at the broker

Training has a thread, and so have the folder, the broker and HTTP. None of them ends the others: what goes wrong is said in the
status, and the rest goes on. Predictions have a copy of the model of their own, and do not wait for training.
"""

import asyncio
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from time import time as wall_clock
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from sumus.device.conditions import Sensors
from sumus.device.device import Device, Prediction
from sumus.device.keys import Keys, system
from sumus.device.link import read_link
from sumus.device.news import DeviceNews
from sumus.device.options import Consent, DeviceProfile, DeviceSystem, ServerConnection
from sumus.device.store import FolderDeviceStore
from sumus.errors import DataError, ExperimentError, SumusError, UsageError
from sumus.http.listening import Listening, PlaneAddress, opened_plane
from sumus.logs import logger
from sumus.node.access import VARIABLE, checked
from sumus.node.folder import LOOK_S, WatchedFolder
from sumus.node.formats import Raw
from sumus.node.intake import Intake, IntakeResult, Label, Prepare, answered
from sumus.node.mqtt import Broker, Subscription
from sumus.node.plane import plane_app
from sumus.node.readings import BadReading, ReadingCounts, Readings, Retention
from sumus.pacing import Conditions
from sumus.protocol.session import Floor
from sumus.storage.files import expanded, make_private_folder, write_whole
from sumus.task import Task
from sumus.text import amount, many, printable
from sumus.transport.hosts import listen_address
from sumus.transport.transport import Transport

if TYPE_CHECKING:
    from sumus.device.training import Training

LOG = logger("sumus.node")
LET_GO_S = 60.0
"""Seconds between two looks for readings that are too old."""
SUMMARY_S = 10.0
"""Seconds between two lines about what came, at least."""
SAMPLE = 256
"""Readings that the model is tried on at the start."""
AGAIN_S = 5.0
"""Seconds until what there is is tried again as a sample."""
LATER_S = 3600.0
"""Seconds until a device is tried again that said what only a person can mend: its disk, its server's operator."""


@dataclass(frozen=True)
class NodeStatus:
    """Where a node stands.

    Attributes:
        readings: Readings that are kept.
        labelled: Of these, with a target.
        new: Of these, how many a round would learn something from, see `ReadingCounts`.
        bytes: Bytes of the readings.
        oldest_s: Age of the oldest, in seconds.
        models: Versions by task.
        rounds: Rounds in which its report is in a sum.
        server: Of its device.
        phase: Of its device.
        waits: What it waits for before it takes part in a round; empty where it takes part.
        trouble: What goes wrong now, by part: training, folder, mqtt, certificate.
        folder: What waits in the watched folder, is left alone there, and was refused.
        mqtt: Messages that came, that were refused, and connections that ended.
        certificate_s: Seconds until the certificate ends that it shows; None if it shows none.
    """

    readings: int
    labelled: int
    bytes: int
    oldest_s: float | None
    models: Mapping[str, int] = field(default_factory=dict[str, int])
    rounds: int = 0
    server: str = ""
    phase: str = ""
    trouble: Mapping[str, str] = field(default_factory=dict[str, str])
    folder: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mqtt: Mapping[str, Any] = field(default_factory=dict[str, Any])
    certificate_s: float | None = None
    waits: str = ""
    new: int = 0


_FLOOR, _ANY = Floor(), Conditions()


def _quiet(said: Any) -> None:
    """Nobody watches."""


class Node:
    """One node of one server, with one task.

    server: its address or its link; None for the one that it is enrolled at.  task: what it trains.
    data: its folder, made if it is not there.
    prepare: a reading as it came → (input, target or None); by default its `inputs` and `target`.
    label: a target in the words of whoever gives it → as the task takes it: of labels that come later, and without `prepare` of
        `target`.
    answer: (inputs, outputs) of one reading, as the model has them → what its prediction says in your words, as JSON holds it.
    token: lets it in at the server, the first time, where the link holds none.  held_out: examples to evaluate on; else its own.
    keep_days, keep_count, keep_bytes: how much is kept; the oldest readings go first.
    watch: a folder whose files are readings.  follow: its files stay where they are, and each line is taken once it has its end.
    mqtt: a broker that sends some.
    time: the name of the value that is a reading's own time, by which it is ordered and grows old; None for when it comes.
    listen: HOST:PORT for HTTP, port 0 for any; None for no HTTP.  access: the token that is asked for there; other machines are
    let in only with one.  tls, names: "auto", or a certificate's chain and its key, and what this machine is called.
    least: readings with a target before it takes part in rounds.  new: of these, how many must be new since the last round in
        whose sum it is; 0 to train on the same ones again.
    floor, requires, sensors, executor, name, wait_s: as of `sumus.Device`.  insecure: without TLS, also where others reach it, or
        where it reaches others.
    authority: a file of certificates, PEM, that the server's must come from.
    news, say: are told what its device does, and lines about what came.
    keys, transport, clock: for tests.
    """

    def __init__(
        self,
        server: str | None,
        task: Task,
        data: str | Path,
        *,
        prepare: Prepare | None = None,
        label: Label | None = None,
        answer: Callable[[Any, Any], Any] | None = None,
        token: str | None = None,
        held_out: Any = None,
        keep_days: float | None = None,
        keep_count: int | None = None,
        keep_bytes: int | None = 2**28,
        watch: str | Path | None = None,
        follow: bool = False,
        time: str | None = None,
        mqtt: Broker | None = None,
        listen: str | None = "127.0.0.1:0",
        access: str | None = None,
        tls: str | Path | Sequence[str | Path] = (),
        names: Sequence[str] = (),
        least: int = 1,
        new: int = 0,
        floor: Floor = _FLOOR,
        requires: Conditions = _ANY,
        sensors: Sensors | None = None,
        executor: str = "auto",
        name: Any = "this node",
        wait_s: float = 20.0,
        insecure: bool = False,
        authority: str | Path | None = None,
        news: Callable[[DeviceNews], None] = _quiet,
        say: Callable[[str], None] = _quiet,
        keys: Keys = system,
        transport: Transport | None = None,
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        self._folder = expanded(data)
        self._task, self._least, self._clock, self._executor = task, least, clock, executor
        self._new, self._answers, self._news = new, answer, news
        self._say: Callable[[str], None] = lambda line: say(printable(line))
        self._token, self._held_out = token, held_out
        self._consent = Consent(floor, requires)
        self._connection = ServerConnection(wait_s, insecure, authority=authority, transport=transport)
        self._profile = DeviceProfile(name, sensors=sensors, executor=executor, system=DeviceSystem(keys))
        self._server = server
        self._listen = None if listen is None else _address(listen, tls, names, insecure)
        self._access = None if access is None else checked(access)
        retention = Retention(keep_days, keep_count, keep_bytes)
        with ExitStack() as stack:
            _own_folder(self._folder)
            declared = task.data if task.prepare is None else None  # else it is of what `prepare=` of the task makes
            self.readings = Readings(self._folder, declared, retention, clock)
            stack.callback(self.readings.close)
            self._intake = Intake(self.readings, prepare, time, label)
            if follow and watch is None:
                raise UsageError("follow which folder? Give watch= (--watch FOLDER) too")
            self._watched: WatchedFolder | None = None
            if watch is not None:
                folder = expanded(watch)
                self._watched = WatchedFolder(folder, self._intake, retention, now=clock, follow=follow)
                stack.callback(self._watched.close)
            self._mqtt: Subscription | None = None
            if mqtt is not None:
                asked = self._folder / "mqtt-topics"
                self._mqtt = Subscription(mqtt, self._intake, self._name_at_broker(), self._tell_mqtt, asked)
            self._at: PlaneAddress | None = None
            if self._listen is not None:
                self._at = stack.enter_context(opened_plane(self._listen, self._folder / "tls"))
                if not self._at.local and self._access is None:
                    raise UsageError(
                        f"others reach {self._listen.host}: give --access-file FILE (made if it is not there), or set {VARIABLE} "
                        "(access=), so that not everyone may put readings here and ask"
                    )
            self._check_enrolled()
            self._closing = stack.pop_all()
        self._over, self._up = threading.Event(), threading.Event()
        self._trouble: dict[str, str] = {}
        self._said_waits = ""
        self._making, self._pair, self._form = threading.Lock(), tuple["Training", ...](), None
        self._device: Device | None = None
        self._answering: Device | None = None
        self._threads: list[threading.Thread] = []
        self._end_http: Callable[[], Any] = lambda: None

    # ── what it is asked to do ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        """Where it answers; empty where it does not listen."""
        return "" if self._at is None else self._at.url

    @property
    def authority(self) -> Path | None:
        """The certificate that vouches for it, to be given to whoever asks it, where it made its own."""
        return None if self._at is None else self._at.authority

    def start(self) -> "Node":
        """Begin to take readings, to take part and to answer; it answers when this returns."""
        return self._start(("training", self._take_part))

    def _start(self, *parts_too: tuple[str, Callable[[], None]]) -> "Node":
        parts = [("folder", self._keep_house), *parts_too]
        if self._mqtt is not None:
            subscription = self._mqtt
            parts.append(("mqtt", lambda: subscription.run(self._over)))
        if self._at is not None:
            app = plane_app(
                self._intake, self._predict, lambda: _as_json(self.status), self._access, names=self._at.names
            )
            planes = self._at.plane(app)
            parts.append(("http", lambda: self._answer(planes)))
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
        """Be a node until the process is told to stop. ready: is told once it answers.

        It trains in the thread that calls this, the main one, so that Ctrl-C ends a round that is being trained at once.
        """
        try:
            self._start()
            ready(self)
            self._part("training", self._take_part)
            self._over.wait()
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def stop(self) -> None:
        """Let `run` end; from any thread."""
        self._over.set()

    def close(self) -> None:
        """End what it does, and let go of its folder. A round that is being trained, or a check-in that waits at the server, is
        awaited, unless `run` was interrupted in it."""
        self._over.set()
        if self._device is not None:
            self._device.stop()
        if self._mqtt is not None:
            self._mqtt.stop()
        self._end_http()
        for thread in self._threads:
            thread.join()
        self._closing.close()

    def __enter__(self) -> "Node":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def keep(self, *raws: Raw, key: str | None = None) -> IntakeResult:
        """Take readings as they come; they are on the disk when it returns. key: of all, so that they are kept once."""
        return self._intake.take(raws, key)

    def label(self, key: str, target: Any) -> None:
        """Give a reading its target. BadReading where there is no such reading."""
        self._intake.label({"key": key, "target": target})

    def predict(self, *raws: Raw) -> Prediction:
        """What the last model says of readings, one row each; with `answers` in your words. Asks nobody. ExperimentError where
        there is no model yet."""
        return self._predict(raws)

    @property
    def status(self) -> NodeStatus:
        """Where it stands."""
        kept, trouble = self.readings.kept, dict(self._trouble)
        if self._mqtt is not None and self._mqtt.trouble:
            trouble["mqtt"] = printable(self._mqtt.trouble)
        oldest = None if kept.oldest is None else max(0.0, self._clock() - kept.oldest)
        folder = {} if self._watched is None else self._watched.state.as_json()
        mqtt = {} if self._mqtt is None else self._mqtt.state
        certificate = None if self._at is None else self._at.certificate
        left = None if certificate is None else certificate.left_s(datetime.now(UTC))
        begun = NodeStatus(
            kept.count,
            kept.labelled,
            kept.bytes,
            oldest,
            trouble=trouble,
            folder=folder,
            mqtt=mqtt,
            waits=self._waits(kept),
            new=kept.new,
            certificate_s=left,
        )
        if (device := self._device) is None:
            return begun
        its = device.status
        if its.trouble:
            trouble.setdefault("training", its.trouble)
        in_sums = its.counts.get("in sums", 0)
        return replace(begun, models=its.models, rounds=in_sums, server=its.server, phase=its.phase)

    def _waits(self, kept: ReadingCounts) -> str:
        """What it waits for before it takes part; empty where it takes part."""
        if kept.labelled < self._least:
            return f"for {many(self._least, 'reading')} with a target; there {_are(kept.labelled)}"
        if kept.new < self._new:
            return f"for {many(self._new, 'new reading')} with a target since the last round; there {_are(kept.new)}"
        return ""

    def _heard(self, news: DeviceNews) -> None:
        """Keep what was trained on in mind, and pass on what its device says."""
        if news.kind == "train" and news.what == "trained":
            self.readings.note_trained()
        elif news.kind == "train" and news.what == "counted":
            self.readings.note_counted()
        self._news(news)

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_part(self) -> None:
        """Take part in rounds while there are readings with a target, and new ones if so many are asked for; else, measure
        models, or only ask for them."""
        works: tuple[bool, bool] | None = None
        try:
            while not self._over.is_set():
                kept = self.readings.kept
                enough = (not (waits := self._waits(kept)), kept.labelled >= self._least)
                if waits != self._said_waits:
                    self._say_waits(waits)
                try:
                    widened = bool(self._pair) and self._form != self.readings.forms.get("input")
                    if self._device is None or works != enough or widened:
                        self._change_device(*enough)
                        works = enough
                    if self._device is None:
                        self._over.wait(LOOK_S)
                        continue
                    seconds = self._device.wake()
                except DataError as error:  # the model cannot be tried on what there is
                    self._trouble["training"] = printable(error)
                    self._over.wait(AGAIN_S)
                    continue
                except ExperimentError as error:
                    self._tell_trouble("training", str(error))
                    works = None
                    self._over.wait(LATER_S)
                    continue
                self._trouble.pop("training", None)
                self._over.wait(min(seconds, LOOK_S))
        except KeyboardInterrupt:
            if self._device is not None:
                self._device.give_up()
            raise
        finally:
            if self._device is not None:
                self._device.close()

    def _say_waits(self, waits: str) -> None:
        """Say what it waits for, and not again with each reading that comes."""
        before, self._said_waits = self._said_waits, waits
        if waits and waits.partition(";")[0] != before.partition(";")[0]:
            self._say(f"training: waits {waits}")

    def _change_device(self, trains: bool, evaluates: bool) -> None:
        """A device that takes such work, or only models; none while nothing says what a reading looks like."""
        training, _ = self._trainings() or (None, None)
        if training is None:
            self._trouble["training"] = (
                "it waits for a reading with a target: until then nothing says what readings look like, where data= of the "
                "task does not"
            )
            return
        if self._device is not None:
            self._device.close()
        # a device that takes no work need not wait at the server for work
        connection = self._connection if evaluates else replace(self._connection, wait_s=0.0)
        consent = replace(self._consent, trains=trains, evaluates=evaluates)
        self._device = self._new_device(training, consent, connection)

    def _new_device(self, task: "Task | Training", consent: Consent, connection: ServerConnection) -> Device:
        return Device(
            self._server,
            task,
            self.readings.examples,
            folder=self._folder / "device",
            token=self._token,
            held_out=self._held_out,
            consent=consent,
            connection=connection,
            profile=self._profile,
            watch=self._heard,
        )

    def _check_enrolled(self) -> None:
        """Whatever a person must mend about the server is said at the start."""
        with self._new_device(self._task, self._consent, self._connection) as device:
            link = None if self._server is None else read_link(self._server, self._connection.insecure)
            if not device.status.device and not (self._token or (link and link.token)):
                raise ExperimentError(
                    "this node is not enrolled: give it a link or a token, from whoever runs the server"
                )

    def _trainings(self) -> "tuple[Training, ...]":
        """Two of the same task: one trains, and one predicts meanwhile. Made together, before either computes; none yet where
        nothing says what readings look like."""
        from sumus.device.training import Training

        with self._making:
            if self._pair and self._form != (
                now := self.readings.forms.get("input")
            ):  # a first whole number was not all
                self._form, self._pair, self._answering = now, (), None
            if not self._pair and (sample := self._sample()) is not None:
                self._form = self.readings.forms.get("input")
                self._pair = tuple(Training(self._task, sample, self._executor) for _ in range(2))
            return self._pair

    def _sample(self) -> tuple[Any, Any] | None:
        """Readings, or zeros in their form, where there are none with a target."""
        if self.readings.kept.labelled:
            inputs, targets = self.readings.examples()
            return inputs[:SAMPLE], targets[:SAMPLE]
        forms = self.readings.forms
        if not {"input", "target"} <= set(forms):
            return None
        inputs, targets = (np.zeros((1, *forms[what].shape), forms[what].dtype) for what in ("input", "target"))
        return inputs, targets

    # ── predictions ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _predict(self, raws: Sequence[Raw | BadReading]) -> Prediction:
        inputs = self._intake.inputs(raws)
        pair = self._trainings()
        if self._answering is None:
            sample = self._sample()
            folder = self._folder / "device"
            if not pair or not (folder / "record.json").is_file():
                raise ExperimentError("there is no model yet: it comes from the server, with the first answer")
            self._answering = Device(None, pair[1], sample, folder=FolderDeviceStore(folder, look=True))
        found = self._answering.prediction(inputs)
        if self._answers is None:
            return found
        said = [answered(self._answers, each, row) for each, row in zip(inputs, found.outputs, strict=True)]
        return replace(found, answers=tuple(said))

    # ── the other threads ────────────────────────────────────────────────────────────────────────────────────────────

    def _part(self, name: str, work: Callable[[], None]) -> None:
        """One thread's work: what ends it is said, and ends nothing else."""
        try:
            work()
        except Exception as error:
            if self._over.is_set():
                return
            if not isinstance(error, SumusError):
                LOG.error("%s ended: a defect", name, exc_info=error)
            defect = f"it ended by a defect, which is in the log ({type(error).__name__})"
            self._tell_trouble(name, str(error) if isinstance(error, SumusError) else defect)
        finally:
            self._up.set()

    def _tell_trouble(self, name: str, what: str) -> None:
        what = printable(what)
        if self._trouble.get(name) != what:
            self._say(f"{name}: {what}")
        self._trouble[name] = what

    def _tell_mqtt(self, line: str) -> None:
        self._say(f"mqtt: {line}")

    def _keep_house(self) -> None:
        """Look into the folder, let go of what is too old, and say what came."""
        said, next_let_go, next_summary = self.readings.kept.count, 0.0, 0.0
        while not self._over.wait(LOOK_S):
            now = monotonic()
            try:
                for seen in self._watched.look() if self._watched is not None else ():
                    self._say(f"folder: {seen.said}")
                if now >= next_let_go:
                    self.readings.let_go()
                    next_let_go = now + LET_GO_S
                    self._look_at_certificate()
                if (kept := self.readings.kept).count != said and now >= next_summary:
                    said, next_summary = kept.count, now + SUMMARY_S
                    self._say(f"readings: {kept.count:,} kept, {kept.labelled:,} with a target, {amount(kept.bytes)}")
                self._trouble.pop("folder", None)
            except (ExperimentError, OSError) as error:
                self._tell_trouble("folder", str(error))

    def _look_at_certificate(self) -> None:
        certificate = None if self._at is None else self._at.certificate
        if certificate is None or not (said := certificate.said(datetime.now(UTC))):
            self._trouble.pop("certificate", None)
        else:
            self._tell_trouble("certificate", said)

    def _answer(self, planes: Any) -> None:
        """HTTP, until it is ended."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._until_ended(planes))

    async def _until_ended(self, planes: Any) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            with suppress(RuntimeError):  # it has ended already
                loop.call_soon_threadsafe(ended.set)

        async with planes:
            self._end_http = end
            self._up.set()
            if not self._over.is_set():
                await ended.wait()

    def _name_at_broker(self) -> str:
        """By which the broker knows its session: the same after a restart."""
        file = self._folder / "mqtt"
        if not file.exists():
            write_whole(file, f"sumus-{secrets.token_hex(8)}".encode(), private=True)
        return file.read_text()


def _own_folder(folder: Path) -> None:
    """A node's own folder, its owner's alone. ExperimentError for one that holds something else."""
    try:
        make_private_folder(folder)
        others = {path.name for path in folder.iterdir()} - {"device", "tls", "mqtt", "mqtt.new", "mqtt-topics"}
        if others and not (folder / "readings.db").is_file():
            raise ExperimentError(f"{folder} holds something else, and is no node's folder: give a new one")
        folder.chmod(0o700)
    except OSError as error:
        raise ExperimentError(
            f"a node cannot keep anything in {folder}: {error.strerror or error}; give a folder that is yours"
        ) from error


def _address(listen: str, tls: str | Path | Sequence[str | Path], names: Sequence[str], insecure: bool) -> Listening:
    host, port = listen_address(listen)
    pair = [tls] if isinstance(tls, str | Path) else list(tls)
    return Listening(host, port, tls=pair, names=names, insecure=insecure)


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count:,}"


def _as_json(status: NodeStatus) -> dict[str, Any]:
    return {
        "readings": {
            "kept": status.readings,
            "labelled": status.labelled,
            "new": status.new,
            "bytes": status.bytes,
            "oldest_s": status.oldest_s,
        },
        "models": dict(status.models),
        "rounds": status.rounds,
        "waits": status.waits,
        "server": status.server,
        "phase": status.phase,
        "trouble": dict(status.trouble),
        **({} if status.certificate_s is None else {"certificate_s": status.certificate_s}),
        **({"folder": dict(status.folder)} if status.folder else {}),
        **({"mqtt": dict(status.mqtt)} if status.mqtt else {}),
    }
