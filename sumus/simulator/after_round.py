"""A user function that is called after each round, for example to log, to save or to end the run.

    def after_round(outcome):
        print(outcome.round, outcome.metrics)
        if outcome.metrics.get("accuracy", 0.0) > 0.9:
            return "stop"

The function is called when the round has ended and its result is stored. Nothing that the function does can lose the round or
change the numbers of later rounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from sumus.errors import ExperimentError, UsageError, own_code
from sumus.metrics import Spread
from sumus.simulator.records import RoundRecord, figures_of
from sumus.training.apart import TorchApart


@dataclass(frozen=True)
class RoundOutcome:
    """The outcome of a round.

    Attributes:
        record: The round's record.
        is_best: Whether the round's model is the best so far, by `Evaluation(best=)`.
        round: The round's number; 0 for the measurement before the first round.
        metrics: The measured values, by name.
        spreads: The spread over clients, by source and name.
        figures: Every number of the record that an experiment tracker plots, by name, such as `unseen/accuracy.median`. NaN
            values (such as the loss of a round without reports) are left out.
        model: A state dict that loads into the task's model. Each access returns a new copy, which you may change.
    """

    record: RoundRecord
    is_best: bool = False
    _model: Callable[[], Mapping[str, Any]] = field(default=dict, repr=False)

    @property
    def round(self) -> int:
        """The round's number, counted from 1; 0 for the measurement before the first round."""
        return self.record.round

    @property
    def metrics(self) -> Mapping[str, float]:
        """The measured values; empty if the round was not evaluated."""
        return MappingProxyType(dict(self.record.metrics))

    @property
    def spreads(self) -> Mapping[str, Mapping[str, Spread]]:
        """The spread over clients, by source and metric."""
        return MappingProxyType(dict(self.record.evaluation.spreads))

    @property
    def figures(self) -> Mapping[str, float]:
        """The numbers of the record by name, for an experiment tracker."""
        return figures_of(self.record)

    @property
    def model(self) -> Mapping[str, Any]:
        """The published model."""
        return self._model()


AfterRound: TypeAlias = Callable[[RoundOutcome], Literal["stop"] | None]


class RoundListener:
    """Calls the user's function.

    The function may draw random numbers from torch or change torch's settings. Neither affects training.
    """

    def __init__(self, function: AfterRound | None) -> None:
        if function is not None and not callable(function):
            raise ExperimentError(
                f"after_round={function!r:.80}: give a function that takes a RoundOutcome and returns 'stop' or None"
            )
        self._function = function
        self._torch = TorchApart()

    def wants_to_stop(self, outcome: RoundOutcome) -> bool:
        """Call the user's function for a round.

        Raises:
            UsageError: The function raised an error, or returned anything other than "stop" or None.
        """
        if self._function is None:
            return False
        with self._torch.entered(), own_code("after_round", f"round {outcome.round}", "the round itself is kept"):
            answer: object = self._function(outcome)
        if answer is not None and answer != "stop":
            raise UsageError(
                f"after_round returned {answer!r:.80} after round {outcome.round}: return 'stop' to end the run, or None to "
                "continue"
            )
        return answer == "stop"
