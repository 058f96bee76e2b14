"""What becomes of rounds that have closed: a model is made of each sum, in the order of the rounds, or the sum is destroyed."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from sumus.errors import ExperimentError, ParticipantError, SumusError, said
from sumus.logs import logger
from sumus.protocol.round import State
from sumus.rounds.coordinator import Coordinator
from sumus.rounds.sealed_sums import SealedSums
from sumus.storage.keyring import SealError

LOG = logger("sumus.server")


class Unusable(Exception):
    """No model can be made of a sum, however often it is tried."""


@contextmanager
def usable() -> Generator[None, None, None]:
    """Convert any exception from a plan's code into Unusable, so that the exception cannot crash the server.

    An exception that is no error of sumus is a defect of the plan, or of sumus: its traceback goes into the log.
    """
    try:
        yield
    except SumusError as error:
        raise Unusable(str(error)) from error
    except Exception as error:
        LOG.exception("no model can be made of a sum, since the plan's code failed")
        raise Unusable(f"the plan failed with {said(error)}") from error


class ClosedRounds:
    """The rounds of a run that have closed, and whose models are not there yet.

    Attributes:
        unfinished: The numbers of the rounds whose sum could not be read, or whose model could not be written. They are tried
            again (`finish`), or an admin cancels them; later rounds wait behind them.
    """

    def __init__(
        self,
        task: str,
        coordinator: Coordinator,
        sums: SealedSums,
        conclude: Callable[[int, float], None],
        give_up: Callable[[int, str, float], None],
        wait: Callable[[str], None],
        go_on: Callable[[], None],
    ) -> None:
        """Close the rounds of a run.

        Args:
            task: The task's name, for the log.
            coordinator: The rounds of the run.
            sums: Their sums.
            conclude: Makes the model of a round, given its number and the time.
            give_up: Is called with a round's number, why no model can be made of its sum, and the time.
            wait: Is called with a sentence why a round cannot be closed yet.
            go_on: Is called when no round waits to be closed any more.
        """
        self.unfinished: list[int] = []
        self._task, self._coordinator, self._sums = task, coordinator, sums
        self._conclude, self._give_up, self._wait, self._go_on = conclude, give_up, wait, go_on
        self._destroyed: set[int] = set()

    def restart(self) -> None:
        """Know of no round, as a new process."""
        self.unfinished.clear()
        self._destroyed.clear()

    def take_up(self, now: float) -> None:
        """Do what other processes' transactions have decided about sums."""
        with self._coordinator.leading() as rows:
            rounds = rows.rounds()
        self._destroyed &= {row.number for row in rounds}
        for row in rounds:
            if row.state is State.ABANDONED and row.number not in self._destroyed:
                self.destroy(row.number)
        self.close_up_to(rounds[-1].number, now)

    def close_up_to(self, last: int, now: float) -> None:
        """Make models of the closed rounds up to this one, in their order: other processes may have closed some of them."""
        with self._coordinator.leading() as rows:
            closing = [row.number for row in rows.rounds() if row.state is State.CLOSING and row.number <= last]
        for number in closing:
            if number not in self.unfinished:
                self._close(number, now)

    def finish(self, now: float) -> None:
        """Try again to close the rounds that could not be closed."""
        waiting, self.unfinished = self.unfinished, []
        for number in waiting:
            self._close(number, now)
        if not self.unfinished:
            self._go_on()

    def forget_unfinished(self) -> None:
        """Try no round again: all of them are about to end."""
        if self.unfinished:
            self.unfinished.clear()
            self._go_on()

    def destroy(self, number: int) -> None:
        """Destroy the sum of a round that was abandoned."""
        self._sums.destroy(number)
        self._destroyed.add(number)

    def _close(self, number: int, now: float) -> None:
        """Make a round's model, unless an earlier round waits for its own.

        A sum that cannot be used is given up, since trying again would give the same. If a file is missing or a disk is full,
        nothing is lost yet: the round is tried again later.
        """
        if self.unfinished:
            self.unfinished.append(number)
            return
        try:
            self._conclude(number, now)
        except (Unusable, SealError) as error:
            self._give_up(number, str(error), now)
        except ParticipantError as error:  # a sum of our own that does not read is damaged, or a defect of ours
            LOG.exception("%s: round %d gave no model", self._task, number)
            self._give_up(number, str(error), now)
        except ExperimentError as error:
            self.unfinished.append(number)
            why = f"round {number} cannot be closed yet: {error}"
            self._wait(why)
            LOG.warning("%s: %s", self._task, why)
