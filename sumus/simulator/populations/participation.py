"""Participation: which clients of a population take part, in which order, from which round on, and with what weight.

people.in_passes()                       all clients take part once (a pass) before any takes part again; each pass is shuffled
people.joining({"eve": 5})               Eve takes part from round 5 on
people.weighed({"ada": 3, "bob": 1})     whole numbers as weights, instead of the numbers of examples
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from sumus.errors import ExperimentError, UsageError, at_client, own_code
from sumus.experiment import Experiment
from sumus.rng import generator
from sumus.spec import canonical_json
from sumus.types import Array, plain_number

PerClient = Mapping[Any, int] | Callable[[Any], int]
"""A whole number for each client: by id, or as a function of the id."""
FIRST_ROUND = 1


@dataclass(frozen=True)
class Participation:
    """The participation of clients: order, first round and weight.

    Attributes:
        in_passes: Whether every client is drawn once before any client is drawn again.
        joins: The first round, counted from 1, of each client; 1 for clients that a mapping does not name.
        weights: The weight of each client; None for its number of examples.
    """

    in_passes: bool = False
    joins: PerClient | None = None
    weights: PerClient | None = None

    def joined(self, clients: Sequence[Any]) -> Array | None:
        """Return the first round of each client, int64 `(clients,)`, from 1; None if all take part from the start."""
        if self.joins is None:
            return None
        return np.array([self._number("joining", self.joins, client, FIRST_ROUND) for client in clients], np.int64)

    def weight_of(self, client: Any, examples: int, most: int) -> int:
        """Return a client's weight in the sum: that of `weights` if they are given, else its number of examples.

        Args:
            client: The client's id.
            examples: The number of its examples.
            most: The largest weight that the plan allows.
        """
        if self.weights is None:
            return examples
        weight = self._number("weighed", self.weights, client, None)
        if weight > most:
            raise UsageError(
                f"client {client!r} has a weight of {weight}, and the plan allows at most {most}: give smaller weights, or "
                "raise cap= of the algorithm"
            )
        return weight

    def check_known(self, known: Callable[[Any], bool]) -> None:
        """Refuse clients that are not in the population."""
        for what, given in (("joining", self.joins), ("weighed", self.weights)):
            for client in by_id(given) or ():
                if not known(client):
                    raise ExperimentError(f"{what}() names client {client!r}, who is not in the population")

    def of(self, clients: frozenset[Any]) -> "Participation":
        """Return the participation of some of the clients."""

        def among(given: PerClient | None) -> PerClient | None:
            named = by_id(given)
            return given if named is None else {client: n for client, n in named.items() if client in clients}

        return replace(self, joins=among(self.joins), weights=among(self.weights))

    @property
    def described(self) -> str:
        """The values that must be equal to continue a run, as text; functions are not compared."""
        if self == Participation():
            return ""
        said = [_described("joining", self.joins), _described("weighed", self.weights)]
        return "".join(f", {word}" for word in ["in passes"] * self.in_passes + [word for word in said if word])

    @staticmethod
    def _number(what: str, given: PerClient, client: Any, otherwise: int | None) -> int:
        with at_client(client):
            number: object
            if (named := by_id(given)) is not None:
                number = named.get(client, otherwise)
            else:
                assert callable(given)
                with own_code("the function", f"{what}()", "it must return a whole number from 1 for every client"):
                    number = given(client)
            number = plain_number(number)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                missing = ": this client is not named, and every client needs a weight" if number is None else ""
                raise UsageError(
                    f"{what}() gives {number!r:.80}{missing}; give a whole number from 1 (to weigh by shares, give hundredths; "
                    "to leave a client out, take population.without([...]))"
                )
        return number


class Passes:
    """The order of draws without replacement: each pass shuffles all clients that have joined when it begins."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._begun = 0
        self._left: Array = np.zeros(0, np.int64)

    def draw(self, wanted: int, present: Array, may_come: Callable[[Array], Array]) -> list[int]:
        """Draw clients that may come now. The others keep their turn in the pass; the next pass begins when all were drawn.

        Args:
            wanted: The largest number to draw.
            present: Positions of all clients that have joined, int64.
            may_come: Function from positions to booleans: whether each client may be given work now.
        """
        drawn: list[int] = []
        for _ in range(2):  # the rest of this pass, then the next one; a third would repeat clients
            if not len(self._left):
                self._begun += 1
                self._left = generator(self._seed, "pass", self._begun).permutation(present)
            drawn += self._taken(wanted - len(drawn), drawn, may_come)
            if len(self._left) or len(drawn) == wanted:
                break
        return drawn

    def _taken(self, wanted: int, drawn: list[int], may_come: Callable[[Array], Array]) -> list[int]:
        """Return the first `wanted` clients of this pass that may come and are not drawn yet.

        The pass is searched section by section, since a million clients may be left in it.
        """
        places: list[int] = []
        for start in range(0, len(self._left), size := max(64, 4 * wanted)):
            some = self._left[start : start + size]
            free = np.flatnonzero(may_come(some) & ~np.isin(some, drawn))[: wanted - len(places)]
            places += (start + free).tolist()
            if len(places) == wanted:
                break
        taken = self._left[places].tolist()
        self._left = np.delete(self._left, places)
        return taken


def joined_of(who: Participation, clients: Sequence[Any], experiment: Experiment) -> Array | None:
    """Return the first round of each client (`Participation.joined`).

    Args:
        who: The participation of the clients.
        clients: The ids of all clients of the population, in order.
        experiment: The experiment in which they take part.

    Raises:
        ExperimentError: The experiment does not support this participation.
    """
    plan, fleet = experiment.plan, experiment.fleet
    if (who.in_passes or who.joins is not None) and not fleet.waits:
        raise ExperimentError(
            "in_passes() and joining() choose the clients, but with Fleet(waits=False) devices come by themselves: leave one "
            "of them out"
        )
    if who.weights is not None and all(part.weight != "examples" for part in plan.algorithm.aggregator.parts):
        raise ExperimentError(
            f"{plan.algorithm.aggregator!r} weighs all clients alike, so that weighed() would have no effect: leave it out, "
            "or weigh by examples"
        )
    if (named := by_id(who.weights)) is not None and len(named) < len(clients):
        missing = next(client for client in clients if client not in named)
        raise ExperimentError(f"weighed() does not name client {missing!r}: give every client a weight")
    joined = who.joined(clients)
    there = len(present_at(joined, 0, len(clients)))
    if there < plan.pacing.cohort:
        raise ExperimentError(
            f"a cohort of {plan.pacing.cohort} is larger than the {there} clients that take part in round 1: lower "
            "Pacing(cohort=), or let more of them join in round 1"
        )
    return joined


def present_at(joined: Array | None, number: int, clients: int) -> Array:
    """Return the positions of the clients that have joined by a round, counted from 0; int64."""
    return np.arange(clients) if joined is None else np.flatnonzero(joined <= number + FIRST_ROUND)


def by_id(given: PerClient | None) -> Mapping[Any, int] | None:
    """Return numbers by client id; None for a function or None."""
    return cast(Mapping[Any, int], given) if isinstance(given, Mapping) else None


def _described(what: str, given: PerClient | None) -> str:
    if given is None:
        return ""
    if (named := by_id(given)) is None:
        return f"{what} by a function"
    items = sorted([str(client), int(number)] for client, number in named.items())
    return f"{what} {hashlib.sha256(canonical_json(items).encode()).hexdigest()[:12]}"
