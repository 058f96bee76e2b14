"""Ray: the clients of a round train on a cluster, in one actor for each of its CPUs.

Clients train as without a cluster. Actors add up their sums in pairs, and then the sums of the pairs, so that this process
receives only one sum. On machines of the same kind (CPU type, torch version) the result is the same, bit for bit.

Anyone who can connect to a Ray cluster can run code on it. So a cluster that is started here listens to this machine only and
requires a token. A cluster elsewhere is used only if it requires a token too, or if `insecure` accepts the risk.
"""

import functools
import importlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sumus.aggregate import Aggregate
from sumus.errors import ExperimentError
from sumus.interrupt import undisturbed
from sumus.simulator.processes.share import ELSEWHERE, CannotTravel, ClientResult, Group, RunSetting, Sums, Trainer
from sumus.simulator.processes.travel import dumps
from sumus.simulator.processes.worker import Failure, trainer_of
from sumus.simulator.processes.workers import AHEAD, WorkerTraceback
from sumus.training.program import one_thread, seeded
from sumus.types import Array, Broadcast

LOOPBACK = "127.0.0.1"
REACHED_WITHIN = 30.0
"""Seconds within which a cluster must answer."""


class Cluster:
    """A `Crew` on Ray. Raises CannotTravel if the run cannot be sent to the cluster.

    Args:
        trainer: The trainer of this process, whose results the actors must reproduce.
        setting: The setting of the run.
        address: "ray" for a cluster of this machine's CPUs that ends with the run; or HOST:PORT of a running cluster.
        insecure: Whether to accept a cluster without access control.
    """

    def __init__(self, trainer: Trainer, setting: RunSetting, address: str, insecure: bool) -> None:
        self._ending = ExitStack()
        self._actors: list[Any] = []
        try:
            self._ray = self._ending.enter_context(_connected(address, insecure))
            self._start(setting, trainer.proof(step=False))
        except BaseException:
            self.close()
            raise

    def train(
        self, number: int, public: bytes, broadcast: Broadcast, groups: Iterable[Group], sums: Sums
    ) -> Iterator[ClientResult]:
        """Deal groups to the actors, one more than each trains at a time; then let the actors add up their sums."""
        waiting, owed = iter(groups), dict[Any, Any]()
        sent = self._ray.put(dumps((public, broadcast)))
        self._told([actor.begin.remote(number, sent) for actor in self._actors])
        for actor in self._actors * AHEAD:
            self._deal(actor, waiting, owed)
        while owed:
            (done,), _ = self._ray.wait(list(owed), num_returns=1)
            self._deal(owed.pop(done), waiting, owed)
            yield from self._told([done])[0]
        parts = [actor.summed.remote() for actor in self._actors]
        while len(parts) > 1:
            pairs = [parts[start : start + 2] for start in range(0, len(parts), 2)]
            parts = [self._actors[place].merged.remote(*pair) for place, pair in enumerate(pairs)]
        sums.add(self._told(parts)[0])

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """Return the number of examples of each of these clients; every actor reads some of them."""
        found = dict[Any, int]()
        people = [clients[start :: len(self._actors)] for start in range(len(self._actors))]
        asked = [actor.sizes.remote(dumps(some)) for actor, some in zip(self._actors, people, strict=True)]
        for some, sizes in zip(people, self._told(asked), strict=True):
            found |= zip(some, sizes, strict=True)
        return [found[client] for client in clients]

    def look_again(self) -> list[str]:
        """Train the first client of every actor again; return the findings of all, or nothing if an actor was lost."""
        with suppress(ExperimentError):
            return list(chain.from_iterable(self._told([actor.look_again.remote() for actor in self._actors])))
        return []

    def close(self) -> None:
        """Stop the actors, and the cluster if it was started here."""
        with undisturbed():
            for actor in self._actors:
                self._ray.kill(actor)
            self._actors = []
            self._ending.close()

    def _start(self, setting: RunSetting, made: str) -> None:
        """Start one actor per CPU, and check that each builds the same initial model from the seed."""
        arrays: list[Array] = []
        try:
            rest = dumps(setting, lambda buffer: arrays.append(np.frombuffer(buffer.raw(), np.uint8)))
        except Exception as error:
            raise CannotTravel(
                f"the run cannot be sent to another process ({type(error).__name__}: {error})"
            ) from error
        parcel = self._ray.put((rest, arrays))
        kind = self._ray.remote(num_cpus=1)(_Actor)
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if not cpus:
            raise ExperimentError("the Ray cluster has no CPU: give another address, or a number of workers")
        self._actors = [kind.remote(parcel, sys.path) for _ in range(min(cpus, setting.plan.pacing.cohort))]
        try:
            models = self._told([actor.made.remote() for actor in self._actors])
        except Exception as error:
            raise CannotTravel(f"it failed on the cluster ({type(error).__name__}: {error})") from error
        if set(models) != {made}:
            raise CannotTravel(ELSEWHERE)

    def _deal(self, actor: Any, waiting: Iterator[Group], owed: dict[Any, Any]) -> None:
        """Give an actor another group, if there is one. owed: the actor of each pending result."""
        if (group := next(waiting, None)) is not None:
            owed[actor.train.remote(dumps(group))] = actor

    def _told(self, references: Sequence[Any]) -> list[Any]:
        """Return the actors' results; raise the errors that occurred on the actors."""
        try:
            answers = self._ray.get(list(references))
        except self._ray.exceptions.RayError as error:
            raise ExperimentError(
                f"the Ray cluster lost a worker ({str(error).strip().splitlines()[0]}): if a machine ran out of memory, give "
                "it fewer CPUs, and start the run again"
            ) from error
        told = [pickle.loads(answer) if isinstance(answer, bytes) else answer for answer in answers]
        for answer in told:
            if isinstance(answer, Failure):
                raise answer.error from WorkerTraceback(answer.where)
        return told


def _answering(method: Callable[..., Any]) -> Callable[..., bytes]:
    """Return a method that runs on one thread, and returns its result or its error as bytes: Ray would wrap an error."""

    @functools.wraps(method)
    def answer(self: "_Actor", *arguments: Any) -> bytes:
        try:
            with one_thread(), seeded(0):
                return dumps(method(self, *arguments))
        except Exception as error:
            return dumps(Failure(error, traceback.format_exc()))

    return answer


class _Actor:
    """The part that runs on the cluster: a trainer, and one sum for the round."""

    def __init__(self, parcel: tuple[bytes, Sequence[Array]], path: Sequence[str]) -> None:
        sys.path += [entry for entry in path if entry not in sys.path]
        self._parcel: Any = parcel
        self._trainer: Trainer

    @_answering
    def made(self) -> str:
        rest, arrays = self._parcel
        self._parcel = None
        self._trainer = trainer_of(pickle.loads(rest, buffers=arrays))
        return self._trainer.proof(step=False)

    @_answering
    def begin(self, number: int, sent: bytes) -> None:
        self._number, (self._public, self._broadcast) = number, pickle.loads(sent)
        self._sums = Sums()

    @_answering
    def train(self, group: bytes) -> list[ClientResult]:
        groups = [pickle.loads(group)]
        return list(self._trainer.train(self._number, self._public, self._broadcast, groups, self._sums))

    @_answering
    def sizes(self, clients: bytes) -> list[int]:
        return self._trainer.sizes(pickle.loads(clients))

    @_answering
    def look_again(self) -> tuple[str, ...]:
        return self._trainer.look_again()

    def summed(self) -> dict[int, Aggregate]:
        return self._sums.totals

    def merged(self, *parts: dict[int, Aggregate]) -> dict[int, Aggregate]:
        sums = Sums()
        for part in parts:
            sums.add(part)
        return sums.totals


@contextmanager
def _connected(address: str, insecure: bool) -> Generator[Any, None, None]:
    """Return a context in which Ray is connected. For the address "ray", it starts a cluster and stops it at its end."""
    own = address == "ray"
    where: dict[str, Any] = {"address": address}
    with ExitStack() as before:
        if own:
            before.enter_context(_environment(_settings()))
            folder = before.enter_context(TemporaryDirectory(prefix="sumus-ray-", ignore_cleanup_errors=True))
            where = {"address": "local", "_node_ip_address": LOOPBACK, "include_dashboard": False, "_temp_dir": folder}
        ray: Any = importlib.import_module("ray")
        if ray.is_initialized():
            raise ExperimentError(
                "Ray is in use in this process: shut it down first (ray.shutdown()), or give the address of its cluster"
            )
        if not own and not insecure:
            _check_closed(address)
        try:
            with _same_sigterm():
                ray.init(logging_level="ERROR", **where)
        except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
            raise ExperimentError(f"workers={address!r}: no connection to Ray ({error})") from error
        try:
            if own:
                reached = str(ray.get_runtime_context().gcs_address)
                if not reached.startswith(f"{LOOPBACK}:"):
                    raise ExperimentError(
                        f"Ray listens at {reached}, which others may reach: it was imported before the run; import it later"
                    )
                _check_closed(reached)
            yield ray
        finally:
            ray.shutdown()


def _settings() -> dict[str, str]:
    """Return the environment variables of a cluster that is started here: a token, no usage reports, only loopback.

    On Linux, Ray listens on loopback only if `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER` is 0.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _token(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


@functools.cache
def _token() -> str:
    """Return the token of this process: always the same token, since Ray reads it only once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(settings: dict[str, str]) -> Generator[None, None, None]:
    """Return a context with these settings in the environment; afterwards the old values are restored."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


@contextmanager
def _same_sigterm() -> Generator[None, None, None]:
    """Return a context that keeps the handler of SIGTERM: Ray's own handler would end the program without a checkpoint."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


def _check_closed(address: str) -> None:
    """Refuse a cluster that answers without a token."""
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        asked = subprocess.run(
            ask, env={**stranger, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=REACHED_WITHIN
        )
    except subprocess.TimeoutExpired as error:
        raise ExperimentError(f"the Ray cluster at {address} cannot be reached: no answer") from error
    if asked.returncode == 0:
        raise ExperimentError(
            f"the Ray cluster at {address} accepts anyone: start it with RAY_AUTH_MODE=token, or give insecure=True if its "
            "network is closed"
        )
    if "AuthenticationError" not in asked.stderr:
        said = asked.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise ExperimentError(f"the Ray cluster at {address} cannot be reached: {said[0]}")
