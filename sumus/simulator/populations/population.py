"""Populations: client id → examples, read only when a client is picked."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sumus.columns import array_of, ids_of, numbers_of, stacked
from sumus.errors import DataError, ExperimentError, SumusError
from sumus.experiment import Examples, expect_population
from sumus.plotting import colormap, figure, save
from sumus.simulator.populations.participation import Participation, PerClient
from sumus.text import whole_number
from sumus.types import Array

if TYPE_CHECKING:
    from sumus.executors.executor import Trained


class Population(Mapping[Any, Examples]):
    """Clients by id. The examples of a client are loaded only when the client is picked, so a million clients cost nothing.

        Population(range(1_000_000), load=lambda client: read(client))

    Args:
        ids: The clients' ids, which must be different, also when they are written as text: `1` and `"1"` are the same client.
        load: Function from an id to the client's examples. It is called whenever a picked client is not in the cache.
    """

    attackers: frozenset[Any] = frozenset()
    """The dishonest clients: none in a plain population (see `sumus.attacks`)."""
    participation = Participation()
    """When each client takes part, and its weight: the same for all, unless set by `in_passes`, `joining` or `weighed`."""
    _by_text: dict[str, Any] | None = None

    def __init__(self, ids: Iterable[Any], load: Callable[[Any], Examples]) -> None:
        self._ids: Sequence[Any] = ids if isinstance(ids, range) else list(ids)
        self._load = load
        self._known: frozenset[Any] | range
        if isinstance(ids, range):
            self._known = ids
            return
        texts = [_text_of(client) for client in self._ids]
        try:
            self._known = frozenset(self._ids)
        except TypeError as error:
            raise ExperimentError(
                f"ids hold a value that cannot be hashed ({error}): give numbers or strings"
            ) from error
        if min(len(set(texts)), len(self._known)) < len(self._ids):
            seen: set[Any] = set()
            twice = next(c for c in self._ids if {c, str(c)} & seen or seen.update({c, str(c)}))
            raise ExperimentError(f"client id {twice!r} appears twice: give each client an id of its own")

    @staticmethod
    def from_arrays(inputs: Any, targets: Any, by: Any) -> "Population":
        """Split arrays by a key: `by[i]` is the client of example i. A client's examples keep their order.

        Args:
            inputs: The inputs, one row per example.
            targets: The targets, one row per example.
            by: The client of each example.
        """
        inputs, targets = _column("inputs", inputs), _column("targets", targets)
        if len(inputs) != len(targets):
            raise ExperimentError(
                f"there are {len(inputs)} inputs and {len(targets)} targets: give one target per input"
            )
        rows = _rows_by_client(by, len(inputs))
        return Population(list(rows), lambda client: (inputs[rows[client]], targets[rows[client]]))

    @staticmethod
    def from_dataset(dataset: Any, by: Any) -> "Population":
        """Split a torch `Dataset` of (input, target) pairs by a key; items are read when their client is picked.

        Args:
            dataset: The data set.
            by: `by[i]` is the client of item i: for example a column, or one of `sumus.splits`.
        """
        if not hasattr(dataset, "__len__"):
            raise ExperimentError(f"a {type(dataset).__name__} has no length: give a data set that is read by index")
        rows = _rows_by_client(by, len(dataset))
        return Population(list(rows), lambda client: _Items(dataset, rows[client]))

    @staticmethod
    def from_hugging_face(dataset: Any, inputs: str | Sequence[str], targets: str, by: Any) -> "Population":
        """Split a `datasets.Dataset` by a key; rows are read when their client is picked.

        Args:
            dataset: The data set.
            inputs: The name of a column, or of several columns of numbers, which are stacked along a new last axis.
            targets: The name of a column.
            by: The name of the column that holds each row's client; or a sequence with the client of each row.
        """
        if isinstance(dataset, Mapping):
            raise ExperimentError(
                f"this is a dict of data sets ({', '.join(map(str, cast(Mapping[str, Any], dataset)))}): choose one, such as "
                "dataset['train']"
            )
        if not hasattr(dataset, "__len__"):
            raise ExperimentError(
                f"a streamed data set ({type(dataset).__name__}) has no length, and its rows have no numbers: load it without "
                "streaming=True, or give sumus.Population(ids, load)"
            )
        columns = [inputs] if isinstance(inputs, str) else list(inputs)
        if not columns:
            raise ExperimentError("inputs= names no column: give one, or several")
        known = list(getattr(dataset, "column_names", []))
        wanted = [*columns, targets, *([by] if isinstance(by, str) else [])]
        if unknown := [name for name in wanted if name not in known]:
            raise ExperimentError(f"the data set has no column {unknown[0]!r}; it has {', '.join(map(str, known))}")
        rows = _rows_by_client(list(dataset.with_format(None)[by]) if isinstance(by, str) else by, len(dataset))
        read = dataset.select_columns(list(dict.fromkeys([*columns, targets]))).with_format(None)

        def load(client: Any) -> Examples:
            found = read[rows[client].tolist()]
            held = {name: _read(client, name, found[name]) for name in dict.fromkeys((*columns, targets))}
            if isinstance(inputs, str):
                return held[inputs], held[targets]
            try:
                return stacked([held[name] for name in columns], -1, [f"column {name!r}" for name in columns]), held[
                    targets
                ]
            except ValueError as error:
                raise DataError(client, f"its columns cannot be stacked: {error}") from error

        return Population(list(rows), load)

    @staticmethod
    def from_pairs(pairs: Iterable[tuple[Any, Examples]]) -> "Population":
        """Create a population from (id, examples) pairs; a repeated id is refused."""
        try:
            pairs = [(client, examples) for client, examples in pairs]
            examples = dict(pairs)
        except (TypeError, ValueError) as error:
            raise ExperimentError(f"from_pairs takes (id, examples) pairs with hashable ids: {error}") from error
        return Population([client for client, _ in pairs], examples.__getitem__)

    def subset(self, clients: Iterable[Any]) -> "Population":
        """Return a population of only these clients."""
        return self._only(self._all_known(clients))

    def without(self, clients: Iterable[Any]) -> "Population":
        """Return a population without these clients."""
        gone = set(self._all_known(clients))
        return self._only([client for client in self if client not in gone])

    def in_passes(self) -> "Population":
        """Return the same clients, drawn in passes: all take part once before any takes part again. Each pass is shuffled.

        A client that is drawn and does not finish has had its turn. A client that cannot come keeps its turn in the pass.
        """
        return self._taking_part(replace(self.participation, in_passes=True))

    def joining(self, since: PerClient) -> "Population":
        """Return the same clients, some of which take part only from a later round on.

        Args:
            since: The first round of each client, counted from 1: a mapping by id, in which clients that take part from the
                start can be left out; or a function of the id.
        """
        return self._taking_part(replace(self.participation, joins=_per_client("joining", since)))

    def weighed(self, weights: PerClient) -> "Population":
        """Return the same clients with your own weights instead of their numbers of examples, for simulations only.

        Args:
            weights: The weight of each client, a whole number from 1: a mapping that names every client, or a function of the id.
        """
        return self._taking_part(replace(self.participation, weights=_per_client("weighed", weights)))

    def _taking_part(self, participation: Participation) -> "Population":
        participation.check_known(self.__contains__)
        changed = copy.copy(self)
        changed.participation = participation
        return changed

    def _only(self, clients: list[Any]) -> "Population":
        some = Population(clients, self.__getitem__)
        some.participation = self.participation.of(frozenset(clients))
        return some

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
        except SumusError:
            raise
        except Exception as error:
            raise DataError(client, f"loading its examples failed: {type(error).__name__}: {error}") from error

    def __contains__(self, client: object) -> bool:
        return client in self._known

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def plot(self, path: str | Path, clients: int = 40) -> Path:
        """Draw a bar for each of the first `clients` clients, coloured by class (needs matplotlib).

        Classes are shown if targets are whole numbers with at most twenty different values; otherwise only sizes are shown. The
        method reads the examples of these clients.
        """
        shown = [self.pick(index) for index in range(min(clients, len(self)))]
        held = [_targets_of(client, self[client]) for client in shown]
        kinds = np.unique(np.concatenate([np.ravel(targets) for targets in held]))
        by_class = all(targets.ndim == 1 and targets.dtype.kind in "iub" for targets in held) and len(kinds) <= 20
        picture = figure(8.0, max(1.2 + 0.2 * len(shown), 1.2 + 0.22 * len(kinds) * by_class))
        axis = picture.subplots()
        before = np.zeros(len(shown))
        colours = colormap("tab20" if len(kinds) > 10 else "tab10", max(1, len(kinds)))
        for number, kind in enumerate(kinds if by_class else [None]):
            counts = np.array([len(targets) if kind is None else int((targets == kind).sum()) for targets in held])
            axis.barh(range(len(shown)), counts, left=before, color=colours[number], label=str(kind))
            before += counts
        axis.set_yticks(range(len(shown)), [str(client)[:16] for client in shown], fontsize=7)
        axis.margins(x=0.02, y=0.01)
        axis.invert_yaxis()
        axis.set(
            xlabel="examples",
            ylabel="client",
            title=f"{len(shown)} of {len(self)} clients" if len(shown) < len(self) else "",
        )
        if by_class:
            axis.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        return save(picture, path)

    @property
    def described(self) -> str:
        """The values of a population that must be equal to continue a run, as text."""
        return f"{len(self)} clients{self.participation.described}"

    @property
    def ids(self) -> Sequence[Any]:
        """The ids of all clients, in order."""
        return self._ids

    def in_order(self, clients: Iterable[Any]) -> list[Any]:
        """Return these clients in the order of the population."""
        if isinstance(self._ids, range):
            return sorted(clients, key=self._ids.index)
        chosen = set(clients)
        return [client for client in self._ids if client in chosen]

    def sent(self, results: "Iterator[Trained]") -> "Iterator[Trained]":
        """Yield the reports that clients send. Honest clients send their results unchanged; attackers are in `sumus.attacks`."""
        return results

    def key_of(self, text: str) -> Any:
        """Return the id that, written as text, equals this text; the text itself if there is no such id."""
        if isinstance(self._ids, range):
            number = whole_number(text.removeprefix("-"))
            signed = number if number is None or not text.startswith("-") else -number
            return signed if signed is not None and signed in self._ids else text
        if self._by_text is None:
            self._by_text = {str(client): client for client in self._ids}
        return self._by_text.get(text, text)

    def pick(self, index: int) -> Any:
        """Return the id at a position."""
        return self._ids[index]


def _per_client(what: str, given: Any) -> Any:
    """Check that `given` is a mapping or a function, and return it; a mapping is copied to a dict."""
    if not isinstance(given, Mapping) and not callable(given):
        raise ExperimentError(
            f"{what}({given!r:.80}): give a mapping from a client's id to a number, or a function of the id"
        )
    return dict(cast(Mapping[Any, int], given)) if isinstance(given, Mapping) else given


def _text_of(client: Any) -> str:
    """Return a client's id as text, for keys and file names."""
    text = str(client)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ExperimentError(f"client id {client!a} cannot be encoded as UTF-8: give the client another id") from None
    return text


class _Items:
    """Some items of a data set, as a data set."""

    def __init__(self, dataset: Any, rows: Array) -> None:
        self._dataset = dataset
        self._rows: list[int] = rows.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]


def _rows_by_client(by: Any, examples: int) -> dict[Any, Array]:
    """Return the row numbers of each client in ascending order; clients are sorted."""
    if not examples:
        raise ExperimentError("there are no examples: a population needs at least one")
    try:
        ids = ids_of(by)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    shape = ids.shape if isinstance(ids, np.ndarray) else (len(ids),)
    if shape != (examples,):
        raise ExperimentError(f"by= has shape {shape} for {examples} examples: give one client per example")
    if isinstance(ids, np.ndarray):
        order = np.argsort(ids, kind="stable")
        names, starts = np.unique(ids[order], return_index=True)
        return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    rows: dict[Any, list[int]] = {}
    try:
        for row, client in enumerate(ids):
            rows.setdefault(client, []).append(row)
        return {client: np.array(rows[client]) for client in sorted(rows)}
    except TypeError as error:
        raise ExperimentError(f"by= holds values that cannot be compared ({error}): give ids of one type") from error


def _column(name: str, values: Any) -> Any:
    """Return a column as an array; arrays and tensors stay as they are."""
    is_array = hasattr(values, "dtype") and not hasattr(values, "iloc")
    try:
        column = values if is_array else array_of(values)
    except ValueError as error:
        raise ExperimentError(f"{name} cannot be read: {error}") from error
    if not getattr(column, "ndim", 1):
        raise ExperimentError(f"{name}= is a {type(column.item()).__name__}: give an array with one row per example")
    return column


def _read(client: Any, name: str, values: Sequence[Any]) -> Array:
    """Read a client's values of one column of a data set."""
    try:
        column = array_of(values)
        if column.dtype.kind == "O":
            numbers_of(column)  # its error names the first row that is not a number
        return column
    except ValueError as error:
        raise DataError(client, f"its column {name!r} cannot be read: {error}") from error


def _targets_of(client: Any, examples: Examples) -> Array:
    from sumus.training.examples import as_pair  # imports torch

    return array_of(as_pair(client, examples)[1])


def as_population(population: Mapping[Any, Examples]) -> Population:
    """Return a population from any mapping."""
    if isinstance(population, Population):
        return population
    expect_population(population)
    return Population(list(population), population.__getitem__)


def sample(population: Population, count: int, rng: np.random.Generator, among: Array | None = None) -> list[Any]:
    """Draw `count` different clients uniformly, in random order.

    Args:
        population: The clients.
        count: The number of clients to draw.
        rng: The generator of the draw.
        among: The positions to draw from; None for all.
    """
    picked: Array = rng.choice(len(population) if among is None else among, size=count, replace=False)
    return [population.pick(int(index)) for index in picked]
