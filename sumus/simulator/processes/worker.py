"""A worker process: it trains the clients that its parent process sends, until the parent ends.

The worker receives `Message`s in order, and sends one response to each except `RoundStart`: to `ClientBatch` the results of
its clients, to `RoundEnd` the sum over the round's clients, to `Sizes` the clients' numbers of examples, to `WitnessRequest`
the list `Program.moved`. The first response is a proof that the worker computes the same bits as its parent. If an error
occurs, the worker sends a `Failure` instead, and then nothing more.

Reading and writing have threads of their own, so that neither process waits for the other while it trains.
"""

import os
import pickle
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

from sumus.simulator.processes.share import ClientResult, Group, RunSetting, Sums, Trainer
from sumus.simulator.processes.travel import dumps, unpacked
from sumus.task import Task
from sumus.training.program import Program, one_thread, seeded
from sumus.types import Broadcast

LOOK_EVERY = 2.0
"""Seconds between checks that the parent lives: another process may keep the parent's connection open after its end."""


@dataclass(frozen=True)
class RoundStart:
    """The start of a round: its number, from 0, the seed that all reports share, and the server's broadcast."""

    number: int
    public: bytes
    broadcast: Broadcast


@dataclass(frozen=True)
class ClientBatch:
    """Clients to train in the current round."""

    group: Group


@dataclass(frozen=True)
class RoundEnd:
    """The end of a round: no more clients follow."""


@dataclass(frozen=True)
class Sizes:
    """A request to read clients, and to return the number of examples of each."""

    clients: Sequence[Any]


@dataclass(frozen=True)
class WitnessRequest:
    """The end of all rounds: a request to train the first client again."""


@dataclass(frozen=True)
class Failure:
    """An error, and its place (a traceback as text)."""

    error: BaseException
    where: str


Message: TypeAlias = RoundStart | ClientBatch | RoundEnd | Sizes | WitnessRequest


def main(line: int, memory: int) -> None:
    """Respond to messages on a connection.

    Args:
        line: The descriptor of the connection.
        memory: The descriptor of the file with the setting.
    """
    connection, parent = Connection(line), os.getppid()
    inbox, outbox = SimpleQueue[Any](), SimpleQueue[bytes]()
    reader = threading.Thread(target=_read, args=(connection, inbox, parent), daemon=True)
    reader.start()
    threading.Thread(target=_write, args=(connection, outbox), daemon=True).start()
    try:
        setting: RunSetting = unpacked(memory, inbox.get())
        os.close(memory)
        with one_thread(), seeded(setting.seed):
            trainer = trainer_of(setting)
            outbox.put(dumps(trainer.proof()))
            _serve(trainer, inbox, outbox)
    except BaseException as error:
        outbox.put(_as_bytes(Failure(error, traceback.format_exc())))
        reader.join()


def trainer_of(setting: RunSetting) -> Trainer:
    """Return a trainer with a program of its own, on the CPU."""
    task = setting.plan.task
    assert isinstance(task, Task)
    return Trainer(setting, Program(task, seed=setting.seed))


def _serve(trainer: Trainer, inbox: SimpleQueue[Any], outbox: SimpleQueue[bytes]) -> None:
    """Respond to messages in an endless loop."""
    while True:
        message = inbox.get()
        if isinstance(message, Sizes):
            outbox.put(dumps(trainer.sizes(message.clients)))
            continue
        if isinstance(message, WitnessRequest):
            outbox.put(dumps(trainer.look_again()))
            continue
        sums, results = Sums(), list[ClientResult]()

        def dealt(results: list[ClientResult] = results) -> Iterator[Group]:
            while isinstance(message := inbox.get(), ClientBatch):
                yield message.group  # the trainer takes the next group only when this one has trained
                outbox.put(dumps(results))
                results.clear()

        for result in trainer.train(message.number, message.public, message.broadcast, dealt(), sums):
            results.append(result)
        outbox.put(dumps(sums.totals))


def _read(connection: Connection, inbox: SimpleQueue[Any], parent: int) -> None:
    """Read messages into the inbox. End this process when the parent has ended or the connection is closed."""
    try:
        while True:
            while not connection.poll(LOOK_EVERY):
                if os.getppid() != parent:
                    os._exit(0)
            inbox.put(pickle.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)


def _write(connection: Connection, outbox: SimpleQueue[bytes]) -> None:
    try:
        while True:
            connection.send_bytes(outbox.get())
    except OSError:
        os._exit(0)


def _as_bytes(failure: Failure) -> bytes:
    try:
        again = dumps(failure)
        pickle.loads(again)
        return again
    except Exception:  # an exception class of the user that cannot be pickled
        return dumps(Failure(RuntimeError(f"{type(failure.error).__name__}: {failure.error}"), failure.where))
