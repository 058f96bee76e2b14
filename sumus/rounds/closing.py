"""Finishes closed rounds: makes a model of each sum, in the order of the rounds, or destroys the sum."""

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
    """No model can be made of a sum, and trying again cannot help."""


@contextmanager
def usable() -> Generator[None, None, None]:
    """Convert any exception of a plan's code into Unusable, so that the exception cannot crash the server.

    An exception that is not a SumusError is a defect of the plan or of sumus: its traceback goes into the log.
    """
    try:
        yield
    except SumusError as error:
        raise Unusable(str(error)) from error
    except Exception as error:
        LOG.exception("no model can be made of a sum: the plan's code failed")
        raise Unusable(f"the plan failed with {said(error)}") from error


class ClosedRounds:
    """The closed rounds of a run whose models do not exist yet.

    Attributes:
        unfinished: The numbers of the rounds whose sum could not be read, or whose model could not be written. They are tried
            again (`finish`), or an admin cancels them; later rounds wait for them.
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
        """Make the closed rounds of a run.

        Args:
            task: The task's name, for the log.
            coordinator: The rounds of the run.
            sums: The sums of the rounds.
            conclude: Makes the model of a round, given its number and the time.
            give_up: Called with a round's number, the reason why no model can be made of its sum, and the time.
            wait: Called with a sentence that says why a round cannot be closed yet.
            go_on: Called when no round waits to be closed any more.
        """
        self.unfinished: list[int] = []
        self._task, self._coordinator, self._sums = task, coordinator, sums
        self._conclude, self._give_up, self._wait, self._go_on = conclude, give_up, wait, go_on
        self._destroyed: set[int] = set()

    def restart(self) -> None:
        """Forget all rounds, as in a new process."""
        self.unfinished.clear()
        self._destroyed.clear()

    def take_up(self, now: float) -> None:
        """Carry out the decisions about sums that other processes have made."""
        with self._coordinator.leading() as rows:
            rounds = rows.rounds()
        self._destroyed &= {row.number for row in rounds}
        for row in rounds:
            if row.state is State.ABANDONED and row.number not in self._destroyed:
                self.destroy(row.number)
        self.close_up_to(rounds[-1].number, now)

    def close_up_to(self, last: int, now: float) -> None:
        """Make the models of all closed rounds up to number `last`, in order, including rounds that other processes have
        closed.
        """
        with self._coordinator.leading() as rows:
            closing = [row.number for row in rows.rounds() if row.state is State.CLOSING and row.number <= last]
        for number in closing:
            if number not in self.unfinished:
                self._close(number, now)

    def finish(self, now: float) -> None:
        """Try again to close the unfinished rounds."""
        waiting, self.unfinished = self.unfinished, []
        for number in waiting:
            self._close(number, now)
        if not self.unfinished:
            self._go_on()

    def forget_unfinished(self) -> None:
        """Forget the unfinished rounds, since all of them are about to end."""
        if self.unfinished:
            self.unfinished.clear()
            self._go_on()

    def destroy(self, number: int) -> None:
        """Destroy the sum of a round that was abandoned."""
        self._sums.destroy(number)
        self._destroyed.add(number)

    def _close(self, number: int, now: float) -> None:
        """Make a round's model, unless the model of an earlier round is missing.

        An unusable sum is given up, since a second attempt would fail in the same way. If a file is missing or a disk is full,
        nothing is lost yet: the round is tried again later.
        """
        if self.unfinished:
            self.unfinished.append(number)
            return
        try:
            self._conclude(number, now)
        except (Unusable, SealError) as error:
            self._give_up(number, str(error), now)
        except (
            ParticipantError
        ) as error:  # a sum that this server wrote cannot be read: it is damaged, or sumus has a defect
            LOG.exception("%s: round %d gave no model", self._task, number)
            self._give_up(number, str(error), now)
        except ExperimentError as error:
            self.unfinished.append(number)
            why = f"round {number} cannot be closed yet: {error}"
            self._wait(why)
            LOG.warning("%s: %s", self._task, why)
