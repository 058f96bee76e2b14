"""Populations: client id → examples, read only when a client is picked."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sumus.errors import DataError, ExperimentError
from sumus.experiment import Examples
from sumus.types import Array


class Population(Mapping[Any, Examples]):
    """Clients by id, loaded one at a time: a million of them cost nothing until they are picked.

        Population(range(1_000_000), load=lambda client: read(client))

    ids: without repeats (also as text: `1` and `"1"` are one client).
    load: id → examples; called again whenever the client is picked and no longer in the cache.
    """

    def __init__(self, ids: Iterable[Any], load: Callable[[Any], Examples]) -> None:
        self._ids: Sequence[Any] = ids if isinstance(ids, range) else list(ids)
        self._load = load
        self._known: frozenset[Any] | range
        if isinstance(ids, range):
            self._known = ids
            return
        texts = [str(client) for client in self._ids]
        self._known = frozenset(self._ids)
        if min(len(set(texts)), len(self._known)) < len(self._ids):
            seen: set[Any] = set()
            twice = next(c for c in self._ids if {c, str(c)} & seen or seen.update({c, str(c)}))
            raise ExperimentError(f"client id {twice!r} is given twice: every client needs an id of its own")

    @staticmethod
    def from_arrays(inputs: Any, targets: Any, by: Any) -> "Population":
        """Split arrays by a key: `by[i]` is the client of example i. A client's examples keep their order.

        inputs, targets, by: one row an example, equally many.
        """
        inputs, targets = (
            column if hasattr(column, "dtype") and not hasattr(column, "iloc") else np.asarray(column)
            for column in (inputs, targets)
        )
        keys = np.asarray(by)
        if not len(inputs) == len(targets) == len(keys):
            raise ExperimentError(
                f"inputs, targets and by have {len(inputs)}, {len(targets)} and {len(keys)} rows; they must be equally many"
            )
        order = np.argsort(keys, kind="stable")
        names, starts = np.unique(keys[order], return_index=True)
        rows = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
        return Population(list(rows), lambda client: (inputs[rows[client]], targets[rows[client]]))

    @staticmethod
    def from_pairs(pairs: Iterable[tuple[Any, Examples]]) -> "Population":
        """From (id, examples) pairs; a repeated id is refused."""
        pairs = list(pairs)
        examples = dict(pairs)
        return Population([client for client, _ in pairs], examples.__getitem__)

    def subset(self, clients: Iterable[Any]) -> "Population":
        """The same clients, only these."""
        return Population(self._all_known(clients), self._load)

    def without(self, clients: Iterable[Any]) -> "Population":
        """The same clients, but these."""
        gone = set(self._all_known(clients))
        return Population([client for client in self if client not in gone], self._load)

    def _all_known(self, clients: Iterable[Any]) -> list[Any]:
        chosen = list(clients)
        unknown = [client for client in chosen if client not in self]
        if unknown:
            raise ExperimentError(f"no client {unknown[0]!r} in this population of {len(self)}")
        return chosen

    def __getitem__(self, client: Any) -> Examples:
        if client not in self._known:
            raise KeyError(client)
        try:
            return self._load(client)
        except Exception as error:
            raise DataError(client, f"loading its examples failed: {type(error).__name__}: {error}") from error

    def __contains__(self, client: object) -> bool:
        return client in self._known

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def pick(self, index: int) -> Any:
        """The id at a position."""
        return self._ids[index]


def as_population(population: Mapping[Any, Examples]) -> Population:
    """A population from any mapping."""
    if isinstance(population, Population):
        return population
    return Population(list(population), population.__getitem__)


def sample(population: Population, count: int, rng: np.random.Generator) -> list[Any]:
    """`count` different clients, uniformly; the order is part of the draw. Costs O(count), not O(population)."""
    picked: Array = rng.choice(len(population), size=count, replace=False)
    return [population.pick(int(index)) for index in picked]
