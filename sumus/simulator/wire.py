"""A simulation over the wire: a real server and one real device per client, in this process and without sockets.

    history = simulate(..., compute=Compute(through="wire"))

Participation, evaluation and records are as in any simulation. But here a client checks in, fetches the plan and the model,
trains, signs its report and sends it, and the server counts, commits and publishes. With the same keys, the model has the
same bits as in a simulation in memory.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sumus.device.device import Device
from sumus.device.keys import keyed
from sumus.device.news import DeviceNews
from sumus.device.options import Consent, DeviceProfile, DeviceSystem, ServerConnection
from sumus.device.store import MemoryDeviceStore
from sumus.device.training import Training
from sumus.errors import ExperimentError, TaskError
from sumus.executors.witness import Witness
from sumus.experiment import Experiment
from sumus.fleet import PERFECT
from sumus.http.limits import Limits, Rate
from sumus.operations.policy import ServerPolicy
from sumus.operations.service import Service, open_service
from sumus.optimizers import ServerState
from sumus.protocol.session import Floor
from sumus.simulator.checkpoint import Checkpoint
from sumus.simulator.participants import RoundReports
from sumus.simulator.populations.participation import present_at
from sumus.simulator.populations.population import Population
from sumus.simulator.prepared import PreparedRun
from sumus.simulator.processes.share import public_seed
from sumus.simulator.records import RoundTally
from sumus.simulator.virtual_time.account import CountedReport
from sumus.storage.client_states import ClientStates
from sumus.task import Task
from sumus.transport.inprocess import InProcess
from sumus.wire.bundle import Bundle

MOST = 10_000
"""The largest number of clients, each of which is an enrolled device."""
NO_FLOOR = Floor(10**9, 1e9, 2**62, 10**9, 2, 2**62)
"""In a simulation, devices consent to everything that a server may request."""
_PLENTY = Rate(1e9, 10**9)
_ALWAYS = 1e6
"""Seconds by which the devices' clock advances before each device wakes, so that all its waiting times are over."""


class DeviceClients:
    """`Participants` that are devices of a server.

    Args:
        prepared: The experiment.
        states: The states that clients keep between rounds.
        executor: The executor that trains a client; "auto" to choose one.
        is_fresh: Whether no round was played yet: a run through the wire always begins anew.
        folder: The run's folder, for an error message.
    """

    def __init__(
        self, prepared: PreparedRun, states: ClientStates, executor: str, is_fresh: bool, folder: Path | None
    ) -> None:
        self._prepared, self._states, self._executor = prepared, states, executor
        self._plan, self._population = prepared.plan, prepared.population
        self._served = replace(self._plan, trusts_devices=True)  # all devices are this process's own
        self._served.check_deployable()
        if not is_fresh:
            raise ExperimentError(
                f"{folder} holds a run, and a run through the wire always starts from the beginning: give another folder, "
                "restart=True (--restart), or continue without through="
            )
        self._training: Training | None = None
        self._stack = ExitStack()
        self._now, self._round = 0.0, 0
        self._devices: dict[Any, Device] = {}
        self._stores: dict[Any, MemoryDeviceStore] = {}
        self._said: dict[Any, list[DeviceNews]] = {}

    @property
    def how(self) -> str:
        """A sentence on how clients are trained; empty before the run begins."""
        return "" if self._training is None else f"{self._executor}, on devices, through the wire"

    def begin(self, at: Checkpoint, left: int) -> str:
        """Start the server, and prepare training on its devices."""
        prepared, seed = self._prepared, self._prepared.setting.seed
        task, first = prepared.experiment.plan.task, self._population.pick(0)
        assert isinstance(task, Task), "a simulation has its task's code"
        self._training = Training(
            task,
            self._population[first],
            self._executor,
            str(prepared.program.device),
            seed,
            lambda program: Witness(program, left, prepared.trainer.read_anew),
        )
        self._service = self._serve(seed)
        self._transport = self._stack.enter_context(InProcess(self._service.device_app))
        server = self._service.server
        self._token = server.roll.new_token(server.population, server.clock(), uses=len(self._population))
        return ""

    def look_again(self) -> None:
        """Train the first client once more."""
        if self._training is not None:
            self._training.look_again()

    def last_notes(self) -> Iterable[str]:
        """Return the notes that were made while the devices trained."""
        if self._training is not None:
            try:
                self._training.program.begin_anew(whole=True)  # finds what the last client's code changed
            except TaskError as error:
                yield str(error)
            self._prepared.program.moved |= self._training.program.moved
            yield from self._training.notes

    def close(self) -> None:
        """Stop the server."""
        self._stack.close()

    def end(self) -> None:
        """Restore the user's code to its state before the run."""
        if self._training is not None:
            with suppress(TaskError):
                self._training.program.end()

    def _serve(self, seed: int) -> Service:
        def seeds(task: str) -> Any:
            return partial(public_seed, self._plan, seed)

        name = self._plan.description.name
        limits = Limits(_PLENTY, _PLENTY, _PLENTY, _PLENTY)
        policy = ServerPolicy(name, MOST, group=0.0, limits=limits)
        bundle = Bundle(self._served, self._prepared.program.initial)
        service = open_service({name: bundle}, policy=policy, seeds=seeds)
        self._stack.callback(service.close)
        service.server.start()
        return service

    def _enrol(self, number: int) -> None:
        """Enrol the devices of all clients that have joined by a round, each once."""
        server, clients = self._service.server, len(self._population)
        present = present_at(self._prepared.joined, number, clients)
        there = [self._population.pick(int(place)) for place in present]
        if new := [client for client in there if client not in self._devices]:
            for client in new:
                self._device(client, self._token).enrol()
            server.ask_to_do(lambda now: server.crowd.count()).result()

    def _device(self, client: Any, token: str | None = None) -> Device:
        """Return a client's device."""
        assert self._training is not None, "the run has begun"
        if client not in self._devices:
            self._stores[client] = MemoryDeviceStore()
            system = DeviceSystem(
                keys=keyed(self._prepared.setting.seed), clock=lambda: self._now, today=lambda: self._round
            )
            self._devices[client] = Device(
                "http://127.0.0.1",
                self._training,
                lambda: self._population[client],
                folder=self._stores[client],
                token=token,
                consent=Consent(NO_FLOOR, evaluates=False, keeps_model=False),
                connection=ServerConnection(wait_s=0.0, transport=self._transport),
                profile=DeviceProfile(client, system=system),
                watch=lambda news: self._said.setdefault(client, []).append(news),
            )
        return self._devices[client]

    def play(
        self, counted: Sequence[CountedReport], number: int, state: ServerState, received: RoundReports
    ) -> ServerState:
        """Run the round's devices, one after the other; the server takes the step."""
        self._round = number
        self._enrol(number)
        training = self._service.server.tasks[0].training
        before, task = training.version, self._plan.description.name
        for report in counted:
            client = self._population.pick(report.position)
            news = self._taken_part(client)
            tally, loss = received.tallies.setdefault(report.into, RoundTally()), news.measured["loss"]
            tally.count(news.examples, (loss * news.examples, news.examples), 0)
            if kept := self._devices[client].kept(task):
                self._states.propose(str(client), kept)
            received.settled[str(client)] = True
        self._service.server.ask_to_do(lambda now: None).result()  # wait until the server has processed the last report
        if training.version != before + 1:
            raise ExperimentError(
                f"round {number} produced no model: {training.trouble or 'the server waits for more reports'}"
            )
        return training.state(training.model(training.version))

    def _taken_part(self, client: Any) -> DeviceNews:
        """Run a device through a round: it asks for work, trains, reports, and learns that its report is counted."""
        said = self._said[client] = []
        for _ in range(3):  # a device that missed the end of an earlier round may have to learn of it first
            self._now += _ALWAYS
            self._devices[client].wake()
            if any(news.what == "counted" for news in said):
                return next(news for news in said if news.what == "trained")
        told = sorted(
            (news for news in said if news.said), key=lambda news: news.what != "waiting"
        )  # every other message is more helpful than why the device waits
        last = told[-1].said if told else "it was given no work"
        raise ExperimentError(f"client {client!r} did not take part in round {self._round + 1}: {last}")


def check_for_wire(experiment: Experiment, skips: bool) -> None:
    """Refuse features that need a virtual clock, or facts about clients that only a simulation in memory has.

    Args:
        experiment: The experiment.
        skips: Whether clients that fail in a round are left out.
    """
    if skips:
        raise ExperimentError(
            "failures='skip' is for simulations in memory: a device that fails tells its server, and the server gives the work "
            "to another device or ends the round at its deadline; leave it out, or simulate without through="
        )
    if isinstance(experiment.population, Population) and experiment.population.participation.weights is not None:
        raise ExperimentError(
            "weighed() is for simulations in memory: a device weighs the examples that it holds, up to the plan's cap; leave "
            "it out, or simulate without through="
        )
    pacing = experiment.plan.pacing
    if experiment.fleet != PERFECT or pacing.buffered or pacing.chosen != pacing.cohort or pacing.every is not None:
        raise ExperimentError(
            "through the wire, devices train one after the other, and each of them finishes: leave out fleet=, over_select=, "
            "concurrency= and every=, or simulate without through="
        )
    if experiment.plan.edges.rounds > 1:
        raise ExperimentError(
            "through the wire, devices report to the server, and this plan's edges run rounds of their own: simulate without "
            "through=, or let edges add, with Edges(rounds=1)"
        )
    if len(experiment.population) > MOST:
        raise ExperimentError(
            f"through the wire every client is an enrolled device, and {len(experiment.population)} are too many: "
            f"simulate up to {MOST}, or without through="
        )
