"""Splits: which client holds which example, for data sets without a client of each example.

    by = splits.dirichlet(labels, clients=100, alpha=0.3)
    population = Population.from_arrays(images, labels, by=by)

A split is an array: `by[i]` is the client of example i, int64 of shape `(examples,)`, with clients counted from 0. You can
inspect it, save it, or combine it with a column of the data. The same arguments give the same split on any machine.
"""

from collections.abc import Iterable

import numpy as np

from sumus.columns import array_of
from sumus.errors import ExperimentError
from sumus.rng import generator
from sumus.types import Array


def iid(examples: int, clients: int, seed: int = 0) -> Array:
    """Return a split in which each client holds a random share; sizes differ by at most one example."""
    _check(examples, clients)
    by = np.arange(examples) % clients
    return generator(seed, "split", "iid").permutation(by)


def quantity(examples: int, clients: int, alpha: float = 0.5, seed: int = 0, at_least: int = 1) -> Array:
    """Return a split into random shares of unequal size.

    The proportions are drawn from Dirichlet(α): the smaller α is, the more the sizes differ. Each client holds at least
    `at_least` examples. [Li et al. 2022, arXiv:2102.02079, section 3.3, quantity skew]
    """
    _check(examples, clients, at_least)
    rng = generator(seed, "split", "quantity")
    sizes = at_least + _whole(rng.dirichlet(_positive(alpha, clients)), examples - at_least * clients)
    return rng.permutation(np.repeat(np.arange(clients), sizes))


def dirichlet(labels: Iterable[int], clients: int, alpha: float, seed: int = 0, at_least: int = 1) -> Array:
    """Return a split with label skew: the examples of each class are divided in proportions from Dirichlet(α).

    The clients' numbers of examples differ too.

    Args:
        labels: Labels of shape `(examples,)`.
        clients: The number of clients.
        alpha: The Dirichlet parameter α: with 0.1, most clients hold only a few classes; with 100, the split is nearly IID.
        seed: The seed of the draws.
        at_least: The smallest number of examples of a client. A client with fewer gets random examples of the largest client.

    [Yurochkin et al. 2019, arXiv:1905.12022, section 4. Hsu et al. 2019, arXiv:1909.06335, draw the class proportions of
    each client instead: their α is not comparable, and the same value gives more skew.]
    """
    classes = _labels(labels)
    _check(len(classes), clients, at_least)
    rng = generator(seed, "split", "dirichlet")
    by = np.empty(len(classes), np.int64)
    for label in np.unique(classes):
        rows = rng.permutation(np.flatnonzero(classes == label))
        shares = _whole(rng.dirichlet(_positive(alpha, clients)), len(rows))
        by[rows] = np.repeat(np.arange(clients), shares)
    sizes = np.bincount(by, minlength=clients)
    for client in np.flatnonzero(sizes < at_least):
        while sizes[client] < at_least:
            largest = int(sizes.argmax())
            given = rng.choice(
                np.flatnonzero(by == largest), min(at_least - int(sizes[client]), _spare(sizes, at_least))
            )
            by[given] = client
            sizes = np.bincount(by, minlength=clients)
    return by


def shards(labels: Iterable[int], clients: int, per_client: int = 2, seed: int = 0) -> Array:
    """Return a split with pathological label skew.

    Examples are sorted by label and cut into clients · per_client shards, which are dealt to clients at random. With two shards
    per client, most clients hold two classes. [McMahan et al. 2017, arXiv:1602.05629, section 3]
    """
    classes = _labels(labels)
    _check_whole("per_client", per_client)
    if per_client < 1:
        raise ExperimentError(f"per_client={per_client}: give at least one shard per client")
    _check(len(classes), clients, per_client)
    rng = generator(seed, "split", "shards")
    shuffled = rng.permutation(len(classes))  # so the examples of a class are divided into shards at random
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    owners = rng.permutation(np.arange(clients * per_client) % clients)
    by = np.empty(len(classes), np.int64)
    for owner, rows in zip(owners, np.array_split(order, len(owners)), strict=True):
        by[rows] = owner
    return by


def _check(examples: int, clients: int, at_least: int = 1) -> None:
    for name, value in (("examples", examples), ("clients", clients), ("at_least", at_least)):
        _check_whole(name, value)
    if clients < 1 or at_least < 1:
        raise ExperimentError(f"clients={clients}, at_least={at_least}: both must be 1 or more")
    if examples < clients * at_least:
        raise ExperimentError(
            f"{examples} examples cannot be dealt to {clients} clients with {at_least} each: lower clients="
            + (" or at_least=" if at_least > 1 else "")
        )


def _check_whole(name: str, value: object) -> None:
    if not isinstance(value, int | np.integer):
        raise ExperimentError(f"{name}={value!r:.60}: it must be a whole number")


def _labels(labels: Iterable[int]) -> Array:
    try:
        classes = array_of(labels)
    except ValueError as error:
        raise ExperimentError(f"labels cannot be read: {error}") from error
    if (
        classes.dtype.kind == "f"
        and (np.abs(classes) < 2**53).all()
        and classes.ndim == 1
        and (classes == np.rint(classes)).all()
    ):
        classes = classes.astype(np.int64)
    if classes.ndim != 1 or classes.dtype.kind in "fOc":
        raise ExperimentError(
            f"labels are {classes.dtype} of shape {classes.shape}; a split by label takes one class per example, "
            "shape (examples,): for other targets use iid() or quantity(), or labels of your own"
        )
    return classes


def _positive(alpha: float, clients: int) -> Array:
    _check_alpha(alpha)
    return np.full(clients, float(alpha))


def _check_alpha(alpha: object) -> None:
    if not isinstance(alpha, int | float | np.number) or not 0 < alpha < np.inf:
        raise ExperimentError(
            f"alpha={alpha!r}: give a positive, finite number; large values give similar clients, small ones skew"
        )


def _whole(shares: Array, total: int) -> Array:
    """Round shares of a whole number to whole numbers with the same total."""
    edges = np.rint(np.cumsum(shares) * total).astype(np.int64)
    edges[-1] = total
    return np.diff(np.minimum(edges, total), prepend=0)


def _spare(sizes: Array, at_least: int) -> int:
    """Return the number of examples that the largest client can give."""
    return int(sizes.max()) - at_least
