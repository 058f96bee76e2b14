"""A device: it takes part in a server's rounds with examples that stay here.

    device = Device("https://sumus.example.org:8443/#enrol=TOKEN&pin=HEX", task, examples, folder="~/.health")
    device.run()                                  runs until it is stopped
    device.predict(inputs)                        with the newest model that it has; also offline
    device.forget()                               withdraws the owner's consent

`Device` is the entry point. Its parts each have a module of their own:

    rounds        carries out the decisions of the protocol's table: check-ins, work, reports
    record_step   the pure part of `rounds`: how an event changes the record
    work          checks an assignment, and does its work
    compute       the contract for computations; `training` implements it with torch
    access        access to the server: enrolment, certificates, signed requests
    models        the released models with which the device predicts
    memory        the record and the objects; `store` keeps them in a folder or in memory
    news, words   messages to the owner, and their wording
    waits         the time of the next action
    options       the options for making a device
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sumus.device.access import ServerAccess, expect_own_server
from sumus.device.compute import DeviceCompute
from sumus.device.conditions import here
from sumus.device.link import Link, read_link
from sumus.device.memory import DeviceMemory
from sumus.device.models import ReleasedModels
from sumus.device.news import DeviceNews, NewsFeed
from sumus.device.options import Consent, DeviceProfile, ServerConnection
from sumus.device.rounds import DeviceRounds
from sumus.device.store import DeviceStore, FolderDeviceStore, Membership, MemoryDeviceStore
from sumus.device.withdrawal import ForgetReport, forget
from sumus.device.work import LocalWork
from sumus.errors import ExperimentError, ParticipantError
from sumus.pacing import Conditions
from sumus.protocol.session import Floor
from sumus.storage.files import expanded
from sumus.task import Task
from sumus.types import Array
from sumus.work import ClientState

_CONSENT, _CONNECTION, _PROFILE = Consent(), ServerConnection(), DeviceProfile()


@dataclass(frozen=True)
class DeviceStatus:
    """The status of a device.

    Attributes:
        device: The device's id; empty before it is enrolled.
        server: The address of the device's server.
        population: The population in which the device is enrolled.
        phase: The device's current phase: idle, asked, training or reporting.
        checkins: The number of check-ins so far.
        counts: The number of times that each kind of event has happened so far, by kind.
        models: The version of each task's model.
        trouble: The last problem, if it is not resolved yet.
        unanswered: The number of requests in a row that the server did not answer.
    """

    device: str
    server: str
    population: str
    phase: str
    checkins: int
    counts: Mapping[str, int]
    models: Mapping[str, int]
    trouble: str
    unanswered: int


@dataclass(frozen=True)
class Prediction:
    """A model's prediction.

    Attributes:
        outputs: The outputs, one row for each example.
        task: The model's task.
        version: The model's version.
        answers: One answer for each example from the `answer` function of a node's file, if the file has one.
    """

    outputs: Array
    task: str
    version: int
    answers: tuple[Any, ...] = ()


def _quiet(news: DeviceNews) -> None:
    """Ignore the news."""


class Device:
    """One device of one server, with one task.

    Args:
        server: The server's address or an enrolment link; None for the server at which the device is enrolled.
        task: The task; or a `DeviceCompute` for it, which many devices of this process may share.
        examples: (inputs, targets) or a data set of pairs; or a function that returns them whenever they are needed.
        folder: Where the device keeps its memory: a path, or a `DeviceStore`. None means that everything is forgotten when the
            process ends.
        token: The token for enrolment, if the link holds none.
        held_out: Examples to evaluate on, in the form of `examples`. None means `examples` themselves.
        consent: The owner's consent. A `Floor` is short for `Consent(floor=...)`.
        connection: The options for the connection to the server.
        profile: A description of the device.
        watch: Called with each `DeviceNews`.

    Raises:
        ExperimentError: A person must fix something first; the message says what. Other kinds of `UsageError` mean the same.
    """

    def __init__(
        self,
        server: str | None,
        task: Task | DeviceCompute[Any],
        examples: Any,
        *,
        folder: str | Path | DeviceStore | None = None,
        token: str | None = None,
        held_out: Any = None,
        consent: Consent | Floor = _CONSENT,
        connection: ServerConnection = _CONNECTION,
        profile: DeviceProfile = _PROFILE,
        watch: Callable[[DeviceNews], None] = _quiet,
    ) -> None:
        link = Link("") if server is None else read_link(server, connection.insecure)
        link = link.vouched_for_by(connection.authority)
        link = replace(link, token=token or link.token)
        consent = Consent(consent) if isinstance(consent, Floor) else consent
        sensors = profile.sensors or here()

        def conditions() -> Conditions:
            return replace(sensors.read(), version=profile.version)

        def new_key() -> bytes:
            return profile.system.keys("device", profile.name)

        self._compute = _OneCompute(task, examples, profile.executor)
        self._examples, self._link = examples, link
        self._memory = _memory_of(folder, link, connection.moves)
        self._news = NewsFeed(watch)
        self._access = ServerAccess(link, self._memory, new_key, connection.transport)
        self._work = LocalWork(
            self._compute, examples, held_out, self._memory, self._access, consent, profile, conditions
        )
        models = ReleasedModels(self._memory, self._access, self._news, self._compute, consent.floor.bytes)
        self._rounds = DeviceRounds(
            self._memory,
            self._access,
            self._work,
            models,
            self._news,
            consent,
            profile,
            conditions,
            connection.wait_s,
        )
        self._stopped = threading.Event()
        self._sleep = profile.system.sleep or self._stopped.wait

    # ── taking part ──────────────────────────────────────────────────────────────────────────────────────────────────

    def enrol(self) -> str:
        """Enrol the device with its token, unless it is enrolled already; return its id. A second call changes nothing."""
        return self._rounds.enrol()

    def wake(self) -> float:
        """Do everything that is due now, and return the seconds until the next action is due. Programs with their own event
        loop call this; `run` calls it in a loop.

        Raises:
            ExperimentError: A person must act; the message says how.
        """
        return self._rounds.wake()

    def run(self, rounds: int | None = None, until: Callable[[DeviceStatus], bool] | None = None) -> None:
        """Take part in rounds. On Ctrl-C, the device tells the server that no report will come for the current work.

        Args:
            rounds: The number of further counted reports after which to end.
            until: End as soon as this returns True.
        """
        goal = math.inf if rounds is None else self._counted + rounds
        try:
            while not self._stopped.is_set():
                seconds = self.wake()
                if self._counted >= goal or (until is not None and until(self.status)):
                    return
                if seconds:
                    self._sleep(seconds)
        except KeyboardInterrupt:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Tell the server, after Ctrl-C, that no report will come for the work in progress."""
        self._rounds.give_up()

    def stop(self) -> None:
        """Let `run` end as soon as its current step is done. Any thread may call this."""
        self._stopped.set()

    def close(self) -> None:
        """Release the folder and the connections."""
        self._access.close()
        self._memory.store.close()

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ── models and state ─────────────────────────────────────────────────────────────────────────────────────────────

    def predict(self, inputs: Any, task: str | None = None) -> Array:
        """Predict with the newest model that is stored here. No network is needed.

        Args:
            inputs: Inputs as this device stores them; they are prepared like its examples.
            task: The task whose model predicts, if the server has several for this device; None for the task
                whose model was updated last.
        """
        return self.prediction(inputs, task).outputs

    def prediction(self, inputs: Any, task: str | None = None) -> Prediction:
        """Predict like `predict`, and return the model's version too."""
        compute = self._compute()
        kept = self._memory.last_model(task, compute.fingerprint)
        try:
            model = compute.model(kept.body)
        except ParticipantError as error:
            raise ExperimentError(
                f"the stored model does not belong to this task: {error}; run `sumus join --once`, so that the device gets "
                "the current model"
            ) from error
        return Prediction(compute.predict(model, kept.state, self._examples, inputs), kept.task, kept.version)

    def forget(self) -> ForgetReport:
        """Withdraw the owner's consent: the server forgets the device, and everything that the device stored here is erased.

        Raises:
            Unreachable: The server cannot be reached. Nothing was erased; call this again.
        """
        done = forget(self._memory.store, self._access.requests if self._memory.record.membership else None)
        self._memory.read_again()
        self._access.forget_key()
        return done

    @property
    def status(self) -> DeviceStatus:
        """The device's status."""
        record = self._memory.record
        member = record.membership or Membership(self._link.server, "", "")
        return DeviceStatus(
            member.device,
            member.server,
            member.population,
            record.row.phase.value,
            record.row.serial,
            record.counts,
            {task: kept.version for task, kept in record.models.items()},
            self._news.all_trouble,
            self._rounds.unanswered,
        )

    def kept(self, task: str) -> ClientState:
        """Return the state that the device keeps from a task's rounds: control variates, personal leaves."""
        return self._work.state(task)

    @property
    def _counted(self) -> int:
        return self._memory.record.counts.get("counted", 0)


class _OneCompute:
    """Makes a device's compute at the first call, and returns the same one at each later call. Several threads may call it."""

    def __init__(self, task: Task | DeviceCompute[Any], examples: Any, executor: str) -> None:
        self._task, self._examples, self._executor = task, examples, executor
        self._made: DeviceCompute[Any] | None = None if isinstance(task, Task) else task
        self._making = threading.Lock()

    def __call__(self) -> DeviceCompute[Any]:
        with self._making:
            if self._made is None:
                from sumus.device.training import Training

                assert isinstance(self._task, Task)
                self._made = Training(self._task, self._examples, self._executor)
            return self._made


def _memory_of(folder: str | Path | DeviceStore | None, link: Link, moves: bool) -> DeviceMemory:
    """Return a device's memory. Raise ExperimentError if the device may not use the server of the link, or has lost its key."""
    if folder is None:
        store, is_own = MemoryDeviceStore(), True
    elif isinstance(folder, str | Path):
        store, is_own = FolderDeviceStore(expanded(folder)), True
    else:
        store, is_own = folder, False
    memory = DeviceMemory(store)
    try:
        expect_own_server(memory.record, link, moves)
        if memory.record.membership is not None and store.key() is None:
            where = folder if isinstance(folder, str | Path) else "this device"
            raise ExperimentError(
                f"{where} is enrolled but has no key, so it was restored only in part: restore its `key` too, or "
                "delete the folder and enrol the device again, with a new link"
            )
    except ExperimentError:
        if is_own:
            store.close()
        raise
    return memory
