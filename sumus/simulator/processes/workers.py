"""Worker processes on this machine: one round's clients train in several processes at once, including this one.

The workers are new processes, not forks, and do not run the user's script again: their data is sent once (`travel`). They live
as long as the run. Each worker has at most two groups of clients at a time: the group that it trains, and the next one. Each
process adds up its reports, and sends its sums at the end of the round.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from sumus.errors import ExperimentError
from sumus.interrupt import undisturbed, unheard, whole
from sumus.simulator.processes.share import ELSEWHERE, CannotTravel, ClientResult, Group, RunSetting, Sums, Trainer
from sumus.simulator.processes.travel import Spans, dumps, packed
from sumus.simulator.processes.worker import ClientBatch, Failure, Message, RoundEnd, RoundStart, Sizes, WitnessRequest
from sumus.types import Broadcast

AHEAD = 2
"""The largest number of groups that a worker has: the group that it trains, and one more."""
_START = (
    "import sys; line, memory, *sys.path = sys.argv[1:]; "
    "from sumus.simulator.processes.worker import main; main(int(line), int(memory))"
)


class Workers:
    """A `Crew` of processes: this process, and `count` − 1 workers. Raises CannotTravel if they cannot be started."""

    def __init__(self, trainer: Trainer, setting: RunSetting, count: int) -> None:
        self._trainer = trainer
        self._children: list[_Child] = []
        proof = trainer.proof()
        file, spans = _packed(setting)
        try:
            with file:
                for number in range(1, count):
                    with whole():
                        self._children.append(_Child(number, file.fileno(), spans))
                for child in self._children:
                    child.check_ready(proof)
        except BaseException:
            self.close()
            raise

    def train(
        self, number: int, public: bytes, broadcast: Broadcast, groups: Iterable[Group], sums: Sums
    ) -> Iterator[ClientResult]:
        """Deal groups to the workers, and train the remaining groups in this process meanwhile."""
        waiting, heard = iter(groups), list[ClientResult]()
        begin = dumps(RoundStart(number, public, broadcast))
        for child in self._children:
            child.send_bytes(begin)
        for result in self._trainer.train(number, public, broadcast, self._own(waiting, heard), sums):
            yield result
            yield from heard
            heard.clear()
        while any(child.owes for child in self._children):
            self._hear(None, heard)
        yield from heard
        for child in self._children:
            child.send(RoundEnd())
        for child in self._children:
            sums.add(child.receive())

    def sizes(self, clients: Sequence[Any]) -> list[int]:
        """Return the number of examples of each of these clients; every process reads some of them."""
        found = dict[Any, int]()
        people = [clients[start :: 1 + len(self._children)] for start in range(1 + len(self._children))]
        for child, theirs in zip(self._children, people[1:], strict=True):
            child.send(Sizes(theirs))
        found |= zip(people[0], self._trainer.sizes(people[0]), strict=True)
        for child, theirs in zip(self._children, people[1:], strict=True):
            found |= zip(theirs, child.receive(), strict=True)
        return [found[client] for client in clients]

    def look_again(self) -> list[str]:
        """Train the first client of every process again; return the findings of all processes that still run."""
        with suppress(ExperimentError):
            for child in self._children:
                child.send(WitnessRequest())
        found = list(self._trainer.look_again())
        with suppress(ExperimentError):
            for child in self._children:
                found += child.receive()
        return found

    def close(self) -> None:
        """Stop the workers at once; nothing that they hold is needed any more."""
        with undisturbed():
            for child in self._children:
                child.end()

    def _own(self, waiting: Iterator[Group], heard: list[ClientResult]) -> Iterator[Group]:
        """Yield the groups that this process trains; in between, receive the workers' results and deal more groups."""
        self._deal(waiting, 1)
        while (group := next(waiting, None)) is not None:
            self._deal(waiting, AHEAD)
            yield group
            self._hear(0, heard)
            self._deal(waiting, 1)

    def _deal(self, waiting: Iterator[Group], most: int) -> None:
        """Give every worker up to `most` groups, while groups are left."""
        for child in self._children:
            while child.owes < most and (group := next(waiting, None)) is not None:
                child.send(ClientBatch(group))
                child.owes += 1

    def _hear(self, timeout: float | None, heard: list[ClientResult]) -> None:
        """Receive the results that have arrived; if `timeout` is None, wait for at least one."""
        owing = {child.line: child for child in self._children if child.owes}
        for line in wait(list(owing), timeout):
            child = owing[line]  # pyright: ignore[reportArgumentType]
            heard += child.receive()
            child.owes -= 1


class _Child:
    """One worker process, and the connection to it. `owes` is the number of groups whose results are pending."""

    def __init__(self, number: int, memory: int, spans: Spans) -> None:
        self._number = number
        self.owes = 0
        self.line, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-u", "-P", "-c", _START, str(theirs.fileno()), str(memory), *map(str, sys.path)]
            try:
                with unheard():
                    self._process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        pass_fds=(theirs.fileno(), memory),
                    )
            except OSError as error:
                self.line.close()
                raise CannotTravel(f"no process could be started ({error})") from error
        self.send(spans)

    def check_ready(self, proof: str) -> None:
        """Wait until the worker is ready; raise CannotTravel if it cannot start, or computes different results."""
        try:
            if self.receive() != proof:
                raise CannotTravel(ELSEWHERE)
        except CannotTravel:
            raise
        except Exception as error:
            raise CannotTravel(f"it failed in the other process ({type(error).__name__}: {error})") from error

    def send(self, message: Message | Spans) -> None:
        self.send_bytes(dumps(message))

    def send_bytes(self, message: bytes) -> None:
        """Send a message as bytes, so that several workers can receive the same bytes."""
        try:
            self.line.send_bytes(message)
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> Any:
        """Return the worker's next response; if the worker failed, raise its error."""
        try:
            answer = pickle.loads(self.line.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(answer, Failure):
            raise answer.error from WorkerTraceback(answer.where)
        return answer

    def end(self) -> None:
        self.line.close()
        self._process.kill()
        self._process.wait()

    def _gone(self) -> ExperimentError:
        """Return the error for a worker that has ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            how = "does not answer"
        else:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ExperimentError(
            f"worker {self._number} {how}: if the machine ran out of memory, give fewer workers=, and start the run again"
        )


class WorkerTraceback(Exception):
    """The traceback of a worker that failed. It is shown as the cause of the error that the worker sent."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def _packed(setting: RunSetting) -> Any:
    try:
        return packed(setting)
    except Exception as error:
        what = next((name for name in ("population", "plan") if not _is_packable(getattr(setting, name))), "run")
        raise CannotTravel(f"the {what} cannot be sent to another process ({type(error).__name__}: {error})") from error


def _is_packable(value: object) -> bool:
    try:
        dumps(value, lambda buffer: None)
    except Exception:
        return False
    return True
